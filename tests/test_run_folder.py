"""Run folders that somebody else has touched, that two trainings want, or whose process is gone."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image

from ibqlab.base.files import temporary_beside
from ibqlab.base.locking import SILENT_SECONDS
from ibqlab.cli import main
from ibqlab.config import to_dict
from ibqlab.plots.printing import save_figure
from ibqlab.pretrained import CheckpointError, load_tokenizer
from ibqlab.runs import RUN_COLUMNS, Run, RunError, list_runs
from ibqlab.runs.folder import claim_folder, writing
from ibqlab.runs.summaries import TEXTS
from ibqlab.tokens.store import TokenStore
from ibqlab.training import TrainingInterrupted, recipe_config, train

CONFIG = {"tokenizer": {"quantizer": {"name": "ibq", "codebook_size": 64, "code_dim": 8}}, "seed": 3, "steps": 300}


@pytest.fixture
def run(tmp_path):
    """A run with a checkpoint, a snapshot, rows and a figure."""
    run = Run.start(tmp_path / "run", CONFIG)
    for step in (0, 5, 10):
        run.log({"step": step, "loss": 1.0})
    run.save_snapshot(10, codebook=np.ones(3))
    run.save_checkpoint(10, {"w": torch.ones(3)})
    run.figure_path("a.csv").write_text("x")
    return run


def smoke(**settings):
    """The smallest recipe, other settings as a__b for a.b."""
    small = {"tokenizer.quantizer": {"name": "ibq", "codebook_size": 16, "code_dim": 8}}
    return recipe_config("builtin/smoke", small | {key.replace("__", "."): value for key, value in settings.items()})


def trained(folder, config, **options):
    return train(config, folder, progress=False, **options)


def stopped(folder, config, step):
    def watch(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted):
        trained(folder, config, watch=watch)
    return Run(folder)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run stopped at step 8 of 12; tests copy it."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stopped(folder, smoke(), 8)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, never stopped."""
    return trained(tmp_path_factory.mktemp("whole") / "run", smoke())


@pytest.fixture
def copy(half, tmp_path):
    """A copy of the half-done run."""
    subprocess.run(["cp", "-r", str(half), str(tmp_path / "copy")], check=True)
    return Run(tmp_path / "copy")


def contents(folder):
    """Every file below a folder and its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(run):
    return run.load_checkpoint()[1]["model"]


def assert_same_weights(left, right):
    one, other = weights(left), weights(right)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def dead_process():
    """The number of a process that lived."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# --- links and leftovers ---

