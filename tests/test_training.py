"""The training loop: what a run leaves behind, that it repeats itself bit for bit, and how it ends badly."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ibqlab.cli import main
from ibqlab.config import ConfigError, content_hash, to_dict
from ibqlab.data import DataConfig, open_data, to_model_range, to_uint8, validation_batches
from ibqlab.pretrained import load_tokenizer
from ibqlab.quantizers import Quantizer, nearest_code
from ibqlab.runs import Run, RunError
from ibqlab.studies.run_report import write_run_report
from ibqlab.training import TrainingError, TrainingInterrupted, recipe_config, train
from ibqlab.training.tokenizer.models import build_models
from ibqlab.training.tokenizer.validation import validate

TIMINGS = ["seconds", "images_per_second"]
NO_ENTROPY = {"name": "ibq", "entropy_weight": 0.0}
REVIVED = {"name": "vq_ema", "revive_after": 2}


def smoke(quantizer="ibq", **settings):
    """The smallest recipe with another quantizer (its name, or settings with it) and other settings (a__b for a.b)."""
    chosen = {"codebook_size": 64, "code_dim": 8} | ({"name": quantizer} if isinstance(quantizer, str) else quantizer)
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return recipe_config("builtin/smoke", {"tokenizer.quantizer": chosen} | dotted)


def trained(folder, config, **options):
    return train(config, folder, progress=False, **options)


def assert_equal(left, right, place=""):
    """Two nested states, bit for bit."""
    assert type(left) is type(right), place
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_equal(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), place
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{place}[{index}]")
    else:
        assert torch.equal(left, right) if torch.is_tensor(left) else left == right, place


def assert_same_run(left, right):
    """Weights, optimizer, averages, recorder, metrics and snapshots equal bit for bit; only clocks may differ."""
    assert left.status == right.status == "finished"
    names = [sorted(path.name for path in (run.path / "checkpoints").iterdir()) for run in (left, right)]
    assert names[0] == names[1]
    for name in names[0]:
        states = [torch.load(run.path / "checkpoints" / name) for run in (left, right)]
        for stored in states:
            assert stored["state"].pop("seconds") >= stored["state"].pop("recorder_seconds") >= 0
        assert_equal(*states)
    pd.testing.assert_frame_equal(*(run.metrics.drop(columns=TIMINGS) for run in (left, right)), check_exact=True)
    assert left.snapshot_steps == right.snapshot_steps
    for step in left.snapshot_steps:
        one, other = left.snapshot(step), right.snapshot(step)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def weights(run):
    return run.load_checkpoint()[1]["model"]


def contents(folder):
    """Every file below a folder and its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_finite(run):
    """At least one checkpoint, and no NaN or infinity in any."""
    files = list((run.path / "checkpoints").glob("*.pt"))
    assert files

    def check(value):
        if torch.is_tensor(value):
            assert torch.isfinite(value).all()
        elif isinstance(value, dict):
            list(map(check, value.values()))

    for file in files:
        check(torch.load(file)["state"])


def small_numbers(monkeypatch):
    """Plain gradient steps: Adam divides by a gradient's size and so makes a rounding of 1e-10 into a step of 1e-3."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **rest: torch.optim.SGD(groups, lr=lr, fused=True))
    monkeypatch.setattr(
        "ibqlab.training.tokenizer.step.learning_rate_at", lambda step, config: 30 * config.learning_rate
    )


# --- what a run leaves behind ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 40 steps."""
    return trained(tmp_path_factory.mktemp("trained") / "run", smoke(steps=40, record__log_every=4))


def test_settings_are_complete_and_carry_their_hash(run):
    config = smoke(steps=40, record__log_every=4)
    text = (run.path / "config.yaml").read_text()
    assert yaml.safe_load(text)["tokenizer"]["quantizer"]["entropy_weight"] == 0.05
    assert run.config_hash == content_hash(config) and run.config_hash in text
    assert recipe_config(str(run.path / "config.yaml")) == config


