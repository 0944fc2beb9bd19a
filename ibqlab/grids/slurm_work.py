"""What a job of a Slurm cluster runs; apart from `slurm`, so that a job imports torch in its cell's process alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FIRST_PORT, PORTS = 20_000, 10_000
"""Where the processes of a cell meet, below the ports that systems give away by themselves."""


class SlurmWork:
    """What a job runs, once per machine: the cell's process, or its share of a torchrun over all machines.

    A job that Slurm ends for its time limit or for others' sake is queued again, and its cell goes on from its last
    checkpoint. Slurm signals this process and the cell's alike, so the cell's ends meanwhile.
    """

    def __init__(self, folder: str, name: str, processes: int):
        self.folder, self.name, self.processes = folder, name, processes

    def __call__(self) -> int:
        command = [sys.executable, *self._launcher(), "-m", "ibqlab.grids.worker", self.folder, self.name]
        with open(Path(self.folder) / "logs" / f"{self.name}.log", "ab") as log:
            return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode

    def _launcher(self) -> list[str]:
        if self.processes == 1:
            return []
        from submitit import JobEnvironment  # noqa: PLC0415 - there on the cluster's machines

        hosts, job = JobEnvironment().hostnames, os.environ["SLURM_JOB_ID"]
        # Jobs may share a machine: each has a port of its own.
        meeting = f"--rdzv-endpoint={hosts[0]}:{FIRST_PORT + int(job) % PORTS}"
        size = (f"--nnodes={len(hosts)}", f"--nproc-per-node={-(-self.processes // len(hosts))}")
        return ["-m", "torch.distributed.run", *size, "--rdzv-backend=c10d", meeting, f"--rdzv-id={job}"]

    def checkpoint(self) -> Any:
        """What is queued again: submitit calls this when the job's time is over."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415

        return DelayedSubmission(self)
