"""index_backprop against Algorithm 1: values, gradients, memory, and every input that should not work."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forms import emulate
from oracle import algorithm_1, entropies
from torch.utils._python_dispatch import TorchDispatchMode

from ibqlab.quantizers import (
    blocks,
    index_backprop,
    mixture_of_codes,
    nearest_code,
    precision,
)


def inputs(*, tokens=37, codes=90, dim=12, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, dim, generator=generator, dtype=torch.float64) * scale
    c = torch.randn(codes, dim, generator=generator, dtype=torch.float64)
    w = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    return z.to(dtype).requires_grad_(), c.to(dtype).requires_grad_(), w.to(dtype)


def naive(z, c, w, temperature):
    z_q, index, _ = algorithm_1(z, c)
    sample, average = entropies(z, c, temperature)
    loss = (w * z_q).sum() + 0.3 * sample - 0.7 * average
    return z_q, index, sample, average, *torch.autograd.grad(loss, (z, c))


def naive_values(temperature, z, c, w):
    quantized, _, *rest = naive(z, c, w, temperature)
    return quantized, *rest


def by_blocks(z, c, w, temperature):
    out = index_backprop(z, c, temperature)
    loss = (w * out.quantized).sum() + 0.3 * out.sample_entropy - 0.7 * out.average_entropy
    return *out, *torch.autograd.grad(loss, (z, c))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()


FORMS = ["in place", "in place, parts", "kernels", "kernels, parts"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """The type to compute in: the tests that take it hold for every form, whichever this machine's device would get.

    Kernels and parts are those of float32; the form in place has float64, too, which shows more.
    """
    emulate(monkeypatch, kernels="kernels" in request.param, parts="parts" in request.param)
    return torch.float64 if request.param == "in place" else torch.float32


def assert_near(got, case, reference, *, limit=1e-8):
    """As near to the reference in float64 as the limit says; in float32 as near as the reference in float32 is."""
    z, c, w = case
    exact = reference(*(t.detach().double().requires_grad_() for t in (z, c)), w.double())
    literal = exact if z.dtype == torch.float64 else reference(*case)
    for one, other, truth in zip(got, literal, exact, strict=True):
        allowed = limit if z.dtype == torch.float64 else 3 * relative(other.double(), truth) + 2e-6
        # Entropies of one sure token are 0 but for shares that float32 counts as e^−61.
        assert relative(one.double(), truth) < allowed or (one - truth).abs().max() < 1e-20


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
def test_every_form_equals_algorithm_1(monkeypatch, form, temperature, rows):
    case = inputs(dtype=form)
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: rows)
    got, expected = by_blocks(*case, temperature), naive(*case, temperature)
    assert torch.equal(got[1], expected[1])
    values = (*got[:1], *got[2:])
    assert_near(values, case, functools.partial(naive_values, temperature))


@pytest.mark.parametrize(
    ("tokens", "codes", "dim"), [(1, 2, 1), (1, 300, 5), (70, 2, 3), (61, 129, 7), (5, 128, 4), (3, 127, 4)]
)
def test_any_number_of_tokens_and_codes(monkeypatch, form, tokens, codes, dim):
    case = inputs(tokens=tokens, codes=codes, dim=dim, dtype=form)
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 50)
    monkeypatch.setattr(blocks, "TILE_BYTES", 3 * codes * 8)
    # Of one token's entropy float32 shows the rounding of its scores times 1/τ, and nothing averages it out.
    temperature = 0.01 if form == torch.float64 else 0.3
    got, expected = by_blocks(*case, temperature), naive(*case, temperature)
    assert torch.equal(got[1], expected[1])
    values = (*got[:1], *got[2:])
    assert_near(values, case, functools.partial(naive_values, temperature), limit=1e-6)


@pytest.mark.parametrize(("spread", "near"), [(1.0, True), (0.01, False)])
@pytest.mark.parametrize("used", ["all", "entropies"])
def test_entropies_on_the_codes_near_the_best_one_are_those_on_all(monkeypatch, spread, near, used):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 16)

    def gradients(case, quantized, sample, average):
        z, c, w = case
        loss = 0.3 * sample - 0.7 * average + ((w * quantized).sum() if used == "all" else 0)
        return sample, average, *torch.autograd.grad(loss, (z, c))

    double = inputs(tokens=40, codes=8192, scale=spread)
    single = inputs(tokens=40, codes=8192, scale=spread, dtype=torch.float32)
    scores = (single[0] @ single[1].T).detach()
    columns = blocks.columns_near_top(scores, scores.amax(1, keepdim=True), 0.01 * 61.2)
    assert (columns is not None) == near
    out = index_backprop(*single[:2], 0.01)
    got = gradients(single, out.quantized, out.sample_entropy, out.average_entropy)
    literal = gradients(single, algorithm_1(*single[:2])[0], *entropies(*single[:2], 0.01))
    exact = gradients(double, algorithm_1(*double[:2])[0], *entropies(*double[:2], 0.01))
    assert exact[0] > 0.01
    for ours, theirs, truth in zip(got, literal, exact, strict=True):
        assert relative(ours.double(), truth) < 3 * relative(theirs.double(), truth) + 1e-6


def test_columns_near_the_top_hold_every_near_score():
    scores = torch.randn(20, 4096, generator=torch.Generator().manual_seed(0))
    top = scores.amax(1, keepdim=True)
    columns = blocks.columns_near_top(scores, top, 0.3)
    assert columns.shape[1] % blocks.CHUNK == 0 and columns.shape[1] <= 1024
    assert all(len(row.unique()) == len(row) for row in columns)
    found = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, columns, True)
    assert found[scores > top - 0.3].all()
    assert blocks.columns_near_top(scores, top, 9.0) is None
    assert blocks.columns_near_top(scores[:, :-1], top, 0.3) is None


@pytest.mark.parametrize("used", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_outputs_may_be_used_one_by_one(form, used):
    def gradients(z, c, outputs):
        return torch.autograd.grad(sum(output for output, use in zip(outputs, used, strict=True) if use), (z, c))

    def reference(z, c, w):
        return gradients(z, c, ((w * algorithm_1(z, c)[0]).sum(), *entropies(z, c, 0.1)))

    z, c, w = inputs(dtype=form)
    out = index_backprop(z, c, 0.1)
    got = gradients(z, c, ((w * out.quantized).sum(), out.sample_entropy, out.average_entropy))
    assert_near(got, (z, c, w), reference)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("seed", range(4))
def test_float32_is_as_close_to_float64_as_algorithm_1_is(seed):
    z, c, w = inputs(tokens=64, codes=256, dim=16, seed=seed)
    exact = naive(z, c, w, 0.01)
    single = [t.detach().float() for t in (z, c, w)]
    single = (single[0].requires_grad_(), single[1].requires_grad_(), single[2])
    mine, literal = by_blocks(*single, 0.01), naive(*single, 0.01)
    for ours, theirs, truth in zip(mine[2:], literal[2:], exact[2:], strict=True):
        assert relative(ours.double(), truth) < 3 * relative(theirs.double(), truth) + 1e-6


def test_gradient_passes_the_numerical_check():
    z, c, _ = inputs(tokens=4, codes=7, dim=3)

    def entropy_only(z, c):
        out = index_backprop(z, c, 0.5)
        return out.sample_entropy - 2 * out.average_entropy

    assert torch.autograd.gradcheck(entropy_only, (z, c))


def test_without_temperature_there_is_no_entropy_and_the_same_gradient(form):
    z, c, w = inputs(dtype=form)
    out = index_backprop(z, c, None)
    assert out.sample_entropy is None
    assert out.average_entropy is None
    ours = torch.autograd.grad((w * out.quantized).sum(), (z, c))
    assert_near(
        ours, (z, c, w), lambda z, c, w: torch.autograd.grad((w * algorithm_1(z, c)[0]).sum(), (z, c)), limit=1e-10
    )


def test_every_code_takes_gradient():
    z, c, w = inputs(tokens=5, codes=90, scale=0.3)
    out = index_backprop(z, c, None)
    (gradient,) = torch.autograd.grad((w * out.quantized).sum(), c)
    assert out.indices.unique().numel() <= 5
    assert (gradient.norm(dim=1) > 0).all()


@pytest.mark.usefixtures("form")
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


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor holds that an operation gave back or wrote."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


def test_nothing_larger_than_two_blocks_ever_exists(monkeypatch):
    tokens, codes, rows = 512, 4096, 32
    z, c, w = inputs(tokens=tokens, codes=codes, dtype=torch.float32)
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: rows)
    with Largest() as largest:
        by_blocks(z, c, w, 0.01)
    assert rows * codes <= largest.numbers <= 2 * rows * codes
    with Largest() as largest:
        naive(z, c, w, 0.01)
    assert largest.numbers == tokens * codes


def test_searching_the_nearest_code_needs_one_block(monkeypatch):
    z, c, _ = inputs(tokens=512, codes=4096, dtype=torch.float32)
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 16)
    for metric in ("l2", "cosine", "dot"):
        with Largest() as largest:
            nearest_code(z.detach(), c.detach(), metric)
        assert largest.numbers == max(16 * 4096, c.numel())


def test_nothing_of_size_n_by_k_is_kept_for_backward():
    tokens, codes = 512, 4096
    z, c, _ = inputs(tokens=tokens, codes=codes, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        index_backprop(z, c)
    assert kept
    assert max(kept) < tokens * codes / 10


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_becomes_nan_as_in_algorithm_1(bad):
    z, c, _ = inputs(dtype=torch.float32)
    with torch.no_grad():
        z[5, 3] = bad
    out = index_backprop(z, c)
    literal, index, _ = algorithm_1(z, c)
    assert torch.equal(out.quantized.isnan(), literal.isnan())
    assert out.quantized.isnan().all(1).nonzero().flatten().tolist() == [5]
    others = torch.arange(len(z)) != 5
    assert torch.equal(out.indices[others], index[others])
    assert 0 <= out.indices[5] < len(c)
    assert out.sample_entropy.isnan()
    assert out.average_entropy.isnan()


def test_strides_do_not_matter(form):
    z, c, w = inputs(dtype=form)
    expected = by_blocks(z, c, w, 0.1)
    apart = z.detach().T.contiguous().T.requires_grad_()
    wide = torch.zeros(len(c), 30, dtype=c.dtype)
    wide[:, 4:16] = c.detach()
    got = by_blocks(apart, wide[:, 4:16].requires_grad_(), w.T.contiguous().T, 0.1)
    for one, other in zip(got, expected, strict=True):
        near = {"rtol": 1e-10, "atol": 1e-12} if form == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(one, other, **near)


def test_a_gradient_without_strides_is_taken():
    z, c, _ = inputs()
    (got,) = torch.autograd.grad(index_backprop(z, c, None).quantized.sum(), z)
    (expected,) = torch.autograd.grad(algorithm_1(z, c)[0].sum(), z)
    assert relative(got, expected) < 1e-8


@pytest.mark.usefixtures("form")
def test_shares_too_small_for_the_type_do_no_harm():
    z, c, w = inputs(dtype=torch.float32, scale=100.0)
    exact = naive(*(t.detach().double().requires_grad_() for t in (z, c)), w.double(), 0.01)
    got = by_blocks(z, c, w, 0.01)
    assert all(torch.isfinite(value).all() for value in got)
    # Apart from the scores' own rounding, which τ multiplies: features of norm 350 leave few tokens undecided.
    assert relative(got[4].double(), exact[4]) < 1e-3
    assert relative(got[5].double(), exact[5]) < 1e-3


def test_repetitions_are_equal_in_every_bit():
    z, c, w = inputs(tokens=300, codes=700, dtype=torch.float32)
    first, second = by_blocks(z, c, w, 0.01), by_blocks(z, c, w, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


SWITCHES = [(backend, "all") for backend in ("generic", "cuda", "mkldnn")] + [
    (backend, operation) for backend in ("cuda", "mkldnn") for operation in ("matmul", "conv", "rnn")
]
CHOICES = {
    "nothing": lambda: None,
    "older, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older, high": lambda: torch.set_float32_matmul_precision("high"),
    "older, highest": lambda: torch.set_float32_matmul_precision("highest"),
    "older, allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "newer, cuda.matmul tf32": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer, cuda.matmul ieee": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    "newer, mkldnn.matmul bf16": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "newer, mkldnn.matmul tf32": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"),
    "newer, cuda tf32": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "newer, all tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer, all bf16": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
    "newer, cuda.matmul bfx9": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "bfx9"),
    "older, then newer": lambda: (
        torch.set_float32_matmul_precision("high"),
        setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    ),
    "newer, all ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "both": lambda: (
        torch.set_float32_matmul_precision("high"),
        setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        setattr(torch.backends, "fp32_precision", "tf32"),
    ),
}


def reset_precision():
    torch.set_float32_matmul_precision("highest")
    for switch in SWITCHES:
        precision.write_switch(switch, "none")


@pytest.fixture
def chosen_precision():
    """Chooses by name, and takes the choice back after the test."""

    def choose(name):
        try:
            CHOICES[name]()
        except RuntimeError as error:
            pytest.skip(f"this torch has no such choice: {error}")

    reset_precision()
    yield choose
    reset_precision()


def precision_of_the_process():
    """All that a process could find out about torch's switches: what they say, and what each of them inherits."""
    found = [{switch: precision.read_switch(switch) for switch in SWITCHES}]
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            found.append(ask())
        except RuntimeError:
            found.append("raises")
    for parent in SWITCHES[:3]:
        own = precision.own_value(parent)
        for value in ("ieee", "tf32"):
            precision.write_switch(parent, value)
            found.append([precision.read_switch(switch) for switch in SWITCHES])
        precision.write_switch(parent, own)
    return found