def test_metrics_are_read_by_pandas_alone(run):
    table = pd.read_json(run.path / "metrics.jsonl", lines=True).set_index("step")
    validated = [0, 2, *range(6, 40, 6), 40]
    assert list(table.index) == list(range(41))  # each of the first fifty steps has a row
    assert list(table.dropna(subset="validation_psnr").index) == validated
    early = {1, 2, 3, 5, 10, 15, 20, 30}
    assert list(table.dropna(subset="validation_usage").index) == sorted({*validated, *early})
    for step in early - {2, 30}:  # both measured on the same images
        assert table["validation_images"].loc[step] == table["validation_images"].loc[0]
    columns = {"loss", "l1", "quantizer_loss", "term_average_entropy", "usage", "usage_tokens", "perplexity"}
    columns |= {"dead_codes", "steps_since_hit", "gradient_reach", "softmax_perplexity", "code_norm_mean"}
    columns |= {"feature_norm_mean", "feature_to_code_distance", "code_to_feature_distance", "learning_rate", *TIMINGS}
    assert columns <= set(table.columns)
    assert table.loc[1:, list(columns)].notna().all(axis=None)
    assert (table["validation_tokens"].dropna() >= 10 * 64).all()
    assert table["usage_tokens"].max() == 768  # whole steps of 4 images with 64 tokens, at least 10 · 64 tokens
    assert table["usage_tokens"].loc[2] == 2 * 4 * 64
    assert table["seconds"].is_monotonic_increasing and (table["images_per_second"].dropna() > 0).all()


def test_rows_after_the_first_fifty_steps_come_as_often_as_the_settings_say(tmp_path):
    small = {"data__source": "digits", "data__image_size": 8, "tokenizer__autoencoder__resolution": 8}
    config = smoke(steps=58, record__log_every=4, record__validate_every=100, record__checkpoint_every=100, **small)
    table = trained(tmp_path / "run", config).metrics
    assert list(table["step"]) == [*range(51), 52, 56, 58]


@pytest.mark.parametrize("name", ["vq", "ibq", "soft_vq", "lfq"])
def test_usage_alone_is_what_a_whole_validation_says(name):
    config = smoke({"name": name, "code_dim": 6} if name == "lfq" else name)
    tokenizer = build_models(config)[0].tokenizer
    source = open_data(config.data, "validation")
    batches = list(validation_batches(source, images=10, batch_size=4))
    whole = validate(tokenizer, batches, torch.device("cpu")).row()
    result = validate(tokenizer, batches, torch.device("cpu"), reconstruct=False)
    alone = result.row()
    assert alone == {key: whole[key] for key in alone} and result.broken == []
    assert set(alone) == {f"validation_{key}" for key in ("usage", "perplexity", "tokens", "images")}
    assert tokenizer.training


def test_loss_goes_down(run):
    table = run.metrics.set_index("step")
    assert table["loss"].loc[40] < 0.5 * table["loss"].loc[2]
    assert table["validation_l1"].loc[40] < 0.8 * table["validation_l1"].loc[0]
    assert table["validation_psnr"].loc[40] > table["validation_psnr"].loc[0]


def test_snapshots_are_read_by_numpy_alone(run):
    files = sorted((run.path / "snapshots").iterdir())
    assert [path.name for path in files] == [f"step_{step:08d}.npz" for step in run.snapshot_steps]
    assert run.snapshot_steps == [0, 2, 6, 12, 18, 24, 30, 36, 40]
    shapes = {"codebook": (64, 8), "features": (128, 8), "assignments": (128,), "counts": (64,), "last_hit": (64,)}
    shapes |= {"images": (8, 16, 16, 3), "reconstructions": (8, 16, 16, 3)}
    for path, step in zip(files, run.snapshot_steps, strict=True):
        learned = {"gradient_norm": (64,)} if step else {}
        with np.load(path, allow_pickle=False) as stored:
            assert {name: stored[name].shape for name in stored.files} == shapes | learned
            assert stored["images"].dtype == stored["reconstructions"].dtype == np.uint8


