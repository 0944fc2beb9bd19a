"""Where cells are worked on: processes of this machine, or jobs of a Slurm cluster.

Either way a cell is `python -m ibqlab.studies.worker FOLDER CELL` in a process that outlives whoever started it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ibqlab.config import ConfigError, nearest, read_assigned, split_assignment
from ibqlab.studies.cells import Cell, CellStore, StudyError


@runtime_checkable
class Job(Protocol):
    """A cell that is being worked on."""

    def ended(self) -> bool:
        """Whether its process is gone."""

    def reason(self) -> str:
        """How it ended, as far as that is known from outside: "exit code 1", "killed by signal 9"."""

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
    return [sys.executable, *together, "-m", "ibqlab.studies.worker", str(store.folder.resolve()), cell.name]


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
        job = _FoundJob(cell.name, store)
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
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ibqlab.studies.worker", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_environment(threads)},
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

    def reason(self) -> str:
        """As `Job`."""
        return _how_it_ended(self.server.codes.get(self.name))

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

    def reason(self) -> str:
        """As `Job`."""
        return _how_it_ended(self.process.returncode)

    def stop(self) -> None:
        """As `Job`."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "ended, and nobody saw how"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class _FoundJob:
    """Somebody else's process at a cell of this folder."""

    def __init__(self, name: str, store: CellStore):
        self.name, self.store = name, store

    def ended(self) -> bool:
        """As `Job`."""
        return not self.store.is_taken(self.name)

    def reason(self) -> str:
        """As `Job`."""
        return _how_it_ended(None)

    def stop(self) -> None:
        """Left alone: whoever started it may still want it."""


SLURM_SETTINGS = {
    "partition": "slurm_partition",
    "account": "slurm_account",
    "qos": "slurm_qos",
    "constraint": "slurm_constraint",
    "setup": "slurm_setup",
    "timeout_min": "timeout_min",
    "cpus_per_task": "cpus_per_task",
    "mem_gb": "mem_gb",
    "gpus_per_node": "gpus_per_node",
    "max_jobs": "",
}
"""What `cluster_settings` may say, and submitit's names for it."""


