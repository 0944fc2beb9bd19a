"""`deferred_vq`: features as they are, then k-means centres and VQ."""

import pytest
import torch
from clusters import clustered_features, continues_alike, plain_usage, train

from ibqlab.quantizers import build_quantizer


def built(size=12, dim=2, **settings):
    torch.manual_seed(1)
    return build_quantizer("deferred_vq", codebook_size=size, code_dim=dim, **settings)


def test_features_pass_as_they_are_until_their_share_of_training():
    quantizer = built(defer=0.5)
    z = clustered_features().requires_grad_()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.progress = 0.49
    out = quantizer(z)
    assert torch.equal(out.quantized, z)
    assert out.loss == 0 and set(out.terms) == {"commitment", "codebook"}
    gradient = torch.autograd.grad(out.loss + out.quantized.sin().sum(), [z, quantizer.codes.weight])
    torch.testing.assert_close(gradient[0], z.cos())
    assert not gradient[1].any()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_afterwards_it_is_vq_from_centres():
    quantizer = built(defer=0.5, size=16).double()
    quantizer.progress = 0.5
    z = clustered_features().double().requires_grad_()
    out = quantizer(z)
    codes = quantizer.codebook
    tokens = z[0, :, :, 0].T
    index = torch.cdist(tokens, codes).argmin(1)
    chosen = codes[index]
    loss = (chosen.detach() - tokens).square().mean() + 0.25 * (chosen - tokens.detach()).square().mean()
    assert torch.equal(out.indices.flatten(), index)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    inputs = [z, codes]
    ours = torch.autograd.grad(out.loss + out.quantized.sin().sum(), inputs)
    theirs = torch.autograd.grad(loss + (tokens + (chosen - tokens).detach()).sin().sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)
    # Chosen codes alone; a centre that k-means has settled on pulls from all sides alike, so that some have none.
    assert set((ours[1].norm(dim=1) > 0).nonzero()[:, 0].tolist()) <= set(index.unique().tolist())
    assert torch.cdist(codes.detach(), tokens.detach()).min(1).values.max() < 1.0
    started = codes.detach().clone()
    quantizer(z + 100)
    assert torch.equal(quantizer.codebook, started)


def test_evaluation_is_quantized_at_all_times():
    quantizer = built().eval()
    out = quantizer(clustered_features())
    assert torch.equal(quantizer.decode(out.indices), out.quantized)


@pytest.mark.parametrize("codebook", ["free", "ema"])
def test_on_clusters_codes_that_start_late_are_used(codebook):
    assert train(built(16, codebook=codebook)) > 0.5 > plain_usage()


def test_it_resumes_in_both_phases():
    assert continues_alike(built(defer=0.2))
    assert continues_alike(built(defer=0.9))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"defer": 1.0}, r"defer must lie in \[0, 1\), the share of training; got 1\.0"),
        ({"codebook_init": "kmeans"}, "codebook_init does not apply to deferred_vq"),
        ({"codebook": "linear"}, 'codebook must be "free" or "ema" for deferred_vq'),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        built(**settings)