def test_snapshots_say_what_the_metrics_say(run):
    table = run.metrics.set_index("step")
    for step in run.snapshot_steps:
        snapshot = run.snapshot(step)
        row = table.loc[step]
        assert snapshot["counts"].sum() == row["validation_tokens"]
        assert (snapshot["counts"] > 0).mean() == row["validation_usage"]
        assert snapshot["last_hit"].max() == (step or -1)
        assert np.array_equal(snapshot["images"], run.snapshot(0)["images"])


def test_the_last_snapshot_is_what_the_stored_weights_do(run):
    snapshot, tokenizer = run.snapshot(), load_tokenizer(run.path, weights="raw")
    with torch.no_grad():
        features = torch.from_numpy(snapshot["features"]).T[None, :, :, None]
        assert np.array_equal(tokenizer.quantizer(features).indices.flatten(), snapshot["assignments"])
        assert np.array_equal(tokenizer.quantizer.codebook, snapshot["codebook"])
        source = open_data(DataConfig(image_size=16), "validation")
        pictures = torch.stack([source.get(index, 0).image for index in range(10)])
        assert np.array_equal(pictures[:8].permute(0, 2, 3, 1), snapshot["images"])
        out = tokenizer(to_model_range(pictures))
        again = to_uint8(out.reconstruction[:8]).permute(0, 2, 3, 1).numpy()
        assert np.abs(again.astype(int) - snapshot["reconstructions"]).max() <= 1
        counts = torch.bincount(out.quantizer.indices.flatten(), minlength=64)
        assert int((counts - torch.from_numpy(snapshot["counts"])).abs().sum()) <= 2  # other batches, other rounding


def test_provenance_tells_what_is_needed_to_repeat_the_run(run):
    facts = json.loads((run.path / "provenance.json").read_text())
    assert facts["status"] == "finished"
    assert {"commit", "dirty", "versions", "hardware", "started", "ended", "command", "platform"} <= facts.keys()
    assert {"torch", "python", "ibqlab"} <= facts["versions"].keys()
    assert (facts["seed"], facts["threads"]) == (0, 1)
    assert facts["duration_s"] > run.metrics["seconds"].max() > 0
    assert 0 < facts["recorder_share_of_step"] < 1  # what it is, is for the benchmark to say
    assert facts["data"]["train"]["fingerprint"]
    assert facts["parameters"] == sum(p.numel() for p in load_tokenizer(run.path).parameters())


def test_the_newest_two_checkpoints_are_kept(run):
    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert names == ["step_00000036.pt", "step_00000040.pt"]
    state = run.load_checkpoint()[1]
    assert {"model", "optimizer", "ema", "recorder", "seconds", "recorder_seconds"} == state.keys()
    assert state["recorder"]["window"].shape == (1, 768)


def test_a_finished_run_is_returned_as_it_is(run):
    before = contents(run.path)
    assert trained(run.path, smoke(steps=40, record__log_every=4)).status == "finished"
    assert contents(run.path) == before


# --- resume ---


def stopped(folder, config, step):
    """A run stopped by hand after the row of a step: the step is finished and saved."""

    def watch(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match=f"^stopped at step {step} of {config.steps}, everything is saved; "):
        trained(folder, config, watch=watch)
    run = Run(folder)
    assert run.status == "stopped" and run.step == step
    return run


def crashed(folder, config, step):
    """A run that failed just after the row of a step, before its checkpoint."""

    def watch(row):
        if row["step"] == step:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(folder, config, watch=watch)
    assert Run(folder).status == "failed" and Run(folder).step < step
    return Run(folder)


