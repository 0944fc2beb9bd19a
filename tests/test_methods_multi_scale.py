"""Multi-scale residual quantization: the published algorithm on the grid, and what an index of all scales means."""

import pytest
import torch
from torch.nn import functional as F

from ibqlab.config import to_dict
from ibqlab.quantizers import build_quantizer, quantizer_config

SIZE, DIM = 6, 4


def image(batch=2):
    drawn = torch.randn(batch, DIM, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.requires_grad_()


def built(inner=None, **settings):
    torch.manual_seed(0)
    inner = {"name": "vq", "codebook_size": SIZE, "code_dim": DIM, "codebook_init": "normal"} | (inner or {})
    return build_quantizer("multi_scale", **{"scales": [1, 3], "inner": inner, **settings}).double()


def published(z, quantizer):
    """The forward pass of VAR's quantizer: value, loss, and each scale's grid of indices."""
    codebook, blends, sizes = quantizer.parts[0].codebook, quantizer.codes.blends, [(1, 1), (3, 3), (5, 7)]
    rest, total, loss, grids = z.detach(), torch.zeros_like(z), 0.0, []
    for level, size in enumerate(sizes):
        coarse = F.interpolate(rest, size, mode="area").permute(0, 2, 3, 1)
        chosen = torch.cdist(coarse.flatten(0, 2), codebook).argmin(1).view(coarse.shape[:3])
        codes = F.interpolate(codebook[chosen].permute(0, 3, 1, 2), (5, 7), mode="bicubic")
        codes = 0.5 * codes + 0.5 * blends[level](codes)
        total = total + codes
        rest = rest - codes.detach()
        loss = loss + 0.25 * (total.detach() - z).square().mean() + (total - z.detach()).square().mean()
        grids.append(chosen)
    return z + (total - z).detach(), loss / len(sizes), grids


def test_value_loss_and_gradients_are_the_published():
    quantizer, reference = built(), built()
    mine, theirs = image(), image()
    out = quantizer(mine)
    value, loss, grids = published(theirs, reference)
    torch.testing.assert_close(out.quantized, value, atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    for digit, grid in zip(quantizer.codes.digits(out.indices), grids, strict=True):
        rows, columns = (torch.arange(n) * few // n for n, few in zip((5, 7), grid.shape[1:], strict=True))
        assert torch.equal(digit, grid[:, rows[:, None], columns])
    (out.quantized.pow(3).sum() + out.loss).backward()
    (value.pow(3).sum() + loss).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)
    for ours, its in zip(quantizer.parameters(), reference.parameters(), strict=True):
        assert ours.grad.norm() > 0  # every convolution serves some scale
        torch.testing.assert_close(ours.grad, its.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", [(5, 7), (2, 2), (1, 1), (1, 6)])
def test_grids_of_every_shape_decode_to_what_evaluation_gives(shape):
    quantizer = built(scales=[1, 2, 3]).eval()
    z = torch.randn(2, DIM, *shape, dtype=torch.float64)
    out = quantizer(z)
    assert torch.equal(quantizer.decode(out.indices), out.quantized)
    assert torch.equal(quantizer.train().encode(z), out.indices)


def test_one_code_everywhere_gives_its_row_of_the_codebook_in_the_middle():
    quantizer = built(scales=[2])
    for index in (0, 7, 35):
        decoded = quantizer.decode(torch.full((1, 9, 9), index))
        torch.testing.assert_close(decoded[0, :, 4, 4], quantizer.codebook[index])


@pytest.mark.parametrize("name", ["ibq", "lfq", "vq_ema"])
def test_any_quantizer_of_tokens_can_be_the_scale_and_keeps_its_other_terms(name):
    inner = {"name": name, "codebook_size": 16, "code_dim": DIM}
    inner = inner if name == "lfq" else inner | {"codebook_init": "normal"}
    torch.manual_seed(0)
    quantizer = build_quantizer("multi_scale", inner=inner)
    z = image().float().detach().requires_grad_()
    out = quantizer(z)
    assert {"commitment", "codebook"} <= set(out.terms) <= set(quantizer.loss_weights())
    assert ("sample_entropy" in out.terms) == (name != "vq_ema")
    (out.loss + out.quantized.sum()).backward()
    assert z.grad.isfinite().all() and quantizer.codes.blends[0].weight.grad.norm() > 0


def test_coarse_scales_take_the_mean_and_only_chosen_codes_learn():
    torch.manual_seed(0)
    data = torch.randn(4, 2, 1, 1) * 3 + 0.3 * torch.randn(4, 2, 4, 4)
    inner = {"name": "vq", "codebook_size": 8, "code_dim": 2, "codebook_init": "normal"}
    quantizer = build_quantizer("multi_scale", scales=[1], shared=False, blend=0.0, inner=inner)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1)
    errors = []
    for step in range(30):
        out = quantizer(data)
        optimizer.zero_grad()
        out.loss.backward()
        for part, digit in zip(quantizer.parts, quantizer.codes.digits(out.indices), strict=True):
            learning = part.codebook_gradient.norm(dim=1) > 0
            assert step or learning.nonzero()[:, 0].tolist() == digit.unique().tolist()
        optimizer.step()
        errors.append((out.quantized - data).square().mean().item())
    assert errors[-1] < 0.5 * errors[0]
    first = quantizer.codes.digits(quantizer.encode(data))[0]
    assert all(len(one.unique()) == 1 for one in first)  # a 1 × 1 grid has one code an image
    assert len(first.unique()) < 8


def test_settings_survive_being_written():
    config = quantizer_config({"name": "multi_scale", "codebook_size": 64, "scales": [1, 2], "code_dim": 6})
    assert config.inner["codebook_size"] == 4 and quantizer_config(to_dict(config)) == config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scales": [2, 1]}, r"scales must ascend, .*got \[2, 1\]. Use sides such as"),
        ({"scales": [0]}, r"scales\[0\] must be at least 1; got 0. Use ascending sides"),
        ({"blend": 1.5}, r"blend must lie in \[0, 1\], got 1.5. Use 0.5"),
        ({"blends": 0}, "blends must be at least 1, got 0. Use 4"),
        ({"inner": {"name": "multi_scale"}}, "inner must be settings of a quantizer of single tokens"),
        ({"scales": [1, 2, 3], "inner": {"name": "vq", "codebook_size": 4096}}, "smaller number of scales"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        quantizer_config({"name": "multi_scale", **settings})
