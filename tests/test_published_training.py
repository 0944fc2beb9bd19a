"""Training as published: the recorded steps, the adversary inside the loop, the switches between paper and code."""

import pytest
import torch
from golden import golden, golden_file
from test_training import assert_same_run, smoke, trained

from ibqlab.data import Batch
from ibqlab.quantizers import build_quantizer
from ibqlab.recipes.tokenizer_config import LossConfig
from ibqlab.runs import Run
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from ibqlab.training import OptimizerConfig, TrainConfig, TrainingError, recipe_config
from ibqlab.training.optimisation import build_optimizer, learning_rate_at

ADVERSARIAL = {
    "data__image_size": 32,
    "loss__adversarial_weight": 0.1,
    "loss__lecam_weight": 0.05,
    "loss__discriminator": {"base_channels": 4},
}
# Relative, for the first step, the later ones, and the weights after the last. In float32 the entropy's temperature
# of 0.01 magnifies rounding, which differs from processor to processor (1.3e-5 seen); Adam turns rounding of
# gradients near zero into whole steps, and after the first step one token's two best codes are 2e-5 apart: which of
# them it takes moves the second step's losses by a percent
# and a patch's logits by more, which are therefore compared in the first step only.
TOLERANCES = {"64-true": (1e-6, 1e-6, 1e-6), "32-true": (3e-5, 2e-2, 1e-2)}


def relative(actual, expected):
    """Largest difference over the largest expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return float((torch.as_tensor(actual).double() - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


# --- parity ---


def published_run(told):
    """The golden run's settings as a recipe of ours."""
    shape, loss = told["ddconfig"], told["lossconfig"]
    return recipe_config(
        "builtin/smoke",
        {
            "data.image_size": shape["resolution"],
            "tokenizer.autoencoder": {
                "base_channels": shape["ch"],
                "channel_multipliers": shape["ch_mult"],
                "num_res_blocks": shape["num_res_blocks"],
                "attention_resolutions": shape["attn_resolutions"],
                "resolution": shape["resolution"],
                "latent_channels": shape["z_channels"],
            },
            "tokenizer.quantizer": {
                "name": "ibq",
                "codebook_size": told["n_embed"],
                "code_dim": told["embed_dim"],
                "quantization_weight": loss["quant_loss_weight"],
                "entropy_weight": loss["entropy_loss_weight"],
                "entropy_temperature": told["entropy_temperature"],
            },
            "loss": {
                "adversarial_weight": loss["gen_loss_weight"],
                "lecam_weight": loss["lecam_loss_weight"],
                "discriminator": {"base_channels": loss["disc_ndf"]},
            },
            "optimizer": {"learning_rate": told["learning_rate"], "betas": told["adam_betas"]},
            "record.log_every": 1,
            "steps": told["steps"],
            "batch_size": told["batch_size"],
            "start_from": str(golden_file("tokenizer_ema_official_ckpt.ckpt")),
            "start_weights": "raw",
        },
    )