def interrupted(folder, config, *steps, end=stopped):
    """A run ended after these steps, one after another, and then finished."""
    for step in steps:
        end(folder, config, step)
    return trained(folder, config)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Gives the run of a config that went through at once; each is trained once."""
    runs = {}

    def run(config):
        key = content_hash(config)
        if key not in runs:
            runs[key] = trained(tmp_path_factory.mktemp("uninterrupted") / "run", config)
        return runs[key]

    return run


@pytest.mark.parametrize(
    ("quantizer", "end", "steps"),
    [
        (REVIVED, crashed, (3, 6, 12)),
        (REVIVED, stopped, (3, 6, 10, 11)),
        ("soft_vq", crashed, (9,)),
        ("simvq", stopped, (9,)),
        ({"name": "vq", "codebook_init": "kmeans", "revive_after": 3}, crashed, (3, 9)),
        # Noise, and what happens every so many steps, inside the parts of a composite.
        ({"name": "residual", "gradient": "parts", "inner": {"name": "diveq", "replace_every": 4}}, crashed, (3, 9)),
    ],
    ids=["vq_ema crashed", "vq_ema stopped", "soft_vq", "simvq", "vq", "residual"],
)
def test_interrupted_and_continued_is_the_same_run(tmp_path, uninterrupted, quantizer, end, steps):
    config = smoke(quantizer, record__log_every=1)
    whole = uninterrupted(config)
    # 3: before the first regular checkpoint; 6 and 12: after the row, before the checkpoint; 9: between checkpoints.
    again = interrupted(tmp_path / "again", config, *steps, end=end)
    assert_same_run(again, whole)
    assert len(again.provenance["resumed"]) == len(steps)
    assert again.provenance["duration_s"] > 0


DROPOUT = {"tokenizer__autoencoder__dropout": 0.2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that went through at once, with dropout in every step."""
    return trained(tmp_path_factory.mktemp("whole") / "run", smoke(**DROPOUT))


def test_loader_processes_change_nothing_in_the_middle_of_an_epoch(tmp_path, whole):
    assert_same_run(interrupted(tmp_path / "again", smoke(**DROPOUT, data__workers=2), 8), whole)


def test_a_damaged_last_checkpoint_is_passed_over(tmp_path, whole):
    folder, config = tmp_path / "again", smoke(**DROPOUT)
    crashed(folder, config, 10).last_checkpoint.write_bytes(b"half a checkpoint")
    there = {}

    def watch(row):
        there[row["step"]] = (Run(folder).snapshot_steps, list(Run(folder).metrics["step"]))

    with pytest.warns(UserWarning, match=r"step_00000006\.pt .*using step_00000000\.pt"):
        again = trained(folder, config, watch=watch)
    assert there[2] == ([0, 2], [0, 1, 2])  # nothing later than the checkpoint was left to be taken for the truth
    assert_same_run(again, whole)


KILLED = smoke(steps=50, record__log_every=1, record__validate_every=20, record__checkpoint_every=5)
KILLED_SETTINGS = ("steps=50", *(f"record.{key}" for key in ("log_every=1", "validate_every=20", "checkpoint_every=5")))


def start(folder, **environment):
    command = [sys.executable, "-m", "ibqlab", "train", "builtin/smoke", *KILLED_SETTINGS, "--no-report"]
    command += ["--output", str(folder)]
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_killed_at_any_moment_and_started_again_is_the_same_run(tmp_path):
    folder = tmp_path / "killed"
    child = start(folder)
    deadline = time.monotonic() + 120
    while not re.search(rb'"step": 5\b', (folder / "metrics.jsonl").read_bytes() if folder.is_dir() else b""):
        assert child.poll() is None and time.monotonic() < deadline, child.stdout.read()
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.4))
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    killed = Run(folder)
    assert killed.status == "interrupted"
    rows = len(killed.metrics)
    # Inside an allocation of a cluster's scheduler one process still trains as one.
    child = start(folder, SLURM_JOB_ID="1", SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NNODES="1")
    whole = trained(tmp_path / "whole", KILLED)
    output = child.communicate()[0].decode()
    assert child.returncode == 0, output
    again = Run(folder)
    assert 5 < rows < len(again.metrics) == 51
    assert len(again.provenance["resumed"]) == 1
    assert_same_run(again, whole)


# --- several processes, several parts ---

