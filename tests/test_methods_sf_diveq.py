"""SF-DiVeQ: the published equation on segments, what index and evaluation mean, and that two codes learn per token."""

import pytest
import torch

from ibqlab.quantizers import build_quantizer, quantizer_config

CODES, DIM = 9, 5


def tokens():
    drawn = torch.randn(30, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.requires_grad_()


def grid(z):
    """Tokens (N, D) as features (1, D, 1, N)."""
    return z.T[None, :, None]


def built(**settings):
    torch.manual_seed(0)
    return build_quantizer(
        "sf_diveq", **{"codebook_size": CODES, "code_dim": DIM, "codebook_init": "normal", **settings}
    ).double()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_value_index_and_gradients_are_the_published(noise):
    quantizer = built(noise_std=noise)
    mine, theirs = tokens(), tokens()
    codebook = quantizer.codebook.detach().clone().requires_grad_()
    torch.manual_seed(3)
    out = quantizer(grid(mine))
    torch.manual_seed(3)
    shares = torch.rand(CODES - 1, 1, dtype=torch.float64)
    noises = [torch.randn(30, DIM, dtype=torch.float64) if noise else torch.zeros(30, DIM) for _ in range(2)]
    points = ((1 - shares) * codebook[:-1] + shares * codebook[1:]).detach()
    values, indices = [], []
    for n, z in enumerate(theirs):
        i = (points - z).norm(dim=1).argmin()
        value = z
        for weight, code, e in ((1 - shares[i], codebook[i], noises[0]), (shares[i], codebook[i + 1], noises[1])):
            v = (code - z + noise * e[n]).detach()
            value = value + (code - z).norm() * (weight * v / v.norm())
        values.append(value)
        indices.append(i + int((z - codebook[i + 1]).norm() < (z - codebook[i]).norm()))
    values = torch.stack(values)
    assert torch.equal(out.indices.flatten(), torch.stack(indices))
    torch.testing.assert_close(out.quantized, grid(values), atol=1e-10, rtol=0)
    if not noise:
        chosen = torch.cdist(theirs, points).argmin(1)
        torch.testing.assert_close(out.quantized, grid(points[chosen]))  # without noise a point of the curve itself
    weights = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.quantized * grid(weights)).sum().backward()
    (values * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(quantizer.codebook_gradient, codebook.grad, atol=1e-10, rtol=0)


def test_evaluation_gives_the_nearest_code_and_draws_nothing():
    quantizer = built().eval()
    before = torch.get_rng_state()
    out = quantizer(grid(tokens()))
    assert torch.equal(out.quantized, quantizer.decode(out.indices))
    assert torch.equal(out.indices.flatten(), torch.cdist(tokens(), quantizer.codebook).argmin(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_codes_learn_from_each_token_and_the_curve_reaches_the_clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[3.0, 0], [0, 3.0], [-2.0, -2.0]]).repeat_interleave(20, 0)
    data = centres + 0.3 * torch.randn_like(centres)
    shares, used = {}, {}
    for name in ("diveq", "sf_diveq"):
        torch.manual_seed(0)
        settings = {"replace_every": 0} if name == "diveq" else {}
        quantizer = build_quantizer(name, codebook_size=16, code_dim=2, **settings)
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.3)
        reached = torch.zeros(16, dtype=torch.bool)
        for _ in range(30):
            optimizer.zero_grad()
            (quantizer(grid(data)).quantized - grid(data)).square().mean().backward()
            reached |= quantizer.codebook_gradient.norm(dim=1) > 0
            optimizer.step()
        shares[name], used[name] = reached.float().mean().item(), len(quantizer.encode(grid(data)).unique())
    assert shares["sf_diveq"] > 0.9 > shares["diveq"]
    assert used["sf_diveq"] >= used["diveq"]


def test_two_codes_are_one_segment():
    out = built(codebook_size=2)(grid(tokens()))
    assert set(out.indices.unique().tolist()) == {0, 1} and out.quantized.isfinite().all()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"noise_std must be ≥ 0.*Use 1e-3"):
        quantizer_config({"name": "sf_diveq", "noise_std": -1.0})
