"""`wasserstein_vq`: the distance against its definition, and what it moves."""

import pytest
import scipy.linalg
import torch
from clusters import continues_alike, permutes_alike, plain_usage, train

from ibqlab.quantizers import build_quantizer
from ibqlab.quantizers.methods import wasserstein_vq
from ibqlab.quantizers.methods.wasserstein_vq import gaussian_distance


def built(size=40, dim=3, **settings):
    torch.manual_seed(1)
    return build_quantizer("wasserstein_vq", codebook_size=size, code_dim=dim, **settings)


def published(z, c):
    """The published code's distance, its roots by eigenvalues."""
    scale = z.std(dim=0).max() + 1e-8
    z, c = z / scale, c / scale
    values, vectors = torch.linalg.eigh(z.T.cov())
    root = vectors @ torch.diag((values.relu() + 1e-8).sqrt()) @ vectors.T
    crossed = torch.linalg.eigh(root @ c.T.cov() @ root)[0]
    spread = torch.trace(z.T.cov() + c.T.cov()) - 2 * (crossed.relu() + 1e-8).sqrt().sum()
    return ((z.mean(0) - c.mean(0)).square().sum() + spread.relu() + 1e-10).sqrt()


def test_values_and_gradients_are_the_published_ones():
    z = torch.randn(30, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64) + 1
    ours = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    mine, other = gaussian_distance(z, ours), published(z, theirs)
    torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)
    mine.backward()
    other.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=0)


def test_it_is_the_distance_of_gaussians():
    z, c = torch.randn(50, 3, dtype=torch.float64), 2 * torch.randn(60, 3, dtype=torch.float64) + 1
    first, second = z.T.cov().numpy(), c.T.cov().numpy()
    root = scipy.linalg.sqrtm(first)
    bures = first.trace() + second.trace() - 2 * scipy.linalg.sqrtm(root @ second @ root).real.trace()
    expected = ((z.mean(0) - c.mean(0)).square().sum().item() + bures) ** 0.5 / z.std(dim=0).max().item()
    assert gaussian_distance(z, c).item() == pytest.approx(expected, rel=1e-6)
    assert gaussian_distance(z, z.flip(0)) < 2e-3


def test_moments_are_those_of_the_tokens_of_all_processes(monkeypatch):
    here, there = torch.randn(7, 3, dtype=torch.float64), 2 + torch.randn(5, 3, dtype=torch.float64)
    both = torch.cat([here, there])
    centred = there - both.mean(0)
    of_the_other = iter([torch.tensor(5.0, dtype=torch.float64), there.sum(0), centred.T @ centred])
    monkeypatch.setattr(wasserstein_vq, "sum_over_processes", lambda values: values + next(of_the_other))
    codes = torch.randn(20, 3, dtype=torch.float64)
    torch.testing.assert_close(gaussian_distance(here, codes), published(both, codes), atol=1e-10, rtol=0)


def test_the_loss_adds_the_distance_in_training_alone():
    quantizer = built(wasserstein_weight=0.3)
    z = torch.randn(1, 3, 5, 5)
    tokens = z[0].flatten(1).T
    out = quantizer(z)
    torch.testing.assert_close(out.terms["wasserstein"], gaussian_distance(tokens, quantizer.codebook))
    plain = out.terms["commitment"] + out.terms["codebook"]
    torch.testing.assert_close(out.loss, plain + 0.3 * out.terms["wasserstein"])
    assert "wasserstein" not in quantizer.eval()(z).terms
    assert "wasserstein" not in built(wasserstein_weight=0.0)(z).terms


def test_every_code_takes_gradient_and_features_none_of_the_distance():
    quantizer = built()
    z = torch.randn(1, 3, 2, 2, requires_grad=True)
    term = quantizer(z).terms["wasserstein"]
    assert torch.autograd.grad(term, z, retain_graph=True, allow_unused=True)[0] is None
    term.backward()
    assert (quantizer.codebook_gradient.norm(dim=1) > 0).all()


def test_codes_come_to_lie_as_the_clusters_do():
    torch.manual_seed(0)
    assert train(built(16, 2), steps=80) > plain_usage(codebook_init="unit") + 0.2


@pytest.mark.parametrize("tokens", [1, 2])
def test_zero_features_and_few_tokens_give_numbers(tokens):
    quantizer = built()
    for z in (torch.zeros(1, 3, tokens, 1), torch.ones(1, 3, tokens, 1)):
        out = quantizer(z.requires_grad_())
        out.loss.backward()
        assert out.loss.isfinite() and quantizer.codebook_gradient.isfinite().all()


def test_what_is_no_number_comes_out_as_nan_and_not_as_an_error_of_the_roots():
    for bad in (float("nan"), float("inf")):
        z = torch.randn(1, 3, 4, 4)
        z[0, 1, 2, 3] = bad
        assert not built()(z).loss.isfinite()


def test_permuted_codes_have_permuted_indices():
    assert permutes_alike(built())


def test_it_resumes():
    assert continues_alike(built(8, 2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dim": 257}, r"code_dim must be at most 256 for wasserstein_vq.*got 257\. Lower code_dim"),
        ({"codebook": "linear"}, 'codebook must be "free" for wasserstein_vq'),
        ({"wasserstein_weight": -0.5}, "wasserstein_weight must be ≥ 0"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        built(**settings)