TOGETHER = """
import os, sys
import torch
from ibqlab.cli import main
from ibqlab.data import to_model_range
from ibqlab.training.tokenizer import step
from ibqlab.training.tokenizer.discriminator_training import Adversary

torch.set_num_threads(1)
torch.optim.AdamW = lambda groups, lr, **rest: torch.optim.SGD(groups, lr=lr, fused=True)
step.learning_rate_at = lambda step, config: 30 * config.learning_rate
folder, *quantizers = sys.argv[1:]

def train(name, *settings):
    words = ["train", "builtin/smoke", *settings, "--no-report", "--output", f"{folder}/{name}"]
    return main(words, standalone_mode=False)

assert train("too_many") == 2
for quantizer in quantizers:
    name, *rest = quantizer.split(",")
    settings = [f"tokenizer.quantizer.{setting}" for setting in (f"name={name}", *rest)]
    assert train(quantizer, *settings, "steps=4", "processes=2") is None

kept = []
made = Adversary.__init__
Adversary.__init__ = lambda self, *rest: (made(self, *rest), kept.append(self))[0]
judged = ["loss.adversarial_weight=0.1", "loss.lecam_weight=0.05", "loss.discriminator.base_channels=4"]
judged += ["loss.discriminator.num_layers=1", "steps=3", "processes=2"]
assert train("judged", *judged) is None
mine = [*kept[0].discriminator.parameters(), *kept[0].average.shadows.values(), kept[0].lecam.real, kept[0].lecam.fake]
mine = torch.cat([value.detach().double().flatten() for value in mine])
both = [torch.empty_like(mine) for _ in range(2)]
torch.distributed.all_gather(both, mine)
assert torch.equal(*both) and kept[0].lecam.real != 0

alarmed = ["tokenizer.quantizer.name=vq_ema", "steps=8", "record.alarm=stop", "processes=2"]
assert train("alarmed", *alarmed) == 130

step.to_model_range = lambda images: to_model_range(images) * float("nan" if os.environ["RANK"] == "1" else "1")
assert train("poisoned", "processes=2") == 2
"""


