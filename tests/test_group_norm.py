"""Group normalisation's kernels, in Triton's interpreter: as torch's operations, in torch's place, with less kept."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ibqlab.costs import meter
from ibqlab.tokenizer import group_norm
from ibqlab.tokenizer.autoencoder import ResidualBlock
from ibqlab.tokenizer.group_norm import normalise, normalise_per_image

pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of errors, in parts of the largest value."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels run on the CPU, too, as many times as the list is long."""
    calls = []
    monkeypatch.setattr(group_norm, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(group_norm, "_forward", lambda *args: (calls.append(args[0]), FORWARD(*args)))
    return calls


FORWARD = group_norm._forward


def activations(shape, dtype=torch.float32, mean=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean
    return x.to(dtype, memory_format=torch.channels_last).requires_grad_()


def layer(channels, groups=32):
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels, generator=generator))
        norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm


def assert_near(ours, exact, limit):
    assert (ours.double() - exact).abs().max() < limit * exact.abs().max()


# Widths: groups of 1, 2, 3 and 8 channels, tiles that are not full, several tiles. Sizes: odd, several chunks.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (1, 64, 3, 2), (2, 96, 4, 9), (1, 256, 6, 6)])
def test_forward_and_backward_are_those_of_torch(shape, swish, dtype, kernels):
    x, norm = activations(shape, dtype), layer(shape[1])
    exact_x = x.detach().double().requires_grad_()
    exact_norm = layer(shape[1]).double()
    exact = exact_norm(exact_x)
    exact = F.silu(exact) if swish else exact
    normed, same = normalise(norm, x, swish=swish)
    assert len(kernels) == 1 and torch.equal(same, x)
    assert normed.dtype == dtype and group_norm.lies_channels_last(normed)
    assert_near(normed, exact, LIMITS[dtype])
    slope, skip = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    slope, skip = (value.to(dtype, memory_format=torch.channels_last) for value in (slope, skip))
    torch.autograd.backward([normed, same], [slope, skip])
    torch.autograd.backward([exact, exact_x], [slope.double(), skip.double()])
    assert x.grad.dtype == dtype and group_norm.lies_channels_last(x.grad)
    assert_near(x.grad, exact_x.grad, LIMITS[dtype])
    # A bfloat16 sum's rounding is that of its terms; sums themselves are float32.
    for ours, theirs in zip(norm.parameters(), exact_norm.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, 2e-5)


def test_many_chunks_add_up(monkeypatch):
    monkeypatch.setattr(group_norm, "MOST_CHUNKS", 3)
    monkeypatch.setattr(group_norm, "TILE", 128)
    x, norm = activations((2, 32, 9, 5)), layer(32)
    assert group_norm._Tiling.of(x).grid == (3, 1, 2)
    exact_x, exact_norm = x.detach().double().requires_grad_(), layer(32).double()
    exact = F.silu(exact_norm(exact_x))
    normed, _ = normalise(norm, x, swish=True)
    assert_near(normed, exact, 2e-5)
    normed.sin().sum().backward()
    exact.sin().sum().backward()
    assert_near(x.grad, exact_x.grad, 2e-5)
    assert_near(norm.weight.grad, exact_norm.weight.grad, 2e-5)


def test_a_large_mean_costs_no_accuracy():
    # E[x²] − E[x]² in float32 would leave nothing of a variance of 1 beside a squared mean of 10⁸.
    x, norm = activations((1, 32, 16, 16), mean=1e4), layer(32)
    exact = layer(32).double()(x.detach().double())
    assert_near(normalise(norm, x, swish=False)[0], exact, 2e-3)
    plain = (x.double().square().mean() - x.double().mean().square()).item()
    assert 0.8 < plain < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_shifts_of_each_image(dtype, kernels):
    x = activations((3, 64, 4, 5), dtype)
    weights = [torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2)]
    weights = [weight.requires_grad_() for weight in weights]
    exact = [value.detach().double().requires_grad_() for value in (x, *weights)]
    ours = normalise_per_image(x, *weights, 32, 1e-6)
    theirs = exact[1][:, :, None, None] * F.group_norm(exact[0], 32, eps=1e-6) + exact[2][:, :, None, None]
    assert len(kernels) == 1 and ours.dtype == dtype
    assert_near(ours, theirs, LIMITS[dtype])
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    ours.backward(slope)
    theirs.backward(slope.double())
    for value, truth in zip((x, *weights), exact, strict=True):
        assert value.grad.dtype == dtype
        assert_near(value.grad, truth.grad, LIMITS[dtype])


@pytest.mark.parametrize("used", ["normed", "skip"])
def test_either_result_may_go_unused(used):
    x, norm = activations((1, 32, 4, 4)), layer(32)
    normed, same = normalise(norm, x, swish=True)
    exact_x = x.detach().double().requires_grad_()
    exact = F.silu(layer(32).double()(exact_x)) if used == "normed" else exact_x
    (normed if used == "normed" else same).sin().sum().backward()
    exact.sin().sum().backward()
    assert_near(x.grad, exact_x.grad, 2e-5)
    assert (norm.weight.grad is None) == (used == "skip")


def test_under_autocast_the_result_is_rounded_once_and_less_is_kept():
    x, norm = activations((2, 32, 8, 8), torch.bfloat16), layer(32)
    kept = []

    def keep(tensor):
        kept[-1].append(tensor.nbytes)
        return tensor

    sizes = []
    for own in (True, False):
        kept.append([])
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            # On CUDA autocast computes norms in float32; on the CPU that has to be said.
            normed = normalise(norm, x, swish=True)[0] if own else F.silu(norm(x.float())).bfloat16()
        assert normed.dtype == torch.bfloat16
        sizes.append(sum(size for size in kept[-1] if size >= x.nbytes))
    # The input in its own type, against its copy in float32 and the normalised one.
    assert sizes == [x.nbytes, 4 * x.nbytes]


def test_the_plan_counts_what_the_kernels_keep():
    torch.manual_seed(0)
    block = ResidualBlock(32, 64).to(memory_format=torch.channels_last)
    x = activations((2, 32, 4, 4), torch.bfloat16)
    sizes = []
    for device in ("cpu", "meta"):
        network, images = block.to(device), x.detach().to(device).requires_grad_()
        saved = meter.SavedTensors(meter.storages_of([network]))
        context = meter.cuda_precision(True) if device == "meta" else torch.autocast("cpu", torch.bfloat16)
        with saved.watching(), context:
            network(images)
        sizes.append(saved.bytes)
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("case", ["contiguous", "double", "compiling"])
def test_elsewhere_torch_computes(case, kernels, monkeypatch):
    x, norm = activations((2, 32, 4, 4)), layer(32)
    if case == "contiguous":
        x = x.detach().contiguous()
    if case == "double":
        x, norm = x.detach().double(), norm.double()
    if case == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    normed, same = normalise(norm, x, swish=True)
    assert not kernels and same is x
    assert torch.equal(normed, F.silu(norm(x)))
