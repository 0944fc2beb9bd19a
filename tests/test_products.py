"""Products of float32 from bfloat16 parts, Triton's kernels over rows of scores, and what both need of memory."""

import itertools
import sys
import threading
import weakref

import pytest
import torch
from forms import PARTS, emulate
from torch.utils._python_dispatch import TorchDispatchMode

from ibqlab.config import content_hash
from ibqlab.generator import linear_cross_entropy
from ibqlab.quantizers import blocks, build_quantizer, index_backprop, mixture_of_codes, nearest_code, products
from ibqlab.quantizers.base import quantizer_config
from ibqlab.quantizers.lfq import sign_entropies
from ibqlab.quantizers.products import CodebookOperand, ProductForm, product_form, side_by_side, stacked

row_kernels = pytest.importorskip("ibqlab.quantizers.row_kernels", reason="needs Triton, which torch brings on Linux")
FLOAT32 = ProductForm(torch.float32)
SCALES = {
    "normal": (1.0, 1.0),
    "short features": (0.02, 1.0),
    "narrow codebook": (1.0, 1e-3),
    "both small": (1e-3, 1e-3),
}


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(value, truth):
    """Largest and root mean square distance from float64."""
    difference = value.double() - truth
    return difference.abs().max(), difference.square().mean().sqrt()


def scores(form, features, codebook):
    operand, out = CodebookOperand(codebook, form), features.new_empty(len(features), len(codebook))
    operand.multiply([side_by_side(form, features, form.left)], [out])
    return out


@pytest.fixture(params=["operations", "kernels"])
def split(request, monkeypatch):
    """Parts made by PyTorch's operations and by the kernel."""
    emulate(monkeypatch, kernels=request.param == "kernels")


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("shape", [(1, 1), (37, 130), (16, 256)])
def test_three_parts_are_the_number_itself(shape):
    values = draw(*shape).float()
    for form in (PARTS, FLOAT32):
        for order in (form.left, form.right, form.change, form.against_change):
            wide, high = side_by_side(form, values, order), stacked(form, values, order)
            segments = wide.view(shape[0], len(order), shape[1]).transpose(0, 1)
            assert torch.equal(segments, high.view(len(order), *shape))
            assert wide.dtype == form.dtype
            parts = {part: segments[place].float() for place, part in enumerate(order)}
            # 24 bits in all; the sum in float64, which is exact.
            assert torch.equal(sum(part.double() for part in parts.values()).float(), values)
            if form is PARTS:
                # Triton's interpreter cuts bits off where its compiler, like PyTorch, rounds.
                assert (parts[1].abs() <= values.abs() / 128).all()
                assert (parts[2].abs() <= values.abs() / 128**2).all()


@pytest.mark.usefixtures("split")
def test_parts_are_those_of_any_strides():
    values = draw(40, 60).float()
    for view in (values.T, values[:, 3:50], values[::3], torch.ones(()).expand(5, 7)):
        assert torch.equal(side_by_side(PARTS, view, PARTS.left), side_by_side(PARTS, view.contiguous(), PARTS.left))


@pytest.mark.usefixtures("split")
def test_numbers_that_are_not_finite_have_a_part_that_is_not():
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([[float("nan"), float("inf"), -float("inf"), largest, -largest, 0.0]])
    parts = stacked(PARTS, values, PARTS.change).float()
    assert parts.isfinite().all(0).tolist() == [False, False, False, True, True, True]
    assert torch.equal(parts[:, 3:].double().sum(0), values[0, 3:].double())


def test_the_six_largest_products_are_taken_small_ones_first():
    pairs = list(zip(PARTS.left, PARTS.right, strict=True))
    assert sorted(pairs) == sorted(pair for pair in itertools.product(range(3), repeat=2) if sum(pair) < 3)
    assert [sum(pair) for pair in pairs] == [2, 2, 2, 1, 1, 0]
    assert PARTS.right[:3] == (0, 1, 2)  # the codes' parts, which the gradient's products read, stand in front


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", [8, 64, 256])
def test_scores_from_parts_are_nearer_to_float64_than_float32(dim, scale):
    features, codebook = draw(64, dim, scale=SCALES[scale][0]), draw(2048, dim, seed=1, scale=SCALES[scale][1])
    single = features.float(), codebook.float()
    truth = single[0].double() @ single[1].double().T
    ours, theirs = (distances(scores(form, *single), truth) for form in (PARTS, FLOAT32))
    assert ours[0] < 1.1 * theirs[0]
    assert ours[1] < theirs[1]


