"""metrics.jsonl: one object per logged step. It only grows, and a last line that a kill cut short is left out.

alarms.jsonl has the same form, one object per alarm.
"""

import io
import json
import math
import os
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ibqlab.base.files import RunError, UnreadableFile, explained, is_ordinary, parse_json, read_bytes
from ibqlab.runs.folder import require_own_files, what_is_left, writing

METRICS_FILE = "metrics.jsonl"
ALARMS_FILE = "alarms.jsonl"
"""Alarms in the same form, one object each; made with the first one."""
METRICS_BYTES = 2**33
"""Largest metrics.jsonl that is read; a row at each of the published 1,651,650 steps makes about 2 GiB."""
_ROWS_LOOKED_AT = 6
"""Rows at both ends of a long file that tell which metrics it has."""
TAIL_BYTES = 32 * 1024
"""Of a run's metrics that are read: some twenty rows."""


def append_row(path: Path, row: Mapping[str, Any], name: str = METRICS_FILE) -> None:
    """Write a row behind the last whole one of a file of a run folder; as `Run.log`."""
    line = json.dumps(plain_row(row, "row"), allow_nan=False) + "\n"
    file = path / name
    require_own_files(path, file.name)
    with explained(file, lambda: what_is_left(path)), _open_to_append(file) as stream:
        size = _end_of_last_row(stream)
        stream.truncate(size)
        stream.seek(size)
        try:
            stream.write(line.encode())
            stream.flush()
        except OSError:
            os.truncate(file, size)
            raise


