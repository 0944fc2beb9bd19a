"""LPIPS' comparison of feature maps: its kernels, in Triton's interpreter, compute what torch's operations do."""

import pytest
import torch

from ibqlab.losses import lpips_layer
from ibqlab.losses.lpips_layer import layer_distance

pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of gradients' errors, in parts of the largest value."""


@pytest.fixture
def kernels(monkeypatch):
    """The kernels run on the CPU, too."""
    monkeypatch.setattr(lpips_layer, "kernels_run_on", lambda device: True)


def maps(shape, dtype=torch.float32, order=torch.channels_last):
    """Two maps of features as a ReLU leaves them, one pixel of the second all zeros; and weights."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator).relu() for _ in range(2))
    y[0, :, 0, 0] = 0
    x, y = (value.to(dtype, memory_format=order).requires_grad_() for value in (x, y))
    return x, y, torch.rand(1, shape[1], 1, 1, generator=generator)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(2, 64, 5, 7), (3, 192, 3, 3), (1, 512, 4, 5)])
def test_distance_and_gradients_are_those_of_torch(shape, dtype):
    x, y, weight = maps(shape, dtype)
    exact = [value.detach().double().requires_grad_() for value in (x, y)]
    ours, theirs = layer_distance(x, y, weight), layer_distance(*exact, weight.double())
    assert ours.dtype == torch.float32 and ours.shape == (shape[0], 1)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    slope = torch.arange(1.0, shape[0] + 1)[:, None]
    ours.backward(slope)
    theirs.backward(slope.double())
    for value, truth in zip((x, y), exact, strict=True):
        assert value.grad.dtype == dtype and lpips_layer.lies_channels_last(value.grad)
        # Where all is zero a length has no gradient; the ReLU before it passes none on.
        passed = (truth > 0).any(1, keepdim=True)
        expected = torch.where(passed, truth.grad, 0)
        assert (torch.where(passed, value.grad.double(), 0) - expected).abs().max() < LIMITS[
            dtype
        ] * expected.abs().max()
        assert torch.isfinite(value.grad).all() or dtype == torch.float16


@pytest.mark.usefixtures("kernels")
def test_pictures_that_need_no_gradient_get_none():
    x, y, weight = maps((1, 64, 3, 3))
    layer_distance(x.detach(), y, weight).sum().backward()
    assert x.grad is None and y.grad is not None


def test_it_is_the_published_expression_bit_for_bit_elsewhere():
    x, y, weight = maps((2, 64, 5, 7), order=torch.contiguous_format)
    left, right = (value / (torch.sqrt(torch.sum(value**2, dim=1, keepdim=True)) + 1e-10) for value in (x, y))
    published = torch.nn.functional.conv2d((left - right) ** 2, weight).mean([2, 3], keepdim=True)
    assert torch.equal(layer_distance(x, y, weight), published.flatten(1))