@pytest.mark.parametrize("choice", CHOICES)
def test_precision_of_the_process_is_neither_used_nor_changed(chosen_precision, choice):
    z, c, w = inputs(tokens=64, codes=256, dtype=torch.float32)
    expected = by_blocks(z, c, w, 0.01), mixture_of_codes(z, c, 0.5), nearest_code(z, c)
    chosen_precision(choice)
    before = precision_of_the_process()
    assert precision_of_the_process() == before  # asking changes nothing
    got = by_blocks(z, c, w, 0.01), mixture_of_codes(z, c, 0.5), nearest_code(z, c)
    assert precision_of_the_process() == before
    assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0], strict=True))
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[2], expected[2])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("wanted", ["ieee", "tf32"])
def test_precision_of_the_process_survives_an_error(chosen_precision, choice, wanted):
    chosen_precision(choice)
    before = precision_of_the_process()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), precision.float32_products(wanted):
            assert {precision.read_switch(switch) for switch in precision.PRODUCTS} == {wanted}
            assert torch.backends.cuda.matmul.allow_tf32 == (
                wanted == "tf32"
            )  # neither interface contradicts the other
            1 / 0  # noqa: B018
        assert precision_of_the_process() == before


def test_a_torch_with_the_older_switch_alone_is_served(monkeypatch):
    monkeypatch.setattr(precision, "has_newer_switches", lambda: False)
    reset_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with precision.float32_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        reset_precision()


