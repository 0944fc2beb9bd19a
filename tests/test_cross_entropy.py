"""linear_cross_entropy against the naive form: values, gradients, types, memory, and every bad input."""

import pytest
import torch
from test_index_backprop import Largest, relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, linear

from ibqlab.generator import linear_cross_entropy
from ibqlab.quantizers import blocks


def inputs(*, tokens=37, vocabulary=90, dim=12, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, dim, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def naive(hidden, weight, targets, reduction="mean"):
    return cross_entropy(linear(hidden, weight), targets, reduction=reduction)


def upstream(loss):
    """A gradient of the loss that is not 1, and differs from token to token."""
    return (0.7 + torch.arange(loss.numel(), dtype=loss.dtype).sin()).view(loss.shape)


def loss_and_gradients(form, hidden, weight, targets, reduction="mean"):
    loss = form(hidden, weight, targets, reduction=reduction)
    return loss, *torch.autograd.grad(loss, (hidden, weight), upstream(loss))


def assert_same(got, expected, tolerance=1e-10):
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert relative(one, other) < tolerance


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of seven rows and tiles of three, so that tokens of a test fill several."""
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 7)
    monkeypatch.setattr(blocks, "TILE_BYTES", 3 * 90 * 8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
def test_float64_equals_the_naive_form(monkeypatch, reduction, rows):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: rows)
    monkeypatch.setattr(blocks, "TILE_BYTES", 3 * 90 * 8)
    case = inputs()
    assert_same(loss_and_gradients(linear_cross_entropy, *case, reduction), loss_and_gradients(naive, *case, reduction))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "dim"), [(1, 2, 1), (1, 301, 5), (50, 2, 3), (15, 131, 7), (7, 90, 4)]
)
def test_any_number_of_tokens_and_vocabulary(reduction, tokens, vocabulary, dim):
    case = inputs(tokens=tokens, vocabulary=vocabulary, dim=dim)
    assert_same(loss_and_gradients(linear_cross_entropy, *case, reduction), loss_and_gradients(naive, *case, reduction))


def test_one_word_alone_is_certain():
    hidden, weight, targets = inputs(vocabulary=1)
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
def test_float32_is_as_close_to_float64_as_the_naive_form_is(reduction, seed, scale):
    hidden, weight, targets = inputs(tokens=64, vocabulary=256, dim=16, dtype=torch.float32, seed=seed, scale=scale)
    double = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = loss_and_gradients(naive, *double, targets, reduction)
    mine = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, reduction)
    literal = loss_and_gradients(naive, hidden, weight, targets, reduction)
    for ours, theirs, truth in zip(mine, literal, exact, strict=True):
        assert ours.dtype == torch.float32
        # One unit in the last place of the largest number, for where the naive form is right by chance.
        assert relative(ours.double(), truth) < 3 * relative(theirs.double(), truth) + 1.2e-7


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_types_are_computed_in_float32(dtype, reduction):
    hidden, weight, targets = inputs(dtype=dtype)
    single = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    loss, *gradients = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, reduction)
    expected, *exact = loss_and_gradients(linear_cross_entropy, *single, targets, reduction)
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    for gradient, truth in zip(gradients, exact, strict=True):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, truth.to(dtype))


def test_types_may_differ():
    hidden, weight, targets = inputs(dtype=torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    loss, grad_hidden, grad_weight = loss_and_gradients(linear_cross_entropy, half, weight, targets)
    expected = loss_and_gradients(naive, half.detach().float().requires_grad_(), weight, targets)
    assert (loss.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert_same((loss, grad_weight), (expected[0], expected[2]), 1e-5)
    assert relative(grad_hidden.float(), expected[1]) < 2**-8


def test_logits_beyond_float16_stay_finite_under_autocast():
    hidden, weight, targets = inputs(dtype=torch.float32, scale=200.0)
    weight = (200 * weight.detach()).requires_grad_()
    assert linear(hidden, weight).abs().max() > 65504
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert_same((loss,), (naive(hidden, weight, targets),), 1e-6)
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_passes_the_numerical_check(reduction):
    hidden, weight, targets = inputs(tokens=9, vocabulary=11, dim=3)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, reduction=reduction), (hidden, weight)
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_may_be_repeated(reduction):
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    expected = torch.autograd.grad(naive(hidden, weight, targets, reduction).sum(), (hidden, weight))
    first = torch.autograd.grad(loss.sum(), (hidden, weight), retain_graph=True)
    assert_same(torch.autograd.grad(3 * loss.sum(), (hidden, weight)), [3 * gradient for gradient in expected])
    assert_same(first, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(reduction, wanted):
    case = inputs()
    _, *expected = loss_and_gradients(naive, *case, reduction)
    case[1 - wanted].requires_grad_(False)
    loss = linear_cross_entropy(*case, reduction=reduction)
    (got,) = torch.autograd.grad(loss, case[wanted], upstream(loss))
    assert_same((got,), (expected[wanted],))
    assert case[1 - wanted].grad is None


def test_without_gradients_only_the_logits_are_multiplied():
    hidden, weight, targets = inputs()
    with torch.no_grad(), torch.autograd.profiler.profile() as told:
        loss = linear_cross_entropy(hidden, weight, targets)
    counts = {event.key: event.count for event in told.key_averages()}
    assert counts["aten::mm"] == 1 and "aten::addmm_" not in counts
    assert not loss.requires_grad
    assert_same((loss,), (naive(hidden, weight, targets),))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_images_of_tokens_and_strides_do_not_matter(reduction):
    hidden, weight, targets = inputs(tokens=36)
    expected = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, reduction)
    apart = hidden.detach().view(4, 9, 12).permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    wide = torch.zeros(90, 30, dtype=weight.dtype)
    wide[:, 4:16] = weight.detach()
    spread = targets.view(4, 9).T.contiguous().T
    assert not (apart.is_contiguous() or spread.is_contiguous() or wide[:, 4:16].is_contiguous())
    got = loss_and_gradients(linear_cross_entropy, apart, wide[:, 4:16].requires_grad_(), spread, reduction)
    assert got[0].shape == (spread.shape if reduction == "none" else ())
    assert got[1].shape == (4, 9, 12)
    for one, other in zip(got, expected, strict=True):
        assert relative(one.reshape(other.shape), other) < 1e-10


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integers_are_targets(dtype):
    hidden, weight, targets = inputs()
    assert torch.equal(
        linear_cross_entropy(hidden, weight, targets.to(dtype)), linear_cross_entropy(hidden, weight, targets)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_larger_than_two_blocks_ever_exists(monkeypatch, reduction):
    tokens, vocabulary, rows = 512, 4096, 32
    case = inputs(tokens=tokens, vocabulary=vocabulary, dtype=torch.float32)
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: rows)
    with Largest() as largest:
        loss_and_gradients(linear_cross_entropy, *case, reduction)
    assert rows * vocabulary <= largest.numbers <= 2 * rows * vocabulary
    with Largest() as largest:
        loss_and_gradients(naive, *case, reduction)
    assert largest.numbers == tokens * vocabulary


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_becomes_nan_as_in_the_naive_form(reduction, bad):
    hidden, weight, targets = inputs(dtype=torch.float32)
    with torch.no_grad():
        hidden[5, 3] = bad
    got = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, reduction)
    expected = loss_and_gradients(naive, hidden, weight, targets, reduction)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
    assert got[1].isnan().any(1).nonzero().flatten().tolist() == [5]
    assert got[0].isnan().sum() == 1
    torch.testing.assert_close(got[0], expected[0], equal_nan=True)


def test_shares_too_small_for_the_type_do_no_harm():
    hidden, weight, targets = inputs(dtype=torch.float32, scale=100.0)
    double = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    got = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    assert_same([value.double() for value in got], loss_and_gradients(naive, *double, targets), 1e-4)


def test_repetitions_are_equal_in_every_bit():
    case = inputs(tokens=300, vocabulary=700, dtype=torch.float32)
    first, second = (loss_and_gradients(linear_cross_entropy, *case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_plan_needs_no_values(reduction):
    with FakeTensorMode():
        hidden, weight = torch.empty(2, 9, 4, requires_grad=True), torch.empty(50, 4, requires_grad=True)
        loss = linear_cross_entropy(hidden, weight, torch.empty(2, 9, dtype=torch.int64), reduction=reduction)
        loss.sum().backward()
    assert loss.shape == ((2, 9) if reduction == "none" else ())
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)


TOKENS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "settings", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(5, 6), TOKENS, {}, r"must share C, got \(3, 4\) and \(5, 6\)"),
        (torch.zeros(3, 4), torch.zeros(4, 5), TOKENS, {}, "not transposed"),
        (torch.zeros(3, 1, 1, 4), torch.zeros(5, 4), TOKENS, {}, r"\(N, C\) or \(B, T, C\)"),
        (torch.zeros(4), torch.zeros(5, 4), TOKENS[0], {}, r"got \(4,\)"),
        (torch.zeros(3, 4), torch.zeros(4), TOKENS, {}, r"and \(4,\)"),
        (torch.zeros(6, 4), torch.zeros(5, 4), TOKENS, {}, r"\(6,\), got \(3,\); use targets.reshape\(6\)"),
        (torch.zeros(1, 3, 4), torch.zeros(5, 4), TOKENS, {}, r"\(1, 3\), got \(3,\); use targets.reshape\(1, 3\)"),
        (torch.zeros(0, 4), torch.zeros(5, 4), TOKENS[:0], {}, "got 0 tokens"),
        (torch.zeros(3, 4), torch.zeros(0, 4), TOKENS, {}, "V = 0"),
        (torch.zeros(3, 4), torch.zeros(5, 4, device="meta"), TOKENS, {}, "weight on meta, targets on cpu"),
        (torch.zeros(3, 4), torch.zeros(5, 4), TOKENS.to("meta"), {}, "targets on meta"),
        (torch.zeros(3, 4).long(), torch.zeros(5, 4), TOKENS, {}, r"floating-point, got torch.int64"),
        (
            torch.zeros(3, 4),
            torch.zeros(5, 4),
            TOKENS.float(),
            {},
            r"integers.* got torch.float32; use targets.long\(\)",
        ),
        (torch.zeros(3, 4), torch.zeros(5, 4), TOKENS.bool(), {}, "got torch.bool"),
        (torch.zeros(3, 4), torch.zeros(5, 4), TOKENS + 5, {}, "0 to V − 1 = 4, got 5 to 5"),
        (torch.zeros(3, 4), torch.zeros(5, 4), TOKENS - 100, {}, "got -100 to -100; leave tokens without a target out"),
        (torch.zeros(3, 4), torch.zeros(5, 4), TOKENS, {"reduction": "avg"}, "'mean', 'sum', 'none', got 'avg'"),
    ],
)
def test_bad_input_is_named(hidden, weight, targets, settings, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets, **settings)
