"""Tensors in a file, read without running anything that the file says.

What is unusual: files are mapped, not read. A tensor costs memory when it is used, so a checkpoint's optimiser and the
weights that nobody asks for cost none. Pickles are read by `stand_ins`, which makes plain values and descriptions of
tensors, and no object of any other class. Where a file's only other classes are rare kinds of tensors, torch's
weights-only reader reads it. There is no third way.
"""

import contextlib
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, open_ordinary, read_json, why_not
from ibqlab.pretrained.containers import CheckpointError, MakeTensors, check_tensors, find_weights, unwrap_names
from ibqlab.pretrained.mapped_storages import DamagedStorage, InertContent, archive_pickle, read_inert
from ibqlab.pretrained.stand_ins import MalformedPickle, StandIn
from ibqlab.quantizers import available_quantizers
from ibqlab.runs.finding import WEIGHT_FILES, hint, locate

SAFETENSORS = "safetensors file"
ZIP_MAGIC = b"PK"
PICKLE_MAGIC = b"\x80"
NUMBER_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that weights may have."""
TORCHS_OWN = {
    "storage of an unknown kind",
    *(f"torch._utils._rebuild_{kind}" for kind in ("tensor_v3", "qtensor", "sparse_tensor", "meta_tensor_no_storage")),
    *(f"torch.{kind}Storage" for kind in ("ComplexDouble", "ComplexFloat", "QInt8", "QInt32", "QUInt8")),
    *("torch.storage.UntypedStorage", "torch.serialization._get_layout", "torch.device"),
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype | torch.qscheme)),
}
"""Names of tensors that our reader does not make, for which torch's is asked. Making them costs no memory. Of the other
names that torch's reader takes, bytearray writes memory of any length that a file claims, and set and Counter hash what
they are given, which ends the process where that is nested deeply."""
ARCHIVE_PICKLE_BYTES = 256 * 2**20
"""Largest table of contents of an archive; that of a generator of 10⁹ weights has 200 kB."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """Tensors of one file under the file's own names."""

    path: Path
    """Where they lie."""
    format: str
    """Kind of file, in words."""
    tensors: Mapping[str, Tensor]
    """Mapped tensors by the file's keys; good as long as the file is not changed in place."""
    averages: Mapping[str, Tensor] = field(default_factory=dict)
    """Averaged weights by the same keys, where the file has a second state dict for them; {} where it has none.
    Averages within `tensors` (model_ema.…) are not among them."""
    holder: str = ""
    """Entries that lead to `tensors`, such as "model" or "model/state_dict"; "" where the file is the state dict. Ends
    in one of AVERAGES where averaged weights are all that the file has."""
    entries: tuple[str, ...] = ()
    """What the file holds beside them, such as optimizer_states."""
    stand_ins: tuple[str, ...] = ()
    """Classes of objects beside the tensors that were not made, such as argparse.Namespace; sorted."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Text in the file's header; safetensors only."""
    wrappers: tuple[str, ...] = ()
    """What was taken off to get at the tensors and their names, in words."""
    quantizer: str | None = None
    """The quantizer that an export under published names tells."""
    lightning: str = ""
    """Version of the Lightning that wrote the file; "" where it tells none."""


def existing_path(name: str | Path, advice: str = "") -> Path:
    """The path of a file or folder that exists. It is named by a path, in which ~ is the home folder, or as a run.

    Args:
        name: of a file or folder.
        advice: the end of the message where nothing is there.
    Raises:
        FileNotFoundError: nothing is there; the message gives the nearest name.
        UnreadableFile: nothing can be told about it: a name too long, a loop of links, no permission.
    """
    path = locate(name)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{for_terminal(path)}: there is no such file or run folder, and {hint(name)}{advice}"
        ) from None
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"{for_terminal(path, 120)}: {why_not(error)}") from None
    return path


