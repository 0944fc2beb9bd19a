"""`vq_ema_revived`: averages and restarts against their equations, and against vector-quantize-pytorch."""

import pytest
import torch
from clusters import continues_alike, plain_usage, train

from ibqlab.quantizers import build_quantizer


def built(size=8, dim=3, **settings):
    torch.manual_seed(1)
    return build_quantizer("vq_ema_revived", codebook_size=size, code_dim=dim, **settings)


def test_a_step_is_the_equation():
    quantizer = built(ema_decay=0.9, revive_below=0.95).double()
    codes, hits, sums = (
        value.clone() for value in (quantizer.codes.weight, quantizer.codes.hits, quantizer.codes.sums)
    )
    z = 3 * torch.randn(1, 3, 20, 1, dtype=torch.float64)
    tokens = z[0, :, :, 0].T
    indices = torch.cdist(tokens, codes).argmin(1)
    one_hot = torch.nn.functional.one_hot(indices, 8).double()
    hits = 0.9 * hits + 0.1 * one_hot.sum(0)
    sums = 0.9 * sums + 0.1 * one_hot.T @ tokens
    smoothed = (hits + 1e-5) / (hits.sum() + 8e-5) * hits.sum()
    expected = sums / smoothed[:, None]
    starved = (hits < 0.95).nonzero()[:, 0]
    torch.manual_seed(5)
    expected[starved] = tokens[torch.randperm(20)[: len(starved)]]
    assert 0 < len(starved) < 8
    torch.manual_seed(5)
    quantizer(z)
    torch.testing.assert_close(quantizer.codebook, expected, atol=1e-10, rtol=0)
    assert (quantizer.codes.hits[starved] == 0.95).all()
    torch.testing.assert_close(quantizer.codes.sums[starved], 0.95 * expected[starved], atol=1e-10, rtol=0)


def test_it_goes_as_the_package_goes():
    package = pytest.importorskip("vector_quantize_pytorch")
    ours = built(size=16, dim=4, ema_decay=0.8, revive_below=0.5)
    theirs = package.VectorQuantize(
        dim=4,
        codebook_size=16,
        decay=0.8,
        threshold_ema_dead_code=0.5,
        rotation_trick=False,
        commitment_weight=0.25,
    )
    theirs._codebook.embed.data.copy_(ours.codebook[None])
    theirs._codebook.embed_avg.data.copy_(ours.codebook[None])
    for step in range(6):
        z = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(step))
        mine, other = z.clone().requires_grad_(), z.clone().requires_grad_()
        torch.manual_seed(step)
        out = ours(mine.permute(0, 2, 1)[..., None])
        torch.manual_seed(step)
        quantized, indices, loss = theirs(other)
        assert torch.equal(out.indices[..., 0], indices)
        torch.testing.assert_close(out.quantized[..., 0].permute(0, 2, 1), quantized)
        torch.testing.assert_close(out.loss, loss.squeeze())
        (out.loss + out.quantized.sin().sum()).backward()
        (loss.sum() + quantized.sin().sum()).backward()
        torch.testing.assert_close(mine.grad, other.grad)
        torch.testing.assert_close(ours.codebook, theirs._codebook.embed[0], atol=1e-5, rtol=1e-5)


def test_no_code_takes_gradient_and_none_stays_unused():
    quantizer = built(16, 2, codebook_init="uniform")
    assert train(quantizer) > 0.7 > plain_usage()
    assert quantizer.codebook_gradient is None
    never = built(16, 2, codebook_init="uniform", revive_below=0.0)
    assert train(never) < 0.5


def test_more_starved_codes_than_tokens_are_revived_in_turn():
    quantizer = built(64, 2, revive_below=1.0)
    z = 50 + torch.randn(1, 2, 4, 1)
    quantizer(z)
    near = (quantizer.codebook - 50).norm(dim=1) < 20
    assert near.sum() == 4


def test_it_resumes():
    assert continues_alike(built(8, 2))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match='Use the quantizer "vq" with revive_after'):
        built(codebook="free")
    with pytest.raises(ValueError, match="revive_below must be ≥ 0 hits, got -1"):
        built(revive_below=-1.0)