PARTS = ("checkpoints", "snapshots", "figures", "metrics.jsonl", "provenance.json", "config.yaml", "lock")
WRITES = {
    "checkpoints": lambda run: run.save_checkpoint(20, {}),
    "snapshots": lambda run: run.save_snapshot(20, a=np.ones(2)),
    "figures": lambda run: run.figure_path("b.png"),
    "metrics.jsonl": lambda run: run.log({"step": 20}),
    "provenance.json": lambda run: run.finish("finished"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_lead_out_of_the_folder_are_not_written_through(tmp_path, run, name):
    outside = tmp_path / "outside"
    if (run.path / name).exists():
        (run.path / name).rename(outside)
    else:
        outside.write_text("theirs")
    (run.path / name).symlink_to(outside)
    before = contents(tmp_path)
    says = f"{name} is a link that leads out of the run folder, to .*outside; nothing was written"
    with pytest.raises(RunError, match=says):
        Run.start(run.path, CONFIG)
    if name in WRITES:
        with pytest.raises(RunError, match=says):
            WRITES[name](run)
    assert contents(tmp_path) == before
    assert Run(run.path).metrics["step"].tolist() == [0, 5, 10]  # reading goes on


def test_a_link_inside_the_folder_is_nobodys_harm(run):
    (run.path / "figures" / "a.csv").unlink()
    (run.path / "figures").rmdir()
    (run.path / "figures").symlink_to("snapshots")
    assert Run.start(run.path, CONFIG).figure_path("b.png").parent.is_dir()


@pytest.mark.parametrize("name", [".unfinished.pt", "step_00000020.pt"])
def test_a_planted_link_is_replaced_and_not_followed(tmp_path, run, name):
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    (run.path / "checkpoints" / name).symlink_to(victim)
    run.save_checkpoint(20, {"w": torch.zeros(2)})
    assert victim.read_text() == "theirs" and run.load_checkpoint()[0] == 20
    assert not (run.path / "checkpoints" / "step_00000020.pt").is_symlink()


def test_a_figure_does_not_follow_links(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    for name in ("a.png", ".a.png.part", "a.csv"):
        (tmp_path / name).symlink_to(victim)
    save_figure(Figure(), tmp_path / "a", pd.DataFrame({"x": [1]}))
    assert victim.read_text() == "theirs"
    assert (tmp_path / "a.csv").read_text() == "x\n1\n" and not (tmp_path / "a.png").is_symlink()


def test_the_next_start_sweeps_what_a_dead_process_left_and_no_more(tmp_path, run, monkeypatch):
    places = [run.path / "metrics.jsonl", run.path / "checkpoints" / "step_00000020.pt", run.path / "figures" / "a.png"]
    live = [temporary_beside(place) for place in places]
    dead = dead_process()
    with monkeypatch.context() as patched:
        patched.setattr("os.getpid", lambda: dead)
        left = [temporary_beside(place) for place in places]
        folder = temporary_beside(tmp_path / "new")
    for file in (*live, *left):
        file.write_bytes(b"half")
    folder.mkdir()
    Run.start(run.path, CONFIG)
    assert all(file.exists() for file in live) and not any(file.exists() for file in left)
    Run.start(tmp_path / "new", CONFIG)
    assert not folder.exists()


def test_the_current_folder_is_no_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"a run needs a folder of its own, got \., the current one: --output NAME"):
        Run.start(".", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_one_message(tmp_path):
    with pytest.raises(RunError, match=r"cannot be written \(File name too long"):
        Run.start(tmp_path / ("x" * 300), CONFIG)
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        Run(tmp_path / ("x" * 5000))


# --- one training at a time ---


def test_a_second_training_of_a_folder_is_refused(tmp_path, whole):
    folder, config, messages = tmp_path / "run", smoke(), []

    def watch(row):
        if row["step"] == 6:
            before = contents(folder)
            assert Run(folder).status == "running"
            with pytest.raises(RunError) as caught:
                trained(folder, config)
            messages.append(str(caught.value))
            assert contents(folder) == before

    run = trained(folder, config, watch=watch)
    here = f"process {os.getpid()} on {socket.gethostname()} is training here since 20"
    assert len(messages) == 1 and here in messages[0] and "choose another folder (--output FOLDER)" in messages[0]
    assert run.status == "finished" and run.metrics["step"].is_unique
    assert (run.path / "lock").read_bytes() == b""  # a finished run does not tell whose machine it was
    assert_same_weights(run, whole)


HOLD = """
import os, sys, time
from pathlib import Path
from ibqlab.runs.folder import claim_folder
lock = claim_folder(Path(sys.argv[1]))
if not os.fork():
    time.sleep(60)  # a process that loads images and outlives its parent for a while
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_ends_with_its_process_whatever_its_children_do(run):
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as child:
        try:
            assert child.stdout.readline() == b"held\n"
            assert run.status == "running"
            with pytest.raises(RunError, match=f"process {child.pid} on .* is training here since"):
                Run.start(run.path, CONFIG, claim=True)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            assert run.status == "interrupted"
            Run.start(run.path, CONFIG, claim=True).release()
        finally:
            os.killpg(child.pid, signal.SIGKILL)


def test_a_claim_is_let_go_of_with_its_run(run):
    claimed = Run.start(run.path, CONFIG, claim=True)
    with pytest.raises(RunError, match="is training here"):
        claim_folder(run.path)
    del claimed
    claim_folder(run.path).release()


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"process": "x"}', b"\xff", b"[" * 3000])
def test_a_lock_without_its_holders_name_still_locks(run, content):
    lock = claim_folder(run.path)
    lock.file.write_bytes(content)
    assert run.status == "running"
    with pytest.raises(RunError, match="another process is training here"):
        claim_folder(run.path)


@pytest.mark.parametrize(("age", "status"), [(0, "running"), (2 * SILENT_SECONDS, "interrupted")])
def test_another_machines_training_lives_by_its_signs_of_life(run, age, status):
    file = run.path / "lock"
    file.write_text(json.dumps({"process": 1, "host": "elsewhere", "since": "2026-01-01T00:00:00+00:00"}))
    os.utime(file, (time.time() - age,) * 2)
    assert Run(run.path).status == status
    assert ("process 1 on elsewhere" in run.describe_status()) == (status == "running")


def test_a_run_of_the_lab_is_told_as_one(tmp_path):
    """It keeps no checkpoints, and no `ibqlab train` makes it."""
    quantizer = {"name": "vq", "codebook_size": 8, "code_dim": 2}
    lab = Run.start(tmp_path / "vq", {"lab": {"label": "VQ"}, "steps": 4, "tokenizer": {"quantizer": quantizer}})
    lab.log({"step": 4, "usage": 0.5})
    os.utime(lab.path / "provenance.json", (1, 1))
    os.utime(lab.path / "metrics.jsonl", (1, 1))
    assert lab.describe_status().startswith("interrupted at step 4 of 4; the lab keeps no checkpoints")
    lab.finish("finished")
    assert lab.describe_status() == "finished at step 4 of 4"
    shown = CliRunner().invoke(main, ["show", str(lab.path)])
    assert "none; the lab keeps none" in shown.output and "ibqlab train" not in shown.output
    (row,) = list_runs(tmp_path).to_dict("records")
    assert (row["kind"], row["quantizer"]) == ("lab", "vq")
    with pytest.raises(CheckpointError, match="is a run of the lab, a quantizer alone on features"):
        load_tokenizer(lab.path)


def test_a_training_gives_signs_of_life(run, monkeypatch):
    monkeypatch.setattr("ibqlab.base.locking.BEAT_SECONDS", 0.0)
    claimed = Run.start(run.path, CONFIG, claim=True)
    os.utime(run.path / "lock", (1, 1))
    claimed.give_sign_of_life()
    assert time.time() - (run.path / "lock").stat().st_mtime < 60


def test_a_run_without_a_lock_lives_by_its_files(run):
    assert run.status == "running"
    for name in ("metrics.jsonl", "provenance.json"):
        os.utime(run.path / name, (1, 1))
    assert run.status == "interrupted"
    run.finish("failed")
    assert run.status == "failed"


def test_the_status_is_a_line_with_a_command_that_works(copy, whole):
    line = copy.describe_status()
    start, _, command = line.partition("; go on with: ")
    assert start == "stopped at step 8 of 12"
    assert shlex.split(command) == ["ibqlab", "train", f"{copy.path}/config.yaml", "--output", str(copy.path)]
    done = CliRunner().invoke(main, [*shlex.split(command)[1:], "--no-report"])
    assert done.exit_code == 0, done.output
    assert copy.describe_status() == "finished at step 12 of 12"
    assert_same_weights(copy, whole)


# --- stopped by hand ---

LONG = ("steps=400", "record.log_every=1", "record.validate_every=400", "record.checkpoint_every=400")


def stopped_at_step_5(command, folder, send, number, *words):
    """A training of LONG that gets a signal once its fifth step is logged: its run, exit code and output."""
    command = [*command, "train", "builtin/smoke", *LONG, *words, "--no-report", "--output", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as child:
        deadline = time.monotonic() + 240
        while not (folder.is_dir() and b'"step": 5,' in (folder / "metrics.jsonl").read_bytes()):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        send(child.pid, number)
        output = child.communicate(timeout=120)[0].decode()
    run = Run(folder)
    assert run.status == "stopped", output
    assert 5 <= run.step < 400 and run.step == run.metrics["step"].iloc[-1]
    return run, child.returncode, output


@pytest.mark.parametrize(
    ("send", "number"),
    [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM), (os.killpg, signal.SIGTERM)],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM to all"],
)
def test_signals_end_training_after_its_step_and_save_it(tmp_path, send, number):
    command = [sys.executable, "-m", "ibqlab"]
    run, code, output = stopped_at_step_5(command, tmp_path / "run", send, number, "data.workers=2")
    assert code == 130, output
    assert "Traceback" not in output and "DataLoader" not in output
    if number == signal.SIGTERM:
        assert f"stopped at step {run.step} of 400, everything is saved; go on with the same command" in output
    Run.start(run.path, run.config, claim=True).release()


@pytest.mark.usefixtures("warm_start")
def test_a_stop_of_torchrun_saves_one_step_of_all_processes(tmp_path):
    """Processes that saved different steps would wait for each other for ever."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ibqlab"]
    run, _, output = stopped_at_step_5(torchrun, tmp_path / "run", os.kill, signal.SIGTERM, "processes=2")
    assert f"stopped at step {run.step} of 400, everything is saved; go on with the same command" in output


def test_a_stop_is_shown_as_one_line():
    told = TrainingInterrupted("stopped at step 1; go on with the same command")
    assert told._render_traceback_() == ["stopped at step 1; run this notebook cell again to go on"]


def test_ctrl_c_while_a_run_is_made_ready_says_how_to_go_on(tmp_path, monkeypatch):
    def opening(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ibqlab.training.data_check.open_data", opening)
    with pytest.raises(TrainingInterrupted, match="before the training began, nothing is lost; go on with the same"):
        trained(tmp_path / "run", smoke())
    assert not (tmp_path / "run").exists()


def test_a_stop_at_the_last_step_finishes_the_run(tmp_path, whole):
    def watch(row):
        if row["step"] == 12:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match="stopped after all 12 steps: the run is finished"):
        trained(tmp_path / "run", smoke(), watch=watch)
    run = Run(tmp_path / "run")
    assert run.status == "finished"
    assert_same_weights(run, whole)


def test_ctrl_c_in_the_middle_of_a_step_saves_no_half_step(tmp_path, whole, monkeypatch):
    from ibqlab.training.tokenizer.step import TokenizerStep  # noqa: PLC0415

    learn = TokenizerStep.learn

    def learn_and_break(self, step, images, observe):
        result = learn(self, step, images, observe)
        if step == 8:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(TokenizerStep, "learn", learn_and_break)
        with pytest.raises(TrainingInterrupted, match="stopped at once; everything up to step 6 of 12 is saved"):
            trained(tmp_path / "run", smoke())
    assert Run(tmp_path / "run").status == "stopped" and Run(tmp_path / "run").step == 6
    assert_same_weights(trained(tmp_path / "run", smoke()), whole)


# --- what was lost ---


@pytest.mark.parametrize("lost", ["empty", "missing", "cut"])
def test_lost_rows_are_noticed_at_resume(copy, lost):
    file = copy.path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.unlink() if lost == "missing" else file.write_bytes(b"" if lost == "empty" else b"".join(lines[:2]))
    before = contents(copy.path)
    with pytest.raises(RunError, match=r"metrics\.jsonl lacks the row of step 8, .*step_00000008\.pt.*nothing was"):
        trained(copy.path, smoke())
    assert contents(copy.path) == before


def test_a_lost_row_in_the_middle_is_a_warning(copy):
    file = copy.path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:1] + lines[2:]))
    with pytest.warns(UserWarning, match=f"has {len(lines) - 1} rows up to step 8, there were {len(lines)}"):
        assert trained(copy.path, smoke()).status == "finished"


