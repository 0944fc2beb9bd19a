"""`nsvq`: the kernel's term with its N × K weights as oracle, and which codes it moves."""

import pytest
import torch
from clusters import continues_alike, permutes_alike, plain_usage, train
from torch.nn import functional as F

from ibqlab.quantizers import blocks, build_quantizer


def built(size=12, dim=3, **settings):
    torch.manual_seed(1)
    return build_quantizer("nsvq", codebook_size=size, code_dim=dim, codebook_init="normal", **settings)


def published(tokens, codes, index, weight, temperature):
    """The published embedding loss without its part of the chosen codes."""
    squares = (tokens[:, None] - codes[None]).square()
    soft = weight * len(codes) * (-squares.sum(2) / temperature).softmax(1).detach()
    kernel = (soft * (1 - F.one_hot(index, len(codes)))).clamp(0, 1)
    return (kernel * squares.mean(2)).sum() / len(tokens)


@pytest.mark.parametrize("rows", [100, 4])
@pytest.mark.parametrize(("weight", "temperature"), [(0.01, 10.0), (0.5, 1.0), (2.0, 0.01)])
def test_values_and_gradients_are_the_published_ones(monkeypatch, rows, weight, temperature):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: rows)
    quantizer = built(drift_weight=weight, temperature_start=temperature, temperature_end=0.01).double()
    z = torch.randn(2, 3, 5, 1, dtype=torch.float64, requires_grad=True)
    inputs = [z, quantizer.codes.weight]
    out = quantizer(z)
    ours = torch.autograd.grad(out.loss + out.quantized.sin().sum(), inputs)
    tokens, codes = z.permute(0, 2, 3, 1).reshape(-1, 3), quantizer.codebook
    index = torch.cdist(tokens, codes).argmin(1)
    drift = published(tokens.detach(), codes, index, weight, temperature)
    torch.testing.assert_close(out.terms["drift"], drift, atol=1e-10, rtol=0)
    chosen = codes[index]
    loss = F.mse_loss(tokens, chosen.detach()) + 0.25 * (F.mse_loss(chosen, tokens.detach()) + drift)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    theirs = torch.autograd.grad(loss + (tokens + (chosen - tokens).detach()).sin().sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


def test_all_codes_take_gradient_and_without_the_term_chosen_ones_alone():
    z = torch.randn(1, 3, 2, 1)
    quantizer, plain = built(), built(drift_weight=0.0)
    for one in (quantizer, plain):
        one(z).loss.backward()
    assert (quantizer.codebook_gradient.norm(dim=1) > 0).all()
    assert (plain.codebook_gradient.norm(dim=1) > 0).sum() <= 2
    assert "drift" not in quantizer.eval()(z).terms


def test_temperature_falls_by_a_constant_factor():
    quantizer = built()
    seen = []
    for progress in (0.0, 1 / 3, 1.0):
        quantizer.progress = progress
        seen.append(quantizer.temperature)
    assert seen == pytest.approx([10.0, 1.0, 0.01])


def test_on_clusters_unused_codes_follow():
    torch.manual_seed(0)
    quantizer = build_quantizer("nsvq", codebook_size=16, code_dim=2, drift_weight=0.1)
    assert train(quantizer, steps=60) > plain_usage()


def test_zero_features_and_one_token_give_numbers():
    quantizer = built()
    quantizer.progress = 1.0
    quantizer(torch.zeros(1, 3, 1, 1)).loss.backward()
    assert quantizer.codebook_gradient.isfinite().all()


def test_permuted_codes_have_permuted_indices():
    assert permutes_alike(built())


def test_it_resumes():
    assert continues_alike(built(8, 2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"metric": "cosine"}, 'metric must be "l2" for nsvq'),
        ({"drift_weight": -1.0}, "drift_weight must be ≥ 0"),
        ({"temperature_end": 20.0}, "temperature_end ≤ temperature_start"),
        ({"codebook": "ema"}, 'codebook must be "free" for nsvq'),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        built(**settings)
