"""`lfq_maskbit`: the published values, the penalty over all codes at once as oracle, by blocks too."""

import math

import pytest
import torch
from golden import golden

from ibqlab.quantizers import blocks, build_quantizer
from ibqlab.quantizers.lfq import sign_entropies
from ibqlab.quantizers.methods.lfq_maskbit import floored_entropies


def literal(z, temperature, epsilon):
    """The penalty as published: a softmax over all K codes, N × K at once."""
    dim = z.shape[1]
    grid = torch.tensor([[1.0 if code >> i & 1 else -1.0 for i in range(dim)] for code in range(2**dim)]).to(z)
    shares = (2 * z @ grid.T / temperature).softmax(1)
    mean = shares.mean(0)
    return -(shares * shares.clamp(min=epsilon).log()).sum(1).mean(), -(mean * mean.clamp(min=epsilon).log()).sum()


def features(tokens=30, dim=5, scale=1.0):
    drawn = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    return (scale * drawn).requires_grad_()


def assert_near(ours, theirs, tolerance):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-12)


@pytest.mark.parametrize("rows", [100, 7])
@pytest.mark.parametrize("dim", [1, 2, 5, 7])
@pytest.mark.parametrize("case", [(1.0, 1.0, 1e-3), (0.01, 0.02, 1e-5), (0.3, 0.5, 0.05)])
def test_entropies_and_gradients_are_those_of_the_softmax_over_all_codes(monkeypatch, rows, dim, case):
    temperature, scale, epsilon = case
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: rows)
    z = features(dim=dim, scale=scale)
    ours, theirs = floored_entropies(z, temperature, epsilon), literal(z, temperature, epsilon)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)
        gradients = [torch.autograd.grad(value, z, retain_graph=True)[0] for value in (mine, reference)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9 * (1 + gradients[1].abs().max().item()))


def test_without_a_floor_they_are_the_factorised_entropies():
    z = features(dim=6, scale=0.05)
    for floored, exact in zip(floored_entropies(z, epsilon=0.0), sign_entropies(z, epsilon=0.0), strict=True):
        torch.testing.assert_close(floored, exact, rtol=1e-10, atol=1e-10)
    certain = (100 * features(dim=6)).detach().float().requires_grad_()
    sample, average = floored_entropies(certain, epsilon=0.0)
    (average - sample).backward()
    assert sample.item() == pytest.approx(0, abs=1e-3) and certain.grad.isfinite().all()


def test_the_floor_caps_the_entropies():
    even = torch.zeros(4, 6)
    assert floored_entropies(even, epsilon=0.0)[1].item() == pytest.approx(6 * math.log(2), rel=1e-6)
    assert [value.item() for value in floored_entropies(even, epsilon=0.1)] == pytest.approx([math.log(10)] * 2)


@pytest.mark.parametrize(("tag", "dtype", "tolerance"), [("f64", torch.float64, 1e-6), ("f32", torch.float32, 1e-4)])
def test_golden_values(tag, dtype, tolerance):
    facts, stored = golden("peers/maskbit_lfq")
    config = facts["config"]
    quantizer = build_quantizer(
        "lfq_maskbit",
        codebook_size=config["codebook_size"],
        commitment_weight=config["commitment_cost"],
        entropy_weight=config["entropy_loss_weight"],
        entropy_temperature=config["entropy_loss_temperature"],
        average_entropy_weight=config["entropy_gamma"],
    ).to(dtype)
    z = stored["out/h"].to(dtype).requires_grad_()
    out = quantizer(z)
    total = (stored["train/w"].to(dtype) * out.quantized).sum() + out.loss
    total.backward()
    assert torch.equal(out.indices, stored["train/indices"])
    terms, weights = out.terms, quantizer.loss_weights()
    entropy = sum(weights[name] * terms[name] for name in ("sample_entropy", "average_entropy"))
    for ours, key in (
        (out.quantized, "z_q"),
        (weights["commitment"] * terms["commitment"], "commitment_loss"),
        (terms["sample_entropy"], "per_sample_entropy"),
        (terms["average_entropy"], "avg_entropy"),
        (entropy, "entropy_loss"),
        (out.loss, "quantizer_loss"),
        (total, "total"),
        (z.grad, "grad_h"),
    ):
        assert_near(ours, stored[f"train/{tag}/{key}"], tolerance)


def test_in_evaluation_the_commitment_stays():
    _, stored = golden("peers/maskbit_lfq")
    quantizer = build_quantizer("lfq_maskbit", codebook_size=64).eval()
    out = quantizer(stored["out/h"])
    assert torch.equal(out.quantized, stored["out/z_q"]) and torch.equal(out.indices, stored["out/indices"])
    assert_near(out.loss, stored["out/loss/quantizer_loss"], 1e-6)
    assert out.terms["sample_entropy"].item() == stored["out/loss/per_sample_entropy"].item() == 0
    assert out.terms["average_entropy"].item() == stored["out/loss/avg_entropy"].item() == 0
    codes = quantizer.decode(stored["bits/indices"].view(1, 8, 8)).permute(0, 2, 3, 1).reshape(64, 6)
    assert torch.equal(codes, stored["bits/codes"])


def test_a_weight_of_zero_leaves_the_penalty_out():
    out = build_quantizer("lfq_maskbit", codebook_size=32, entropy_weight=0.0)(torch.randn(1, 5, 3, 3))
    assert out.terms["sample_entropy"].item() == out.terms["average_entropy"].item() == 0
    assert out.loss.item() == pytest.approx(0.25 * out.terms["commitment"].item())
