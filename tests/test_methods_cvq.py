"""`cvq`: usage, blend and anchors as the published code has them."""

import pytest
import torch
from clusters import continues_alike, permutes_alike, plain_usage, train
from torch.nn import functional as F

from ibqlab.quantizers import blocks, build_quantizer
from ibqlab.quantizers.methods import cvq


def built(size=12, dim=3, **settings):
    torch.manual_seed(1)
    return build_quantizer("cvq", codebook_size=size, code_dim=dim, codebook_init="normal", **settings)


def closeness(tokens, codes, metric):
    """(N, K), the larger the closer."""
    if metric == "cosine":
        return F.normalize(tokens, dim=1) @ F.normalize(codes, dim=1).T
    return -torch.cdist(tokens, codes).square()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("anchor", ["closest", "random", "probability"])
def test_a_step_is_the_equation(metric, anchor):
    quantizer = built(metric=metric, anchor=anchor, usage_decay=0.5).double()
    quantizer.upkeep[0].usage.copy_(torch.rand(12) / 100)
    codes, usage = quantizer.codebook.detach().clone(), quantizer.upkeep[0].usage.clone()
    z = torch.randn(1, 3, 20, 1, dtype=torch.float64)
    tokens = z[0, :, :, 0].T
    near = closeness(tokens, codes, metric)
    one_hot = F.one_hot(near.argmax(1), 12).double()
    usage = 0.5 * usage + 0.5 * one_hot.mean(0)
    torch.manual_seed(5)
    if anchor == "closest":
        chosen = near.argmax(0)
    elif anchor == "random":
        chosen = torch.randint(20, (12,))
    else:  # a draw from the softmax over tokens, as the largest of logits with Gumbel noise
        chosen = (near.T - torch.empty(12, 20, dtype=torch.float64).exponential_().log()).argmax(1)
    blend = torch.exp(-usage * 12 * 10 / 0.5 - 1e-3)[:, None]
    torch.manual_seed(5)
    out = quantizer(z)
    assert torch.equal(out.indices.flatten(), near.argmax(1))
    torch.testing.assert_close(
        quantizer.codebook.detach(), codes * (1 - blend) + tokens[chosen] * blend, atol=1e-10, rtol=0
    )
    torch.testing.assert_close(quantizer.upkeep[0].usage, usage, atol=1e-10, rtol=0)


def test_anchors_are_drawn_by_the_softmax(monkeypatch):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 1000)
    quantizer = built(4000, 3, metric="l2")
    tokens = torch.randn(5, 3)
    codes = torch.randn(1, 3).expand(4000, 3).contiguous()
    torch.manual_seed(0)
    drawn = torch.bincount(quantizer.upkeep[0]._anchors(codes, tokens), minlength=5) / 4000
    assert (drawn - closeness(tokens, codes[:1], "l2")[:, 0].softmax(0)).abs().max() < 0.03


def test_used_codes_stay_and_unused_ones_jump_onto_features():
    quantizer = built(anchor="closest", metric="l2")
    before = quantizer.codebook.detach().clone()
    z = torch.randn(1, 3, 20, 1)
    used = quantizer(z).indices.unique()
    after = quantizer.codebook.detach()
    unused = torch.ones(12, dtype=torch.bool).index_fill(0, used, False)
    assert (after[used] - before[used]).abs().max() < 0.02  # α of a code that one token of twenty has hit: e⁻⁶
    assert torch.cdist(after[unused], z[0, :, :, 0].T).min(1).values.max() < 0.01


def test_chosen_codes_alone_take_gradient_but_none_stays_unused():
    quantizer = built()
    out = quantizer(torch.randn(1, 3, 4, 1))
    out.loss.backward()
    assert (quantizer.codebook_gradient.norm(dim=1) > 0).nonzero()[:, 0].tolist() == out.indices.unique().tolist()
    assert train(built(16, 2, metric="l2")) > 0.6 > plain_usage()


def test_usage_is_that_of_all_processes(monkeypatch):
    """A code that lives elsewhere alone is left alone here."""
    quantizer = built(usage_decay=0.5)
    before, elsewhere = quantizer.codebook.detach().clone(), torch.zeros(12)
    z = before[:3].T.reshape(1, 3, 3, 1)
    elsewhere[7] = 5
    monkeypatch.setattr(cvq, "sum_over_processes", lambda hits: hits + elsewhere)
    quantizer(z)
    torch.testing.assert_close(quantizer.upkeep[0].usage[[0, 1, 2, 7]], torch.tensor([1.0, 1, 1, 5]) / 16)
    assert torch.equal(quantizer.codebook[7], before[7])


def test_permuted_codes_have_permuted_indices():
    assert permutes_alike(built())


def test_zero_features_and_one_token_give_numbers():
    quantizer = built()
    quantizer(torch.zeros(1, 3, 1, 1))
    assert quantizer.codebook.isfinite().all()


def test_it_resumes():
    assert continues_alike(built(8, 2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"anchor": "nearest"}, "anchor must be one of 'closest'"),
        ({"metric": "dot"}, 'metric must be "l2" or "cosine" for cvq'),
        ({"codebook": "ema"}, 'codebook must be "free" for cvq'),
        ({"usage_decay": 1.0}, r"usage_decay must lie in \[0, 1\), got 1\.0"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        built(**settings)
