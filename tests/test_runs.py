"""The run folder: written whole or not at all, continued only with its own settings, readable by anyone."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from ibqlab.config import content_hash
from ibqlab.runs import RUN_COLUMNS, Run, RunError, list_runs, provenance, runs_root

CONFIG = {
    "tokenizer": {"quantizer": {"name": "ibq", "codebook_size": 64, "code_dim": 8}},
    "seed": 3,
    "steps": 300,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 3
    betas: tuple[float, float] = (0.5, 0.9)


@pytest.fixture
def run(tmp_path):
    return Run.start(tmp_path / "run", CONFIG)


def contents(folder):
    """Every file below a folder and its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- start ---


def test_start_writes_everything_that_tells_what_the_run_is(run):
    assert run.status == "running" and run.name == "run"
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG == run.config
    assert content_hash(CONFIG) == run.config_hash
    assert run.config_hash in (run.path / "config.yaml").read_text().splitlines()[0]
    assert run.provenance["config_hash"] == run.config_hash
    assert run.metrics.empty and run.snapshot_steps == [] and run.load_checkpoint() is None
    assert run.last_checkpoint is None
    assert [path.name for path in run.path.parent.iterdir()] == ["run"]


def test_start_takes_dataclasses_and_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert Run.start(tmp_path / "empty", Settings()).config == {"steps": 3, "betas": [0.5, 0.9]}
    assert Run.start(tmp_path / "deep" / "er", Settings()).status == "running"


def test_start_continues_the_same_settings(run):
    run.log({"step": 1, "loss": 2.0})
    run.finish("failed")
    again = Run.start(run.path, dict(reversed(CONFIG.items())))
    assert again.status == "running" and len(again.metrics) == 1
    assert len(again.provenance["resumed"]) == 1
    again.finish("finished")
    before = contents(run.path)
    assert Run.start(run.path, CONFIG).status == "finished"
    assert contents(run.path) == before


def test_start_refuses_other_settings_and_changes_nothing(run):
    before = contents(run.path)
    other = CONFIG | {"steps": 500, "extra": 1}
    with pytest.raises(RunError) as caught:
        Run.start(run.path, other)
    text = str(caught.value)
    for part in (run.config_hash, content_hash(other), "steps: 300 → 500", "extra: not set → 1", "--output", "delete"):
        assert part in text
    assert contents(run.path) == before


def test_start_refuses_a_config_edited_by_hand(run):
    file = run.path / "config.yaml"
    file.write_text(file.read_text().replace("steps: 300", "steps: 500"))
    with pytest.raises(RunError, match="was edited after the run began"):
        Run.start(run.path, CONFIG | {"steps": 500})