def _open_to_append(file: Path) -> BinaryIO:
    """An ordinary file for reading and writing, made where it is missing; a pipe is refused instead of waited for."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RunError(f"{file} must be an ordinary file; delete it, or choose another folder")
    return os.fdopen(handle, "r+b")


def _end_of_last_row(stream: io.BufferedRandom) -> int:
    """Where the next row belongs: after the last newline, before what a kill left of a row."""
    size = stream.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    stream.seek(size - 1)
    if stream.read(1) == b"\n":
        return size
    stream.seek(0)
    return stream.read().rfind(b"\n") + 1


def read_rows(path: Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """All whole rows of a file of a run folder; a RunError that names the line where one is damaged."""
    file = path / name
    *lines, last_line = _read_text(path, name).split(b"\n")
    rows = [read_row(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]
    try:
        return [*rows, read_row(last_line, "last line")] if last_line else rows
    except RunError:
        return rows


def _read_text(path: Path, name: str = METRICS_FILE) -> bytes:
    file = path / name
    try:
        return read_bytes(file, METRICS_BYTES)
    except FileNotFoundError:
        return b""
    except UnreadableFile as error:
        raise RunError(
            f"{file} cannot be read ({str(error).removeprefix(f'{file}').lstrip(': ')}); mend or restore it"
        ) from None


def read_row(line: bytes, source: str) -> dict[str, Any]:
    """One line of metrics; a RunError that names its source where it is damaged."""
    try:
        row = parse_json(line, source)
    except UnreadableFile as error:
        reason = str(error).removeprefix(f"{source}: ")
        raise RunError(f"{source}: damaged ({reason}); mend or delete this line") from None
    step = row.get("step")
    if type(step) is not int or not 0 <= step < 2**63:
        step_text = f"{step!r:.40}" if "step" in row else "none"
        raise RunError(f"{source}: step must be a whole number ≥ 0, got {step_text}; mend or delete this line")
    return row


def last_of_each(path: Path, names: Collection[str]) -> dict[str, Any]:
    """The last value of every metric, as `read_rows` would tell, without reading every row of a long run.

    Args:
        path: the run folder.
        names: metrics that are looked for in all rows. Others are found where the first or last rows have them.
    Raises:
        RunError: a damaged line, as far as it is looked at; that a line is cut is always seen.
    """
    file, text = path / METRICS_FILE, _read_text(path)
    lines, end = text.count(b"\n"), text.rfind(b"\n") + 1
    whole = text[:end]
    if lines <= 3 * _ROWS_LOOKED_AT or not whole.startswith(b"{") or whole.count(b"}\n{") != lines - 1:
        return {name: value for row in read_rows(path) for name, value in row.items() if value is not None}
    ends = [*whole.split(b"\n", _ROWS_LOOKED_AT)[:-1], *whole[:-1].rsplit(b"\n", _ROWS_LOOKED_AT)[1:]]
    values: dict[str, Any] = {}
    latest: set[str] = set()  # metrics whose last value is known
    for number, line in enumerate([*ends, text[end:]]):
        try:
            row = read_row(line, f"{file}")
        except RunError:
            if number == len(ends):  # the last one may be cut
                continue
            read_rows(path)  # says which line is damaged
            raise
        known = {name: value for name, value in row.items() if value is not None}
        values |= known
        latest |= {*known} if number >= _ROWS_LOOKED_AT else set()
    for name in {*names, *values} - latest:
        value = _last_of(whole, name, file)
        if value is not None:
            values[name] = value
    return values


def _last_of(text: bytes, name: str, file: Path) -> Any:
    """The last value that is none of None of a metric in whole rows; None where it has none."""
    key, end = json.dumps(name).encode() + b":", len(text)
    while (at := text.rfind(key, 0, end)) >= 0:
        start = text.rfind(b"\n", 0, at) + 1
        value = read_row(text[start : text.find(b"\n", at)], f"{file}").get(name)
        if value is not None:
            return value
        end = start
    return None


def plain_row(value: Any, source: str) -> Any:
    """A value as JSON can hold it; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): plain_row(item, f"{source}[{str(key)!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_row(item, f"{source}[{index}]") for index, item in enumerate(value)]
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else None
    if callable(getattr(value, "item", None)) and math.prod(getattr(value, "shape", ())) == 1:
        return plain_row(value.item(), source)
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise ValueError(f"{source} must be a number, text, or a list of them; got {type(value).__name__}{shape}")


def drop_rows_after(path: Path, step: int, name: str = METRICS_FILE) -> None:
    """Drop rows later than a step, and a cut last line."""
    text = "".join(json.dumps(row) + "\n" for row in read_rows(path, name) if row["step"] <= step).encode()
    file = path / name
    if is_ordinary(file) and read_bytes(file, METRICS_BYTES) != text:
        with writing(path, file) as stream:
            stream.write(text)


def last_step(path: Path) -> int:
    """Step of the last whole row; −1 where there is none or none that can be read."""
    return _last_step(_read_text(path))


def _last_step(text: bytes) -> int:
    """Step of the last whole row of metrics; −1 where there is none or none that can be read."""
    line = text[: text.rfind(b"\n") + 1].rstrip(b"\n").rpartition(b"\n")[2]
    try:
        return read_row(line, "last line")["step"]
    except RunError:
        return -1


def last_values(file: Path) -> dict[str, Any]:
    """The last value of every metric in the last rows of a run's metrics.jsonl; {} before the first row."""
    return {key: value for row in last_rows(file) for key, value in row.items() if value is not None}


def last_rows(file: Path) -> list[dict[str, Any]]:
    """The last rows of a run's metrics.jsonl, a few at least, read without the others; [] before the first row, and
    where it is no ordinary file: a device would never end."""
    if not is_ordinary(file):
        return []
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL_BYTES))
            lines = stream.read(TAIL_BYTES).split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        # The first line may be cut, and so may the last one, which is being written.
        with suppress(UnreadableFile, UnicodeDecodeError):
            rows.append(parse_json(line, file.name))
    return rows


def force_rows(path: Path) -> dict[str, Any]:
    """Force what is logged to disk; how many rows there are and the last one's step."""
    file = path / METRICS_FILE
    if is_ordinary(file):
        with explained(file), open(file, "r+b") as stream:
            os.fsync(stream.fileno())
    text = _read_text(path)
    last = _last_step(text)
    return {"count": text.count(b"\n"), "last_step": None if last < 0 else last}
