"""What may stand in the files of a run folder."""

import io
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ibqlab.base.files import RunError, UnreadableFile, parse_json

METRICS_BYTES = 2**33
"""Largest metrics.jsonl that is read; a row at each of the published 1,651,650 steps makes about 2 GiB."""
SNAPSHOT_BYTES = 2**36
"""Largest snapshot, unpacked; the largest published codebook, 262,144 × 256 in float32, makes 0.25 GiB."""


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
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    matches = [re.fullmatch(rf"step_([0-9]{{8,18}}){re.escape(suffix)}", name) for name in names]
    return [int(match[1]) for match in matches if match]


def read_row(line: bytes, place: str) -> dict[str, Any]:
    """One line of metrics; a RunError that names the place where it is damaged."""
    try:
        row = parse_json(line, place)
    except UnreadableFile as error:
        reason = str(error).removeprefix(f"{place}: ")
        raise RunError(f"{place}: damaged ({reason}); mend or delete this line") from None
    step = row.get("step")
    if type(step) is not int or not 0 <= step < 2**63:
        shown = f"{step!r:.40}" if "step" in row else "none"
        raise RunError(f"{place}: step must be a whole number ≥ 0, got {shown}; mend or delete this line")
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