def test_start_refuses_folders_and_files_that_are_no_run(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    before = contents(tmp_path)
    for name in ("photos", "file"):
        with pytest.raises(RunError, match="is no run; nothing was changed"):
            Run.start(tmp_path / name, CONFIG)
    with pytest.raises(RunError, match="cannot be written"):
        Run.start(tmp_path / "file" / "below", CONFIG)
    assert contents(tmp_path) == before


def test_start_leaves_nothing_when_it_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr("ibqlab.runs.folder.dump_yaml", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Run.start(tmp_path / "run", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_open_says_what_is_missing(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        Run(tmp_path / "none")
    with pytest.raises(RunError, match=r"holds no config\.yaml"):
        Run(tmp_path)
    (run.path / "config.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"damaged run: .*config\.yaml"):
        Run(run.path)


# --- metrics ---


def test_log_converts_and_reads_back(run):
    run.log({"step": 1, "loss": torch.tensor(0.5), "usage": np.float32(0.25), "k": np.int64(3), "note": "a"})
    run.log({"step": 2, "loss": float("nan"), "usage": torch.tensor([float("inf")]), "parts": [1, torch.tensor(2)]})
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": 0.5, "usage": 0.25, "k": 3, "note": "a"}
    assert lines[1] == {"step": 2, "loss": None, "usage": None, "parts": [1, 2]}
    pd.testing.assert_frame_equal(pd.read_json(run.path / "metrics.jsonl", lines=True), run.metrics, check_dtype=False)
    assert run.metrics["step"].tolist() == [1, 2] and np.isnan(run.metrics["loss"][1])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"loss": 1.0}, "needs an integer step"),
        ({"step": -1}, "needs an integer step"),
        ({"step": 1.5}, "needs an integer step"),
        ({"step": 1, "loss": torch.zeros(3)}, r"row\['loss'\] must be a number.*shape \(3,\)"),
        ({"step": 1, "loss": object()}, r"row\['loss'\] must be a number"),
    ],
)
def test_log_refuses_what_is_no_row(run, row, says):
    with pytest.raises(ValueError, match=says):
        run.log(row)
    assert (run.path / "metrics.jsonl").read_text() == ""


def test_a_cut_last_line_is_dropped_and_written_over(run):
    run.log({"step": 1})
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 2, "lo')
    assert run.metrics["step"].tolist() == [1]
    run.log({"step": 2})
    assert run.metrics["step"].tolist() == [1, 2]


def test_other_damage_is_named_by_file_and_line(run):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: damaged"):
        _ = run.metrics
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n7\n')
    with pytest.raises(RunError, match=r"line 2: damaged \(must hold an object"):
        _ = run.metrics


def test_truncate_drops_later_rows_only(run):
    for step in (0, 10, 20, 30):
        run.log({"step": step, "loss": 0.1 * step})
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 5')
    before = run.metrics
    run.truncate_metrics(20)
    pd.testing.assert_frame_equal(run.metrics, before.iloc[:3])
    assert (run.path / "metrics.jsonl").read_text().endswith("\n")
    run.truncate_metrics(-1)
    assert run.metrics.empty


# --- snapshots ---


def test_snapshots_read_back(run):
    codebook = torch.arange(6.0).view(3, 2)
    run.save_snapshot(300, codebook=codebook, low=codebook.bfloat16(), counts=np.arange(3), seen=7)
    run.save_snapshot(20, codebook=codebook + 1)
    assert run.snapshot_steps == [20, 300]
    last = run.snapshot()
    assert np.array_equal(last["codebook"], codebook.numpy()) and last["low"].dtype == np.float32
    assert last["counts"].dtype == np.int64 and last["seen"] == 7
    assert np.array_equal(run.snapshot(20)["codebook"], codebook.numpy() + 1)
    assert np.array_equal(np.load(run.path / "snapshots" / "step_00000300.npz")["counts"], [0, 1, 2])
    run.drop_snapshots_after(20)
    assert run.snapshot_steps == [20]


def test_snapshot_errors(run):
    with pytest.raises(RunError, match="has no snapshot: none was taken yet"):
        run.snapshot()
    run.save_snapshot(5, a=np.zeros(2))
    with pytest.raises(RunError, match="no snapshot of step 6; there are: 5"):
        run.snapshot(6)
    with pytest.raises(ValueError, match="'b' holds Python objects"):
        run.save_snapshot(6, b=[None, "x"])
    with pytest.raises(ValueError, match="step is ≥ 0"):
        run.save_snapshot(-2, a=np.zeros(2))
    (run.path / "snapshots" / "step_00000005.npz").write_bytes(b"PK\x03\x04cut")
    with pytest.raises(RunError, match=r"step_00000005\.npz is damaged"):
        run.snapshot(5)


# --- checkpoints ---


def test_checkpoints_keep_the_newest_two_exactly(run):
    state = {"model": {"w": torch.randn(5)}, "count": 3, "rate": 0.1, "list": [1, (2, None, "x")]}
    for step in (10, 20, 30):
        run.save_checkpoint(step, state | {"count": step})
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == [
        "step_00000020.pt",
        "step_00000030.pt",
    ]
    assert run.last_checkpoint.name == "step_00000030.pt"
    step, loaded = run.load_checkpoint()
    assert step == loaded["count"] == 30 and loaded["list"] == state["list"]
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])