@pytest.mark.parametrize(("tag", "precision"), [("f64", "64-true"), ("f32", "32-true")])
def test_the_loop_repeats_the_published_training(tmp_path, monkeypatch, tag, precision):
    told, values = golden("train_tokenizer_3steps")
    batches = values["images_nhwc"].double().permute(0, 3, 1, 2).split(told["batch_size"])
    labels = torch.zeros(told["batch_size"], dtype=torch.int64)
    monkeypatch.setattr(
        "ibqlab.training.tokenizer.loop.training_batches",
        lambda *_, **__: [Batch(images, labels, []) for images in batches],
    )
    monkeypatch.setattr("ibqlab.training.tokenizer.step.to_model_range", lambda images: images)
    config = published_run(told)
    run = trained(tmp_path / "run", TrainConfig(**{**vars(config), "precision": precision}))
    first, later, last = TOLERANCES[precision]
    rows = run.metrics.set_index("step")
    for call in told["results"][tag]:
        row, log = rows.loc[call["global_step"] + 1], call["log"]
        if call["optimizer_idx"] == 1:
            ours = {
                "loss": row["discriminator"] + 0.05 * row["lecam"],
                "train/lecam_loss": row["lecam"],
                "train/logits_real": row["logits_real"],
                "train/logits_fake": row["logits_fake"],
            }
        else:
            ours = {
                "loss": row["loss"],
                "train/reconstruct_loss": row["l1"],
                "train/unsacled_g_loss": row["adversarial"],
                "train/codebook_loss": row["quantizer_loss"],
                "train/codebook_sample_entropy_loss": row["term_sample_entropy"],
                "train/codebook_avg_entropy_loss": row["term_average_entropy"],
            }
        if call["global_step"] and precision == "32-true":
            ours = {name: value for name, value in ours.items() if "logits" not in name and "lecam" not in name}
        for name, value in ours.items():
            expected = call["loss"] if name == "loss" else log[name]
            assert relative(value, expected) < (later if call["global_step"] else first), (call["global_step"], name)
    state = run.load_checkpoint()[1]
    final = published_names(state)
    compared = [name for name in values if name.startswith(f"{tag}/final/")]
    assert len(compared) == 10
    for name in compared:
        assert relative(final[name.removeprefix(f"{tag}/final/")], values[name]) < last, name
    norms = told["results"][f"{tag}_final_norms"]
    assert norms.keys() - final.keys() == {"model_ema.decay"}
    for name in norms.keys() & final.keys():
        norm = norms[name]
        assert relative(final[name].double().norm(), norm) < last, name
    lecam = torch.stack([state["lecam"]["real"], state["lecam"]["fake"]])
    assert relative(lecam, told["results"]["lecam_final"]) < (last if precision == "64-true" else 0.1)


def published_names(state):
    """A checkpoint's tensors under the published code's names."""

    def renamed(name):
        return name.replace("quantizer.codes.", "quantize.embedding.")

    plain = {renamed(name): value for name, value in state["model"].items()}
    plain |= {f"loss.discriminator.{name}": value for name, value in state["discriminator"].items()}
    averages = {renamed(name): value for name, value in state["ema"].items()}
    averages |= {f"loss.discriminator.{name}": value for name, value in state["discriminator_ema"].items()}
    return plain | {"model_ema." + name.replace(".", ""): value for name, value in averages.items()}


# --- the adversary in the loop ---


def test_a_resumed_run_with_an_adversary_repeats_itself(tmp_path, monkeypatch):
    config = smoke(**ADVERSARIAL, steps=8, record__checkpoint_every=4)
    whole = trained(tmp_path / "whole", config)
    monkeypatch.setattr(Run, "log", stop_at(6, Run.log))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", config)
    monkeypatch.undo()
    assert Run(tmp_path / "cut").status == "stopped"
    cut = trained(tmp_path / "cut", config)
    assert_same_run(whole, cut)
    state = cut.load_checkpoint()[1]
    assert state["lecam"]["real"] != 0
    assert {"adversarial", "discriminator", "lecam", "logits_real", "logits_fake"} <= set(cut.metrics.columns)


def stop_at(step, log):
    """`Run.log` that is interrupted at a step."""

    def logging(run, row):
        if row["step"] == step:
            raise KeyboardInterrupt
        log(run, row)

    return logging


def first_calls(monkeypatch, tmp_path, **settings):
    """The discriminator's calls in the first step: the image's mean and whether a graph was wanted, in order."""
    seen = []

    def look(discriminator, images):
        seen.append(("train" if discriminator.training else "eval", images.requires_grad, images.mean().item()))
        return discriminator.main(images)

    monkeypatch.setattr(PatchDiscriminator, "forward", look)
    trained(tmp_path / "run", smoke(**ADVERSARIAL | settings, steps=1))
    return seen


def test_the_discriminator_is_called_three_times_and_learns_first(tmp_path, monkeypatch):
    real, fake, judged = first_calls(monkeypatch, tmp_path)
    assert [call[:2] for call in (real, fake, judged)] == [("train", False), ("train", False), ("train", True)]
    assert fake[2] == judged[2] != real[2]


def test_the_discriminator_may_learn_last(tmp_path, monkeypatch):
    calls = first_calls(monkeypatch, tmp_path, loss__discriminator_first=False)
    assert [call[1] for call in calls] == [True, False, False]


def test_a_batch_in_parts_teaches_the_discriminator_all_of_it_first(tmp_path, monkeypatch):
    calls = first_calls(monkeypatch, tmp_path, accumulate=2, tokenizer__autoencoder__dropout=0.0)
    assert [call[1] for call in calls] == [False] * 4 + [True] * 2
    assert [calls[1][2], calls[3][2]] == pytest.approx([calls[4][2], calls[5][2]], rel=1e-6)