@pytest.mark.parametrize(("size", "parts_are_whole"), [(1e-30, True), (1e-35, False)])
def test_tiny_numbers_keep_their_bits_down_to_1e_30(size, parts_are_whole):
    """Where a GPU takes numbers below bfloat16's range, 1.2·10⁻³⁸, for zero."""
    values, codebook = draw(64, 64, scale=size).float(), draw(512, 64, seed=1).float()
    smallest = torch.finfo(torch.bfloat16).tiny
    left = side_by_side(PARTS, values, PARTS.left)
    left = torch.where(left.abs() < smallest, 0, left)
    out = values.new_empty(64, 512)
    CodebookOperand(codebook, PARTS).multiply([left], [out])
    truth = values.double() @ codebook.double().T
    ours, theirs = distances(out, truth), distances(values @ codebook.T, truth)
    assert (ours[1] < theirs[1]) == parts_are_whole
    assert ours[0] < 0.01 * truth.abs().max()


def gradients(form, case, temperature, monkeypatch, *, kernels=False):
    with monkeypatch.context() as patch:
        if form is not None:
            emulate(patch, kernels=kernels, parts=True, form=form)
        features, codebook, pull = (value.clone().requires_grad_() for value in case)
        out = index_backprop(features, codebook, temperature)
        loss = (out.quantized * pull).sum()
        if temperature:
            loss = loss + 0.05 * (out.sample_entropy - out.average_entropy)
        return torch.autograd.grad(loss, (features, codebook))


@pytest.mark.parametrize("temperature", [0.01, 1.0, None])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", [8, 64, 256])
def test_gradients_from_parts_are_as_near_to_float64_as_float32s(monkeypatch, dim, scale, temperature):
    """The median of several draws: at τ = 0.01 an undecided token or two make most of a draw's error in any form."""
    ratios = []
    for seed in range(5):
        features, codebook = draw(64, dim, seed=seed, scale=SCALES[scale][0]), draw(1500, dim, seed=10 + seed)
        pull = draw(64, dim, seed=20 + seed, scale=1 / (64 * dim))
        case = features.float(), (SCALES[scale][1] * codebook).float(), pull.float()
        exact = gradients(None, [value.double() for value in case], temperature, monkeypatch)
        ours, theirs = (gradients(form, case, temperature, monkeypatch) for form in (PARTS, FLOAT32))
        errors = [[distances(v, t) for v, t in zip(values, exact, strict=True)] for values in (ours, theirs)]
        ratios.append(torch.tensor(errors[0]) / torch.tensor(errors[1]))
    largest, root_mean_square = torch.stack(ratios).median(0).values.unbind(1)  # of ∂z and ∂C
    assert (root_mean_square < 1.1).all()
    assert (largest < 1.5).all()


@pytest.mark.parametrize("matmul", ["tf32", "bfloat16"])
def test_lower_promises_are_kept_by_their_forms(monkeypatch, matmul):
    monkeypatch.setattr(products, "has_bfloat16", lambda device: True)
    form = product_form(torch.float32, torch.device("cuda"), matmul)
    assert form == {"tf32": ProductForm(torch.float32, tf32=True), "bfloat16": ProductForm(torch.bfloat16)}[matmul]
    case = draw(64, 32).float(), draw(500, 32, seed=1).float(), draw(64, 32, seed=2).float()
    exact = gradients(None, [value.double() for value in case], 1.0, monkeypatch)
    for one, truth in zip(gradients(form, case, 1.0, monkeypatch, kernels=True), exact, strict=True):
        assert distances(one, truth)[1] < 0.02 * truth.square().mean().sqrt()


