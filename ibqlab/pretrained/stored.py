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

LIGHTNING = "Lightning checkpoint"
BARE = "state dict"
SAFETENSORS = "safetensors file"
ZIP_MAGIC = b"PK"
PICKLE_MAGIC = b"\x80"


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the message says what stands there and what to do."""


@dataclass(frozen=True, kw_only=True)
class Stored:
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


def open_stored(path: Path) -> Stored:
    """The tensors of a checkpoint file of any known kind.

    Args:
        path: an existing file.
    Raises:
        CheckpointError: no checkpoint, cut short, or one that would have to run code.
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
    wrapped = isinstance(content.get("state_dict"), dict)
    weights = content["state_dict"] if wrapped else content
    strangers = [key for key, value in weights.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strangers or not weights:
        there = ", ".join(map(str, strangers[:6])) or "nothing"
        raise CheckpointError(
            f"{path}: must hold tensors by name, or under 'state_dict'; got {there} instead. Save model.state_dict()."
        )
    entries = tuple(str(key) for key in content if key != "state_dict") if wrapped else ()
    return Stored(path=path, format=LIGHTNING if wrapped else BARE, tensors=weights, entries=entries)


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
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint, it is damaged or of another kind ({_first_line(error)}). "
            "Copy or download it again"
        ) from None


def file_kind(path: Path) -> Any:
    """ZIP_MAGIC, PICKLE_MAGIC or SAFETENSORS by the file's first bytes.

    Raises:
        CheckpointError: none of them; the message says what the file looks like.
    """
    with open(path, "rb") as stream:
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
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path}: cut short or damaged ({error}); copy or download it again") from None
    if not any(name.endswith("data.pkl") for name in names):
        there = ", ".join(names[:4]) or "nothing"
        raise CheckpointError(f"{path} is no checkpoint: it is a zip archive of {there}")


def _open_safetensors(path: Path) -> Stored:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - reading runs needs none of it

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cut short or damaged ({_first_line(error)}); copy or download it again"
        ) from None
    return Stored(path=path, format=SAFETENSORS, tensors=tensors, metadata=metadata)


def _refused(path: Path, error: Exception) -> CheckpointError:
    classes = _foreign_classes(path, str(error))
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


def _foreign_classes(path: Path, message: str) -> list[str]:
    """Classes that the weights-only reader does not know, by name; the file is scanned, not executed."""
    found: list[str] = []
    with contextlib.suppress(Exception):  # it reads archives only, and raises what its scanner meets in others
        found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return found[:6] or re.findall(r"GLOBAL ([\w.]+)", message)[:1]


def _article(content: Any) -> str:
    return f"{'an' if type(content).__name__[0] in 'aeiouAEIOU' else 'a'} {type(content).__name__}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
