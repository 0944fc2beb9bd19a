"""Where cells are worked on: jobs, and the launcher for processes of this machine.

A launcher starts cells: `free` says whether there is room for one, `start` starts one that `CellStore.prepare` has
written down, and `find` returns the job of an earlier engine that still works on it.

A cell is the work of `python -m ibqlab.grids.worker FOLDER CELL` in a process that outlives whoever started it; `slurm`
makes jobs of a cluster of the same. On Windows every package can be imported and nothing more is promised: training
and studies need Linux, macOS or WSL.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import ModuleType

from ibqlab.grids.cells import NO_ROOM, Cell, CellStore, StudyError
from ibqlab.grids.fork_server import end_server, start_server
from ibqlab.grids.worker import run_cell

START_METHOD = "forkserver"
"""How multiprocessing starts a cell's process."""
SERVER_GONE = 255
"""multiprocessing's exit code of a process whose server of forks is gone."""


class Job:
    """A cell that a process works on: here somebody else's, known by the lock that it holds."""

    def __init__(self, name: str, store: CellStore):
        self.name, self.store = name, store

    def ended(self) -> bool:
        """Whether its process is gone."""
        return not self.store.is_taken(self.name)

    def code(self) -> int | None:
        """Exit code of a process that has ended, negative for a signal; None where nobody saw it."""
        return None

    def reason(self) -> str:
        """How it ended, in words."""
        code = self.code()
        if code is None:
            return "ended, and nobody saw how"
        if code == NO_ROOM:
            return "the disk or the memory was full"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """End it now, so that it can be resumed. Somebody else's is left alone: they may still want it."""


class LocalLauncher:
    """A launcher of processes of this machine, one per GPU or per group of cores.

    Args:
        workers: cells at a time, at least 1; with CUDA at most as many as there are devices.
        threads: of each; 0: the cores shared out evenly.
    """

    def __init__(self, workers: int = 1, threads: int = 0):
        if START_METHOD not in multiprocessing.get_all_start_methods():
            raise StudyError(
                "studies need Linux or macOS: this system cannot start their processes. Use WSL on Windows"
            )
        self.workers = max(1, workers)
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
        self.threads = threads or max(1, len(cores) // self.workers)
        self.cores = [
            [cores[(slot * self.threads + index) % len(cores)] for index in range(self.threads)]
            for slot in range(self.workers)
        ]
        self.slots: list[Job | None] = [None] * self.workers

    def _free_slots(self) -> list[int]:
        return [number for number, job in enumerate(self.slots) if job is None or job.ended()]

    def free(self, cell: Cell) -> bool:
        """Whether as many slots are free as the cell has processes."""
        if cell.config.processes > self.workers:
            raise StudyError(
                f"{cell.name} trains in {cell.config.processes} processes and there is room for {self.workers}: give "
                f"workers={cell.config.processes}, or processes=1"
            )
        return len(self._free_slots()) >= cell.config.processes

    def start(self, cell: Cell, store: CellStore) -> Job:
        """A process of its own session, so that a notebook that dies leaves it alone."""
        taken = self._free_slots()[: cell.config.processes]
        cores = list(dict.fromkeys(core for slot in taken for core in self.cores[slot]))
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "MPLBACKEND": "agg"}
        if cell.config.accelerator != "cpu":
            devices = _devices()
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[slot] for slot in taken if slot < len(devices))
        if cell.config.processes == 1:
            job = _CellProcess(cell, store, cores, environment)
        else:
            job = _ChildJob(cell, store, environment)
        for slot in taken:
            self.slots[slot] = job
        return job

    def find(self, cell: Cell, store: CellStore) -> Job | None:
        """A process of an earlier engine, known by the lock that it holds; it takes a slot meanwhile."""
        if not store.is_taken(cell.name):
            return None
        job = Job(cell.name, store)
        for slot in self._free_slots()[:1]:
            self.slots[slot] = job
        return job


def _devices() -> list[str]:
    """CUDA devices by the names that a child's CUDA_VISIBLE_DEVICES takes."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        return [name for name in names.split(",") if name]
    import torch  # noqa: PLC0415

    return [str(number) for number in range(torch.cuda.device_count())]


class _CellProcess(Job):
    """A cell in a process that multiprocessing's server of forks has started: what cells need is imported already.

    A cell goes on to its row when its engine ends, and the next engine finds it. The server stays for the engine's next
    study, and ends with its engine and the last of its cells.
    """

    def __init__(self, cell: Cell, store: CellStore, cores: list[int], environment: dict[str, str]):
        super().__init__(cell.name, store)
        folder, log = str(store.folder.resolve()), str(store.log(cell.name).resolve())
        context = multiprocessing.get_context(START_METHOD)
        self.process = context.Process(target=run_cell, args=(folder, cell.name, log, cores, environment))
        # multiprocessing would run the engine's script again in every cell, which a cell has no use for.
        script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            if START_METHOD == "forkserver":
                start_server(bool(cell.measure.metrics))
            self.process.start()
        except BaseException:
            # Interrupted while the server still imports: it must not begin a cell that nobody knows of.
            end_server()
            raise
        finally:
            sys.modules["__main__"] = script
        # At its end the engine would wait for its children; a cell is meant to outlive it.
        multiprocessing.process._children.discard(self.process)

    def ended(self) -> bool:
        """As `Job`."""
        # Without the server nobody knows how a process ended, and only its lock tells whether it has.
        code = self.process.exitcode
        return code is not None and (code != SERVER_GONE or not self.store.is_taken(self.name))

    def code(self) -> int | None:
        """As `Job`."""
        return None if self.process.exitcode == SERVER_GONE else self.process.exitcode

    def stop(self) -> None:
        """As `Job`."""
        # Not by multiprocessing, which signals nobody once the server is gone.
        if not self.ended():
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)


class _ChildJob(Job):
    """A torchrun of this machine."""

    def __init__(self, cell: Cell, store: CellStore, environment: dict[str, str]):
        super().__init__(cell.name, store)
        together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cell.config.processes)]
        work = ["-m", "ibqlab.grids.worker", str(store.folder.resolve()), cell.name]
        with open(store.log(cell.name), "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *together, *work],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """As `Job`."""
        return self.process.poll() is not None

    def code(self) -> int | None:
        """As `Job`."""
        return self.process.returncode

    def stop(self) -> None:
        """As `Job`."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
