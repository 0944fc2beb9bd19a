"""The engine: cells as processes that survive alone, rows that come once, failures told, kills repaired."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from ibqlab.base.files import is_alive
from ibqlab.config import ConfigError
from ibqlab.grids.cells import NO_ROOM, Cell, CellStore, StudyError, cause_of
from ibqlab.grids.engine import run_cells
from ibqlab.grids.local import LocalLauncher
from ibqlab.grids.slurm import SlurmLauncher
from ibqlab.runs import Run, RunError
from ibqlab.studies.study import SharedParameters
from ibqlab.training import recipe_config


def cell(seed=0, steps=4, **settings):
    config = recipe_config("builtin/smoke", {"seed": seed, "steps": steps, "record.validate_every": steps, **settings})
    return Cell(f"seed{seed}-steps{steps}", config, {"seed": seed, "method": "ibq"})


def wild(seed=0):
    """A cell that fails: its learning rate makes weights that are not finite."""
    return replace(cell(seed, **{"optimizer.learning_rate": 1e30}), name=f"wild{seed}")


def generator(needs):
    config = recipe_config("builtin/smoke_generator", {"tokenizer": needs.name, "steps": 4})
    return Cell("generator", config, {"seed": 0}, needs=needs.name)


LAUNCHER = LocalLauncher(2)
"""One for all tests: it imports what cells need once."""


def run(cells, folder, **options):
    return run_cells(cells, CellStore(folder), LAUNCHER, progress=False, **options)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Four cells that were run: two good ones, one that fails, a generator over a good one, one over the failed."""
    folder = tmp_path_factory.mktemp("engine") / "grid"
    cells = [cell(0), cell(1), wild(), generator(cell(0)), replace(generator(wild()), name="orphan")]
    return folder, cells, run(cells, folder)


