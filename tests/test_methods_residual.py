"""Residual quantization: the published equations, the reference library, any inner quantizer, indices of its digits."""

import copy

import pytest
import torch

from ibqlab.config import to_dict
from ibqlab.quantizers import build_quantizer, quantizer_config

SIZE, DIM, LEVELS = 6, 4, 3


def tokens():
    drawn = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.requires_grad_()


def grid(z):
    """Tokens (N, D) as features (1, D, 1, N)."""
    return z.T[None, :, None]


def built(inner=None, **settings):
    torch.manual_seed(0)
    inner = {"name": "vq", "codebook_size": SIZE, "code_dim": DIM, "codebook_init": "normal"} | (inner or {})
    return build_quantizer("residual", **{"levels": LEVELS, "inner": inner, **settings}).double()


WEIGHTS = torch.randn(40, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("shared", [False, True])
def test_value_loss_and_gradients_are_the_published(shared):
    quantizer = built(shared=shared)
    mine, theirs = tokens(), tokens()
    out = quantizer(grid(mine))
    books = [part.codebook.detach().clone().requires_grad_() for part in quantizer.codes.parts]
    total, index, losses = torch.zeros_like(theirs), 0, []
    for level in range(LEVELS):
        book = books[level % len(books)]
        rest = theirs - total.detach()
        chosen = torch.cdist(rest, book).argmin(1)
        losses.append((rest - book[chosen].detach()).square().mean())
        losses.append(0.25 * (rest.detach() - book[chosen]).square().mean())
        total = total + book[chosen]
        index = index * SIZE + chosen
    value = theirs + (total - theirs).detach()
    loss = sum(losses) / LEVELS
    torch.testing.assert_close(out.quantized, grid(value), atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    assert torch.equal(out.indices.flatten(), index)
    ((out.quantized * grid(WEIGHTS)).sum() + out.loss).backward()
    ((value * WEIGHTS).sum() + loss).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)
    for part, book in zip(quantizer.codes.parts, books, strict=True):
        torch.testing.assert_close(part.codebook_gradient, book.grad, atol=1e-10, rtol=0)


def test_the_reference_library_agrees_and_passes_the_gradient_once_per_level():
    library = pytest.importorskip("vector_quantize_pytorch")
    quantizer = built()
    reference = library.ResidualVQ(
        dim=DIM,
        num_quantizers=LEVELS,
        codebook_size=SIZE,
        rotation_trick=False,
        ema_update=False,
        learnable_codebook=True,
    ).double()
    for layer, part in zip(reference.layers, quantizer.parts, strict=True):
        layer._codebook.embed.data.copy_(part.codebook[None])
    mine, theirs = tokens(), tokens()
    out = quantizer(grid(mine))
    values, indices, _ = reference(theirs[None])
    assert torch.equal(torch.stack(quantizer.codes.digits(out.indices.flatten()), 1), indices[0])
    torch.testing.assert_close(out.quantized, grid(values[0]), atol=1e-6, rtol=1e-6)
    (out.quantized * grid(WEIGHTS)).sum().backward()
    (values[0] * WEIGHTS).sum().backward()
    torch.testing.assert_close(LEVELS * mine.grad, theirs.grad, atol=1e-6, rtol=1e-6)


def test_the_reference_library_agrees_with_diveq_on_the_sum():
    library = pytest.importorskip("vector_quantize_pytorch")
    quantizer = built(gradient="diveq", noise_std=5e-3**0.5)
    reference = library.ResidualVQ(dim=DIM, num_quantizers=LEVELS, codebook_size=SIZE, diveq=True).double()
    for layer, part in zip(reference.layers, quantizer.parts, strict=True):
        layer._codebook.embed.data.copy_(part.codebook[None])
    mine, theirs = tokens(), tokens()
    torch.manual_seed(2)
    out = quantizer(grid(mine))
    torch.manual_seed(2)
    values, _, _ = reference(theirs[None])
    torch.testing.assert_close(out.quantized, grid(values[0]), atol=1e-6, rtol=1e-6)
    (out.quantized * grid(WEIGHTS)).sum().backward()
    (values[0] * WEIGHTS).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-6)
    for layer, part in zip(reference.layers, quantizer.parts, strict=True):
        torch.testing.assert_close(part.codebook_gradient, layer._codebook.embed.grad[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["ibq", "lfq", "soft_vq", "simvq", "vq_ema", "fsq", "diveq"])
def test_any_quantizer_can_be_the_level(name):
    grids = {"lfq": {"codebook_size": 16}, "fsq": {"levels": [3, 3, 3, 3]}}
    sizes = grids.get(name, {"codebook_size": SIZE, "code_dim": DIM, "codebook_init": "normal"})
    torch.manual_seed(0)
    quantizer = build_quantizer("residual", gradient="parts", inner={"name": name, **sizes})
    z = tokens().detach().float().requires_grad_()
    out = quantizer(grid(z))
    assert set(out.terms) <= set(quantizer.loss_weights())
    (out.loss + out.quantized.square().sum()).backward()
    assert z.grad.norm() > 0
    assert (quantizer.codebook_gradient is None) == (name in grids or name == "vq_ema")
    out = quantizer.eval()(grid(z))
    assert torch.equal(out.quantized, quantizer.decode(out.indices))
    assert torch.equal(out.indices, quantizer.train().encode(grid(z)))


def test_levels_leave_less_over_and_a_combination_learns_where_one_of_its_codes_does():
    torch.manual_seed(0)
    centres = torch.tensor([[3.0, 0], [0, 3.0], [-2.0, -2.0]]).repeat_interleave(20, 0)
    data = centres + 0.5 * torch.randn_like(centres)
    errors = []
    for levels in (1, 2):
        torch.manual_seed(0)
        inner = {"name": "vq", "codebook_size": 4, "code_dim": 2, "codebook_init": "kmeans"}
        quantizer = build_quantizer("residual", levels=levels, inner=inner)
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
        for _ in range(30):
            optimizer.zero_grad()
            out = quantizer(grid(data))
            out.loss.backward()
            optimizer.step()
        errors.append((quantizer.eval()(grid(data)).quantized - grid(data)).square().mean().item())
    assert errors[1] < 0.6 * errors[0]
    learning = quantizer.codebook_gradient.norm(dim=1) > 0
    first, second = (part.codebook_gradient.norm(dim=1) > 0 for part in quantizer.parts)
    assert torch.equal(learning.view(4, 4), first[:, None] | second[None])
    torch.testing.assert_close(
        quantizer.codebook.view(4, 4, 2), quantizer.parts[0].codebook[:, None] + quantizer.parts[1].codebook[None]
    )


def test_upkeep_is_the_parts_own_and_can_be_left_out():
    quantizer = built({"name": "vq_ema", "revive_after": 1})
    before = copy.deepcopy(quantizer.state_dict())
    with quantizer.without_upkeep():
        quantizer(grid(tokens()))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    quantizer(grid(tokens()))
    assert all(
        not torch.equal(part.codebook, before[f"codes.parts.{i}.codes.weight"])
        for i, part in enumerate(quantizer.parts)
    )


def test_settings_survive_being_written_and_say_the_parts_sizes():
    config = quantizer_config({"name": "residual", "codebook_size": 64, "code_dim": 6, "levels": 3})
    assert (config.inner["codebook_size"], config.inner["code_dim"]) == (4, 6)
    assert quantizer_config(to_dict(config)) == config
    assert quantizer_config({"name": "residual"}).codebook_size == 2**20
    nested = quantizer_config({"name": "residual", "inner": {"name": "grouped", "codebook_size": 16, "code_dim": 4}})
    assert (nested.codebook_size, nested.code_dim) == (256, 4)
    deep = quantizer_config({"name": "residual", "codebook_size": 256, "inner": {"name": "residual", "levels": 4}})
    assert deep.inner["inner"]["codebook_size"] == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"levels": 0}, "levels must be from 1 to 24, got 0"),
        ({"codebook_size": 50}, "must be a whole number to the power of 2.*got 50. Use 49 or 64"),
        ({"levels": 4, "inner": {"name": "vq", "codebook_size": 1024}}, "1,024\\^4, must be at most.*codebook_size=64"),
        ({"codebook_size": 64, "inner": {"name": "vq", "codebook_size": 4}}, "codebook_size must be 16 for 2 parts"),
        (
            {"code_dim": 6, "inner": {"name": "vq", "code_dim": 4}},
            "code_dim must be 4 .*Leave it out, or change inner.code_dim",
        ),
        ({"codebook_init": "kmeans"}, 'write it into inner: {"codebook_init"'),
        ({"gradient": "through"}, "gradient must be one of"),
        ({"inner": {"name": "diveq"}}, "no loss that does; use gradient='parts'"),
        ({"inner": {"name": "multi_scale"}}, "inner must be settings of a quantizer of single tokens"),
        ({"inner": {"name": "vqq"}}, "did you mean 'vq'"),
        ({"inner": {"name": "vq", "betta": 1}}, "inner.betta: unknown key; did you mean 'beta'"),
        ({"noise_std": -1}, "noise_std must be ≥ 0"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        quantizer_config({"name": "residual", **settings})


@pytest.mark.parametrize("inner", [{"name": "gumbel"}, {"name": "grouped", "inner": {"name": "gumbel"}}])
def test_a_loss_that_moves_no_code_does_not_make_levels_learn(inner):
    """Gumbel's KL term moves its scores alone."""
    for gradient in ("straight_through", "rotation"):
        with pytest.raises(ValueError, match=f"'{gradient}' reaches no code.* use gradient='parts'$"):
            quantizer_config({"name": "residual", "inner": inner, "gradient": gradient})
    quantizer = build_quantizer("residual", code_dim=4, codebook_size=256, inner=inner, gradient="parts")
    out = quantizer(torch.randn(1, 4, 4, 4))
    (out.loss + out.quantized.square().sum()).backward()
    assert quantizer.codebook_gradient.any()
