"""The server that cells are forked from: a process that has imported what cells need, in a session of its own.

multiprocessing starts the server and a tracker of shared memory as children that live until the last cell has ended.
They must hold neither the engine's output, whose reader would wait for hours, nor share its session, or whatever ends
the engine's group of processes would end them, too. The server imports this module first and then leaves the session;
an import anywhere else does nothing.
"""

import multiprocessing
import os
import signal
from contextlib import suppress

ENGINE = "IBQLAB_ENGINE"
"""Environment variable by which an engine tells the server that it starts whose server it is."""
PRELOAD = ("ibqlab.grids.fork_server", "ibqlab.training.fabric", "ibqlab.grids.cell_rows")
"""What the server imports, in this order."""
MEASURING = "torchmetrics.functional.image"
"""What it imports besides where cells are measured: else each cell would, for more than a second."""


def start_server(measuring: bool) -> None:
    """Have the server run, started with nothing of this process's input and output; `measuring`: as its first cell."""
    from multiprocessing import forkserver, resource_tracker  # noqa: PLC0415 - not on Windows

    multiprocessing.set_forkserver_preload([*PRELOAD, *[MEASURING] * measuring])
    nothing, streams = os.open(os.devnull, os.O_RDWR), {}
    os.environ[ENGINE] = str(os.getpid())
    try:
        for stream in (0, 1, 2):
            with suppress(OSError):  # closed in this process
                streams[stream] = os.dup(stream)
                os.dup2(nothing, stream)
        resource_tracker.ensure_running()
        forkserver.ensure_running()
    finally:
        del os.environ[ENGINE]
        for stream, handle in streams.items():
            os.dup2(handle, stream)
            os.close(handle)
        os.close(nothing)


def end_server() -> None:
    """End the server; the next cell starts another. Cells go on."""
    from multiprocessing import forkserver  # noqa: PLC0415 - not on Windows

    number = forkserver._forkserver._forkserver_pid
    if number:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


if os.environ.get(ENGINE) == str(os.getppid()):
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
