"""Tensors in a file, read without running anything that the file says.

What is unusual: files are mapped, not read. A tensor costs memory when it is used, so a checkpoint's optimiser and the
weights that nobody asks for cost none. Pickles are read by torch's weights-only reader, which knows tensors, numbers
and text and refuses every other class; there is no way around it here.
"""

import contextlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, open_ordinary, read_json, why_not
from ibqlab.runs.finding import WEIGHT_FILES, hint, locate

SAFETENSORS = "safetensors file"
ZIP_MAGIC = b"PK"
PICKLE_MAGIC = b"\x80"
HOLDERS = ("state_dict", "model", "module")
"""Entries under which files hold their tensors: Lightning's, many training loops', DeepSpeed's."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and training loops put ahead of every name."""
COMPILED = "._orig_mod."
"""What torch.compile of a part puts inside a name."""
NUMBER_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that weights may have."""
EXPANDED_BYTES = 2**26
"""A tensor that repeats its numbers may claim so many bytes, whatever it stores; some files hold such counters."""
ARCHIVE_PICKLE_BYTES = 256 * 2**20
"""Largest table of contents of an archive; that of a generator of 10⁹ weights has 200 kB."""


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the message says what stands there and what to do."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """Tensors of one file under the file's own names."""

    path: Path
    """Where they lie."""
    format: str
    """Kind of file, in words."""
    tensors: Mapping[str, Tensor]
    """Mapped tensors by the file's keys; good as long as the file is not changed in place."""
    entries: tuple[str, ...] = ()
    """What the file holds beside them, such as optimizer_states."""
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
        CheckpointError: no checkpoint, cut short, one that would have to run code, or with tensors that are no plain
            ones.
        UnreadableFile: no ordinary file, or one that may not be read.
    """
    if file_kind(path) == SAFETENSORS:
        return _open_safetensors(path)
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a state dict; got {_article(content)}. Save model.state_dict().")
    if isinstance(content.get("state"), dict) and "step" in content:
        raise CheckpointError(
            f"{path} is one step of a run, without its settings; give the run's folder, {path.absolute().parents[1]}"
        )
    holder = next((name for name in HOLDERS if isinstance(content.get(name), dict)), None)
    weights = content[holder] if holder else content
    strangers = [key for key, value in weights.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strangers or not weights:
        entries = ", ".join(for_terminal(key, 40) for key in strangers[:6]) or "nothing"
        raise CheckpointError(
            f"{path}: must hold tensors by name, or under {' or '.join(map(repr, HOLDERS))}; got {entries} instead. "
            "Save model.state_dict()."
        )
    check_tensors(path, weights)
    weights, wrappers = _unwrapped(path, weights)
    if holder not in (None, "state_dict"):
        wrappers = (f"entry {holder!r}", *wrappers)
    header, lightning = content.get("ibqlab"), content.get("pytorch-lightning_version")
    return TensorFile(
        path=path,
        format="Lightning checkpoint" if holder == "state_dict" else "state dict",
        tensors=weights,
        entries=tuple(str(key) for key in content if key != holder) if holder else (),
        wrappers=wrappers,
        quantizer=header.get("quantizer") if isinstance(header, dict) else None,
        lightning=lightning if isinstance(lightning, str) and re.match(r"[0-9]{1,4}\.", lightning) else "",
    )


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


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is an ordinary one whose numbers lie in the file.

    Raises:
        CheckpointError: a sparse, quantized or empty-handed tensor, or one that claims more numbers than are stored.
    """
    for name, value in tensors.items():
        kind = _unusable(value)
        if kind:
            raise CheckpointError(
                f"{path}: the tensor {for_terminal(name)!r} {kind}; a checkpoint holds plain tensors. Save "
                "{name: value.detach().cpu().to_dense().contiguous() for each}, or give the file as it was published"
            )


def _unusable(value: Tensor) -> str:
    """What is wrong with a stored tensor; "" for an ordinary one."""
    if value.layout != torch.strided:
        return f"is sparse ({value.layout})"
    if value.is_meta:
        return "has a shape and no numbers (device meta)"
    if value.is_quantized:
        return f"is quantized ({value.dtype})"
    stored_bytes = value.untyped_storage().nbytes()
    if value.nbytes > max(stored_bytes, EXPANDED_BYTES):
        return f"claims {value.nbytes:,} bytes {tuple(value.shape)} and stores {stored_bytes:,}"
    return ""


def _unwrapped(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors by the names that they have without wrappers, and what was taken off."""
    names, wrappers = list(tensors), []
    if not names:
        raise CheckpointError(f"{path} holds no tensor; copy or download it again, or save model.state_dict()")
    while prefix := next((start for start in PREFIXES if all(name.startswith(start) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
        wrappers.append(f"prefix {prefix}")
    if any(COMPILED in name for name in names):
        names = [name.replace(COMPILED, ".") for name in names]
        wrappers.append(f"{COMPILED} inside names")
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path}: without {', '.join(wrappers)} two tensors have one name; save one model alone")
    return dict(zip(names, tensors.values(), strict=True)), tuple(wrappers)


def load_pickle(path: Path) -> Any:
    """What `torch.save` wrote, tensors mapped; nothing in the file is executed.

    Files of torch before 1.6 cannot be mapped and are read whole.

    Raises:
        CheckpointError: no such file format, cut short, or holding classes beyond tensors, numbers and text.
    """
    kind = file_kind(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on its own old formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == ZIP_MAGIC)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
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
    tensors, wrappers = _unwrapped(path, tensors)
    return TensorFile(path=path, format=SAFETENSORS, tensors=tensors, metadata=metadata, wrappers=wrappers)


def _refused(path: Path, error: Exception) -> CheckpointError:
    classes: list[str] = []
    # Those that the weights-only reader does not know, by name; the file is scanned, not executed. The scanner reads
    # archives only, and raises whatever it meets in others.
    with contextlib.suppress(Exception):
        classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:6]
    classes = classes or re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    if not classes:
        return CheckpointError(
            f"{path} was refused and nothing in it was run: it is damaged, or a pickle of another kind than torch.save "
            "writes, which cannot be read without running code. Copy or download it again, or save tensors alone: "
            "torch.save(model.state_dict(), 'tensors.ckpt')"
        )
    return CheckpointError(
        f"{path} was refused and nothing in it was run: beside tensors it holds {', '.join(classes)}, and reading such "
        "objects runs code that the file names. Where you trust the file, save its tensors alone and read those: "
        f"torch.save({{'state_dict': torch.load({path.name!r}, weights_only=False)['state_dict']}}, 'tensors.ckpt')"
    )


def _article(content: Any) -> str:
    return f"{'an' if type(content).__name__[0] in 'aeiouAEIOU' else 'a'} {type(content).__name__}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