def test_an_unreadable_checkpoint_is_passed_over(run):
    run.save_checkpoint(10, {"w": torch.ones(100)})
    run.save_checkpoint(20, {"w": torch.zeros(100)})
    newest = run.last_checkpoint
    newest.write_bytes(newest.read_bytes()[:700])
    with pytest.warns(UserWarning, match=r"step_00000020\.pt .*; using step_00000010\.pt"):
        step, state = run.load_checkpoint()
    assert step == 10 and state["w"].sum() == 100
    run.save_checkpoint(15, {"w": torch.ones(1)})
    assert run.load_checkpoint()[0] == 15
    for file in (run.path / "checkpoints").iterdir():
        file.write_bytes(b"")
    with pytest.raises(RunError, match=r"no checkpoint can be read: step_00000015\.pt .*step_00000010\.pt"):
        run.load_checkpoint()


@pytest.mark.parametrize("bad", [np.zeros(2), np.float64(1.0), {1, 2}, object(), torch.nn.Linear(1, 1)])
def test_what_could_not_be_loaded_is_not_saved(run, bad):
    with pytest.raises(ValueError, match=r"state\['rng'\]\[0\] is a"):
        run.save_checkpoint(1, {"w": torch.ones(1), "rng": [bad]})
    assert contents(run.path / "checkpoints") == {}


KILL_WHILE_SAVING = """
    import os, signal, sys, time, torch
    from ibqlab.runs import Run

    def save_for_ever(run, saved):
        for step in range(run.last_checkpoint and int(run.last_checkpoint.stem[-8:]) or 0, 10**6):
            run.save_checkpoint(step, {"w": torch.full((200_000,), step)})
            run.log({"step": step})
            os.write(saved, b"x")

    torch.set_num_threads(1)  # a forked child must not wait for its parent's threads
    run, reached, caught = Run(sys.argv[1]), 0, 0
    for attempt in range(12):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(run, writing)
        os.close(writing)
        assert os.read(reading, 1) and os.read(reading, 1), "the child has died"
        time.sleep(0.0007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        caught += any((run.path / "checkpoints").glob(".*.part"))
        step, state = run.load_checkpoint()
        assert step > reached and (state["w"] == step).all(), (step, reached)
        assert run.metrics["step"].iloc[-1] in (step - 1, step)
        reached = step
    print(caught)
"""


def test_a_kill_at_any_moment_leaves_a_checkpoint(run):
    command = [sys.executable, "-c", textwrap.dedent(KILL_WHILE_SAVING), str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no kill fell into the writing of a checkpoint: the test has shown nothing"


FILL_THE_DISK = """
    import resource, sys
    import numpy as np, torch
    from ibqlab.runs import Run, RunError
    run = Run(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    for write in (
        lambda: run.save_checkpoint(20, {"w": torch.zeros(100_000), "v": torch.zeros(10)}),
        lambda: run.save_snapshot(20, codebook=np.zeros(100_000)),
        lambda: run.log({"step": 20, "note": "x" * 60_000}),
        lambda: run.write_provenance(note="x" * 60_000),
        lambda: Run.start(run.path.parent / "new", {"note": "x" * 60_000}),
    ):
        try:
            write()
            print("written!")
        except RunError as error:
            print(error)
"""


def test_a_full_disk_breaks_nothing_that_was_there(run):
    run.save_checkpoint(10, {"w": torch.ones(10)})
    run.save_snapshot(10, codebook=np.ones(10))
    run.log({"step": 10})
    before = contents(run.path.parent)
    command = [sys.executable, "-c", textwrap.dedent(FILL_THE_DISK), str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    messages = done.stdout.splitlines()
    files = ("step_00000020.pt", "step_00000020.npz", "metrics.jsonl", "provenance.json", "new")
    assert len(messages) == len(files)
    for file, text in zip(files, messages, strict=True):
        assert f"{file}: the disk or a quota is full (File too large" in text
        assert "GiB free" in text and "Make room" in text
    assert all("step_00000010.pt, which is intact" in text for text in messages[:4])
    assert contents(run.path.parent) == before
    assert not (run.path.parent / "new").exists()
    assert run.load_checkpoint()[0] == 10


# --- provenance, figures ---


def test_provenance_says_enough_and_not_too_much(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/secret/bin/ibqlab", "train", "/secret/recipe.yaml", "data.folder=/secret/photos"]
    )
    facts = provenance()
    assert facts["command"] == ["ibqlab", "train", "recipe.yaml", "data.folder=photos"]
    assert {"python", "torch", "numpy", "ibqlab", "lightning-fabric"} <= set(facts["versions"])
    assert {"cpu", "cores", "memory_gib", "gpu"} == set(facts["hardware"]) and facts["hardware"]["cores"] >= 1
    assert {"commit", "dirty", "started", "platform"} <= set(facts)
    assert facts["started"].endswith("+00:00")
    text = json.dumps(facts)
    assert "/secret" not in text and os.uname().nodename not in text.split('"')


def test_provenance_reads_the_commit_of_its_own_checkout_only(tmp_path, monkeypatch):
    from ibqlab.runs import provenance_record as origin  # noqa: PLC0415

    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(commit, cwd=tmp_path, check=True)
    (tmp_path / "ibqlab").mkdir()
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "ibqlab" / "runs" / "provenance_record.py"))
    clean = provenance()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "new.py").write_text("x")
    assert provenance()["dirty"] is True
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "venv" / "ibqlab" / "runs" / "provenance_record.py"))
    assert provenance()["commit"] is None