class SlurmLauncher:
    """Jobs of the Slurm cluster that this machine may submit to, through submitit.

    Args:
        folder: of the study, on a disk that the cluster's machines share.
        settings: "partition=gpu", "timeout_min=600", "gpus_per_node=8", …, the keys of `SLURM_SETTINGS`.
    Raises:
        StudyError: no Slurm here, or it does not answer.
        ConfigError: unknown settings.
        ValueError: submitit is not installed.
    """

    def __init__(self, folder: Path, settings: Sequence[str] = ()):
        for program in ("sbatch", "sinfo"):
            if not shutil.which(program):
                raise StudyError(
                    f"cluster=slurm needs Slurm's {program}, which is not on this machine: start the notebook where "
                    "jobs are submitted from, or give cluster=local"
                )
        answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60, check=False)
        if answer.returncode:
            raise StudyError(f"Slurm does not answer ({answer.stderr.strip()[:200]}); give cluster=local meanwhile")
        try:
            import submitit  # noqa: PLC0415 - only clusters need it
        except ImportError:
            raise ValueError("cluster=slurm needs submitit: pip install 'ibqlab[cluster]'") from None
        given = {}
        for setting in settings:
            key, value = split_assignment(setting)
            if key not in SLURM_SETTINGS:
                raise ConfigError(f"cluster_settings: there is no {key!r}; {nearest(key, list(SLURM_SETTINGS))}")
            given[key] = read_assigned(key, value)
        self.max_jobs = int(given.pop("max_jobs", 64))
        self.gpus_per_node = int(given.get("gpus_per_node", 8))
        self.settings = {SLURM_SETTINGS[key]: value for key, value in given.items()}
        if "slurm_setup" in self.settings and isinstance(self.settings["slurm_setup"], str):
            self.settings["slurm_setup"] = [self.settings["slurm_setup"]]
        self.submitit, self.folder = submitit, folder / "slurm"
        self.jobs: list[_SlurmJob] = []

    def free(self, cell: Cell) -> bool:
        """Whether fewer than max_jobs are queued or running."""
        return sum(not job.ended() for job in self.jobs) < self.max_jobs

    def start(self, cell: Cell, store: CellStore) -> Job:
        """Submit a job; its number is kept in the study's folder, so that a later engine finds it."""
        nodes = -(-cell.config.processes // self.gpus_per_node)
        executor = self.submitit.AutoExecutor(folder=self.folder, cluster="slurm")
        shared: dict[str, Any] = {"name": cell.name[:60], "nodes": nodes, "tasks_per_node": 1}
        if cell.config.accelerator != "cpu":
            shared["gpus_per_node"] = min(cell.config.processes, self.gpus_per_node)
        executor.update_parameters(**{**self.settings, **shared})
        work = SlurmWork(str(store.folder.resolve()), cell.name, cell.config.processes)
        try:
            submitted = executor.submit(work)
        except self.submitit.core.utils.FailedJobError as error:
            raise StudyError(f"Slurm refused {cell.name}: {_last_line(error)}; mend cluster_settings") from None
        number = self.folder / f"{cell.name}.json"
        number.write_text(json.dumps({"job": submitted.job_id}), encoding="utf-8")
        return self._noted(submitted)

    def find(self, cell: Cell, store: CellStore) -> Job | None:
        """The job that an earlier engine submitted for a cell, if it is still queued or running."""
        try:
            number = json.loads((self.folder / f"{cell.name}.json").read_text(encoding="utf-8"))["job"]
        except (OSError, ValueError, KeyError):
            return None
        job = _SlurmJob(self.submitit.SlurmJob(folder=self.folder, job_id=number))
        if job.ended():
            return None
        self.jobs.append(job)
        return job

    def _noted(self, submitted: Any) -> "_SlurmJob":
        job = _SlurmJob(submitted)
        self.jobs.append(job)
        return job

    def close(self) -> None:
        """Nothing to let go of: jobs belong to the cluster."""


class SlurmWork:
    """What a job runs, once per machine: the cell's process, or its share of a torchrun over all machines.

    A job that Slurm ends for its time limit or for others' sake is queued again, and its cell goes on from its last
    checkpoint.
    """

    def __init__(self, folder: str, name: str, processes: int):
        self.folder, self.name, self.processes = folder, name, processes

    def __call__(self) -> int:
        command = [sys.executable, *self._launcher(), "-m", "ibqlab.studies.worker", self.folder, self.name]
        with open(Path(self.folder) / "logs" / f"{self.name}.log", "ab") as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode

    def _launcher(self) -> list[str]:
        if self.processes == 1:
            return []
        from submitit import JobEnvironment  # noqa: PLC0415 - there on the cluster's machines

        hosts = JobEnvironment().hostnames
        return [
            "-m",
            "torch.distributed.run",
            f"--nnodes={len(hosts)}",
            f"--nproc-per-node={-(-self.processes // len(hosts))}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={hosts[0]}:29500",
            f"--rdzv-id={os.environ['SLURM_JOB_ID']}",
        ]

    def checkpoint(self) -> Any:
        """What is queued again: submitit calls this when the job's time is over."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415

        return DelayedSubmission(self)


class _SlurmJob:
    """A job by its number."""

    def __init__(self, job: Any):
        self.job = job

    def ended(self) -> bool:
        """As `Job`."""
        return self.job.done()

    def reason(self) -> str:
        """As `Job`."""
        with suppress(Exception):
            return f"exit code {self.job.result()}"
        return f"job {self.job.job_id}: {self.job.state}"

    def stop(self) -> None:
        """Left in the queue: it was given away so that it goes on alone."""


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
