"""`gumbel`: the published form with its N × K one-hot as oracle, by blocks too, and its schedule."""

import pytest
import torch
from clusters import continues_alike, train
from golden import golden
from torch.nn import functional as F

from ibqlab.quantizers import blocks, build_quantizer
from ibqlab.quantizers.methods import gumbel

TINY = torch.finfo(torch.float64).tiny


def built(size=12, dim=5, **settings):
    torch.manual_seed(1)
    return build_quantizer("gumbel", codebook_size=size, code_dim=dim, **settings)


def published(tokens, quantizer, noise, temperature):
    """taming-transformers' GumbelQuantize with given noise."""
    hard_forward = quantizer.config.straight_through
    logits = tokens @ quantizer.scores.weight.T + quantizer.scores.bias
    soft = ((logits + noise) / temperature).softmax(1)
    index = soft.argmax(1)
    hard = F.one_hot(index, logits.shape[1]).to(soft.dtype)
    quantized = (hard - soft.detach() + soft if hard_forward else soft) @ quantizer.codebook
    prior = logits.softmax(1)
    kl = (prior * (prior * logits.shape[1] + 1e-10).log()).sum(1).mean()
    return quantized, index, kl


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("rows", [100, 4])
@pytest.mark.parametrize("progress", [0.0, 0.6])
def test_values_and_gradients_are_the_published_ones(monkeypatch, rows, progress, hard):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: rows)
    quantizer = built(kl_weight=0.3, straight_through=hard).double()
    quantizer.progress = progress
    z = torch.randn(2, 5, 5, 1, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    noise = torch.cat(
        [torch.empty(min(rows, 10 - start), 12, dtype=torch.float64).exponential_() for start in range(0, 10, rows)]
    )
    after = torch.get_rng_state()
    torch.manual_seed(3)
    out = quantizer(z)
    inputs = [z, *quantizer.parameters()]
    ours = torch.autograd.grad(out.loss + out.quantized.sin().sum(), inputs)
    assert torch.equal(torch.get_rng_state(), after)
    tokens = z.permute(0, 2, 3, 1).reshape(-1, 5)
    quantized, index, kl = published(tokens, quantizer, -noise.log(), quantizer.temperature)
    theirs = torch.autograd.grad(0.3 * kl + quantized.sin().sum(), inputs)
    assert torch.equal(out.indices.flatten(), index)
    torch.testing.assert_close(out.terms["kl"], kl, atol=1e-10, rtol=0)
    torch.testing.assert_close(out.quantized.permute(0, 2, 3, 1).reshape(-1, 5), quantized, atol=1e-10, rtol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


def from_golden(monkeypatch, dtype, *, temperature=1.0, straight_through=True):
    """The published quantizer with its stored noise in place of what is drawn, and all stored values."""
    facts, stored = golden("peers/taming_gumbel")
    size, dim = facts["n_embed"], facts["embed_dim"]
    quantizer = build_quantizer(
        "gumbel",
        codebook_size=size,
        code_dim=dim,
        kl_weight=facts["kl_weight"],
        temperature_start=temperature,
        temperature_end=temperature,
        straight_through=straight_through,
    ).to(dtype)
    weights = {name: stored[f"state_dict/quantize.{name}"] for name in ("embed.weight", "proj.weight", "proj.bias")}
    quantizer.codes.weight.data.copy_(weights["embed.weight"])
    quantizer.scores.weight.data.copy_(weights["proj.weight"][:, :, 0, 0])
    quantizer.scores.bias.data.copy_(weights["proj.bias"])
    noise = stored["gumbel_noise"].permute(0, 2, 3, 1).reshape(-1, size)  # one block holds all tokens
    monkeypatch.setattr(gumbel, "_gumbel_noise", lambda buffer: buffer.copy_(noise))
    return quantizer, stored


def assert_near(ours, theirs, tolerance):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-12)


@pytest.mark.parametrize(
    ("tag", "dtype", "tolerance"),
    [
        ("train/f64", torch.float64, 1e-6),
        ("train/f32", torch.float32, 1e-4),
        ("train_soft/f64", torch.float64, 1e-6),
    ],
)
def test_golden_values(monkeypatch, tag, dtype, tolerance):
    soft = tag.startswith("train_soft")
    quantizer, stored = from_golden(monkeypatch, dtype, temperature=0.5 if soft else 1.0, straight_through=not soft)
    z = stored["out/h"].to(dtype).requires_grad_()
    out = quantizer(z)
    total = (stored["train/w"].to(dtype) * out.quantized).sum() + out.loss
    total.backward()
    assert torch.equal(out.indices, stored["train/indices"])
    for ours, key in (
        (out.quantized, "z_q"),
        (out.loss, "quant_loss"),
        (total, "total"),
        (z.grad, "grad_h"),
        (quantizer.codes.weight.grad, "grad_codebook"),
        (quantizer.scores.weight.grad[:, :, None, None], "grad_proj_weight"),
        (quantizer.scores.bias.grad, "grad_proj_bias"),
    ):
        assert_near(ours, stored[f"{tag}/{key}"], tolerance)


@pytest.mark.parametrize("straight_through", [True, False])
def test_golden_evaluation_is_noise_free_and_has_the_published_loss(monkeypatch, straight_through):
    quantizer, stored = from_golden(monkeypatch, torch.float32, straight_through=straight_through)
    out = quantizer.eval()(stored["out/h"])
    assert torch.equal(out.indices, stored["det/indices"])
    assert torch.equal(out.quantized, stored["det/z_q"])
    assert_near(out.loss, stored["out/loss/quant_loss"], 1e-5)  # of scores, which the noise does not enter
    double = from_golden(monkeypatch, torch.float64)[0].eval()(stored["f64/h"])
    assert_near(double.loss, stored["f64/quant_loss"], 1e-6)


def test_golden_samples_are_those_of_the_published_evaluation(monkeypatch):
    quantizer, stored = from_golden(monkeypatch, torch.float32)
    out = quantizer(stored["out/h"])
    assert torch.equal(out.indices, stored["out/indices"]) and torch.equal(out.quantized, stored["out/z_q"])


def test_a_mixture_moves_every_code():
    quantizer = built(straight_through=False)
    quantizer(torch.randn(1, 5, 3, 1)).quantized.square().sum().backward()
    assert (quantizer.codebook_gradient.norm(dim=1) > 0).all()


def test_samples_follow_the_softmax_and_evaluation_takes_the_best():
    quantizer = built(4, 2)
    z = torch.ones(1, 2, 4000, 1)
    torch.manual_seed(0)
    shares = torch.bincount(quantizer(z).indices.flatten(), minlength=4) / 4000
    logits = quantizer.scores(torch.ones(2))
    assert (shares - logits.softmax(0)).abs().max() < 0.03
    assert (quantizer.eval()(z).indices == logits.argmax()).all()


def test_all_scores_take_gradient_and_sampled_codes():
    quantizer = built()
    out = quantizer(torch.randn(1, 5, 3, 1))
    out.quantized.square().sum().backward()
    assert (quantizer.scores.weight.grad.norm(dim=1) > 0).all()
    learned = quantizer.codebook_gradient.norm(dim=1) > 0
    assert learned.nonzero()[:, 0].tolist() == out.indices.unique().tolist()


def test_temperature_falls_along_a_cosine():
    quantizer = built(temperature_start=1.0, temperature_end=0.2)
    seen = []
    for progress in (0.0, 0.5, 1.0):
        quantizer.progress = progress
        seen.append(quantizer.temperature)
    assert seen == pytest.approx([1.0, 0.6, 0.2])


def test_the_coldest_temperature_gives_numbers():
    quantizer = built()
    quantizer.progress = 1.0
    z = torch.zeros(1, 5, 1, 1, requires_grad=True)
    out = quantizer(z)
    (out.loss + out.quantized.sum()).backward()
    assert z.grad.isfinite().all() and quantizer.scores.weight.grad.isfinite().all()


def test_permuted_codes_and_scores_have_permuted_indices():
    quantizer = built().eval()
    z = torch.randn(1, 5, 4, 4)
    before, order = quantizer.encode(z), torch.randperm(12)
    for parameter in quantizer.parameters():
        parameter.data = parameter.data[order]
    assert torch.equal(order[quantizer.encode(z)], before)


def test_on_clusters_training_samples_many_codes():
    quantizer = built(16, 2)
    train(quantizer, progress=0.0)
    assert len(quantizer.train()(torch.randn(1, 2, 20, 20)).indices.unique()) >= 12


def test_it_resumes():
    assert continues_alike(built(8, 2))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"temperature_end ≤ temperature_start, got end 1\.0 and start 0\.5"):
        built(temperature_start=0.5, temperature_end=1.0)
    with pytest.raises(ValueError, match="kl_weight must be ≥ 0, got -1"):
        built(kl_weight=-1.0)
