"""Discriminator, its losses and the whole loss module against values of the published code."""

import math

import pytest
import torch
from golden import golden
from lightning_fabric import Fabric
from torch.nn import functional as F

from ibqlab.losses.gan_losses import DISCRIMINATOR_LOSS_FUNCTIONS, LeCam, adaptive_weight, generator_loss
from ibqlab.losses.tokenizer_loss import tokenizer_loss
from ibqlab.quantizers import QuantizerOutput
from ibqlab.recipes.tokenizer_config import LossConfig, OptimizerConfig
from ibqlab.tokenizer import TokenizerOutput
from ibqlab.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from ibqlab.training import TrainConfig
from ibqlab.training.tokenizer.discriminator_training import Adversary


def assert_near(actual, expected, tolerance):
    """Equal within a tolerance relative to the largest expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = expected.abs().max().clamp_min(1e-12)
    assert (torch.as_tensor(actual).double() - expected).abs().max() / scale < tolerance


def published_discriminator(description, tensors, prefix=""):
    width = description["config"].get("ndf") or description["config"]["disc_ndf"]
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=width))
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(f"{prefix}main")}
    discriminator.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return discriminator


def weight_prefix(tensors):
    """What stands before `main.0.weight` in a file of golden values."""
    return next(name for name in tensors if name.endswith("main.0.weight")).removesuffix("main.0.weight")


# --- discriminator ---


def test_discriminator_equals_the_published_one():
    description, values = golden("discriminator")
    discriminator = published_discriminator(description, values, weight_prefix(values))
    images = values["x"].clone().requires_grad_()
    assert_near(discriminator.eval()(images), values["eval/logits"], 1e-5)
    logits = discriminator.train()(images)
    assert_near(logits, values["train/logits"], 1e-5)
    (gradient,) = torch.autograd.grad(logits.square().mean(), images)
    assert_near(gradient, values["train/grad_x"], 1e-4)
    state = discriminator.state_dict()
    after = {name: value for name, value in values.items() if name.startswith("train/after/")}
    assert len(after) == 9
    for name, value in after.items():
        assert_near(state[name.removeprefix("train/after/")], value, 1e-5)


def test_published_discriminator_has_its_names_its_size_and_its_grid():
    keys, _ = golden("official_state_dict_keys")
    published = {
        name.removeprefix("loss.discriminator."): shape
        for name, (shape, _) in next(v for k, v in keys.items() if "ibqgan_16384" in k).items()
        if name.startswith("loss.discriminator.")
    }
    with torch.device("meta"):
        discriminator = PatchDiscriminator(DiscriminatorConfig())
    assert {name: list(value.shape) for name, value in discriminator.state_dict().items()} == published
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    assert discriminator(torch.empty(2, 3, 256, 256, device="meta")).shape == (2, 1, 30, 30)


def test_discriminator_starts_as_published():
    torch.manual_seed(0)
    state = PatchDiscriminator(DiscriminatorConfig()).state_dict()
    assert abs(state["main.5.weight"].std() - 0.02) < 1e-3 and abs(state["main.5.weight"].mean()) < 1e-3
    assert abs(state["main.6.weight"].mean() - 1) < 0.01 and abs(state["main.6.weight"].std() - 0.02) < 0.01
    assert not state["main.6.bias"].any()
    # A convolution of PyTorch's own start has biases up to 1/√(fan-in).
    assert 0.5 / math.sqrt(48) < state["main.0.bias"].abs().max() <= 1 / math.sqrt(48)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_is_the_smallest_that_works(layers):
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=2, num_layers=layers)).eval()
    smallest = discriminator.config.smallest_image
    assert discriminator(torch.zeros(1, 3, smallest, smallest)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(1, 3, smallest - 1, smallest - 1))
    with pytest.raises(ValueError, match=f"at least {smallest} × {smallest} pixels, got 8 × 4"):
        discriminator.check_size(8, 4)


# --- losses ---


@pytest.mark.parametrize(
    ("tag", "dtype", "tolerance", "for_gradients"),
    [("f64", torch.float64, 1e-6, 1e-6), ("f32", torch.float32, 1e-5, 1e-4)],
)
def test_losses_and_their_gradients_are_the_published(tag, dtype, tolerance, for_gradients):
    description, values = golden("gan_losses_lecam")
    expected = description["values"][tag]
    real, fake = (values[name].to(dtype).requires_grad_() for name in ("logits_real", "logits_fake"))
    names = {"hinge": "hinge_d_loss", "vanilla": "vanilla_d_loss", "non_saturating": "non_saturate_discriminator_loss"}
    for ours, theirs in names.items():
        assert_near(DISCRIMINATOR_LOSS_FUNCTIONS[ours](real, fake).detach(), expected[theirs], tolerance)
    assert_near(generator_loss(fake).detach(), expected["non_saturate_gen_loss"], tolerance)
    gradients = torch.autograd.grad(DISCRIMINATOR_LOSS_FUNCTIONS["hinge"](real, fake), (real, fake))
    assert_near(gradients[0], values[f"{tag}/grad_hinge_wrt_logits_real"], for_gradients)
    assert_near(gradients[1], values[f"{tag}/grad_hinge_wrt_logits_fake"], for_gradients)
    (gradient,) = torch.autograd.grad(generator_loss(fake), fake)
    assert_near(gradient, values[f"{tag}/grad_gen_loss_wrt_logits_fake"], for_gradients)


def test_lecam_follows_the_published_sequence_also_after_a_resume():
    description, values = golden("gan_losses_lecam")
    told = description["lecam"]
    lecam = LeCam(told["decay"])
    for row in told["sequence"]:
        step = row["step"]
        real, fake = (values[f"lecam/logits_{side}"][step].double().requires_grad_() for side in ("real", "fake"))
        value = lecam(real, fake)
        hinge = DISCRIMINATOR_LOSS_FUNCTIONS["hinge"](real, fake)
        loss = told["weight"] * value + hinge
        for ours, theirs in [(value, "lecam_reg"), (hinge, "hinge"), (loss, "d_loss")]:
            assert_near(ours.detach(), row[theirs], 1e-6)
        assert_near(lecam.real, row["ema_real"], 1e-6)
        assert_near(lecam.fake, row["ema_fake"], 1e-6)
        gradients = torch.autograd.grad(loss, (real, fake))
        assert_near(gradients[0], values[f"lecam/grad_real/{step}"], 1e-6)
        assert_near(gradients[1], values[f"lecam/grad_fake/{step}"], 1e-6)
        resumed = LeCam(told["decay"])
        resumed.load_state_dict(lecam.state_dict())
        lecam = resumed


def test_adaptive_weight_is_the_published_formula():
    told = golden("gan_losses_lecam")[0]["adaptive_weight"]
    layer = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    direction = torch.full((4,), 0.5, dtype=torch.float64)
    nll, adversarial = ((layer * direction).sum() * told[norm] for norm in ("norm_nll_grad", "norm_g_grad"))
    assert_near(adaptive_weight(nll, adversarial, layer) * told["disc_weight"], told["d_weight"], 1e-6)
    assert adaptive_weight(nll, adversarial * 0, layer) == 1e4


def test_the_whole_loss_module_over_three_calls():
    description, values = golden("loss_module")
    told = description["config"]
    config = TrainConfig(
        loss=LossConfig(
            adversarial_weight=told["gen_loss_weight"],
            lecam_weight=told["lecam_loss_weight"],
            discriminator=DiscriminatorConfig(base_channels=told["disc_ndf"]),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-30),
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    discriminator = published_discriminator(description, values, weight_prefix(values)).double()
    adversary = Adversary(config, discriminator, fabric)
    images, rebuilt = values["x"].double(), values["x_rec"].double()
    quant, *_, entropy = values["codebook_loss_tuple"].double()
    quantizer_loss = told["quant_loss_weight"] * quant + told["entropy_loss_weight"] * entropy
    quantizer = QuantizerOutput(images, torch.zeros(1), quantizer_loss, {})
    for row in description["sequence"]:
        rebuilt = rebuilt.detach().requires_grad_()
        out = TokenizerOutput(rebuilt, quantizer, images)
        losses = adversary.learn([(images, rebuilt.detach())], 1e-30)
        total, parts = tokenizer_loss(config.loss, images, out, judge=adversary.judge)
        (gradient,) = torch.autograd.grad(total, rebuilt)
        told_d, told_g = row["disc_log"], row["gen_log"]
        assert_near(losses["discriminator"] + 0.05 * losses["lecam"], row["d_loss"], 1e-6)
        assert_near(losses["lecam"], told_d["train/lecam_loss"], 1e-6)
        assert_near(losses["logits_real"], told_d["train/logits_real"], 1e-6)
        assert_near(losses["logits_fake"], told_d["train/logits_fake"], 1e-6)
        assert_near(total.detach(), row["g_total"], 1e-6)
        assert_near(parts["l1"].detach(), told_g["train/reconstruct_loss"], 1e-6)
        assert_near(parts["adversarial"].detach(), told_g["train/unsacled_g_loss"], 1e-6)
        assert_near(gradient, values[f"step{row['step']}/grad_x_rec"], 1e-6)
    state = adversary.discriminator.state_dict()
    for name, value in values.items():
        if name.startswith("after/"):
            assert_near(state[name.removeprefix("after/")], value, 1e-6)
    assert state["main.3.num_batches_tracked"] - values[f"{weight_prefix(values)}main.3.num_batches_tracked"] == 9


def test_judging_gives_the_discriminator_no_gradient_and_leaves_it_trainable():
    fabric = Fabric(accelerator="cpu", devices=1)
    config = TrainConfig(loss=LossConfig(adversarial_weight=0.1))
    adversary = Adversary(config, PatchDiscriminator(DiscriminatorConfig(base_channels=4)), fabric)
    rebuilt = torch.rand(2, 3, 32, 32, requires_grad=True)
    adversary.judge(rebuilt).backward()
    assert rebuilt.grad.abs().max() > 0
    assert all(p.requires_grad and p.grad is None for p in adversary.discriminator.parameters())


def test_learning_tells_images_from_reconstructions():
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1)
    config = TrainConfig(loss=LossConfig(adversarial_weight=0.1, lecam_weight=0.05))
    adversary = Adversary(config, PatchDiscriminator(DiscriminatorConfig(base_channels=8)), fabric)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    pairs = [(images, F.avg_pool2d(images, 3, 1, 1))]
    losses = [adversary.learn(pairs, 1e-3)["discriminator"].item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