class TestOutcome:
    def test_good_cells_are_finished_though_another_failed(self, grid):
        folder, cells, outcome = grid
        assert outcome.finished == ["seed0-steps4", "seed1-steps4", "generator"]
        table = CellStore(folder).table(cells)
        assert list(table["cell"]) == outcome.finished
        assert table["usage"].iloc[0] > 0
        assert table["tokens"].iloc[0] >= 10 * 64
        assert {"quantizer_ms", "quantizer_mib", "seconds", "provenance"} <= set(table)

    def test_a_failed_cell_is_listed_with_its_last_lines(self, grid):
        _, _, outcome = grid
        assert list(outcome.failed) == ["wild0"]
        assert "NaN or infinity" in outcome.failed["wild0"][0]
        assert any("Traceback" in line or "TrainingError" in line for line in outcome.failed["wild0"][1:])
        assert "retry=true" in str(outcome)
        with pytest.raises(StudyError, match="3 of 5 runs are finished"):
            outcome.check()

    def test_a_cell_whose_need_failed_is_named_with_it(self, grid):
        _, _, outcome = grid
        assert outcome.waiting == {"orphan": "wild0"}
        assert "orphan waits for wild0" in str(outcome)

    def test_started_again_nothing_is_done_twice(self, grid):
        folder, cells, _ = grid
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
        outcome = run(cells, folder)
        assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before
        assert list(outcome.failed) == ["wild0"]

    def test_a_failed_cell_is_tried_again_on_request(self, grid, tmp_path):
        folder, cells, _ = grid
        shutil.copytree(folder, tmp_path / "again")
        store = CellStore(tmp_path / "again")
        lines = len(store.log("wild0").read_text().splitlines())
        assert list(run(cells, store.folder, retry=True).failed) == ["wild0"]
        assert len(store.log("wild0").read_text().splitlines()) > lines

    def test_a_row_that_was_cut_is_made_again_without_training(self, grid, tmp_path):
        folder, cells, _ = grid
        shutil.copytree(folder, tmp_path / "cut")
        row = tmp_path / "cut" / "rows" / "seed0-steps4.json"
        whole = row.read_text()
        row.write_text(whole[: len(whole) // 2])
        metrics = (tmp_path / "cut" / "seed0-steps4" / "metrics.jsonl").stat().st_mtime_ns
        assert "seed0-steps4" in run(cells[:2], tmp_path / "cut").finished
        assert json.loads(row.read_text())["usage"] == json.loads(whole)["usage"]
        assert (tmp_path / "cut" / "seed0-steps4" / "metrics.jsonl").stat().st_mtime_ns == metrics


class TestKills:
    def test_a_killed_worker_loses_only_what_is_after_its_checkpoint(self, tmp_path):
        long = cell(0, steps=100, **{"record.checkpoint_every": 5, "record.validate_every": 100})
        store = CellStore(tmp_path)
        store.prepare(long)
        job = LAUNCHER.start(long, store)
        _wait(lambda: store.last_step(long.name) >= 8)
        os.kill(job.process.pid, signal.SIGKILL)
        _wait(job.ended)
        assert job.reason() == "killed by signal 9"
        step, _ = Run(tmp_path / long.name).load_checkpoint()
        assert step >= 5
        outcome = run([long], tmp_path)
        assert outcome.finished == [long.name]
        kept = Run(tmp_path / long.name)
        assert len(kept.provenance["resumed"]) == 1
        whole = tmp_path / "whole"
        run([long], whole)
        columns = ["step", "loss", "usage", "validation_l1"]
        pd.testing.assert_frame_equal(kept.metrics[columns], Run(whole / long.name).metrics[columns])

    def test_a_killed_cell_is_listed_and_goes_on_unasked(self, tmp_path):
        long = cell(0, steps=100, **{"record.checkpoint_every": 10, "record.validate_every": 100})
        store = CellStore(tmp_path)
        with ThreadPoolExecutor(1) as threads:
            engine = threads.submit(run, [long], tmp_path)
            _wait(lambda: store.last_step(long.name) >= 10)
            os.kill(_worker_of(store, long.name), signal.SIGKILL)
            outcome = engine.result(120)
        assert not outcome.finished and list(outcome.killed) == [long.name]
        failure = store.failure(long)
        assert failure["killed"]
        assert failure["error"] == "killed by signal 9"
        assert run([long], tmp_path).finished == [long.name]
        assert store.failure(long) is None

    def test_a_cell_outlives_its_engine_and_is_found_by_the_next(self, tmp_path):
        long = cell(0, steps=40, **{"record.checkpoint_every": 20, "record.validate_every": 40})
        store = CellStore(tmp_path)
        starter = _other_engine(tmp_path, 40)
        _wait(lambda: store.last_step(long.name) >= 2)
        process = _worker_of(store, long.name)
        os.kill(process, signal.SIGSTOP)  # not to finish before its engine is gone
        status = Path(f"/proc/{process}/status").read_text()
        assert "Name:\tibqlab-cell\n" in status
        server = int(re.search(r"PPid:\t(\d+)", status)[1])
        starter.kill()
        starter.wait()
        assert store.is_taken(long.name)
        os.kill(process, signal.SIGCONT)
        assert run([long], tmp_path).finished == [long.name]
        _wait(lambda: not is_alive(server), 60)  # it ends with its engine and the last of its cells
        assert "resumed" not in Run(tmp_path / long.name).provenance

    def test_a_script_that_ends_leaves_its_cell_at_work_and_is_run_once(self, tmp_path):
        """Without `if __name__ == "__main__"`, and with two threads for its cell."""
        script, short, store = tmp_path / "script.py", cell(0), CellStore(tmp_path / "grid")
        script.write_text(
            "import sys, os; sys.path.insert(0, sys.argv[1])\n"
            "print('begun', flush=True)\n"
            "from test_engine import LocalLauncher, CellStore, cell\n"
            "LocalLauncher(1, threads=2).start(cell(0), CellStore(sys.argv[2]))\n"
        )
        command = [sys.executable, str(script), os.path.dirname(__file__), str(store.folder)]
        # The cell waits for a reader of its log, and so outlasts the script however long that takes.
        store.prepare(short)
        os.mkfifo(store.log(short.name))
        # A pipe ends with the script: neither its cell nor the server that this was forked from holds it open.
        printed = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        ).stdout
        assert store.row(short) is None
        with open(os.open(store.log(short.name), os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as log:
            _wait(lambda: store.row(short))
            os.set_blocking(log.fileno(), True)
            logged = log.read()
        assert printed == "begun\n"
        assert "begun" not in logged
        assert Run(store.folder / short.name).provenance["threads"] == 2


class TestBadInput:
    def test_two_cells_of_the_same_settings_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=r"seed0-steps4 and other are the same run \(content hash"):
            run([cell(0), replace(cell(0), name="other")], tmp_path)
        assert not list(tmp_path.iterdir())

    def test_one_name_for_two_settings_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="two runs are named seed0-steps4"):
            run([cell(0), replace(cell(1), name="seed0-steps4")], tmp_path)

    def test_the_folder_of_another_grid_is_refused(self, tmp_path):
        store = CellStore(tmp_path / "grid")
        store.claim({"study": "mine", "steps": 3})
        store.claim({"study": "mine", "steps": 3})
        with pytest.raises(StudyError, match=r"holds another grid.*steps: 3 → 4"):
            store.claim({"study": "mine", "steps": 4})

    def test_more_processes_than_workers_is_said_before_anything_runs(self, tmp_path):
        with pytest.raises(StudyError, match="give workers=4"):
            run([cell(0, processes=4)], tmp_path)

    def test_a_cluster_that_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(StudyError, match=r"sbatch, which is not on this machine.*cluster=local"):
            SlurmLauncher(tmp_path)

    def test_a_cluster_that_does_not_answer(self, tmp_path, monkeypatch):
        for name, text in (("sbatch", "exit 0"), ("sinfo", "echo no controller >&2; exit 1")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(StudyError, match=r"Slurm does not answer .no controller"):
            SlurmLauncher(tmp_path)

    def test_settings_of_a_cluster_without_one(self):
        with pytest.raises(ValueError, match="cluster=slurm"):
            SharedParameters(cluster_settings=("partition=gpu",))
        with pytest.raises(ValueError, match="did you mean 'slurm'"):
            SharedParameters(cluster="slrm")

    def test_a_full_disk_is_listed_and_no_finished_row_is_lost(self, grid, tmp_path):
        folder, _, _ = grid
        shutil.copytree(folder, tmp_path / "full")
        rows = {file.name: file.read_bytes() for file in (tmp_path / "full" / "rows").iterdir()}
        code = (
            "import resource, sys\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "from ibqlab.grids.worker import main\n"
            "sys.exit(main(*sys.argv[1:]))"
        )
        store, new = CellStore(tmp_path / "full"), cell(7)
        store.prepare(new)
        done = subprocess.run(
            [sys.executable, "-c", code, str(store.folder), new.name], capture_output=True, text=True, check=False
        )
        assert done.returncode == NO_ROOM
        assert "disk or a quota is full" in store.failure(new)["error"]
        assert store.failure(new)["cause"] == "disk"
        # There is room again: the same command tries it again, unasked.
        assert run([new], store.folder).finished == [new.name]
        assert rows.items() <= {file.name: file.read_bytes() for file in (store.folder / "rows").iterdir()}.items()

    def test_a_folder_that_cannot_be_written_is_said(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(RunError, match="a part of the path is a file"):
            CellStore(tmp_path / "file" / "grid").claim({"study": "mine"})

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
    @pytest.mark.parametrize("name", ["study.json", "cells/seed0-steps4.json", "rows/seed0-steps4.json"])
    def test_what_is_no_file_is_named_and_nothing_is_changed(self, tmp_path, name, make):
        store = CellStore(tmp_path)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make(tmp_path / name)
        doors = {"study.json": lambda: store.claim({"study": "mine"}), "rows": lambda: store.row(cell(0))}
        with pytest.raises(RunError, match=f"{name}.*nothing was changed"):
            doors.get(name.split("/")[0], lambda: store.request("seed0-steps4"))()

    @pytest.mark.parametrize(
        "change",
        [
            {"usage": None},
            {"usage": "![x](figures/../../secret)"},
            {"usage": [1]},
            {"usage": True},
            {"method": "<script>"},
            {"seed": None},
            {"cell": "# heading"},
            {"provenance": "text"},
            {"more": "text"},
        ],
        ids=str,
    )
    def test_a_row_with_null_or_text_counts_as_damaged(self, grid, tmp_path, change):
        folder, cells, _ = grid
        store, file = CellStore(tmp_path), tmp_path / "rows" / "seed0-steps4.json"
        shutil.copytree(folder / "rows", tmp_path / "rows")
        assert store.row(cells[0])
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        assert store.row(cells[0]) is None

    @pytest.mark.parametrize(
        ("error", "cause"),
        [
            (OSError(28, "No space left on device"), "disk"),
            (MemoryError(), "memory"),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
            (RuntimeError("CUDA out of memory. Tried to allocate"), "memory"),
            (ValueError("out of memory of what was said"), "error"),
            (OSError(13, "Permission denied"), "error"),
        ],
    )
    def test_causes_of_failures_are_told_apart(self, error, cause):
        assert cause_of(error) == cause
        wrapped = RunError("cannot be written")
        wrapped.__cause__ = error
        assert cause_of(wrapped) == cause

    def test_a_failure_of_an_earlier_version_is_read(self, grid, tmp_path):
        cells, store = grid[1], CellStore(tmp_path)
        (tmp_path / "failed").mkdir()
        for killed, cause in ((True, "killed"), (False, "error"), ("x", "error")):
            facts = {"key": cells[0].key, "error": None, "killed": killed, "lines": "text"}
            (tmp_path / "failed" / f"{cells[0].name}.json").write_text(json.dumps(facts))
            assert (store.failure(cells[0])["cause"], store.failure(cells[0])["lines"]) == (cause, [])


class TestSeveralProcesses:
    @pytest.mark.usefixtures("warm_start")
    def test_a_cell_of_two_processes_is_started_by_torchrun(self, tmp_path):
        two = cell(0, processes=2)
        assert run([two], tmp_path).finished == [two.name]
        assert CellStore(tmp_path).row(two)["steps"] == 4


def _other_engine(folder, steps):
    """Another process that runs one cell of `folder`; exit code 3 where it ends unfinished."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_engine import cell, run\n"
        "steps = int(sys.argv[3])\n"
        "long = cell(0, steps=steps, **{'record.checkpoint_every': 20, 'record.validate_every': steps})\n"
        "sys.exit(0 if run([long], sys.argv[2]).finished else 3)"
    )
    return subprocess.Popen([sys.executable, "-c", code, os.path.dirname(__file__), str(folder), str(steps)])


def _worker_of(store, name):
    """The process that holds a cell's lock, as the kernel lists it."""
    inode = os.stat(store.folder / "locks" / name).st_ino
    with open("/proc/locks", encoding="ascii") as locks:
        found = [line.split() for line in locks if f":{inode} " in line]
    return int(found[0][4])


def _wait(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
