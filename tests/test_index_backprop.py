"""index_backprop against Algorithm 1: values, gradients, memory, and every input that should not work."""

import pytest
import torch
from oracle import algorithm_1, entropies

from ibqlab.quantizers import estimators, index_backprop


def inputs(*, tokens=37, codes=90, dim=12, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, dim, generator=generator, dtype=torch.float64) * scale
    c = torch.randn(codes, dim, generator=generator, dtype=torch.float64)
    w = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    return z.to(dtype).requires_grad_(), c.to(dtype).requires_grad_(), w.to(dtype)


def written_out(z, c, w, temperature):
    z_q, index, _ = algorithm_1(z, c)
    sample, average = entropies(z, c, temperature)
    loss = (w * z_q).sum() + 0.3 * sample - 0.7 * average
    return z_q, index, sample, average, *torch.autograd.grad(loss, (z, c))


def by_blocks(z, c, w, temperature):
    out = index_backprop(z, c, temperature)
    loss = (w * out.quantized).sum() + 0.3 * out.sample_entropy - 0.7 * out.average_entropy
    return *out, *torch.autograd.grad(loss, (z, c))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
def test_float64_equals_algorithm_1(monkeypatch, temperature, rows):
    z, c, w = inputs()
    monkeypatch.setattr(estimators, "BLOCK_BYTES", rows * len(c) * 8)
    got, expected = by_blocks(z, c, w, temperature), written_out(z, c, w, temperature)
    assert torch.equal(got[1], expected[1])
    for one, other in zip(got[:1] + got[2:], expected[:1] + expected[2:], strict=True):
        assert relative(one, other) < 1e-8


@pytest.mark.parametrize("seed", range(4))
def test_float32_is_as_close_to_float64_as_algorithm_1_is(seed):
    z, c, w = inputs(tokens=64, codes=256, dim=16, seed=seed)
    exact = written_out(z, c, w, 0.01)
    single = [t.detach().float() for t in (z, c, w)]
    single = (single[0].requires_grad_(), single[1].requires_grad_(), single[2])
    mine, literal = by_blocks(*single, 0.01), written_out(*single, 0.01)
    for ours, theirs, truth in zip(mine[2:], literal[2:], exact[2:], strict=True):
        assert relative(ours.double(), truth) < 3 * relative(theirs.double(), truth) + 1e-6


def test_gradient_passes_the_numerical_check():
    z, c, _ = inputs(tokens=4, codes=7, dim=3)

    def entropy_only(z, c):
        out = index_backprop(z, c, 0.5)
        return out.sample_entropy - 2 * out.average_entropy

    assert torch.autograd.gradcheck(entropy_only, (z, c))


def test_without_temperature_there_is_no_entropy_and_the_same_gradient():
    z, c, w = inputs()
    out = index_backprop(z, c, None)
    assert out.sample_entropy is None
    assert out.average_entropy is None
    z_q, _, _ = algorithm_1(z, c)
    ours = torch.autograd.grad((w * out.quantized).sum(), (z, c))
    theirs = torch.autograd.grad((w * z_q).sum(), (z, c))
    assert all(relative(a, b) < 1e-10 for a, b in zip(ours, theirs, strict=True))


def test_every_code_takes_gradient():
    z, c, w = inputs(tokens=5, codes=90, scale=0.3)
    out = index_backprop(z, c, None)
    (gradient,) = torch.autograd.grad((w * out.quantized).sum(), c)
    assert out.indices.unique().numel() <= 5
    assert (gradient.norm(dim=1) > 0).all()


def test_ties_go_to_the_lowest_index():
    z = torch.eye(3)
    c = torch.cat([torch.zeros(2, 3), torch.eye(3), torch.eye(3)])
    assert index_backprop(z, c).indices.tolist() == [2, 3, 4]


def test_half_precision_inputs_are_computed_in_float32():
    z, c, _ = inputs(dtype=torch.float32, scale=30.0)
    half = index_backprop(z.detach().half(), c.detach().half())
    single = index_backprop(z.detach().half().float(), c.detach().half().float())
    assert half.quantized.dtype == torch.float32
    assert torch.equal(half.indices, single.indices)
    assert torch.isfinite(half.sample_entropy)
    assert torch.equal(half.average_entropy, single.average_entropy)


def test_logits_beyond_float16_stay_finite_under_autocast():
    z = torch.full((4, 8), 200.0, requires_grad=True)
    c = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * 200
    with torch.autocast("cpu", dtype=torch.float16):
        out = index_backprop(z, c)
    (out.quantized.sum() + out.sample_entropy).backward()
    assert torch.isfinite(z.grad).all()
    assert (z.detach() @ c.T).abs().max() > 65504


def test_nothing_of_size_n_by_k_is_kept_for_backward():
    tokens, codes = 512, 4096
    z, c, _ = inputs(tokens=tokens, codes=codes, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        index_backprop(z, c)
    assert kept
    assert max(kept) < tokens * codes / 10


@pytest.mark.parametrize(
    ("z", "c", "settings", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(5, 6), {}, r"must share D, got \(3, 4\) and \(5, 6\)"),
        (torch.zeros(3, 4, 2), torch.zeros(5, 4), {}, "permute"),
        (torch.zeros(0, 4), torch.zeros(5, 4), {}, "N = 0"),
        (torch.zeros(3, 4), torch.zeros(1, 4), {}, "K = 1"),
        (torch.zeros(3, 4), torch.zeros(5, 4, device="meta"), {}, "codebook on meta"),
        (torch.zeros(3, 4), torch.zeros(5, 4), {"entropy_temperature": 0.0}, "entropy_temperature"),
        (torch.zeros(3, 4), torch.zeros(5, 4), {"entropy_epsilon": -1.0}, "entropy_epsilon"),
    ],
)
def test_bad_input_is_named(z, c, settings, message):
    with pytest.raises(ValueError, match=message):
        index_backprop(z, c, **settings)
