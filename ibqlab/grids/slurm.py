"""Cells as jobs of a Slurm cluster, through submitit: the launcher behind cluster=slurm.

A job is queued again when its time is over or others go first, and its cell goes on from its last checkpoint.
"""

import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ibqlab.base.files import write_whole
from ibqlab.config import ConfigError, nearest, read_assigned, split_assignment
from ibqlab.grids.cells import Cell, CellStore, StudyError, as_json, read_json
from ibqlab.grids.local import Job
from ibqlab.grids.slurm_work import SlurmWork

SLURM_SETTINGS = {
    **{name: f"slurm_{name}" for name in ("partition", "account", "qos", "constraint", "setup")},
    **{name: name for name in ("timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node")},
    "max_jobs": "",
}
"""What `cluster_settings` may say, and submitit's names for it."""
TIME_LIMITS = 1000
"""Times that a job is queued again because its time was over."""


class SlurmLauncher:
    """A launcher of jobs of the Slurm cluster that this machine may submit to, through submitit.

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
        try:
            answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=60, check=False)
            complaint = answer.stderr.strip()[:200] or "without a reason" if answer.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            complaint = str(error)
        if complaint:
            raise StudyError(f"Slurm does not answer ({complaint}); give cluster=local meanwhile")
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
        self.max_jobs = _whole_number("max_jobs", given.pop("max_jobs", 64))
        self.gpus_per_node = _whole_number("gpus_per_node", given.get("gpus_per_node", 8))
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
        executor = self.submitit.AutoExecutor(folder=self.folder, cluster="slurm", slurm_max_num_timeout=TIME_LIMITS)
        shared: dict[str, Any] = {"name": cell.name.replace("/", "-")[:60], "nodes": nodes, "tasks_per_node": 1}
        if cell.config.accelerator != "cpu":
            shared["gpus_per_node"] = min(cell.config.processes, self.gpus_per_node)
        executor.update_parameters(**{**self.settings, **shared})
        work = SlurmWork(str(store.folder.resolve()), cell.name, cell.config.processes)
        number = self.folder / f"{cell.name}.json"
        number.parent.mkdir(parents=True, exist_ok=True)
        try:
            submitted = executor.submit(work)
        except self.submitit.core.utils.FailedJobError as error:
            *_, reason = [type(error).__name__, *(line for line in str(error).splitlines() if line.strip())]
            raise StudyError(f"Slurm refused {cell.name}: {reason}; mend cluster_settings") from None
        write_whole(number, as_json({"job": submitted.job_id}))
        self.jobs.append(_SlurmJob(submitted))
        return self.jobs[-1]

    def find(self, cell: Cell, store: CellStore) -> Job | None:
        """The job that an earlier engine submitted for a cell and that is queued or running, or another's process."""
        number = (read_json(self.folder / f"{cell.name}.json") or {}).get("job")
        if number is not None:
            job = _SlurmJob(self.submitit.SlurmJob(folder=self.folder, job_id=number))
            if not job.ended():
                self.jobs.append(job)
                return job
        return Job(cell.name, store) if store.is_taken(cell.name) else None


class _SlurmJob(Job):
    """A job by its number. It is never stopped: it was given away so that it goes on alone."""

    def __init__(self, job: Any):
        self.job = job

    def ended(self) -> bool:
        """As `Job`."""
        return self.job.done()

    def code(self) -> int | None:
        """As `Job`. A job that Slurm ended has none."""
        with suppress(Exception):
            return self.job.result()
        return None

    def reason(self) -> str:
        """As `Job`."""
        code = self.code()
        return f"job {self.job.job_id}: {self.job.state}" if code is None else super().reason()


def _whole_number(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"cluster_settings: {name} must be a whole number of at least 1; got {value!r}")
    return value