def test_rebuilding_for_the_discriminator_leaves_moving_averages_alone(tmp_path):
    plain = smoke("vq_ema", steps=2, accumulate=2, data__image_size=32)
    judged = smoke("vq_ema", steps=2, accumulate=2, **ADVERSARIAL | {"loss__adversarial_weight": 1e-12})
    one, other = (trained(tmp_path / name, c) for name, c in (("plain", plain), ("judged", judged)))
    for name in ("quantizer.codes.hits", "quantizer.codes.weight"):
        torch.testing.assert_close(
            *(run.load_checkpoint()[1]["model"][name] for run in (one, other)), atol=1e-6, rtol=0
        )


def test_before_its_start_the_discriminator_is_not_there(tmp_path):
    run = trained(tmp_path / "run", smoke(**ADVERSARIAL, steps=4, loss__discriminator_start=2, record__log_every=1))
    judged = run.metrics.set_index("step")["discriminator"]
    assert judged.loc[[1, 2]].isna().all() and judged.loc[[3, 4]].notna().all()
    with_it = Run(tmp_path / "run").load_checkpoint()[1]["discriminator"]
    assert with_it["main.3.num_batches_tracked"] == 6


def test_adaptive_weight_changes_the_generators_loss(tmp_path):
    fixed, adaptive = (
        trained(tmp_path / str(on), smoke(**ADVERSARIAL, steps=1, loss__adaptive_weight=on)).metrics.iloc[-1]
        for on in (False, True)
    )
    assert adaptive["adversarial_weight"] not in (0.1, 1e3)
    assert adaptive["loss"] != fixed["loss"] and adaptive["l1"] == fixed["l1"]


def test_nan_in_the_discriminator_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(PatchDiscriminator, "forward", lambda self, images: self.main(images) * float("nan"))
    with pytest.raises(TrainingError, match="the discriminator's 'discriminator' is the first"):
        trained(tmp_path / "run", smoke(**ADVERSARIAL))


def test_images_too_small_for_the_discriminator_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"at least 24 × 24 pixels, got data.image_size=16"):
        trained(tmp_path / "run", smoke(**ADVERSARIAL | {"data__image_size": 16}))
    assert not (tmp_path / "run").exists()


def test_mixed_precision_with_an_adversary(tmp_path):
    run = trained(tmp_path / "run", smoke(**ADVERSARIAL, steps=2, precision="bf16-mixed"))
    assert run.metrics["loss"].iloc[1:].notna().all()
    assert {v.dtype for v in run.load_checkpoint()[1]["discriminator"].values()} == {torch.float32, torch.int64}


# --- LPIPS ---


def test_a_missing_weight_file_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"vgg16-397923af\.pth"):
        trained(tmp_path / "run", smoke(loss__perceptual_weight=1.0))
    assert not (tmp_path / "run").exists()


def test_lpips_is_a_term_of_the_loss(tmp_path, monkeypatch):
    class Distance(torch.nn.Module):
        def forward(self, images, reconstructions):
            return (images - reconstructions).square().mean((1, 2, 3))

    asked = []
    monkeypatch.setattr(
        "ibqlab.metrics.perceptual.load_lpips", lambda net, weights: asked.append((net, weights)) or Distance()
    )
    row = trained(
        tmp_path / "run", smoke(steps=1, loss__perceptual_weight=3.0, loss__perceptual_weights="here.pth")
    ).metrics.iloc[-1]
    assert asked == [("vgg", "here.pth")]
    assert row["perceptual"] > 0
    assert row["loss"] == pytest.approx(row["l1"] + 3 * row["perceptual"] + row["quantizer_loss"], rel=1e-5)


def test_tables_name_the_losses(tmp_path):
    assert LossConfig().describe() == "L1, no LPIPS, no GAN"
    assert LossConfig(perceptual_weight=1, adversarial_weight=0.1).describe() == "L1 + LPIPS (vgg) + hinge GAN"
    run = trained(tmp_path / "run", smoke(**ADVERSARIAL, steps=1))
    assert run.provenance["losses"] == "L1 + hinge GAN, no LPIPS"


# --- switches and schedules ---


