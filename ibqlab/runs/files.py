"""Writing files so that they are there whole or not at all, and what may stand in them."""

import errno
import io
import json
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class RunError(RuntimeError):
    """A run folder that cannot be used or written; the message says what stands there and what to do."""


@contextmanager
def explained(file: Path, what_is_left: Callable[[], str] = str) -> Iterator[None]:
    """Turn what goes wrong in writing a file into a RunError that says what is left and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise RunError(f"{file}: {_reason(cause, file)}{what_is_left()}") from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's complaint inside an error: torch.save reports it as a RuntimeError about positions."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error


def _reason(cause: OSError, file: Path) -> str:
    if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot be written ({os.strerror(cause.errno)}); choose a folder that you may write to"
    place = next(folder for folder in file.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free / 2**30
    return (
        f"the disk or a quota is full ({os.strerror(cause.errno)}; {free:.2f} GiB free on the disk), nothing was left "
        f"half written. Make room or raise the quota, then start the same command again"
    )


def force_to_disk(folder: Path) -> None:
    """Make a rename inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all.

    Raises:
        RunError: the disk is full, or the folder may not be written to.
    """
    with replacing(file) as stream:
        stream.write(content)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file when the block ends well, and is gone otherwise.

    Raises:
        RunError: the disk is full, or the folder may not be written to.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with explained(file):
        try:
            with open(part, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
        force_to_disk(file.parent)


def end_of_last_row(stream: io.BufferedRandom) -> int:
    """Where the next row belongs: after the last newline, before what a kill left of a row."""
    size = stream.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    stream.seek(size - 1)
    if stream.read(1) == b"\n":
        return size
    stream.seek(0)
    return stream.read().rfind(b"\n") + 1


def steps_of_files(folder: Path, suffix: str) -> list[int]:
    """Steps that a folder has a file of, in no order."""
    names = [file.name.removeprefix("step_").removesuffix(suffix) for file in folder.glob(f"step_*{suffix}")]
    return [int(name) for name in names if name.isdecimal()]


def read_row(line: bytes, place: str) -> dict[str, Any]:
    """One line of metrics; a RunError that names the place where it is damaged."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RunError(f"{place}: damaged ({error}); mend or delete this line") from None
    if not isinstance(row, dict):
        raise RunError(f"{place}: must be a JSON object, got {str(row)[:40]!r}; mend or delete this line")
    return row


def plain_row(value: Any, place: str) -> Any:
    """A value as JSON can hold it; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain_row(item, f"{place}[{str(key)!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_row(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else None
    if callable(getattr(value, "item", None)) and math.prod(getattr(value, "shape", ())) == 1:
        return plain_row(value.item(), place)
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise ValueError(f"{place} must be a number, text, or a list of them; got {type(value).__name__}{shape}")


def plain_array(name: str, value: Any) -> np.ndarray:
    """A tensor, array or number as an array of numbers."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise ValueError(f"snapshot array {name!r} holds Python objects; give numbers")
    return array


def check_storable(value: Any, place: str) -> None:
    """Refuse what torch.load(weights_only=True) would refuse, before it is too late."""
    import torch  # noqa: PLC0415 - reading runs needs no torch

    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_storable(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_storable(item, f"{place}[{index}]")
    elif not (value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor)):
        raise ValueError(
            f"{place} is a {type(value).__module__}.{type(value).__name__}, which a checkpoint cannot hold; store "
            f"tensors and plain numbers: torch.as_tensor(array), number.item()"
        )
