"""BSQ: the published equations written out, the reference library, and what the factorised entropy bounds."""

import math

import pytest
import torch
from torch.nn import functional as F

from ibqlab.quantizers import build_quantizer, quantizer_config

DIM = 4


def tokens(dim=DIM, count=30):
    drawn = torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.requires_grad_()


def grid(z):
    """Tokens (N, D) as features (1, D, 1, N)."""
    return z.T[None, :, None]


def bits_entropies(z, gamma, temperature=1.0):
    """The paper's penalty, bit by bit: mean entropy of tokens, and γ times the entropy of the mean of each bit."""
    u = z / z.norm(dim=1, keepdim=True)
    sample, average = 0.0, 0.0
    for i in range(z.shape[1]):
        p = torch.sigmoid(4 * u[:, i] / math.sqrt(z.shape[1]) / temperature)
        for chance in (p, 1 - p):
            sample = sample - (chance * chance.log()).mean()
            average = average - chance.mean() * (chance.mean() + 1e-8).log()
    return sample, gamma * average


def test_value_loss_and_gradient_are_the_published():
    quantizer = build_quantizer("bsq", codebook_size=16, commitment_weight=0.3, average_entropy_weight=0.7).double()
    mine, theirs = tokens(), tokens()
    out = quantizer(grid(mine))
    u = theirs / theirs.norm(dim=1, keepdim=True)
    code = u.detach().sign() / 2
    value = u + (code - u).detach()
    sample, average = bits_entropies(theirs, 0.7)
    loss = 0.3 * (u - code).square().mean() + 0.1 * (sample - average)
    torch.testing.assert_close(out.quantized, grid(value), atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    bits = (theirs > 0).long() * torch.tensor([1, 2, 4, 8])
    assert torch.equal(out.indices.flatten(), bits.sum(1))
    weights = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ((out.quantized * grid(weights)).sum() + out.loss).backward()
    ((value * weights).sum() + loss).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)


def test_the_reference_library_agrees_where_one_group_holds_all_channels():
    reference = pytest.importorskip("vector_quantize_pytorch").LFQ(
        dim=DIM,
        spherical=True,
        entropy_loss_weight=0.1,
        commitment_loss_weight=0.25,
        diversity_gamma=0.7,
        force_quantization_f32=False,
    )
    quantizer = build_quantizer(
        "bsq",
        codebook_size=2**DIM,
        group_size=DIM,
        commitment_weight=0.25,
        average_entropy_weight=0.7,
        entropy_epsilon=0.0,
    ).double()
    reference.codebook = reference.codebook.double()
    mine, theirs = tokens(), tokens()
    out = quantizer(grid(mine))
    values, _, loss = reference(theirs[None], inv_temperature=1.0)
    torch.testing.assert_close(out.quantized, grid(values[0]), atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    (out.quantized.pow(3).sum() + out.loss).backward()
    (values.pow(3).sum() + loss).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)


def test_the_sum_over_groups_bounds_the_exact_entropy():
    averages = []
    for size in (1, 2, 4):
        quantizer = build_quantizer("bsq", codebook_size=16, group_size=size, entropy_epsilon=0.0).double()
        averages.append(quantizer(grid(tokens())).terms["average_entropy"].item())
    assert averages[0] >= averages[1] >= averages[2] > 0


def test_codes_lie_on_the_unit_sphere_and_none_learns():
    quantizer = build_quantizer("bsq", codebook_size=64)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(64))
    assert not list(quantizer.parameters()) and not quantizer.state_dict()


def test_the_penalty_spreads_clustered_features_over_the_codes():
    used = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        quantizer = build_quantizer("bsq", codebook_size=4, entropy_weight=weight, entropy_temperature=1.0)
        z = (torch.tensor([1.0, 0.8]) + 0.3 * torch.randn(60, 2)).requires_grad_()
        optimizer = torch.optim.SGD([z], lr=10.0)
        for _ in range(30):
            optimizer.zero_grad()
            quantizer(grid(z)).loss.backward()
            optimizer.step()
        used[weight] = len(quantizer.encode(grid(z)).unique())
    assert used == {0.0: 1, 1.0: 4}


def test_zero_features_have_an_index_and_a_finite_gradient():
    z = torch.zeros(1, DIM, 1, 3, requires_grad=True)
    out = build_quantizer("bsq", codebook_size=16)(z)
    (out.loss + out.quantized.sum()).backward()
    assert out.indices.eq(0).all() and z.grad.isfinite().all()
    assert F.normalize(out.quantized, dim=1).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"codebook_size": 64, "group_size": 4},
            r"group_size must divide code_dim = 6; got 4. Use one of \[1, 2, 3",
        ),
        ({"codebook_size": 20}, "power of two for bsq.*Use 16 or 32"),
        ({"codebook_size": 64, "code_dim": 5}, "for bsq, 6 for 64 codes; got 5. Use code_dim=6"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        quantizer_config({"name": "bsq", **settings})