def open_tensor_file(path: Path) -> TensorFile:
    """The tensors of a checkpoint file of any known kind.

    Args:
        path: an existing file.
    Raises:
        CheckpointError: no checkpoint, cut short, one whose weights are objects of a class that is not made, or with
            tensors that are no plain ones.
        UnreadableFile: no ordinary file, or one that may not be read.
    """
    kind = file_kind(path)
    if kind == SAFETENSORS:
        return _open_safetensors(path)
    content, make_tensors, stand_ins = load_content(path, kind)
    if isinstance(content, StandIn):
        raise CheckpointError(
            f"{path}: must hold a state dict; got an object of {for_terminal(content)}, which is not made here. Save "
            "model.state_dict()."
        )
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a state dict; got {_article(content)}. Save model.state_dict().")
    if isinstance(content.get("state"), dict) and "step" in content:
        raise CheckpointError(
            f"{path} is one step of a run, without its settings; give the run's folder, {path.absolute().parents[1]}"
        )
    try:
        weights = find_weights(path, content, make_tensors)
    except (DamagedStorage, MalformedPickle) as error:
        raise CheckpointError(f"{path}: cut short or damaged, {error}; copy or download it again") from None
    header, lightning = content.get("ibqlab"), content.get("pytorch-lightning_version")
    wrappers = weights.wrappers
    if weights.holder not in ("", "state_dict"):
        wrappers = (f"entry {weights.holder!r}", *wrappers)
    return TensorFile(
        path=path,
        format="Lightning checkpoint" if "pytorch-lightning_version" in content else "state dict",
        tensors=weights.tensors,
        averages=weights.averages,
        holder=weights.holder,
        entries=weights.entries,
        stand_ins=stand_ins,
        wrappers=wrappers,
        quantizer=_stored_quantizer(path, header) if isinstance(header, dict) else None,
        lightning=lightning if isinstance(lightning, str) and re.match(r"[0-9]{1,4}\.", lightning) else "",
    )


def _stored_quantizer(path: Path, header: Mapping[Any, Any]) -> str | None:
    """The quantizer that an export under published names tells. CheckpointError for one that is not known here."""
    quantizer = header.get("quantizer")
    if quantizer is not None and quantizer not in available_quantizers():
        name = quantizer if isinstance(quantizer, str) else type(quantizer).__name__
        raise CheckpointError(
            f"{path}: its header names the quantizer {for_terminal(name, 80)!r}, and none of that name is known here; "
            "give the plugin that registers it (--plugin FILE.py)"
        )
    return quantizer


def settings_beside(path: Path) -> dict[str, Any]:
    """The config.json in a published folder, given its file of weights; {} beside any other file.

    Raises:
        CheckpointError: it is damaged.
    """
    file = path.parent / "config.json"
    if path.name not in WEIGHT_FILES or not file.is_file():
        return {}
    try:
        return read_json(file)
    except UnreadableFile as error:
        raise CheckpointError(f"{file}: {error}; copy or download the folder again") from None


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote, tensors mapped; nothing in the file is executed, and classes are refused.

    Files of torch before 1.6 cannot be mapped by torch and are read whole.

    Raises:
        CheckpointError: no such file format, cut short, or holding classes beyond tensors, numbers and text.
    """
    kind = file_kind(path)
    inert = _read_inert(path, kind)
    if inert.has_nested_keys or not TORCHS_OWN.issuperset(inert.names):
        raise _refused(path, inert.names or ("keys that contain other objects",))
    return _load_by_torch(path, kind)


def load_content(path: Path, kind: bytes) -> tuple[Any, MakeTensors, tuple[str, ...]]:
    """What `torch.save` wrote, with stand-ins for objects that are no tensors and no plain values; nothing is run.

    Args:
        kind: from `file_kind`.
    Returns:
        The content; what makes its tensors of their descriptions; and the classes that were stood in for.
    Raises:
        CheckpointError: no such file format, cut short, or more work than any checkpoint asks for.
    """
    inert = _read_inert(path, kind)
    # torch's reader hashes keys, which ends the process if they are nested deeply; it makes storages of old files as
    # long as tensors claim; and it takes a file for what its name says.
    is_safe = not (inert.has_nested_keys or kind == PICKLE_MAGIC or path.name.endswith(".safetensors"))
    if is_safe and inert.names and TORCHS_OWN.issuperset(inert.names):
        with contextlib.suppress(CheckpointError):
            return _load_by_torch(path, kind), dict, ()
    return inert.content, inert.make_tensors, inert.names


def _read_inert(path: Path, kind: bytes) -> InertContent:
    """A file's content, nothing of which was made but plain values; errors are those of `load_content`."""
    try:
        with archive_pickle(path) if kind == ZIP_MAGIC else open_ordinary(path) as stream:
            return read_inert(path, stream, is_archive=kind == ZIP_MAGIC)
    except MalformedPickle as error:
        raise CheckpointError(
            f"{path} was refused and nothing in it was run: it is damaged, or another file than torch.save writes "
            f"({for_terminal(error)}). Copy or download it again, or save tensors alone: "
            "torch.save(model.state_dict(), 'tensors.ckpt')"
        ) from None


