"""A generator's training: the published schedule and steps, exact resume, one process and many, and what is refused."""

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from golden import golden, golden_file
from PIL import Image
from registry import SMALL_DIGITS

from ibqlab.cli import main
from ibqlab.data import Batch, DataConfig
from ibqlab.pretrained import load_tokenizer
from ibqlab.runs import Run, RunError
from ibqlab.tokens.writing import write_tokens
from ibqlab.training import (
    GeneratorOptimizerConfig,
    TrainingError,
    TrainingInterrupted,
    recipe_config,
    train,
    train_generator,
)
from ibqlab.training.generator.step import GeneratorStep
from ibqlab.training.optimisation import (
    build_generator_optimizer,
    generator_learning_rate_at,
    generator_weight_decay_at,
)

TIMINGS = ["seconds", "images_per_second"]
TINY = {
    "data.source": "digits",
    "data.image_size": 8,
    "generator": {
        "name": "ibq",
        "vocabulary_size": 32,
        "num_classes": 10,
        "grid_size": 4,
        "width": 16,
        "depth": 2,
        "num_heads": 2,
        "hidden_multiple": 8,
    },
    "steps": 8,
    "batch_size": 8,
    "tokenizer_weights": "raw",
    "record": {"log_every": 1, "validate_every": 4, "validation_images": 11, "checkpoint_every": 3},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A run of a tokenizer of 32 codes and 4 × 4 tokens per digit."""
    settings = SMALL_DIGITS | {"steps": 6}
    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    return train(recipe_config("builtin/smoke", settings), folder, progress=False).path


def tiny(tokenizer, /, **settings):
    """The smallest generator's run over a tokenizer with other settings (a__b for a.b)."""
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return recipe_config("builtin/digits_generator", TINY | {"tokenizer": str(tokenizer)} | dotted)


def trained(folder, config, **options):
    return train_generator(config, folder, progress=False, **options)


def weights(run):
    return run.load_checkpoint()[1]["model"]


def assert_same_run(left, right, rtol=0.0):
    """Weights, Adam's averages and metrics of the last step equal, bit for bit unless told otherwise."""
    one, other = (run.load_checkpoint()[1] for run in (left, right))
    for name, value in one["model"].items():
        torch.testing.assert_close(other["model"][name], value, rtol=rtol, atol=rtol)
    if not rtol:
        for place, kept in one["optimizer"]["state"].items():
            for name, value in kept.items():
                assert torch.equal(other["optimizer"]["state"][place][name], value)
    frames = [run.metrics.drop(columns=TIMINGS) for run in (left, right)]
    pd.testing.assert_frame_equal(*frames, check_exact=not rtol, rtol=max(rtol, 1e-12))
    for name, value in left.snapshot().items():
        assert np.allclose(value, right.snapshot()[name], rtol=rtol, atol=rtol)


# --- published ---


def test_rates_and_decays_are_the_published_ones():
    facts, _ = golden("lr_schedules")
    for given in facts["lr_wd_annealing"].values():
        steps, decay = given["max_it"], given["weight_decay"]
        config = GeneratorOptimizerConfig(
            learning_rate=given["peak_lr"],
            weight_decay=decay,
            final_weight_decay=given["twde"] or decay,
            warmup_share=given["wp_it"] / steps,
            warmup_start=given["wp0"],
            final_share=given["wpe"],
        )
        assert len(given["rows"]) > 5
        for row in given["rows"]:
            step = row["it"] + 1
            assert [generator_learning_rate_at(step, steps, config)] * 2 == pytest.approx(row["lr"], rel=1e-9), row
            assert [generator_weight_decay_at(step, steps, config)] * 2 == pytest.approx(
                row["weight_decay"], rel=1e-9
            ), row


@pytest.mark.parametrize(
    ("name", "schedule", "final"), [("linear_warmup", "constant", 1.0), ("linear_warmup_cosine", "cosine", 0.1)]
)
def test_other_schedules_are_the_published_ones(name, schedule, final):
    given = golden("lr_schedules")[0][name]
    steps = given.get("max_steps", 1000)
    config = GeneratorOptimizerConfig(
        learning_rate=2.0,
        schedule=schedule,
        warmup_share=given["warmup_steps"] / steps,
        warmup_start=0.0,
        final_share=final,
    )
    for step, share in given["multiplier"].items():
        assert generator_learning_rate_at(int(step) + 1, steps, config) == pytest.approx(
            2 * share, rel=1e-9, abs=1e-12
        ), step


def published_run(facts):
    given, optimizer = facts["gpt_config"], facts["net2net"]
    generator = {
        "name": "ibq",
        "vocabulary_size": given["vocab_size"],
        "num_classes": given["class_num"],
        "grid_size": math.isqrt(given["block_size"]),
        "width": given["n_embd"],
        "depth": given["n_layer"],
        "num_heads": given["n_head"],
        "hidden_multiple": given["multiple_of"],
        "gate_scale": given["alng"],
        "attention_dropout": given["resid_dropout_p"],
        "feed_forward_dropout": given["ffn_dropout_p"],
        "token_dropout": given["token_drop"],
        "label_dropout": 0.0,
    }
    steps = facts["batches_per_epoch"] * facts["epochs"]
    settings = {
        "tokenizer": str(golden_file("tokenizer_ema_official_ckpt.ckpt")),
        "tokenizer_weights": "ema",
        "data.source": "photos",
        "data.image_size": 32,
        "generator": generator,
        "optimizer": {
            "learning_rate": optimizer["learning_rate"],
            "weight_decay": optimizer["weight_decay"],
            "final_weight_decay": optimizer["twde"],
            "warmup_share": facts["batches_per_epoch"] / steps,
            "warmup_start": optimizer["wp0"],
            "final_share": optimizer["wpe"],
            "clip_norm": facts["gradient_clip_val"],
        },
        "steps": steps,
        "batch_size": facts["batch_size"],
        "record": {"log_every": 1, "validation_images": 2},
    }
    return recipe_config("builtin/digits_generator", settings)


def test_the_loop_repeats_six_published_steps(tmp_path, monkeypatch):
    facts, tensors = golden("train_ar_6steps")
    config = published_run(facts)
    prefix = "transformer."
    start, end = (
        {n.removeprefix(when + prefix): w.float() for n, w in tensors.items() if n.startswith(when)}
        for when in ("init/", "final/")
    )
    images = tensors["images_nhwc"].float().permute(0, 3, 1, 2)
    parts = zip(images.split(2), tensors["labels"].split(2), strict=True)
    batches = [Batch(pictures, labels, []) for pictures, labels in parts] * facts["epochs"]
    monkeypatch.setattr("ibqlab.training.generator.token_source.training_batches", lambda *_, **__: iter(batches))
    made = GeneratorStep.__init__

    def started(self, config, generator, fabric):
        generator.load_state_dict(start)
        made(self, config, generator, fabric)

    monkeypatch.setattr(GeneratorStep, "__init__", started)
    run = trained(tmp_path / "run", config)
    rows = run.metrics.set_index("step")
    for number, step in enumerate(facts["steps"]):
        row = rows.loc[number + 1]
        assert row["loss"] == pytest.approx(step["loss"], rel=3e-5)
        assert row["gradient_norm"] == pytest.approx(facts["grad_norm_before_clip"][number], rel=1e-4)
        assert row["learning_rate"] == pytest.approx(step["lr"][0])
        assert row["weight_decay"] == pytest.approx(step["weight_decay"][0])
    for name, value in weights(run).items():
        assert (value - end[name]).abs().max() <= 3e-3 * end[name].abs().max(), name


def test_norms_and_biases_are_spared_from_decay_on_request(tokenizer):
    for decay_norms, expected in ((True, 0.05), (False, 0.0)):
        config = tiny(tokenizer, optimizer__decay_norms=decay_norms)
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
        step = GeneratorStep.__new__(GeneratorStep)
        step.config, step.optimizer = config, build_generator_optimizer(model, config.optimizer)
        step._set_rates(3)
        matrices, flat = step.optimizer.param_groups
        assert (matrices["weight_decay"], flat["weight_decay"]) == (0.05, expected)
        assert [len(group["params"]) for group in (matrices, flat)] == [1, 3]


# --- what a run leaves behind, and how it goes on ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    return trained(tmp_path_factory.mktemp("whole") / "run", tiny(tokenizer))


def test_a_run_leaves_losses_with_and_without_the_class(whole, tokenizer):
    rows = whole.metrics
    assert list(rows["step"]) == list(range(9))
    last = rows.iloc[-1]
    assert rows["validation_loss"].iloc[0] == pytest.approx(math.log(32))
    assert last["validation_loss"] < math.log(32) and last["validation_loss_unconditional"] < math.log(32)
    assert last["validation_bits_per_token"] == pytest.approx(last["validation_loss"] / math.log(2))
    assert last["validation_bits_per_pixel"] == pytest.approx(last["validation_bits_per_token"] * 16 / 64)
    assert (last["validation_images"], last["validation_tokens"]) == (11, 11 * 16)
    snapshot = whole.snapshot()
    assert snapshot["position_loss"].shape == snapshot["position_loss_unconditional"].shape == (16,)
    assert snapshot["position_loss"].mean() == pytest.approx(last["validation_loss"])
    kept = load_tokenizer(whole.path / "tokenizer.safetensors", "raw")
    assert kept.fingerprint() == load_tokenizer(tokenizer, "raw").fingerprint()
    assert whole.provenance["tokenizer"]["fingerprint"] == kept.fingerprint()


def test_ctrl_c_while_a_run_is_made_ready_says_how_to_go_on(tmp_path, tokenizer, monkeypatch):
    def opening(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ibqlab.training.generator.loop.open_tokens", opening)
    with pytest.raises(TrainingInterrupted, match="before the training began, nothing is lost; go on with the same"):
        trained(tmp_path / "run", tiny(tokenizer))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [2, 4, 6])
def test_interrupted_and_continued_is_the_same_run(tmp_path, tokenizer, whole, step):
    def watch(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    config = tiny(tokenizer)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", config, watch=watch)
    assert Run(tmp_path / "run").status == "stopped"
    assert_same_run(trained(tmp_path / "run", config), whole)


def test_a_run_goes_on_when_its_tokenizer_has_moved_away(tmp_path, tokenizer, whole):
    moved = tmp_path / "tokenizer"
    moved.symlink_to(tokenizer)
    config = tiny(moved)

    def watch(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", config, watch=watch)
    moved.unlink()
    assert_same_run(trained(tmp_path / "run", config), whole)


def test_a_run_refuses_to_go_on_with_another_tokenizer(tmp_path, tokenizer):
    place = tmp_path / "tokenizer"
    place.symlink_to(tokenizer)

    def watch(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", tiny(place), watch=watch)
    other = {"data.source": "digits", "data.image_size": 8, "seed": 5, "steps": 1}
    other |= {"tokenizer.autoencoder.channel_multipliers": [1, 1], "tokenizer.autoencoder.resolution": 8}
    other |= {"tokenizer.quantizer.codebook_size": 32}
    train(recipe_config("builtin/smoke", other), tmp_path / "other", progress=False)
    place.unlink()
    place.symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="was begun with another tokenizer"):
        trained(tmp_path / "run", tiny(place))


def test_a_permutation_renames_the_codes(tmp_path, tokenizer, whole):
    run = trained(tmp_path / "run", tiny(tokenizer, index_permutation=3))
    assert not torch.equal(weights(run)["head.weight"], weights(whole)["head.weight"])
    assert run.metrics["loss"].iloc[1] == pytest.approx(math.log(32))


@pytest.mark.parametrize(
    ("settings", "rtol"),
    [
        ({"accumulate": 2, "precision": "64-true"}, 1e-9),
        ({"speed__activation_checkpointing": True, "precision": "64-true"}, 1e-12),
        ({"speed__compile": True, "precision": "64-true"}, 1e-9),
    ],
    ids=["accumulate", "checkpointing", "compile"],
)
def test_other_ways_to_compute_a_step_give_the_same_weights(tmp_path, monkeypatch, tokenizer, settings, rtol):
    # Tracing is the part of torch.compile that could change a result; the C++ behind it is torch's.
    monkeypatch.setattr("ibqlab.training.speed.COMPILER", "aot_eager")
    still = {f"generator__{name}_dropout": 0.0 for name in ("attention", "feed_forward", "token", "label")}
    plain = trained(tmp_path / "plain", tiny(tokenizer, precision="64-true", steps=4, **still))
    other = trained(tmp_path / "other", tiny(tokenizer, steps=4, **still, **settings))
    assert_same_run(plain, other, rtol)


def test_checkpointed_activations_repeat_their_dropouts(tmp_path, tokenizer):
    runs = [
        trained(tmp_path / str(on), tiny(tokenizer, steps=3, precision="64-true", speed__activation_checkpointing=on))
        for on in (False, True)
    ]
    assert_same_run(*runs, 1e-12)


def test_mixed_precision_trains(tmp_path, tokenizer):
    run = trained(tmp_path / "run", tiny(tokenizer, precision="bf16-mixed"))
    assert run.metrics["validation_loss"].iloc[-1] < math.log(32)
    assert all(value.dtype == torch.float32 for value in weights(run).values())


def test_open_magvit2s_generator_trains(tmp_path, tokenizer):
    generator = {**TINY["generator"], "name": "magvit2", "bits": [2, 3], "spatial_depth": 1, "factorized_depth": 1}
    del generator["vocabulary_size"], generator["depth"]
    run = trained(tmp_path / "run", tiny(tokenizer, generator=generator))
    rows = run.metrics
    assert rows["validation_loss"].iloc[0] == pytest.approx(math.log(32))
    assert rows["validation_loss"].iloc[-1] < math.log(32)


def test_llamagens_generator_trains(tmp_path, tokenizer):
    run = trained(tmp_path / "run", tiny(tokenizer, generator={**TINY["generator"], "name": "llamagen"}))
    assert run.metrics["validation_loss"].iloc[0] == pytest.approx(math.log(32))
    assert run.metrics["validation_loss"].iloc[-1] < math.log(32)
    assert not any("ada_lin" in name for name in weights(run))


# --- several processes ---

TOGETHER = """
import sys
import torch
from ibqlab.training import recipe_config, train_generator
from ibqlab.training.trainer import Trainer

torch.set_num_threads(1)
folder, *settings = sys.argv[1:]

def trained(name, *more):
    config = recipe_config("builtin/digits_generator", assignments=[*settings, *more, "processes=2"])
    return train_generator(config, f"{folder}/{name}", progress=False)

trained("whole", "speed.sharded=true")
taken = Trainer._step

def step(self, number, batch):
    row = taken(self, number, batch)
    if number == 5:
        raise KeyboardInterrupt
    return row

Trainer._step = step
try:
    trained("again", "speed.sharded=true")
except KeyboardInterrupt:
    Trainer._step = taken
trained("again", "speed.sharded=true")

# Adam makes whole steps of the rounding of gradients near zero, in which one process differs from two.
torch.optim.AdamW = lambda groups, lr, **rest: torch.optim.SGD(groups, lr=lr)
trained("plain", "optimizer.learning_rate=0.5")
trained("shards", "optimizer.learning_rate=0.5", "speed.sharded=true")
"""


def flat(settings, prefix=""):
    """Nested settings as typed on a command line."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value}"


def picture_folder(folder, count):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("stored", [False, True], ids=["images", "tokens"])
@pytest.mark.parametrize("door", ["Python", "command"])
def test_changed_images_are_continued_with_on_request(tmp_path, tokenizer, stored, door):
    images = picture_folder(tmp_path / "images", 12)
    settings = {"data__source": str(images)}

    def write_store(count):
        data = DataConfig(source=str(picture_folder(images, count)), image_size=8)
        shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
        write_tokens(load_tokenizer(tokenizer, "raw").float(), data, tmp_path / "tokens", progress=False)

    if stored:
        write_store(12)
        settings["tokens"] = str(tmp_path / "tokens")
    config = tiny(tokenizer, **settings)

    def watch(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted):
        trained(tmp_path / "run", config, watch=watch)
    before = Run(tmp_path / "run").provenance["data"]
    if stored:
        write_store(14)
    else:
        picture_folder(images, 14)
    with pytest.raises(RunError, match=r"images are not those .*--accept-changed-data"):
        trained(tmp_path / "run", config)
    assert Run(tmp_path / "run").step == 4
    if door == "Python":
        trained(tmp_path / "run", config, accept_changed_data=True)
    else:
        words = [str(tmp_path / "run" / "config.yaml"), "--no-report", "--output", str(tmp_path / "run")]
        done = CliRunner().invoke(main, ["train", *words, "--accept-changed-data"])
        assert done.exit_code == 0, done.output
    run = Run(tmp_path / "run")
    (noted,) = run.provenance["data_changes"]
    assert run.status == "finished" and noted["after_step"] == 4 and noted["before"] == before
    now = run.provenance["data"]
    assert sum(now[split]["images"] for split in ("train", "validation")) == 14


@pytest.mark.usefixtures("warm_start")
def test_two_processes_train_what_one_trains(tmp_path, monkeypatch, tokenizer):
    """Without dropout, whose numbers are each process's own."""
    still = {f"{name}_dropout": 0.0 for name in ("attention", "feed_forward", "token", "label")}
    changes = TINY | {"generator": TINY["generator"] | still, "precision": "64-true"}
    (tmp_path / "together.py").write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "together.py"), str(tmp_path), f"tokenizer={tokenizer}", *flat(changes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    again, whole = Run(tmp_path / "again"), Run(tmp_path / "whole")
    assert len(again.provenance["resumed"]) == 1
    assert_same_run(again, whole)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **rest: torch.optim.SGD(groups, lr=lr))
    one = tiny(tokenizer, precision="64-true", generator=changes["generator"], optimizer__learning_rate=0.5)
    one = trained(tmp_path / "one", one)
    for name in ("plain", "shards"):
        assert_same_run(one, Run(tmp_path / name), 1e-9)


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tokenizer": ""}, "tokenizer must name a trained one"),
        ({"tokenizer": "nowhere"}, "nowhere: there is no such file or run folder"),
        ({"generator__vocabulary_size": 64}, "vocabulary must be the tokenizer's codebook; got 64 tokens for 32 codes"),
        ({"generator__grid_size": 8}, "got 8 × 8 tokens for 4 × 4 at 8 pixels. Use generator.grid_size=4"),
        ({"generator__num_classes": 9}, "Use generator.num_classes=10"),
        ({"speed__sharded": True}, "needs at least 2; got processes=1"),
        ({"optimizer__clip_norm": -1.0}, "clip_norm must be ≥ 0"),
        ({"optimizer__schedule": "linear"}, "schedule must be one of"),
        ({"tokenizer_weights": "averaged"}, "tokenizer_weights must be one of"),
        ({"index_permutation": -2}, "index_permutation must be ≥ −1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, tokenizer, settings, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        trained(tmp_path / "run", tiny(tokenizer, **settings))
    assert not (tmp_path / "run").exists()


def test_other_settings_in_a_folder_are_refused(tmp_path, tokenizer):
    trained(tmp_path / "run", tiny(tokenizer, steps=1))
    with pytest.raises(RunError, match="steps"):
        trained(tmp_path / "run", tiny(tokenizer, steps=2))


def test_an_exploding_learning_rate_stops_the_run(tmp_path, tokenizer):
    config = tiny(tokenizer, optimizer__learning_rate=1e38, optimizer__clip_norm=0.0, optimizer__warmup_share=0.0)
    with pytest.raises(TrainingError, match="first tensor with NaN or infinity"):
        trained(tmp_path / "run", config)
    assert Run(tmp_path / "run").status == "failed"