def test_older_checkpoints_know_nothing_of_rows_and_are_resumed(copy, whole):
    for file in (copy.path / "checkpoints").iterdir():
        stored = torch.load(file)
        del stored["rows"]
        torch.save(stored, file)
    assert_same_weights(trained(copy.path, smoke()), whole)


def test_checkpoints_that_are_gone_are_noticed(copy):
    for file in (copy.path / "checkpoints").iterdir():
        file.unlink()
    before = contents(copy.path)
    with pytest.raises(RunError, match="goes up to step 8: the checkpoints are gone; nothing was changed"):
        trained(copy.path, smoke())
    assert contents(copy.path) == before
    copy.finish("finished")
    assert "its checkpoints are gone" in copy.describe_status()


def other_model():
    return {"model": {"w": torch.ones(2)}, "optimizer": {}, "ema": {}, "seconds": 1.0}


@pytest.mark.parametrize("state", [dict, other_model, lambda: {"seconds": "soon"}], ids=["empty", "other", "text"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(copy, state):
    torch.save({"step": 9, "state": state()}, copy.path / "checkpoints" / "step_00000009.pt")
    before = contents(copy.path)
    with pytest.raises(RunError, match=r"step_00000009\.pt does not fit this run's settings.*nothing was changed"):
        trained(copy.path, smoke())
    assert contents(copy.path) == before


# --- hostile content ---

ROWS = {
    "text": b'{"step": "six"}',
    "null": b'{"step": null}',
    "list": b'{"step": [1]}',
    "flag": b'{"step": true}',
    "none": b'{"loss": 1}',
    "large": b'{"step": 1' + b"0" * 30 + b"}",
    "digits": b'{"step": 1, "loss": 1' + b"0" * 5000 + b"}",
    "deep": b'{"step": 1, "loss": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "nested": b'{"step": 1, "loss": ' + b"[" * 100 + b"]" * 100 + b"}",
    "bytes": b'{"step": 1, "note": "\xff"}',
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_is_none_is_named_by_its_line(copy, row):
    with open(copy.path / "metrics.jsonl", "ab") as stream:
        stream.write(ROWS[row] + b"\n")
    lines = (copy.path / "metrics.jsonl").read_bytes().count(b"\n")
    before = contents(copy.path)
    says = rf"metrics\.jsonl, line {lines}: .*mend or delete this line"
    with pytest.raises(RunError, match=says):
        trained(copy.path, smoke())
    with pytest.raises(RunError, match=says):
        _ = copy.metrics
    assert contents(copy.path) == before


PROVENANCE = {
    "numbers as text": b'{"status": "stopped", "duration_s": "long", "resumed": 5, "data": [], "extended": {}}',
    "status as list": b'{"status": ["finished"]}',
}


@pytest.mark.parametrize("facts", PROVENANCE)
def test_odd_types_in_provenance_stop_nothing(copy, whole, facts):
    (copy.path / "provenance.json").write_bytes(PROVENANCE[facts])
    assert copy.status in ("stopped", "unknown")
    assert_same_weights(trained(copy.path, smoke()), whole)


HOSTILE = {
    "config types": ("config.yaml", b"tokenizer: [1]\nseed: {a: 1}\ngenerator: text\n"),
    "config number": ("config.yaml", b"seed: 1" + b"0" * 5000),
    "config depth": ("config.yaml", b"a: " + b"[" * 3000 + b"]" * 3000),
    "config surrogate": ("config.yaml", b'seed: 1\nnote: "\\uDC80"\n'),
    "provenance depth": ("provenance.json", b"[" * 5000),
    "provenance number": ("provenance.json", b'{"status": "finished", "duration_s": 1' + b"0" * 5000 + b"}"),
    "provenance surrogate": ("provenance.json", b'{"status": "\\udc80", "losses": "\\udc80"}'),
    "provenance kind": ("provenance.json", b"[]"),
    "metrics step": ("metrics.jsonl", b'{"step": null}\n'),
    "metrics list": ("metrics.jsonl", b'{"step": 1, "loss": [1, 2], "usage": "all", "validation_psnr": {"a": 1}}\n'),
    "metrics large": ("metrics.jsonl", b'{"step": 1, "usage_tokens": 1' + b"0" * 300 + b"}\n"),
    "metrics name": ("metrics.jsonl", b'{"step": 1, "' + b"x" * 5000 + b'": 1}\n'),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_one_run_never_hides_the_others(tmp_path, run, kind):
    good = Run.start(tmp_path / "good", CONFIG)
    good.log({"step": 7, "loss": 2.0})
    name, content = HOSTILE[kind]
    (run.path / name).write_bytes(content)
    table = list_runs(tmp_path).set_index("name")
    assert list(table.index) == ["good", "run"] and table.loc["good", "step"] == 7
    row = table.loc["run"]
    assert (row["status"] == "unreadable") == isinstance(row["problem"], str)
    if row["status"] == "unreadable":
        assert row["problem"].isprintable() and len(row["problem"]) <= 200
    else:
        for column in set(RUN_COLUMNS) - set(TEXTS):
            assert pd.isna(row.get(column)) or abs(float(row[column])) >= 0
    assert list_runs(tmp_path).to_string()


READ = {
    "config.yaml": lambda run: Run(run.path),
    "provenance.json": lambda run: run.provenance,
    "metrics.jsonl": lambda run: run.metrics,
    "snapshots/step_00000010.npz": lambda run: run.snapshot(),
    "checkpoints/step_00000010.pt": lambda run: run.load_checkpoint(),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "denied"])
def test_a_file_that_cannot_be_read_is_one_message(run, name, kind, monkeypatch):
    file = run.path / name
    if kind != "denied":
        file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file)
    else:
        opened = os.open

        def denied(path, *rest, **options):
            if str(path) == str(file):
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *rest, **options)

        monkeypatch.setattr("os.open", denied)
        if name == "config.yaml":
            monkeypatch.setattr("pathlib.io.open", lambda path, *rest: denied(path) and None)
    with pytest.raises(RunError, match=file.name.replace(".", r"\.") if kind != "folder" else r"config|json|step_|no "):
        READ[name](run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "lock", "checkpoints", "snapshots"])
def test_a_pipe_in_place_of_what_is_written_is_not_waited_for(run, name):
    place = run.path / name
    if place.is_dir():
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    else:
        place.unlink(missing_ok=True)
    os.mkfifo(place)
    with pytest.raises(RunError, match=name):
        Run.start(run.path, CONFIG, claim=True) if name == "lock" else WRITES[name](run)


def test_names_that_are_not_utf_8_reach_provenance_as_escapes(run):
    run.write_provenance(command=["bad\udcff"])
    assert rb"bad\udcff" in (run.path / "provenance.json").read_bytes()
    assert run.provenance["command"] == ["bad\udcff"]


# --- other images ---


def short(**settings):
    """Four steps, enough where images are what matters; tests stop after the second."""
    return smoke(steps=4, **settings)


def picture_folder(folder, classes=("a", "b"), count=10):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("change", ["removed", "another folder", "class added"])
def test_images_that_have_changed_are_not_resumed_on_silently(tmp_path, change):
    images, config = picture_folder(tmp_path / "images"), short(data__source=str(tmp_path / "images"))
    stopped(tmp_path / "run", config, 2)
    if change == "removed":
        for number in range(5):
            (images / "a" / f"{number}.png").unlink()
        says = r"train images \d+ → \d+; train fingerprint"
    elif change == "another folder":
        images.rename(tmp_path / "old")
        picture_folder(images, classes=("c", "b"))
        says = r"train classes 2 → 2 \(gone: a; new: c\)"
    else:
        picture_folder(images, classes=("0",))
        says = r"train classes 2 → 3 \(new: 0\)"
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=f"the images are not those.*{says}.*accept_changed_data=True"):
        trained(tmp_path / "run", config)
    assert contents(tmp_path / "run") == before
    old = Run(tmp_path / "run").provenance["data"]
    run = trained(tmp_path / "run", config, accept_changed_data=True)
    assert run.status == "finished"
    (noted,) = run.provenance["data_changes"]
    assert noted["before"] == old and noted["after_step"] == 2
    assert run.provenance["data"] != old


