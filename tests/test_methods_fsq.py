"""FSQ: the published equation written out, the reference library, levels that fit a codebook's size."""

import math

import pytest
import torch

from ibqlab.quantizers import build_quantizer, quantizer_config
from ibqlab.quantizers.methods.fsq import even_levels

LEVELS = [8, 5, 4]


def tokens(scale=1.5, requires_grad=True):
    drawn = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (scale * drawn).requires_grad_(requires_grad)


def grid(z):
    """Tokens (N, D) as features (1, D, 1, N)."""
    return z.T[None, :, None]


def published(z, levels, sign=-1, inverse=math.tan):
    """The listing of the paper's appendix, one channel and token at a time."""
    values, indices = torch.empty_like(z), []
    for n, token in enumerate(z):
        index = 0
        for i, count in enumerate(levels):
            half = (count - 1) * (1 + sign * 1e-3) / 2
            offset = 0.0 if count % 2 else 0.5
            bounded = torch.tanh(token[i] + inverse(offset / half)) * half - offset
            level = round(bounded.item())
            values[n, i] = (bounded + level - bounded.item()) / (count // 2)
            index += (level + count // 2) * math.prod(levels[:i])
        indices.append(index)
    return values, torch.tensor(indices)


@pytest.mark.parametrize(("shift", "form"), [("tan", (-1, math.tan)), ("atanh", (1, math.atanh))])
def test_value_index_and_gradient_are_the_published(shift, form):
    quantizer = build_quantizer("fsq", levels=LEVELS, shift=shift).double()
    mine, theirs = tokens(), tokens()
    out = quantizer(grid(mine))
    values, indices = published(theirs, LEVELS, *form)
    torch.testing.assert_close(out.quantized, grid(values), atol=1e-10, rtol=0)
    assert torch.equal(out.indices.flatten(), indices)
    weights = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.quantized * grid(weights)).sum().backward()
    (values * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)
    assert out.terms == {} and out.loss.item() == 0


def test_the_reference_library_agrees_in_values_gradients_and_codebook():
    reference = pytest.importorskip("vector_quantize_pytorch").FSQ(levels=LEVELS)
    quantizer = build_quantizer("fsq", levels=LEVELS, shift="atanh").double()
    mine, theirs = tokens(), tokens()
    out = quantizer(grid(mine))
    values, indices = reference(theirs[None])
    torch.testing.assert_close(out.quantized, grid(values[0]), atol=1e-10, rtol=0)
    assert torch.equal(out.indices.flatten(), indices[0].long())
    out.quantized.square().sum().backward()
    values.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=0)  # its shift is float32
    torch.testing.assert_close(quantizer.codebook.float(), reference.implicit_codebook)


def test_every_level_is_reached_and_no_code_is_ever_dead_of_learning():
    quantizer = build_quantizer("fsq", levels=LEVELS).double()
    line = torch.linspace(-6, 6, 400, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(line[::8], line[::8], line[::8], indexing="ij"), -1).reshape(-1, 3)
    assert len(quantizer.encode(grid(z)).unique()) == math.prod(LEVELS) == quantizer.config.codebook_size
    assert not list(quantizer.parameters()) and quantizer.codebook_gradient is None and not quantizer.state_dict()


def test_features_in_one_corner_stay_there_without_a_loss():
    """Nothing spreads tokens over the codes: usage is what the features' spread makes of it."""
    torch.manual_seed(0)
    quantizer = build_quantizer("fsq", levels=[5, 5])
    centres = torch.tensor([[-0.8, -0.8], [0.8, -0.8], [0.0, 0.9]])
    data = centres.repeat_interleave(20, 0) + 0.05 * torch.randn(60, 2)
    z = data.clone().requires_grad_()
    optimizer = torch.optim.SGD([z], lr=5.0)
    for _ in range(30):
        out = quantizer(grid(z))
        optimizer.zero_grad()
        (out.quantized - grid(data)).square().mean().backward()
        optimizer.step()
    used = quantizer.encode(grid(z)).unique()
    assert 3 <= len(used) < 13
    error = (quantizer.eval()(grid(z)).quantized - grid(data)).square().mean()
    assert error < (quantizer(grid(data)).quantized - grid(data)).square().mean()


def test_indices_of_nan_lie_in_the_grid():
    quantizer = build_quantizer("fsq", levels=LEVELS)
    out = quantizer(torch.full((1, 3, 1, 2), math.nan))
    assert out.indices.max() < 160 and out.quantized.isnan().all()


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        (240, (8, 6, 5)),
        (1000, (8, 5, 5, 5)),
        (4375, (7, 5, 5, 5, 5)),
        (15360, (8, 8, 8, 6, 5)),
        (64000, (8, 8, 8, 5, 5, 5)),
    ],
)
def test_the_published_levels_are_those_of_their_size(size, levels):
    assert even_levels(size) == levels
    config = quantizer_config({"name": "fsq", "codebook_size": size})
    assert config.levels == levels and config.code_dim == len(levels)


def test_levels_sizes_and_dimensions_fill_each_other_in():
    assert quantizer_config({"name": "fsq"}).levels == (8, 5, 5, 5)
    given = quantizer_config({"name": "fsq", "levels": [7, 3]})
    assert (given.codebook_size, given.code_dim) == (21, 2)
    assert quantizer_config({"name": "fsq", "codebook_size": 16, "code_dim": 4}).levels == (2, 2, 2, 2)
    assert even_levels(2**24) and even_levels(2 * 503) == (503, 2) and even_levels(23) == (23,)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"levels": [8, 1]}, r"levels\[1\] must be at least 2; got 1. Use levels such as"),
        ({"levels": [8, 5], "codebook_size": 41}, "codebook_size must be 40 for the levels .*Use codebook_size=40"),
        ({"levels": [8, 5], "code_dim": 3}, "code_dim must be 2 for the levels"),
        ({"codebook_size": 23, "code_dim": 2}, "must be a product of code_dim = 2 levels.*Use levels such as"),
        ({"codebook_init": "normal"}, "does not apply to fsq.*Leave it out"),
        ({"shift": "tanh"}, "did you mean 'tan'|did you mean 'atanh'"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        quantizer_config({"name": "fsq", **settings})