def test_provenance_grows_and_damage_is_named(run):
    run.write_provenance(seed=np.int64(3), data={"images": torch.tensor(4)})
    run.finish("stopped", duration_s=1.5)
    assert run.provenance["data"] == {"images": 4} and run.provenance["seed"] == 3
    assert run.status == "stopped" and run.provenance["duration_s"] == 1.5
    with pytest.raises(ValueError, match="got 'done'"):
        run.finish("done")
    (run.path / "provenance.json").write_text("{")
    with pytest.raises(RunError, match=r"provenance\.json is damaged"):
        _ = run.status


def test_figures_have_plain_names(run):
    assert run.figure_path("collapse.png") == run.path / "figures" / "collapse.png"
    for name in ("../x.png", "a/b.png", ""):
        with pytest.raises(ValueError, match="plain file name"):
            run.figure_path(name)


# --- the table of runs ---


def test_list_runs_reads_the_last_value_of_each_metric(tmp_path):
    run = Run.start(tmp_path / "study" / "a", CONFIG)
    run.log({"step": 10, "loss": 2.0, "usage": 0.1, "usage_tokens": 640, "validation_psnr": 11.0})
    run.log({"step": 20, "loss": 1.0, "usage": 0.5, "usage_tokens": 640})
    run.finish("finished", duration_s=12.0)
    Run.start(tmp_path / "b", {"steps": 1})
    broken = Run.start(tmp_path / "c", CONFIG)
    (broken.path / "metrics.jsonl").write_text("no\nrow\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("of: another program")
    table = list_runs(tmp_path)
    assert tuple(table.columns) == RUN_COLUMNS
    assert dict(zip(table["name"], table["status"], strict=True)) == {
        "b": "running",
        "c": "unreadable",
        "study/a": "finished",
    }
    row = table.set_index("name").loc["study/a"]
    expected = {
        "quantizer": "ibq",
        "codebook_size": 64,
        "code_dim": 8,
        "seed": 3,
        "step": 20,
        "loss": 1.0,
        "usage": 0.5,
    }
    expected |= {"usage_tokens": 640, "validation_psnr": 11.0, "duration_s": 12.0, "config_hash": content_hash(CONFIG)}
    assert row[list(expected)].to_dict() == expected
    assert Run(row["path"]).status == "finished"


def test_list_runs_of_nothing_has_the_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "none"))
    for table in (list_runs(), list_runs(tmp_path)):
        assert table.empty and tuple(table.columns) == RUN_COLUMNS


def test_runs_root_follows_variable_then_checkout_then_here(tmp_path, monkeypatch):
    deep = tmp_path / "clone" / "notebooks"
    deep.mkdir(parents=True)
    monkeypatch.delenv("IBQLAB_RUNS", raising=False)
    monkeypatch.chdir(deep)
    (tmp_path / "clone" / "pyproject.toml").write_text('[project]\nname = "other"\n')
    assert runs_root() == deep / "runs"
    (tmp_path / "clone" / "pyproject.toml").write_text('[project]\nname = "ibqlab"\n')
    assert runs_root() == tmp_path / "clone" / "runs"
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "elsewhere"))
    assert runs_root() == tmp_path / "elsewhere"