@pytest.mark.usefixtures("warm_start")
def test_two_processes_train_what_one_trains(tmp_path, monkeypatch):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    names = ["vq", "ibq,entropy_weight=0", "vq_ema", "simvq"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(tmp_path / "two"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "asks for 1 process(es), 2 are running; type: ibqlab train RECIPE processes=2" in done.stderr
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        ["alarmed", "judged", "poisoned", *names]
    )
    # The first process alone looks at the rows, and both end at the step that it says.
    alarmed = Run(tmp_path / "two" / "alarmed")
    assert alarmed.status == "stopped" and alarmed.step == alarmed.alarms[0]["step"] < 8
    assert done.stderr.count(f"stopped at step {alarmed.step} of 8 by the alarm") == 2
    # NaN on the second process alone stops both, and the first one notes it.
    assert Run(tmp_path / "two" / "poisoned").status == "failed"
    assert "step 1: the batch of images is the first" in done.stderr
    assert "step 1: the sum of the losses, here or on another process, is the first" in done.stderr
    small_numbers(monkeypatch)
    for name in names:
        kind, *rest = name.split(",")
        quantizer = {"name": kind} | {key: int(value) for key, value in (part.split("=") for part in rest)}
        one, two = trained(tmp_path / "one" / name, smoke(quantizer, steps=4)), Run(tmp_path / "two" / name)
        assert two.status == "finished"
        assert contents(two.path).keys() == contents(one.path).keys()
        left, right = (run.metrics.set_index("step").drop(columns=TIMINGS) for run in (one, two))
        # Features and probes of a step are one process's own; the rest is about all tokens.
        probed = ["feature_norm_mean", "feature_norm_std", "softmax_perplexity"]
        probed += ["feature_to_code_distance", "code_to_feature_distance"]
        probed += ["winner_margin", "logit_margin", "quantization_error"]
        exact = ["usage", "usage_tokens", "dead_codes", "perplexity", "steps_since_hit", "gradient_reach"]
        exact += ["validation_usage", "validation_tokens", "validation_images", "validation_perplexity"]
        assert list(left.columns) == list(right.columns)
        pd.testing.assert_frame_equal(left[exact], right[exact], rtol=1e-12)
        pd.testing.assert_frame_equal(left.drop(columns=probed), right.drop(columns=probed), rtol=1e-5)
        torch.testing.assert_close(weights(two), weights(one), rtol=1e-5, atol=1e-6)
        assert two.load_checkpoint()[1]["recorder"]["window"].shape == (2, 384)
        assert np.array_equal(one.snapshot()["counts"], two.snapshot()["counts"])
        assert np.array_equal(one.snapshot()["last_hit"], two.snapshot()["last_hit"])


def test_fewer_processes_than_asked_for_is_an_error(tmp_path):
    result = CliRunner().invoke(
        main, ["train", "builtin/smoke", "processes=2", "--output", str(tmp_path / "run")], catch_exceptions=False
    )
    assert result.exit_code == 2
    assert "torchrun --nproc-per-node 2 -m ibqlab train RECIPE processes=2" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match=r"there are 0.*accelerator=cpu"):
        trained(tmp_path / "run", smoke(accelerator="cuda"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tasks", ["1", "2"])
def test_one_process_inside_an_allocation_trains_as_one(tmp_path, monkeypatch, tasks):
    for key, value in {"JOB_ID": "7", "NTASKS": tasks, "PROCID": "0", "LOCALID": "0", "NNODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert trained(tmp_path / "run", smoke(steps=1)).status == "finished"


@pytest.mark.parametrize("quantizer", ["vq", NO_ENTROPY], ids=["vq", "ibq"])
def test_a_batch_in_parts_gives_the_same_weights(tmp_path, monkeypatch, quantizer):
    small_numbers(monkeypatch)
    whole, parts = (trained(tmp_path / str(n), smoke(quantizer, steps=4, accumulate=n)) for n in (1, 2))
    before, after = torch.load(whole.path / "checkpoints/step_00000000.pt")["state"]["model"], weights(whole)
    assert any((before[name] - value).abs().max() > 1e-3 for name, value in after.items())
    torch.testing.assert_close(weights(parts), after, rtol=0, atol=1e-6)
    one, other = (run.metrics.set_index("step") for run in (whole, parts))
    for column in ("loss", "l1", "usage", "usage_tokens", "validation_usage"):
        np.testing.assert_allclose(one[column], other[column], rtol=1e-5)


def test_mixed_precision_leaves_the_quantizer_in_float32(tmp_path):
    seen = []

    def look(module, inputs, out):
        if isinstance(module, Quantizer) and module.training:
            tokens = inputs[0].detach().float().permute(0, 2, 3, 1).flatten(0, 2)
            with torch.autocast("cpu", enabled=False):
                expected = nearest_code(tokens, module.codebook.detach(), "dot")
            seen.append((inputs[0].dtype, out.quantized.dtype, out.loss.dtype))
            assert torch.equal(out.indices.flatten(), expected)

    hook = register_module_forward_hook(look)
    try:
        run = trained(tmp_path / "run", smoke(precision="bf16-mixed", steps=3))
    finally:
        hook.remove()
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)] * 3
    assert {value.dtype for value in weights(run).values()} == {torch.float32}
    assert run.status == "finished" and run.metrics["loss"].iloc[1:].notna().all()


# --- bad ends ---


def test_nan_in_a_batch_stops_the_run(tmp_path, monkeypatch):
    calls = []

    def poisoned(images):
        calls.append(images)
        return to_model_range(images) * (float("nan") if len(calls) == 9 else 1.0)

    monkeypatch.setattr("ibqlab.training.tokenizer.step.to_model_range", poisoned)
    with pytest.raises(TrainingError) as caught:
        trained(tmp_path / "run", smoke())
    for part in ("step 9: the batch of images is the first", "step_00000006.pt", "mend the data", "'photos'"):
        assert part in str(caught.value)
    run = Run(tmp_path / "run")
    assert run.status == "failed" and run.last_checkpoint.name == "step_00000006.pt"
    assert run.metrics["step"].max() == 8
    assert_finite(run)


@pytest.mark.parametrize("quantizer", ["ibq", REVIVED], ids=["ibq", "vq_ema"])
def test_an_exploding_learning_rate_stops_the_run(tmp_path, quantizer):
    config = smoke(quantizer, optimizer__learning_rate=1e30, record__checkpoint_every=1)
    with pytest.raises(TrainingError) as caught:
        trained(tmp_path / "run", config)
    for part in ("the encoder's features is the first", "step_00000001.pt", "lower optimizer.learning_rate", "1e+30"):
        assert part in str(caught.value)
    assert "precision" not in str(caught.value)
    assert Run(tmp_path / "run").status == "failed"
    assert_finite(Run(tmp_path / "run"))


@pytest.mark.parametrize("recomputing", [False, True])
def test_a_batch_that_does_not_fit_is_one_error_with_what_to_lower(tmp_path, monkeypatch, recomputing):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("ibqlab.training.tokenizer.step.tokenizer_loss", full)
    with pytest.raises(TrainingError, match="step 1: a batch does not fit into the GPU's memory") as caught:
        trained(tmp_path / "run", smoke(speed__activation_checkpointing=recomputing))
    for part in ("accumulate (now 1)", "batch_size (now 4)"):
        assert part in str(caught.value)
    assert ("speed.activation_checkpointing=true" in str(caught.value)) != recomputing
    assert Run(tmp_path / "run").status == "failed"


@pytest.mark.parametrize(("step", "found"), [(6, 6), (7, 8)])
def test_a_weight_that_is_no_number_is_neither_validated_nor_stored(tmp_path, step, found):
    steps = []

    def poison(optimizer, *_):
        steps.append(optimizer)
        if len(steps) == step:
            optimizer.param_groups[0]["params"][3].grad.fill_(float("nan"))

    hook = register_optimizer_step_pre_hook(poison)
    try:
        with pytest.raises(TrainingError, match=f"step {found}: the weight 'encoder") as caught:
            trained(tmp_path / "run", smoke(precision="bf16-mixed"))
    finally:
        hook.remove()
    assert "precision=32-true" in str(caught.value)
    run = Run(tmp_path / "run")
    assert run.status == "failed" and run.metrics["step"].max() < found
    assert run.snapshot_steps[-1] < found
    assert_finite(run)


def test_a_folder_with_other_settings_is_left_alone(tmp_path):
    stopped(tmp_path / "run", smoke(), 8)
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match="steps: 12 → 11"):
        trained(tmp_path / "run", smoke(steps=11))
    assert contents(tmp_path / "run") == before


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, whole):
    folder = tmp_path / "run"
    command = ["train", "builtin/smoke", "tokenizer.autoencoder.dropout=0.2", "--output", str(folder)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the first checkpoint; the next ones hold Adam's moments too.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, hard))
    try:
        result = CliRunner().invoke(main, command, catch_exceptions=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert result.stderr.rstrip().endswith(line)
    assert "step_00000006.pt: the disk or a quota is full" in line and "step_00000000.pt, which is intact" in line
    run = Run(folder)
    assert run.status == "failed"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000000.pt"]
    assert run.load_checkpoint()[0] == 0
    assert_same_run(trained(folder, smoke(**DROPOUT)), whole)


def test_an_image_size_that_the_tokenizer_cannot_take_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match="multiples of the downsampling 2; got 17 × 17"):
        trained(tmp_path / "run", smoke(data__image_size=17))
    assert list(tmp_path.iterdir()) == []


def picture_folder(folder, count):
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_an_empty_folder_is_refused_first(tmp_path):
    empty = picture_folder(tmp_path / "empty", 0)
    with pytest.raises(ValueError, match="at least one image"):
        trained(tmp_path / "run", smoke(data__source=str(empty)))
    assert list(tmp_path.iterdir()) == [empty]


def test_broken_images_are_told_in_one_line_and_left_out_of_validation(tmp_path, capfd, recwarn):
    training = picture_folder(tmp_path / "training", 6)
    held_out = picture_folder(tmp_path / "held_out", 4)
    (training / "torn.png").write_bytes((training / "1.png").read_bytes()[:300])
    (held_out / "empty.png").touch()
    config = smoke(data__source=str(training), data__validation_source=str(held_out), steps=4)
    run = trained(tmp_path / "run", config)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "unreadable" in line]
    assert line.startswith("2 of 12 images unreadable: empty.png (its content is none of ")
    assert re.search(r", torn\.png \(\S.*\), left out; in training others stand in for them$", line)
    assert not [w for w in recwarn if "unreadable" in str(w.message)]
    assert run.status == "finished"
    assert run.metrics["validation_images"].dropna().eq(4).all()
    assert run.metrics["validation_tokens"].dropna().eq(4 * 64).all()
    assert run.provenance["unreadable"]["count"] == 2 and run.provenance["unreadable"]["images"] == 12
    write_run_report(run)
    report = (run.path / "report.md").read_text(encoding="utf-8")
    assert "2 of 12 images unreadable: empty.png (its content is none of " in report


