"""`gumbel`: the published form with its N × K one-hot as oracle, by blocks too, and its schedule."""

import pytest
import torch
from clusters import continues_alike, train
from torch.nn import functional as F

from ibqlab.quantizers import blocks, build_quantizer

TINY = torch.finfo(torch.float64).tiny


def built(size=12, dim=5, **settings):
    torch.manual_seed(1)
    return build_quantizer("gumbel", codebook_size=size, code_dim=dim, **settings)


def published(tokens, quantizer, noise, temperature):
    """taming-transformers' GumbelQuantize with given noise."""
    logits = tokens @ quantizer.scores.weight.T + quantizer.scores.bias
    soft = ((logits + noise) / temperature).softmax(1)
    index = soft.argmax(1)
    hard = F.one_hot(index, logits.shape[1]).to(soft.dtype)
    quantized = (hard - soft.detach() + soft) @ quantizer.codebook
    prior = logits.softmax(1)
    kl = (prior * (prior * logits.shape[1] + 1e-10).log()).sum(1).mean()
    return quantized, index, kl


@pytest.mark.parametrize("rows", [100, 4])
@pytest.mark.parametrize("progress", [0.0, 0.6])
def test_values_and_gradients_are_the_published_ones(monkeypatch, rows, progress):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: rows)
    quantizer = built(kl_weight=0.3).double()
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