@pytest.mark.parametrize("size", [2, 127, 128, 129, 1000])
def test_best_codes_are_those_of_max(size):
    generator = torch.Generator().manual_seed(size)
    scores = torch.randint(0, 5, (40, size), generator=generator).float()  # few values: many ties
    scores[7, size // 2] = torch.nan
    top, indices = blocks.best_codes(scores)
    expected = scores.max(1, keepdim=True)
    assert torch.equal(indices, expected.indices[:, 0])
    torch.testing.assert_close(top, expected.values, rtol=0, atol=0, equal_nan=True)


def run_processes(count, function, folder):
    """What a function of this module returns in each of some processes, by rank."""
    script = (
        "import sys, torch, torch.distributed as dist\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "torch.set_num_threads(1)\n"
        f"import test_index_backprop as here\n"
        f"dist.init_process_group('gloo', init_method='file://{folder}/meet', rank=int(sys.argv[1]), "
        f"world_size={count})\n"
        f"torch.save(here.{function}(), f'{folder}/{{sys.argv[1]}}.pt')\n"
        "dist.destroy_process_group()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def one_processs_gradients():
    """Gradients of the average entropy, taken over two processes, from this process's half of the tokens."""
    from ibqlab.quantizers.lfq import sign_entropies  # noqa: PLC0415

    half = slice(0, 18) if dist.get_rank() == 0 else slice(18, 36)
    z, c, _ = inputs(tokens=36)
    z = z.detach()[half].requires_grad_()
    entropy = index_backprop(z, c, 0.1, entropy_over_processes=True).average_entropy
    signs = z.detach()[:, :6].clone().requires_grad_()
    bits = sign_entropies(signs, 1.0, over_processes=True)[1]
    return [entropy, *torch.autograd.grad(entropy, (z, c)), bits, *torch.autograd.grad(bits, signs)]


def test_the_average_entropy_may_be_taken_over_all_processes(tmp_path):
    from ibqlab.quantizers.lfq import sign_entropies  # noqa: PLC0415

    z, c, _ = inputs(tokens=36)
    entropy = index_backprop(z, c, 0.1).average_entropy
    grads = torch.autograd.grad(entropy, (z, c))
    signs = z.detach()[:, :6].clone().requires_grad_()
    bits = sign_entropies(signs, 1.0)[1]
    first, second = run_processes(2, "one_processs_gradients", tmp_path)
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-14)
    # Data-parallel training averages the processes' gradients.
    close(first[0], entropy)
    close(second[0], entropy)
    close(torch.cat([first[1], second[1]]) / 2, grads[0])
    close((first[2] + second[2]) / 2, grads[1])
    close(first[3], bits)
    close(torch.cat([first[4], second[4]]) / 2, *torch.autograd.grad(bits, signs))


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
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(5, 4), {}, r"floating-point, got torch.int64"),
    ],
)
def test_bad_input_is_named(z, c, settings, message):
    with pytest.raises(ValueError, match=message):
        index_backprop(z, c, **settings)