def test_validation_averages_over_the_readable_images_alone(tmp_path):
    images = picture_folder(tmp_path / "images", 6)
    names = sorted(file.name for file in images.iterdir())
    config = smoke(data__source=str(images), data__validation_source=str(images))
    tokenizer = build_models(config)[0].tokenizer

    def validated(count):
        batches = validation_batches(open_data(config.data, "validation"), images=count, batch_size=2)
        return validate(tokenizer, batches, torch.device("cpu"))

    (images / "torn.png").write_bytes((images / names[0]).read_bytes()[:300])
    result = validated(7)
    (images / "torn.png").unlink()
    whole = validated(6)
    assert (result.images, result.broken) == (6, ["torn.png"])
    assert result.psnr == pytest.approx(whole.psnr, rel=1e-6) and torch.equal(result.counts, whole.counts)
    assert whole.broken == []


def test_a_resumed_run_still_tells_of_what_was_unreadable_before(tmp_path, capfd):
    images = picture_folder(tmp_path / "images", 6)
    (images / "torn.png").write_bytes((images / "1.png").read_bytes()[:300])
    config = smoke(data__source=str(images), data__validation_source=str(picture_folder(tmp_path / "held_out", 4)))

    def watch(row):
        if row["step"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted):
        trained(tmp_path / "run", config, watch=watch)
    assert "1 of 11 images unreadable: torn.png" in capfd.readouterr().err
    trained(tmp_path / "run", config)
    assert capfd.readouterr().err.count("1 of 11 images unreadable: torn.png") == 1


