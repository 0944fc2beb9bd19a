"""A grid on a real Slurm of one node on loopback, started and stopped by this test.

Needs Slurm's and munge's programs and the right to start them: `apt-get install slurm-wlm munge`, as root.
"""

import json
import os
import pwd
import shutil
import socket
import subprocess
import time

import pytest
from test_engine import cell, generator

from ibqlab.grids.cells import CellStore, StudyError
from ibqlab.grids.engine import run_cells
from ibqlab.grids.slurm import SlurmLauncher

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "sinfo")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs Slurm: {', '.join(MISSING)} not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons are started by root alone"),
    pytest.mark.usefixtures("warm_start"),
]
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of this machine; its settings stand in the environment meanwhile."""
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == 0 and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(2)
    settings = CONFIG.format(host=host, folder=folder, ports=ports, cores=len(os.sched_getaffinity(0)))
    (folder / "slurm.conf").write_text(settings)
    environment = pytest.MonkeyPatch()
    environment.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    environment.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    daemons = []
    try:
        daemons.append(_munge(folder))
        for name in ("slurmctld", "slurmd"):
            command = [name, "-D", "-c", "-f", str(folder / "slurm.conf")]
            daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        _wait_until_idle(folder)
        yield folder
    finally:
        # A job's last process is told of its end by the daemons: they must outlive it.
        end = time.monotonic() + 30
        while time.monotonic() < end and subprocess.run(["squeue", "-h"], capture_output=True, check=False).stdout:
            subprocess.run(["scancel", "--full", "--user=root"], check=False)
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        environment.undo()


class TestSlurm:
    def test_a_grid_runs_as_jobs_and_gives_its_rows(self, slurm, tmp_path):
        cells = [cell(0), cell(1), generator(cell(0))]
        store = CellStore(tmp_path / "grid")
        outcome = run_cells(cells, store, SlurmLauncher(store.folder, ["partition=main"]), progress=False)
        assert outcome.finished == ["seed0-steps4", "seed1-steps4", "generator"], outcome
        assert list(store.table(cells)["cell"]) == outcome.finished
        jobs = [json.loads((store.folder / "slurm" / f"{one.name}.json").read_text())["job"] for one in cells]
        assert len(set(jobs)) == 3
        again = run_cells(cells, store, SlurmLauncher(store.folder), progress=False)
        assert again.finished == outcome.finished

    def test_a_job_outlives_its_engine_and_is_found_by_the_next(self, slurm, tmp_path):
        long = cell(0, steps=100, **{"record.validate_every": 100})
        store = CellStore(tmp_path / "grid")
        store.prepare(long)
        SlurmLauncher(store.folder).start(long, store)
        launcher = SlurmLauncher(store.folder)
        assert launcher.find(long, store) is not None
        assert run_cells([long], store, launcher, progress=False).finished == [long.name]
        numbers = {file.name.split("_")[0] for file in (store.folder / "slurm").glob("*_0_log.out")}
        assert len(numbers) == 1

    def test_a_job_whose_time_is_over_is_queued_again_and_goes_on_from_its_checkpoint(self, slurm, tmp_path):
        long = cell(0, steps=120, **{"record.validate_every": 120, "record.checkpoint_every": 10})
        store = CellStore(tmp_path / "grid")
        store.prepare(long)
        launcher = SlurmLauncher(store.folder)
        launcher.start(long, store)
        job = json.loads((store.folder / "slurm" / f"{long.name}.json").read_text())["job"]
        checkpoints = store.folder / long.name / "checkpoints"
        _wait_for(lambda: any(checkpoints.glob("*")), 120)
        subprocess.run(["scancel", "--signal=USR2", job], check=True)
        _wait_for(lambda: "Restarts=1" in _about(job) and "JobState=PENDING" in _about(job), 60)
        # Slurm lets two minutes pass before such a job may start.
        subprocess.run(["scontrol", "update", f"JobId={job}", "EligibleTime=now"], check=False)
        assert run_cells([long], store, launcher, progress=False).finished == [long.name]
        rows = [json.loads(line) for line in (store.folder / long.name / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)) and steps[-1] == 120
        assert "Restarts=1" in _about(job)

    def test_a_process_of_somebody_else_is_waited_for(self, slurm, tmp_path):
        one, store = cell(0), CellStore(tmp_path / "grid")
        store.prepare(one)
        launcher = SlurmLauncher(store.folder)
        with store.working(one.name):
            found = launcher.find(one, store)
            assert found is not None and not found.ended()
        assert found.ended() and launcher.find(one, store) is None

    def test_a_partition_that_is_not_there_is_said(self, slurm, tmp_path):
        store = CellStore(tmp_path / "grid")
        with pytest.raises(StudyError, match=r"Slurm refused seed0-steps4.*partition"):
            run_cells([cell(0)], store, SlurmLauncher(store.folder, ["partition=nowhere"]), progress=False)

    def test_a_cell_of_two_processes_is_one_torchrun(self, slurm, tmp_path):
        two = cell(0, processes=2)
        store = CellStore(tmp_path / "grid")
        settings = ["cpus_per_task=2"] if len(os.sched_getaffinity(0)) > 1 else []
        outcome = run_cells([two], store, SlurmLauncher(store.folder, settings), progress=False)
        assert outcome.finished == [two.name], outcome


def _wait_for(what, seconds):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.2)


def _about(job):
    return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout


def _munge(folder):
    """Slurm's way to know who asks: a daemon of the user `munge` with a key of this test."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    place = folder / "munge"
    place.mkdir()
    user = pwd.getpwnam("munge")
    for path in (key, place):
        os.chown(path, user.pw_uid, user.pw_gid)
    key.chmod(0o400)
    command = [
        shutil.which("munged"),
        "--foreground",
        "--force",
        f"--socket={folder}/munge.socket",
        f"--key-file={key}",
        f"--log-file={place}/munged.log",
        f"--pid-file={place}/munged.pid",
        f"--seed-file={place}/munged.seed",
    ]
    os.chown(folder, user.pw_uid, user.pw_gid)
    return subprocess.Popen(command, user="munge", group="munge", extra_groups=[], stderr=subprocess.DEVNULL)


def _wait_until_idle(folder):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        answer = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False)
        if answer.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(file.read_text()[-2000:] for file in folder.glob("*.log"))
    pytest.fail(f"Slurm did not come up:\n{answer.stdout}{answer.stderr}\n{logs}")


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