@pytest.mark.parametrize("temperature", [0.9, 0.05, 1e-6])
@pytest.mark.parametrize(("tokens", "codes"), [(37, 90), (1, 2), (5, 129)])
def test_mixture_of_codes_equals_the_naive_form(monkeypatch, temperature, tokens, codes):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 10)
    monkeypatch.setattr(blocks, "TILE_BYTES", 3 * codes * 8)
    z, c, w = inputs(tokens=tokens, codes=codes)
    mixed = mixture_of_codes(z, c, temperature)
    literal = (z @ c.T / temperature).softmax(1) @ c
    torch.testing.assert_close(mixed, literal, rtol=1e-9, atol=1e-11)
    got, expected = (torch.autograd.grad((w * value).sum(), (z, c)) for value in (mixed, literal))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_mixture_of_codes_never_holds_more_than_two_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 32)
    z, c, w = inputs(tokens=512, codes=4096, dtype=torch.float32)
    with Largest() as largest:
        torch.autograd.grad((w * mixture_of_codes(z, c, 0.5)).sum(), (z, c))
    assert 32 * 4096 <= largest.numbers <= 2 * 32 * 4096


def test_mixture_of_codes_refuses_temperature_zero():
    z, c, _ = inputs()
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        mixture_of_codes(z, c, 0)