def _load_by_torch(path: Path, kind: bytes) -> Any:
    """What torch's weights-only reader makes of a file whose names are harmless. CheckpointError where it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on its own old formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == ZIP_MAGIC)
    except Exception as error:  # of a damaged pickle torch tells with whatever it meets, AssertionError among them
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint, it is damaged or of another kind ({_first_line(error)}). "
            "Copy or download it again"
        ) from None


def file_kind(path: Path) -> Any:
    """ZIP_MAGIC, PICKLE_MAGIC or SAFETENSORS by the file's first bytes.

    Raises:
        CheckpointError: none of them; the message says what the file looks like.
        UnreadableFile: no ordinary file, or one that may not be read.
    """
    with open_ordinary(path) as stream:
        head = stream.read(64)
    if head.startswith(ZIP_MAGIC):
        _check_archive(path)
        return ZIP_MAGIC
    if head[8:9] == b"{":
        return SAFETENSORS
    if head.startswith(PICKLE_MAGIC):
        return PICKLE_MAGIC
    looks = f"it begins with {head[:16]!r}" if head else "it is empty"
    if head.startswith(b"version https://git-lfs"):
        looks = "it is a Git LFS pointer in place of the file itself; fetch that with `git lfs pull`"
    raise CheckpointError(f"{path} is no checkpoint (.ckpt, .pt or .safetensors): {looks}")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: cut short or damaged ({error}); copy or download it again") from None
    names = [for_terminal(entry.filename, 40) for entry in entries]
    if not any(name.endswith("data.pkl") for name in names):
        entries = ", ".join(names[:4]) or "nothing"
        raise CheckpointError(f"{path} is no checkpoint: it is a zip archive of {entries}")
    # torch.save compresses nothing; what is compressed could unpack to any size.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is a compressed archive, which torch.save does not write; unpack and save it")
    if any(entry.filename.endswith("data.pkl") and entry.file_size > ARCHIVE_PICKLE_BYTES for entry in entries):
        raise CheckpointError(f"{path}: its table of contents is larger than any checkpoint's; save its tensors alone")


def _open_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - reading runs needs none of it

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cut short or damaged ({_first_line(error)}); copy or download it again"
        ) from None
    check_tensors(path, tensors)
    tensors, wrappers = unwrap_names(path, tensors)
    return TensorFile(path=path, format=SAFETENSORS, tensors=tensors, metadata=metadata, wrappers=wrappers)


def _refused(path: Path, names: Sequence[str]) -> CheckpointError:
    classes = ", ".join(for_terminal(name, 80) for name in names[:6])
    return CheckpointError(
        f"{path} was refused and nothing in it was run: beside tensors it holds {classes}, and reading such "
        "objects runs code that the file names. Where you trust the file, save its tensors alone and read those: "
        f"torch.save({{'state_dict': torch.load({path.name!r}, weights_only=False)['state_dict']}}, 'tensors.ckpt')"
    )


def _article(content: Any) -> str:
    name = type(content).__name__.removeprefix("Stored")
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
