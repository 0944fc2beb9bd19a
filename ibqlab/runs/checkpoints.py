"""checkpoints/: what resuming needs, written whole or not at all, the newest two."""

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.base.files import RunError, open_ordinary
from ibqlab.runs.folder import step_file, steps_of_files, writing
from ibqlab.runs.metrics import METRICS_FILE, force_rows, read_rows

CHECKPOINTS_KEPT = 2
_DAMAGES = (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError)
"""What torch.load raises on damaged files."""


class Checkpoint(NamedTuple):
    """What resuming needs."""

    file: Path
    step: int
    state: dict[str, Any]
    rows: dict[str, Any]
    """Of metrics.jsonl when it was written: "count", and "last_step" (None: no row). {} in older checkpoints."""


def write_checkpoint(path: Path, step: int, state: dict[str, Any], every: int = 1) -> None:
    """Store what resuming needs in a run folder; as `Run.save_checkpoint`."""
    import torch  # noqa: PLC0415 - reading runs needs no torch

    check_storable(state, "state")
    file = step_file(path, "checkpoints", step, ".pt")
    rows = force_rows(path)
    with writing(path, file) as stream:
        torch.save({"step": step, "state": state, "rows": rows}, stream)
    steps = steps_of_files(file.parent, ".pt")
    regular = sorted(old for old in steps if old == step or (old < step and old % every == 0))
    for old in set(steps) - set(regular[-CHECKPOINTS_KEPT:]):
        step_file(path, "checkpoints", old, ".pt").unlink(missing_ok=True)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder that can be read; None and errors as of `Run.load_checkpoint`."""
    failures = []
    for step in sorted(steps_of_files(path / "checkpoints", ".pt"), reverse=True):
        file = step_file(path, "checkpoints", step, ".pt")
        try:
            checkpoint = _read_file(file)
        except _DAMAGES as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            failures.append(f"{file.name} ({reason})")
            continue
        if failures:
            warnings.warn(f"{path}: unreadable: {', '.join(failures)}; using {file.name}", stacklevel=3)
        return checkpoint
    if failures:
        raise RunError(
            f"{path / 'checkpoints'}: no checkpoint can be read: {', '.join(failures)}. Restore one from "
            f"a copy, or delete the run folder to train anew"
        )
    return None


def _read_file(file: Path) -> Checkpoint:
    import torch  # noqa: PLC0415 - reading runs needs no torch

    with open_ordinary(file) as stream:
        content = torch.load(stream, map_location="cpu", weights_only=True)
    if not isinstance(content["state"], dict):
        raise ValueError("it holds no state")
    rows = content.get("rows")
    return Checkpoint(file, int(content["step"]), content["state"], rows if isinstance(rows, dict) else {})


def require_rows(path: Path, checkpoint: Checkpoint | None) -> None:
    """Refuse to resume where rows of metrics, or all checkpoints, were lost since they were written.

    Raises:
        RunError: the message names the file and what to do.
    """
    steps = [row["step"] for row in read_rows(path)]
    if checkpoint is None:
        if max(steps, default=0) > 0:
            raise RunError(
                f"{path / 'checkpoints'} is empty and metrics.jsonl goes up to step {max(steps)}: the "
                "checkpoints are gone; nothing was changed. Restore one from a copy, or delete the run folder to "
                "train anew"
            )
        return
    earlier = [step for step in steps if step <= checkpoint.step]
    # Of older checkpoints it is known that the first row is that of step 0.
    last, count = checkpoint.rows.get("last_step", 0), checkpoint.rows.get("count", 0)
    if last is not None and last not in earlier:
        raise RunError(
            f"{path / METRICS_FILE} lacks the row of step {last}, which was there before "
            f"{checkpoint.file.name}: rows were lost; nothing was changed. Restore the file from a copy, or choose "
            "another folder (--output FOLDER)"
        )
    if type(count) is int and len(earlier) < count:
        warnings.warn(
            f"{path / METRICS_FILE} has {len(earlier)} rows up to step {checkpoint.step}, there were {count}: "
            "curves of this run have gaps",
            stacklevel=2,
        )


def check_storable(value: Any, name: str) -> None:
    """Refuse what torch.load(weights_only=True) would refuse, before it is too late."""
    import torch  # noqa: PLC0415 - reading runs needs no torch

    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_storable(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_storable(item, f"{name}[{index}]")
    elif not (value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor)):
        raise ValueError(
            f"{name} is a {type(value).__module__}.{type(value).__name__}, which a checkpoint cannot hold; store "
            f"tensors and plain numbers: torch.as_tensor(array), number.item()"
        )
