"""One cell's process: train what is left to train, measure, write the row.

    python -m ibqlab.grids.worker FOLDER CELL

Started by Slurm, by hand, or under torchrun for a cell of several processes. On one machine the engine starts

    python -P …/ibqlab/studies/worker.py --serve ENGINE

once, which imports what all cells need and then forks a process per cell, so that a cell does not wait ten seconds for
imports.

Who outlives whom: the server ends within seconds when its engine is gone, and begins nothing for the dead. A cell that
is being worked on is a process of its own and goes on to its row, which the next engine finds; `ps` shows its process
as ibqlab-cell, and the file of its lock holds its number.
"""

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any


def main(folder: str, name: str) -> int:
    """Work on a cell to its row. Returns the exit code: 0 done, 1 failed, 74 no room, 75 taken by another process."""
    # The tokenizer that a generator needs is named as a run of this folder.
    os.environ["IBQLAB_RUNS"] = str(Path(folder).resolve())
    from ibqlab.grids.cells import CellStore  # noqa: PLC0415 - after the environment is set

    try:
        return _take(CellStore(folder), name)
    except Exception as error:
        return _fail(error)


def _take(store: Any, name: str) -> int:
    """Work on a cell if nobody else does."""
    from ibqlab.grids.cells import BUSY  # noqa: PLC0415 - after the environment is set

    if os.environ.get("RANK", "0") != "0":
        return _work(store, name, first=False)
    with store.working(name) as ours:
        if ours:
            return _work(store, name, first=True)
    print(f"another process works on {name}", file=sys.stderr)
    return BUSY


def _fail(error: BaseException) -> int:
    """Print what went wrong where it can be printed; the exit code that tells its kind."""
    from ibqlab.grids.cells import NO_ROOM, OUTSIDE, cause_of  # noqa: PLC0415 - after the environment is set

    # The log may lie on the full disk.
    with suppress(OSError):
        traceback.print_exception(error)
        sys.stderr.flush()
    return NO_ROOM if cause_of(error) in OUTSIDE else 1


def _work(store: Any, name: str, first: bool) -> int:
    from ibqlab.grids.cell_rows import measure_cell  # noqa: PLC0415 - heavy
    from ibqlab.grids.cells import cause_of  # noqa: PLC0415 - after the environment is set
    from ibqlab.training import TrainConfig, train, train_generator  # noqa: PLC0415 - heavy

    cell = store.request(name)
    try:
        kind = train if isinstance(cell.config, TrainConfig) else train_generator
        run = kind(cell.config, store.folder / name, progress=False)
        if first:
            store.write_row(cell, measure_cell(cell, run))
    except Exception as error:
        code = _fail(error)
        if first:
            store.write_failure(cell, f"{type(error).__name__}: {error}", cause_of(error))
        return code
    return 0


# --- the server of one machine ---------------------------------------------------------------------------------------


def serve(engine: int) -> None:
    """Fork a process per line of standard input, and answer when each has ended.

    A line asks {"folder", "name", "log", "cores", "environment"}; answers are {"name", "pid"} and {"name", "code"}, the
    code negative for a signal. Ends with its input or with the process that started it, whichever it notices first; its
    forks go on.

    Args:
        engine: number of the process that started this one.
    """
    threading.Thread(target=_end_with, args=(engine,), daemon=True).start()
    _import_what_cells_need()
    children: dict[int, str] = {}
    asked = b""
    while True:
        ready = select.select([sys.stdin], [], [], 0.1)[0]
        if ready:
            chunk = os.read(sys.stdin.fileno(), 65536)
            # What a dead engine has asked for is not begun.
            if not chunk or os.getppid() != engine:
                return
            *lines, asked = (asked + chunk).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = _fork(request)
                children[pid] = request["name"]
                _answer(name=request["name"], pid=pid)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            _answer(name=children.pop(pid), code=os.waitstatus_to_exitcode(status))


def _end_with(engine: int) -> None:
    """End this process when the one that started it is gone, also in the middle of imports.

    The end of standard input does not tell: a child of the engine's, such as a loader process, may hold it open.
    """
    while os.getppid() == engine:
        time.sleep(1.0)
    os._exit(0)


def _import_what_cells_need() -> None:
    import lightning_fabric  # noqa: F401, PLC0415

    import ibqlab.grids.cell_rows  # noqa: F401, PLC0415


def _answer(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _fork(request: dict[str, Any]) -> int:
    """Start a cell's process; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        _show_name("ibqlab-cell")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(request["environment"])
        # Neighbours' caches are left alone.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, request["cores"])
        code = main(request["folder"], request["name"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        code = _fail(error)
    finally:
        # Not sys.exit: what the server would do at its end is not this process's business.
        os._exit(code)


def _show_name(name: str) -> None:
    """Name this process in `ps`, where the system can."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name, encoding="ascii")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]))
    else:
        sys.exit(main(*sys.argv[1:]))
