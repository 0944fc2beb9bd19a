"""One cell's process: train what is left to train, measure, write the row.

    python -m ibqlab.grids.worker FOLDER CELL

Started so by Slurm, by hand, or under torchrun for a cell of several processes. On one machine the engine forks it from
a process that has imported what cells need (`run_cell`), so that a cell does not wait ten seconds for imports. `ps`
shows it as ibqlab-cell, and the file of its lock holds its number.
"""

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from ibqlab.diagnostics.lab import LabRunConfig, train_in_lab
from ibqlab.grids.cells import BUSY, NO_ROOM, OUTSIDE, STOPPED, Cell, CellStore, cause_of
from ibqlab.recipes.plugins import COPIES, SEARCHED_FIRST
from ibqlab.runs import Run
from ibqlab.training import GeneratorTrainConfig, StoppedByAlarm, TrainConfig, train, train_generator
from ibqlab.training.alarms import stop_reason

WORK = {TrainConfig: train, GeneratorTrainConfig: train_generator, LabRunConfig: train_in_lab}
"""What a cell's process does first, by the kind of its settings."""


def main(folder: str, name: str) -> int:
    """Work on a cell to its row. Returns the exit code: 0 done, 1 failed, 74 no room, 75 taken by another process."""
    # The tokenizer that a generator needs is named as a run of this folder.
    os.environ["IBQLAB_RUNS"] = str(Path(folder).resolve())
    # Its code is the study's, also when the file that it was copied from has changed meanwhile.
    os.environ[SEARCHED_FIRST] = str(Path(folder).resolve() / COPIES)
    store = CellStore(folder)
    try:
        if os.environ.get("RANK", "0") != "0":
            return _work(store, name, first=False)
        with store.working(name) as ours:
            if ours:
                return _work(store, name, first=True)
        print(f"another process works on {name}", file=sys.stderr)
        return BUSY
    except Exception as error:
        return _fail(error)


def _fail(error: BaseException) -> int:
    """Print what went wrong where it can be printed; the exit code that tells its kind."""
    # The log may lie on the full disk.
    with suppress(OSError):
        traceback.print_exception(error)
        sys.stderr.flush()
    return NO_ROOM if cause_of(error) in OUTSIDE else 1


def _work(store: CellStore, name: str, first: bool) -> int:
    """Train and measure; only the first of several processes writes."""
    from ibqlab.grids.cell_rows import measure_cell  # noqa: PLC0415 - heavy

    cell = store.request(name)
    try:
        run = _train(cell, store.folder / name)
        if first:
            reason = stop_reason(run)
            store.write_row(cell, measure_cell(cell, run) | ({STOPPED: reason} if reason else {}))
    except Exception as error:
        code = _fail(error)
        if first:
            store.write_failure(cell, f"{type(error).__name__}: {error}", cause_of(error))
        return code
    return 0


def _train(cell: Cell, path: Path) -> Run:
    """The cell's run, trained to its end. One that the alarm stops has ended, too: it is not begun again."""
    if (path / "config.yaml").is_file() and stop_reason(Run(path)):
        return Run(path)
    try:
        return WORK[type(cell.config)](cell.config, path, progress=False)
    except StoppedByAlarm:
        return Run(path)


def run_cell(folder: str, name: str, log: str, cores: list[int], environment: dict[str, str]) -> None:
    """A cell as a process of this machine; ends with `main`'s exit code.

    Args:
        folder: of the study.
        name: of the cell.
        log: file that takes what the process prints.
        cores: that it runs on, where the system can tell processes apart: neighbours' caches are left alone.
        environment: its variables, "OMP_NUM_THREADS" among them.
    """
    try:
        # A session of its own: the end of the engine's terminal does not reach it.
        os.setsid()
        # What `ps` shows, where the system can.
        with suppress(OSError):
            Path("/proc/self/comm").write_text("ibqlab-cell", encoding="ascii")
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(handle, stream)
        # The process that it was forked from may have begun with those of an earlier study.
        os.environ.clear()
        os.environ.update(environment)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        import matplotlib as mpl  # noqa: PLC0415 - heavy
        import torch  # noqa: PLC0415 - heavy

        # Both are imported already and have read other variables.
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        mpl.use("agg")
        code = main(folder, name)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        code = _fail(error)
    # Not sys.exit: what libraries do at a process's end takes seconds, and the engine waits for them.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