def test_two_good_images_and_a_broken_one_are_trained_on(tmp_path):
    for number in range(40):
        images = picture_folder(tmp_path / f"images{number}", 2)
        (images / f"broken{number}.png").write_bytes(b"nothing")
        if open_data(DataConfig(source=str(images), unreadable="stop"), "validation").name(0).startswith("broken"):
            break
    else:
        raise AssertionError("in none of the folders the broken image was chosen for validation")
    run = trained(tmp_path / "run", smoke(data__source=str(images), steps=4))
    assert run.status == "finished"
    assert run.metrics["validation_images"].dropna().eq(1).all()


def test_images_none_of_which_can_be_read_are_refused_before_a_folder_is_made(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        (images / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"one image must be readable; .*They are \d\.png, .*Replace the files"):
        trained(tmp_path / "run", smoke(data__source=str(images)))
    assert list(tmp_path.iterdir()) == [images]


def test_impossible_settings_never_reach_the_loop():
    with pytest.raises(ConfigError, match="codebook_size must be at least 2"):
        smoke({"name": "ibq", "codebook_size": 1})
    with pytest.raises(ConfigError, match=r"did you mean 'learning_rate'"):
        smoke(optimizer__learning_rates=1)
    with pytest.raises(ConfigError, match="multiple of processes × accumulate = 3"):
        smoke(accumulate=3)
    with pytest.raises(ConfigError, match="seed must lie in"):
        smoke(seed=2**31)
    assert to_dict(smoke(seed=2**31 - 1))["seed"] == 2**31 - 1