def test_which_form_a_device_gets(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for matmul in products.MATMULS:
        assert product_form(torch.float32, cpu, matmul) == FLOAT32
        assert product_form(torch.float64, cuda, matmul) == ProductForm(torch.float64)
        assert product_form(torch.float16, cuda, matmul) == ProductForm(torch.float16)
    monkeypatch.setattr(products, "has_bfloat16", lambda device: True)
    assert product_form(torch.float32, cuda) == PARTS
    monkeypatch.setattr(products, "has_bfloat16", lambda device: False)
    assert product_form(torch.float32, cuda) == product_form(torch.float32, cuda, "bfloat16") == FLOAT32
    with pytest.raises(ValueError, match="matmul must be one of"):
        product_form(torch.float32, cpu, "bf16")


@pytest.mark.parametrize("whole", [True, False])
def test_panels_of_codes_change_nothing(monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(products, "PANEL_BYTES", 1)  # 1,024 codes, the fewest
    operand = CodebookOperand(draw(2500, 8).float(), PARTS)
    assert len(operand.panels()) == (1 if whole else 3)
    assert len(operand.panels(10**6)) == 3
    assert [panel.stop for panel in operand.panels(10**6)] == [1024, 2048, 2500]
    case = draw(30, 8).float(), draw(2500, 8, seed=1).float(), draw(30, 8, seed=2).float()
    exact = gradients(None, [value.double() for value in case], 0.3, monkeypatch)
    for one, truth in zip(gradients(PARTS, case, 0.3, monkeypatch, kernels=True), exact, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-4, atol=1e-5)


def rows_of_scores(codes):
    """Rows with many ties, with NaN and infinities, and of −∞ alone."""
    generator = torch.Generator().manual_seed(codes)
    values = torch.randint(0, 5, (12, codes), generator=generator).float()
    values[1, codes // 2] = torch.nan
    values[2, [0, -1]] = torch.nan
    values[3, codes // 3] = torch.inf
    values[4] = -torch.inf
    values[5, :-1] = -torch.inf
    values[6] = torch.randn(codes, generator=generator)
    return values


@pytest.mark.parametrize("codes", [1, 2, 511, 4096, 4097, 9000])
def test_the_kernels_best_codes_are_those_of_max(codes):
    values = rows_of_scores(codes)
    top, indices = row_kernels.best_codes(values)
    expected = values.max(1, keepdim=True)
    assert torch.equal(indices, expected.indices[:, 0])
    torch.testing.assert_close(top, expected.values, rtol=0, atol=0, equal_nan=True)
    offset = torch.randint(0, 3, (codes,), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(row_kernels.best_codes(values, offset)[1], (2 * values + offset).max(1).indices)


def test_more_spans_than_one_program_joins_at_a_time(monkeypatch):
    monkeypatch.setattr(row_kernels, "GROUP", 2)
    values = torch.zeros(2, 5 * row_kernels.SPAN)
    values[0, [-1, 3 * row_kernels.SPAN]] = 1
    values[1, [-5, -1]] = torch.nan
    _, indices = row_kernels.best_codes(values)
    assert indices.tolist() == [3 * row_kernels.SPAN, values.shape[1] - 5]
    statistics = row_kernels.row_statistics(values[:1], 0.5, torch.zeros(values.shape[1]))[1]
    exact = (values[:1].double() - 1).exp().sum().log(), (2 * (values[:1].double() - 1)).exp().sum().log()
    torch.testing.assert_close(statistics[1:3, 0].double(), torch.stack(exact), rtol=1e-5, atol=0)


@pytest.mark.parametrize("codes", [2, 700, 9000])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_the_kernels_statistics_are_those_of_the_softmax(codes, temperature):
    values = rows_of_scores(codes)
    finite = values.isfinite().all(1)
    average = torch.zeros(codes)
    _, (top, log_sum, tempered, entropy), _ = row_kernels.row_statistics(values, temperature, average)
    assert average.isnan().all()
    assert torch.equal(top.isfinite(), torch.tensor([*([True] + 4 * [False]), True, *(6 * [True])]))
    for bad in (1, 2, 3, 4):
        assert entropy[bad].isnan() and tempered[bad].isnan()
    average = torch.zeros(codes)
    row_kernels.row_statistics(values[finite], temperature, average)
    exact = values[finite].double()
    relative = (exact - exact.amax(1, keepdim=True)) / temperature
    shares = relative.softmax(1)
    torch.testing.assert_close(average.double(), shares.sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tempered[finite].double(), relative.exp().sum(1).log(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        entropy[finite].double(), -(shares * relative.log_softmax(1)).sum(1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        log_sum[finite].double(), (relative * temperature).exp().sum(1).log(), rtol=1e-5, atol=1e-6
    )


def test_columns_far_below_the_best_are_not_read():
    """Poisoned after the maxima were taken: NaN there would show in the sums."""
    values = draw(40, 6000).float()
    values[:, 100] = 500.0
    _, statistics, maxima = row_kernels.row_statistics(values, 0.01, torch.zeros(6000))
    values[:, 600:] = torch.nan  # tiles of 512 columns; none but the first holds a share
    sums = torch.zeros(1, 6000)
    row_kernels.share_sums[(47, 1)](
        values, maxima, statistics[0], statistics[2], sums, 40, 6000, maxima.shape[1], 40, 100.0, 0.61,
        ROWS=32, COLUMNS=128, WIDTH=512,
    )  # fmt: skip
    assert sums[0, 100] == 40
    assert sums.sum() == 40


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_nearest_codes_of_every_form_are_those_of_float64(monkeypatch, metric):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 13)
    features, codebook = draw(40, 16).float(), draw(700, 16, seed=1).float()
    codebook[300:350] = codebook[100:150]
    features[:20] = codebook[300:320]
    expected = nearest_code(features, codebook, metric)
    for kernels, parts in ((True, False), (False, True), (True, True)):
        with monkeypatch.context() as patch:
            emulate(patch, kernels=kernels, parts=parts)
            assert torch.equal(nearest_code(features, codebook, metric), expected)
    exact = nearest_code(features.double(), codebook.double(), metric)
    assert torch.equal(exact, expected)
    assert metric == "dot" or torch.equal(exact[:20], torch.arange(100, 120))  # of two equal codes the lower index


@pytest.mark.parametrize("temperature", [0.9, 0.05])
def test_mixtures_of_codes_from_parts_are_as_near_to_float64(monkeypatch, temperature):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 13)
    case = draw(40, 16).float(), draw(1500, 16, seed=1).float()
    pull = draw(40, 16, seed=2)

    def values(inputs):
        inputs = [value.clone().requires_grad_() for value in inputs]
        mixed = mixture_of_codes(*inputs, temperature)
        return mixed, *torch.autograd.grad((mixed * pull.to(mixed.dtype)).sum(), inputs)

    exact, plain = values([value.double() for value in case]), values(case)
    emulate(monkeypatch, parts=True)
    monkeypatch.setattr(products, "PANEL_BYTES", 1)
    for ours, theirs, truth in zip(values(case), plain, exact, strict=True):
        assert distances(ours, truth)[1] < 1.5 * distances(theirs, truth)[1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropies_from_parts_are_as_near_to_float64(monkeypatch, reduction):
    monkeypatch.setattr(blocks, "rows_per_block", lambda size, like: 13)
    hidden, weight = draw(40, 32).float(), draw(1500, 32, seed=1).float()
    targets = torch.arange(40)

    def values(inputs):
        inputs = [value.clone().requires_grad_() for value in inputs]
        loss = linear_cross_entropy(*inputs, targets, reduction=reduction)
        return loss, *torch.autograd.grad(loss.square().sum(), inputs)

    exact, plain = values([hidden.double(), weight.double()]), values([hidden, weight])
    emulate(monkeypatch, parts=True)
    for ours, theirs, truth in zip(values([hidden, weight]), plain, exact, strict=True):
        assert distances(ours, truth)[1] < 1.5 * distances(theirs, truth)[1] + 1e-9


def test_lfqs_table_product_from_parts_is_as_near_to_float64(monkeypatch):
    features = draw(50, 9, scale=0.1).float()

    def values(inputs):
        inputs = inputs.clone().requires_grad_()
        average = sign_entropies(inputs, 0.5)[1]
        return average, *torch.autograd.grad(average, inputs)

    exact, plain = values(features.double()), values(features)
    emulate(monkeypatch, parts=True)
    for ours, theirs, truth in zip(values(features), plain, exact, strict=True):
        assert distances(ours, truth)[1] < 1.5 * distances(theirs, truth)[1] + 1e-7


def test_the_setting_reaches_every_product(monkeypatch):
    """What quantizers ask for when their config says so."""
    asked = []

    def product_form_asked(dtype, device, matmul="float32"):
        asked.append(matmul)
        return product_form(dtype, device, matmul)

    for name in ("index_backprop", "estimators", "soft_vq", "products"):
        monkeypatch.setattr(sys.modules[f"ibqlab.quantizers.{name}"], "product_form", product_form_asked)
    nested = {"name": "grouped", "matmul": "bfloat16", "inner": {"name": "ibq", "codebook_size": 8, "code_dim": 2}}
    small = {"codebook_size": 16, "code_dim": 4}
    cases = [
        {"name": name, **small} for name in ("vq", "ibq", "soft_vq", "lfq", "gumbel", "diveq", "sf_diveq", "vq_cosine")
    ]
    for case in [*cases, nested]:
        quantizer = build_quantizer(**{"matmul": "bfloat16", **case})
        asked.clear()
        features = torch.randn(2, quantizer.config.code_dim, 3, 3, requires_grad=True)
        out = quantizer(features)
        (out.loss + out.quantized.sum()).backward()
        quantizer.eval()(features)
        assert asked or case["name"] == "gumbel"
        assert set(asked) <= {"bfloat16"}, case


def test_the_setting_is_checked_and_older_hashes_stay():
    with pytest.raises(ValueError, match="matmul must be one of"):
        quantizer_config({"name": "ibq", "matmul": "fp32"})
    older = {"name": "ibq", "codebook_size": 16}
    assert content_hash(older) == content_hash({**older, "matmul": "float32"})
    assert content_hash(older) != content_hash({**older, "matmul": "tf32"})
    assert quantizer_config({"name": "grouped", "inner": {"name": "vq", "matmul": "tf32"}}).matmul == "tf32"


class Peak(TorchDispatchMode):
    """Bytes of all storages that operations made and that live at one time; inputs are not counted."""

    def __init__(self, *inputs):
        super().__init__()
        self.live, self.peak = 0, 0
        self.known = {value.untyped_storage()._cdata for value in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage):
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, name, size):
        self.known.discard(name)
        self.live -= size


class NotLaunched:
    """A kernel whose tensors have no numbers."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def test_memory_at_full_size_is_a_twentieth_of_the_published_forms(monkeypatch):
    """N = 4,096, K = 262,144, D = 256 as on a GPU, in tensors that are shapes alone. Published form: 30,070 MB."""
    emulate(monkeypatch, parts=True)
    for module in (blocks, products, sys.modules["ibqlab.quantizers.index_backprop_rows"]):
        monkeypatch.setattr(module, "row_kernels_for", lambda scores: row_kernels)
    for kernel in ("parts_of_matrix", "span_statistics", "join_spans", "share_sums", "row_products", "score_gradient"):
        monkeypatch.setattr(row_kernels, kernel, NotLaunched())
    # A GPU multiplies bfloat16 into float32 as it is, without the copies that another device needs.
    monkeypatch.setattr(products, "product", lambda left, right, out: out)
    monkeypatch.setattr(products, "add_product", lambda total, left, right: total)
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", blocks.BLOCK_BYTES["cuda"])
    monkeypatch.setattr(blocks, "rows_per_tile", len)
    features = torch.empty(4096, 256, device="meta", requires_grad=True)
    codebook = torch.empty(262144, 256, device="meta", requires_grad=True)
    pull = torch.empty(4096, 256, device="meta")
    with Peak(features, codebook, pull) as peak:
        out = index_backprop(features, codebook)
        loss = (out.quantized * pull).sum() + out.sample_entropy - out.average_entropy
        torch.autograd.grad(loss, (features, codebook))
    assert 1.3e9 < peak.peak < 30_070e6 / 20


def test_threads_share_the_switches_and_the_last_one_puts_them_back():
    from ibqlab.quantizers.precision import float32_products  # noqa: PLC0415

    torch.set_float32_matmul_precision("high")
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with float32_products():
            inside.set()
            leave.wait()
            seen.append(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=other)
    try:
        thread.start()
        inside.wait()
        with float32_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "highest"  # the other thread is inside
        waiting = threading.Thread(target=lambda: seen.append(enter("tf32")))
        waiting.start()
        leave.set()
        thread.join()
        waiting.join()
        assert seen == ["highest", "high"]
        assert torch.get_float32_matmul_precision() == "high"
        with float32_products(), pytest.raises(RuntimeError, match="leave that one first"), float32_products("tf32"):
            pass
    finally:
        leave.set()
        torch.set_float32_matmul_precision("highest")


def enter(precision):
    from ibqlab.quantizers.precision import float32_products  # noqa: PLC0415

    with float32_products(precision):
        return torch.get_float32_matmul_precision()


def test_forms_of_other_types_leave_the_switches_alone(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", None)  # cannot be called
    with products.multiplying(PARTS, torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