def test_images_that_have_moved_are_the_same(tmp_path):
    images, config = picture_folder(tmp_path / "images"), short(data__source=str(tmp_path / "link"))
    (tmp_path / "link").symlink_to(images)
    stopped(tmp_path / "run", config, 2)
    images.rename(tmp_path / "moved")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    run = trained(tmp_path / "run", config)
    assert run.status == "finished" and "data_changes" not in run.provenance
    assert run.provenance["data"]["train"]["classes"] == ["a", "b"]


def test_the_command_line_accepts_changed_images_on_request(tmp_path):
    images = picture_folder(tmp_path / "images")
    stopped(tmp_path / "run", short(data__source=str(images)), 2)
    (images / "a" / "0.png").unlink()
    command = ["train", str(tmp_path / "run" / "config.yaml"), "--no-report", "--output", str(tmp_path / "run")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2 and "--accept-changed-data" in refused.stderr
    done = CliRunner().invoke(main, [*command, "--accept-changed-data"])
    assert done.exit_code == 0, done.output
    run = Run(tmp_path / "run")
    (noted,) = run.provenance["data_changes"]
    assert run.status == "finished" and noted["after_step"] == 2
    assert noted["before"]["train"]["images"] + noted["before"]["validation"]["images"] == 20
    assert run.provenance["data"]["train"]["images"] + run.provenance["data"]["validation"]["images"] == 19


@pytest.mark.parametrize("spelling", ["relative", "absolute", "home", "link"])
def test_a_folder_of_images_may_be_spelt_in_any_way(tmp_path, monkeypatch, spelling, whole):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    images = picture_folder(home / "images")
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    run = stopped(tmp_path / "run", short(data__source="images"), 2)
    config_hash, text = run.config_hash, (run.path / "config.yaml").read_bytes()
    assert run.provenance["started_in"] == str(home)
    monkeypatch.chdir(elsewhere)
    (elsewhere / "link").symlink_to(images)
    spelt = {"relative": "../home/images", "absolute": str(images), "home": "~/images", "link": "link"}[spelling]
    run = trained(tmp_path / "run", short(data__source=spelt))
    assert run.status == "finished" and run.config_hash == config_hash
    assert (run.path / "config.yaml").read_bytes() == text
    assert "data_changes" not in run.provenance
    longer = trained(tmp_path / "run", smoke(data__source=spelt, steps=5))
    assert longer.config["data"]["source"] == "images" and longer.config["steps"] == 5


def test_a_run_is_used_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    images = picture_folder(tmp_path / "home" / "images")
    monkeypatch.chdir(tmp_path / "home")
    stopped(tmp_path / "run", short(data__source="images"), 2)
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = Run(tmp_path / "run")
    assert run.located_config["data"]["source"] == str(images)
    assert run.config["data"]["source"] == "images"
    words = shlex.split(run.continue_command())[1:]
    done = CliRunner().invoke(main, [*words, "--no-report"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["tokenize", str(run.path), "--output", str(tmp_path / "tokens")])
    assert done.exit_code == 0, done.output
    monkeypatch.chdir(tmp_path / "home")
    again = CliRunner().invoke(main, ["tokenize", str(run.path), "--output", str(tmp_path / "tokens")])
    assert again.exit_code == 0, again.output
    assert TokenStore(tmp_path / "tokens").manifest.data.source == str(images)
    assert run.located_config["data"]["source"] == "images"


def test_another_folder_of_the_same_name_is_not_taken_for_the_runs(tmp_path, monkeypatch):
    for place, classes in (("home", ("a", "b")), ("elsewhere", ("c", "d"))):
        picture_folder(tmp_path / place / "images", classes)
    monkeypatch.chdir(tmp_path / "home")
    stopped(tmp_path / "run", short(data__source="images"), 2)
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"the images are not those.*gone: a, b; new: c, d"):
        trained(tmp_path / "run", short(data__source="images"))
    assert Run(tmp_path / "run").located_config["data"]["source"] == str(tmp_path / "home" / "images")


def test_built_in_images_are_no_folder_of_that_name(tmp_path, monkeypatch):
    picture_folder(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    run = stopped(tmp_path / "run", smoke(), 2)
    assert run.config["data"]["source"] == "photos" and run.located_config == run.config
    with pytest.raises(RunError, match=r"data\.source: photos → \./photos"):
        trained(tmp_path / "run", smoke(data__source="./photos"))


# --- other settings ---


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The same run with more steps from its start."""
    return trained(tmp_path_factory.mktemp("longer") / "run", smoke(steps=18))


@pytest.mark.parametrize("start", ["half", "finished"])
def test_more_steps_give_the_longer_run(copy, longer, start):
    if start == "finished":
        trained(copy.path, smoke())
    hash_before = copy.config_hash
    run = trained(copy.path, smoke(steps=18))
    assert run.status == "finished" and run.config["steps"] == 18
    assert run.config_hash == longer.config_hash == run.provenance["config_hash"]
    (noted,) = run.provenance["extended"]
    assert (noted["from_steps"], noted["to_steps"], noted["config_hash"]) == (12, 18, hash_before)
    assert_same_weights(run, longer)
    timings = ["seconds", "images_per_second"]
    pd.testing.assert_frame_equal(run.metrics.drop(columns=timings), longer.metrics.drop(columns=timings))
    before = contents(run.path)
    assert trained(run.path, smoke(steps=18)).status == "finished"
    assert contents(run.path) == before


def test_a_kill_between_the_files_of_an_extension_is_continued(copy, monkeypatch):
    def killed(path, file):
        if file.name == "config.yaml":
            raise ZeroDivisionError
        return writing(path, file)

    with monkeypatch.context() as patched:
        patched.setattr("ibqlab.runs.folder.writing", killed)
        with pytest.raises(ZeroDivisionError):
            trained(copy.path, smoke(steps=18))
    assert Run(copy.path).config["steps"] == 12
    assert trained(copy.path, smoke(steps=18)).config["steps"] == 18


def test_more_steps_are_refused_where_the_run_would_be_another(tmp_path):
    quantizer = {"name": "soft_vq", "codebook_size": 64, "code_dim": 8}
    config = smoke(tokenizer__quantizer=quantizer)
    stopped(tmp_path / "run", config, 2)
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=r"begun with steps=12, and Soft VQ's temperature.* start_from=.*--output"):
        trained(tmp_path / "run", replace(config, steps=18))
    assert contents(tmp_path / "run") == before


def test_other_settings_name_the_command_that_trains_on(copy):
    config, before = smoke(batch_size=8), contents(copy.path)
    with pytest.raises(RunError, match="batch_size: 4 → 8") as caught:
        trained(copy.path, config)
    assert contents(copy.path) == before
    command = shlex.split(str(caught.value).partition("with your settings: ")[2])
    new = f"{copy.path}-2"
    assert command[:2] == ["ibqlab", "train"] and command[-2:] == ["--output", new]
    made = recipe_config(command[2], assignments=command[3:-2])
    assert to_dict(made) == to_dict(replace(config, start_from=str(copy.path)))
    with pytest.raises(RunError) as caught:
        trained(copy.path, replace(config, processes=2))
    assert "torchrun --nproc-per-node 2 -m ibqlab train" in str(caught.value)
    assert "start_from" in str(caught.value)
    with pytest.raises(RunError) as caught:
        trained(copy.path, smoke(tokenizer__quantizer__codebook_size=32))
    assert "start_from" not in str(caught.value)  # its weights would not fit


def test_a_study_is_told_from_a_run(tmp_path):
    with pytest.raises(RunError, match=r"holds no config\.yaml; list the runs there are: ibqlab runs"):
        Run(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(RunError, match="it is a study: ibqlab report"):
        Run(tmp_path)


def test_figures_of_a_killed_report_are_swept_by_the_next(run):
    """Temporaries beside figures and beside the page itself."""
    left = [temporary_beside(run.path / "report.html"), temporary_beside(run.figure_path("curves.png"))]
    mine = os.getpid()
    left = [file.with_name(file.name.replace(f".{mine}-", f".{dead_process()}-")) for file in left]
    for file in left:
        file.write_text("half a pic")
    run.figure_path("curves.png")
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize("name", ["snapshots", "checkpoints", "figures"])
def test_a_file_in_a_folders_place_is_named_before_any_step(run, name):
    shutil.rmtree(run.path / name)
    (run.path / name).write_text("somebody's")
    with pytest.raises(RunError, match=f"{name} must be a folder; nothing was changed"):
        Run.start(run.path, CONFIG)
    assert (run.path / name).read_text() == "somebody's"


def test_a_link_in_the_locks_place_is_named(run, tmp_path):
    (run.path / "lock").unlink(missing_ok=True)
    (run.path / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(RunError, match=r"lock must be an ordinary file and no link; nothing was changed\. Delete it"):
        claim_folder(run.path)
    assert not (tmp_path / "other").exists()


def test_a_folder_of_runs_that_is_none_itself_names_them(tmp_path):
    for method in ("vq", "ibq"):
        (tmp_path / "lab" / method).mkdir(parents=True)
        for file in ("config.yaml", "metrics.jsonl"):
            (tmp_path / "lab" / method / file).touch()
    with pytest.raises(RunError, match=r"it holds runs; of one of them type ibqlab show \S*lab/ibq, or of \S*lab/vq$"):
        Run(tmp_path / "lab")
