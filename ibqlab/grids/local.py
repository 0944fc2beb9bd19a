"""Where cells are worked on: what every launcher does, and the one for processes of this machine.

A cell is `python -m ibqlab.grids.worker FOLDER CELL` in a process that outlives whoever started it; `slurm` makes
jobs of a cluster of the same.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from ibqlab.grids.cells import NO_ROOM, Cell, CellStore, StudyError


@runtime_checkable
class Job(Protocol):
    """A cell that is being worked on."""

    def ended(self) -> bool:
        """Whether its process is gone."""

    def code(self) -> int | None:
        """Exit code of a process that has ended, negative for a signal; None where nobody saw it."""

    def reason(self) -> str:
        """How it ended, in words: "exit code 1", "killed by signal 9"."""

    def stop(self) -> None:
        """End it now; it can be gone on with."""


@runtime_checkable
class Launcher(Protocol):
    """Starts cells."""

    def free(self, cell: Cell) -> bool:
        """Whether there is room for a cell now."""

    def start(self, cell: Cell, store: CellStore) -> Job:
        """Start a cell that `store.prepare` has written down."""

    def find(self, cell: Cell, store: CellStore) -> Job | None:
        """The job of an earlier engine that still works on a cell."""

    def close(self) -> None:
        """Let go of what it holds; cells that are being worked on go on."""


def worker_command(cell: Cell, store: CellStore) -> list[str]:
    """What works on a cell of several processes, on the machine where it is typed."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cell.config.processes)]
    return [sys.executable, *together, "-m", "ibqlab.grids.worker", str(store.folder.resolve()), cell.name]


class LocalLauncher:
    """Processes of this machine, one per GPU or per group of cores.

    Args:
        workers: cells at a time, at least 1; with CUDA at most as many as there are devices.
        threads: of each; 0: the cores shared out evenly.
    """

    def __init__(self, workers: int = 1, threads: int = 0):
        self.workers = max(1, workers)
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
        self.threads = threads or max(1, len(cores) // self.workers)
        self.cores = [
            [cores[(slot * self.threads + index) % len(cores)] for index in range(self.threads)]
            for slot in range(self.workers)
        ]
        self.slots: list[Job | None] = [None] * self.workers
        self.server: _Server | None = None

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
        environment = {}
        if cell.config.accelerator != "cpu":
            devices = _devices()
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[slot] for slot in taken if slot < len(devices))
        if cell.config.processes == 1:
            self.server = self.server if self.server and self.server.alive() else _Server(self.threads)
            job = self.server.start(cell, store, cores, environment)
        else:
            job = _ChildJob(cell, store, _environment(self.threads) | environment)
        for slot in taken:
            self.slots[slot] = job
        return job

    def find(self, cell: Cell, store: CellStore) -> Job | None:
        """A process of an earlier engine, known by the lock that it holds; it takes a slot meanwhile."""
        if not store.is_taken(cell.name):
            return None
        job = FoundJob(cell.name, store)
        for slot in self._free_slots()[:1]:
            self.slots[slot] = job
        return job

    def close(self) -> None:
        """End the server; its forks go on."""
        if self.server:
            self.server.process.stdin.close()
            self.server.process.wait()
            self.server.process.stdout.close()
            self.server = None


def _devices() -> list[str]:
    """CUDA devices by the names that a child's CUDA_VISIBLE_DEVICES takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    import torch  # noqa: PLC0415

    return [str(number) for number in range(torch.cuda.device_count())]


def _environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "agg"}


class _Server:
    """The process that forks a process per cell (see `worker`)."""

    def __init__(self, threads: int):
        package = Path(__file__).resolve().parents[2]
        places = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            # By its path, since -m imports the whole package first, and a server that imports must notice its engine's
            # end, too. -P: this folder is no place to import from.
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), "--serve", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_environment(threads), "PYTHONPATH": os.pathsep.join(places)},
            start_new_session=True,
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.rest, self.pids, self.codes = b"", {}, {}

    def alive(self) -> bool:
        """Whether it still answers."""
        return self.process.poll() is None

    def start(self, cell: Cell, store: CellStore, cores: list[int], environment: dict[str, str]) -> "_ForkedJob":
        """Ask for a cell's process on these cores."""
        self.pids.pop(cell.name, None)
        self.codes.pop(cell.name, None)
        request = {
            "folder": str(store.folder.resolve()),
            "name": cell.name,
            "log": str(store.log(cell.name).resolve()),
            "cores": cores,
            "environment": environment,
        }
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return _ForkedJob(cell.name, store, self)

    def listen(self) -> None:
        """Take in what it has answered since."""
        with suppress(BlockingIOError):
            self.rest += os.read(self.process.stdout.fileno(), 65536)
        *lines, self.rest = self.rest.split(b"\n")
        for line in map(json.loads, lines):
            where, key = (self.codes, "code") if "code" in line else (self.pids, "pid")
            where[line["name"]] = line[key]


class _ForkedJob:
    """A cell's process that the server has forked."""

    def __init__(self, name: str, store: CellStore, server: _Server):
        self.name, self.store, self.server = name, store, server

    def ended(self) -> bool:
        """As `Job`."""
        self.server.listen()
        if self.name in self.server.codes:
            return True
        return not self.server.alive() and not self.store.is_taken(self.name)

    def code(self) -> int | None:
        """As `Job`."""
        return self.server.codes.get(self.name)

    def reason(self) -> str:
        """As `Job`."""
        return how_it_ended(self.code())

    def stop(self) -> None:
        """As `Job`."""
        self.server.listen()
        if self.name in self.server.pids and self.name not in self.server.codes:
            with suppress(ProcessLookupError):
                os.kill(self.server.pids[self.name], signal.SIGTERM)


class _ChildJob:
    """A torchrun of this machine."""

    def __init__(self, cell: Cell, store: CellStore, environment: dict[str, str]):
        with open(store.log(cell.name), "ab") as log:
            self.process = subprocess.Popen(
                worker_command(cell, store),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def ended(self) -> bool:
        """As `Job`."""
        return self.process.poll() is not None

    def code(self) -> int | None:
        """As `Job`."""
        return self.process.returncode

    def reason(self) -> str:
        """As `Job`."""
        return how_it_ended(self.code())

    def stop(self) -> None:
        """As `Job`."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)


def how_it_ended(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "ended, and nobody saw how"
    if code == NO_ROOM:
        return "the disk or the memory was full"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class FoundJob:
    """Somebody else's process at a cell of this folder."""

    def __init__(self, name: str, store: CellStore):
        self.name, self.store = name, store

    def ended(self) -> bool:
        """As `Job`."""
        return not self.store.is_taken(self.name)

    def code(self) -> int | None:
        """As `Job`."""
        return None

    def reason(self) -> str:
        """As `Job`."""
        return how_it_ended(self.code())

    def stop(self) -> None:
        """Left alone: whoever started it may still want it."""
