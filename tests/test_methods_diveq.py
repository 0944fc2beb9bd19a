"""DiVeQ: the published equation, the reference library's form of it, and codes that learn without a loss."""

import pytest
import torch

from ibqlab.quantizers import build_quantizer, quantizer_config
from ibqlab.quantizers.methods.diveq import directed_error

CODES, DIM = 12, 5


def tokens():
    drawn = torch.randn(30, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.requires_grad_()


def grid(z):
    """Tokens (N, D) as features (1, D, 1, N)."""
    return z.T[None, :, None]


def built(**settings):
    torch.manual_seed(0)
    return build_quantizer(
        "diveq", **{"codebook_size": CODES, "code_dim": DIM, "codebook_init": "normal", **settings}
    ).double()


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.5])
def test_value_and_gradients_are_the_published(noise):
    quantizer = built(noise_std=noise)
    mine, theirs = tokens(), tokens()
    codebook = quantizer.codebook.detach().clone().requires_grad_()
    torch.manual_seed(3)
    out = quantizer(grid(mine))
    chosen = torch.cdist(theirs, codebook).argmin(1)
    torch.manual_seed(3)
    values = []
    noises = torch.randn(30, DIM, dtype=torch.float64) if noise else torch.zeros(30, DIM, dtype=torch.float64)
    for z, k, e in zip(theirs, chosen, noises, strict=True):
        v = (codebook[k] - z + noise * e).detach()
        values.append(z + (codebook[k] - z).square().sum().sqrt() * v / v.norm())
    values = torch.stack(values)
    assert torch.equal(out.indices.flatten(), chosen)
    torch.testing.assert_close(out.quantized, grid(values), atol=1e-10, rtol=0)
    weights = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.quantized * grid(weights)).sum().backward()
    (values * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(quantizer.codebook_gradient, codebook.grad, atol=1e-10, rtol=0)
    assert out.terms == {}


def test_the_reference_library_agrees_in_value_and_gradients():
    library = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    z, c = tokens(), tokens().detach().flip(0).requires_grad_()
    ours, theirs = [], []
    for store, call in [
        (ours, lambda: z + directed_error(z, c, 0.05)),
        (theirs, lambda: library.directional_reparam(z, c, noise_variance=0.05**2)),
    ]:
        torch.manual_seed(5)
        value = call()
        store += [value, *torch.autograd.grad(value.pow(3).sum(), (z, c))]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_evaluation_gives_the_code_itself_and_draws_nothing():
    quantizer = built(noise_std=0.5).eval()
    before = torch.get_rng_state()
    out = quantizer(grid(tokens()))
    assert torch.equal(out.quantized, quantizer.decode(out.indices))
    assert torch.equal(torch.get_rng_state(), before)


def clusters():
    torch.manual_seed(0)
    centres = torch.tensor([[3.0, 0], [0, 3.0], [-2.0, -2.0]]).repeat_interleave(20, 0)
    return centres + 0.3 * torch.randn_like(centres)


def trained(replace_every):
    data = clusters()
    torch.manual_seed(0)
    quantizer = build_quantizer("diveq", codebook_size=16, code_dim=2, replace_every=replace_every)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.3)
    shares = []
    for _ in range(30):
        out = quantizer(grid(data))
        optimizer.zero_grad()
        (out.quantized - grid(data)).square().mean().backward()
        learning = quantizer.codebook_gradient.norm(dim=1) > 0
        assert learning.nonzero()[:, 0].tolist() == out.indices.unique().tolist()
        shares.append(learning.float().mean().item())
        optimizer.step()
    return quantizer, data, shares


def test_codes_learn_from_the_reconstruction_and_only_the_replacement_revives_the_others():
    quantizer, data, shares = trained(replace_every=0)
    used = len(quantizer.encode(grid(data)).unique())
    assert max(shares) < 1 and used < 10
    error = (quantizer.eval()(grid(data)).quantized - grid(data)).square().mean()
    assert error < 0.5 * data.square().mean()
    replaced, data, _ = trained(replace_every=5)
    assert len(replaced.encode(grid(data)).unique()) > used


def test_replacement_moves_the_unused_onto_used_codes_at_its_step():
    quantizer = built(replace_every=2)
    z = tokens().detach()[:3]
    used = quantizer.encode(grid(z)).unique()
    before = quantizer.codebook.detach().clone()
    quantizer(grid(z))
    assert torch.equal(quantizer.codebook, before)
    with quantizer.without_upkeep():
        quantizer(grid(z))
    assert torch.equal(quantizer.codebook, before)
    quantizer(grid(z))
    assert torch.equal(quantizer.codebook[used], before[used])
    assert torch.cdist(quantizer.codebook, before[used]).min(1).values.max() < 1e-7
    assert quantizer.upkeep[0].steps_chosen.sum() == 0


def test_a_token_on_its_code_gives_no_nan():
    quantizer = built(noise_std=0.0)
    z = quantizer.codebook.detach()[:2].clone().requires_grad_()
    quantizer(grid(z)).quantized.sum().backward()
    assert z.grad.isfinite().all() and quantizer.codebook_gradient.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"replace_shift": -1.0}, "replace_shift must be ≥ 0"),
        ({"noise_std": -1.0}, "noise_std must be ≥ 0.*Use 1e-3"),
        ({"replace_every": -1}, "replace_every must be ≥ 0 steps"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        quantizer_config({"name": "diveq", **settings})