def test_learning_rate_drops_after_its_steps_for_both_optimisers(tmp_path):
    config = OptimizerConfig(learning_rate=1e-3, drop_steps=(2, 3))
    rates = [learning_rate_at(step, config) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
    run = trained(tmp_path / "run", smoke(**ADVERSARIAL, steps=3, record__log_every=1, optimizer__drop_steps=[1, 2]))
    assert run.metrics["learning_rate"].dropna().tolist() == pytest.approx([1e-3, 1e-4, 1e-5])
    state = run.load_checkpoint()[1]
    for name in ("optimizer", "discriminator_optimizer"):
        assert state[name]["param_groups"][0]["lr"] == pytest.approx(1e-5)


@pytest.mark.parametrize("decay_norms", [True, False])
def test_decay_norms_decides_whether_norms_shrink(decay_norms):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, decay_norms=decay_norms)
    optimizer = build_optimizer(module, config)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(module.named_parameters())
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * 0.95)
    torch.testing.assert_close(after["1.weight"], before["1.weight"] * (0.95 if decay_norms else 1.0))


@pytest.mark.parametrize(("start", "placeholder"), [("placeholder", True), ("codes", False)])
def test_the_averaged_codebook_starts_where_the_switch_says(tmp_path, start, placeholder):
    run = trained(tmp_path / start, smoke(steps=1, ema_codebook_start=start))
    state = torch.load(run.path / "checkpoints" / "step_00000000.pt")["state"]
    shadow, codes = state["ema"]["quantizer.codes.weight"], state["model"]["quantizer.codes.weight"]
    assert torch.equal(shadow, codes) is not placeholder
    assert (shadow.abs().max() <= 1 / 64).item() is placeholder
    assert torch.equal(state["ema"]["decoder.conv_in.weight"], state["model"]["decoder.conv_in.weight"])


def test_the_placeholder_is_ibqs_alone(tmp_path):
    config = smoke({"name": "vq", "codebook_init": "normal"}, ema_codebook_start="placeholder", steps=1)
    run = trained(tmp_path / "run", config)
    state = torch.load(run.path / "checkpoints" / "step_00000000.pt")["state"]
    assert torch.equal(state["ema"]["quantizer.codes.weight"], state["model"]["quantizer.codes.weight"])


def test_upkeep_rests_inside_its_block():
    quantizer = build_quantizer("vq_ema", codebook_size=16, code_dim=4)
    before = quantizer.codebook.clone()
    with quantizer.without_upkeep():
        quantizer(torch.randn(2, 4, 3, 3))
    assert torch.equal(quantizer.codebook, before)
    quantizer(torch.randn(2, 4, 3, 3))
    assert not torch.equal(quantizer.codebook, before)


# --- start_from ---


def test_a_run_starts_from_another_ones_weights_and_averages(tmp_path):
    first = trained(tmp_path / "first", smoke(**ADVERSARIAL, steps=3))
    second = trained(tmp_path / "second", smoke(**ADVERSARIAL, steps=1, seed=5, start_from=str(first.path)))
    last = first.load_checkpoint()[1]
    start = torch.load(second.path / "checkpoints" / "step_00000000.pt")["state"]
    for part in ("model", "ema", "discriminator", "discriminator_ema"):
        assert all(torch.equal(start[part][name], value) for name, value in last[part].items()), part
    assert start["lecam"]["real"] == 0
    assert second.provenance["start"]["discriminator"] == "its own"


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    first = trained(tmp_path / "first", smoke(steps=1))
    wrong = smoke(steps=1, start_from=str(first.path), tokenizer__autoencoder__num_res_blocks=2)
    with pytest.raises(ValueError, match=r"start_from .* tensors do not fit .* first '.*none in the checkpoint"):
        trained(tmp_path / "second", wrong)
    assert not (tmp_path / "second").exists()


def test_full_size_discriminator_and_tokenizer_have_the_published_parameters():
    with torch.device("meta"):
        tokenizer, discriminator = (
            Tokenizer.from_config(TrainConfig().tokenizer),
            PatchDiscriminator(DiscriminatorConfig()),
        )
    assert sum(p.numel() for p in tokenizer.encoder.parameters()) == 46_752_256
    assert sum(p.numel() for p in tokenizer.decoder.parameters()) == 59_903_875
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
