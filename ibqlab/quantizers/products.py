"""How two float matrices are multiplied, chosen by what is promised about the result rather than by a kernel's name.

A GPU multiplies float32 on its ordinary cores, an order of magnitude slower than bfloat16 on its tensor cores. But a
float32 number is the sum of three bfloat16 numbers, 24 bits in all, and the product of two bfloat16 numbers is exact in
float32. So both operands are written as three parts, and the six largest of the nine products of parts are laid side by
side along the dimension that is summed over: one product of six times the width, as near to float64 as IEEE float32.

Small products come first, so that the sum is still small while they are added: with the largest first every one of the
6·D additions rounds at the size of the result, and the error is 2.5 times IEEE float32's instead of 0.6 times.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibqlab.base.checks import require_choice
from ibqlab.base.kernels import has_bfloat16, kernels_run_on
from ibqlab.quantizers.compiling import never_compiled
from ibqlab.quantizers.precision import autocast_device, float32_products

MATMULS = ("float32", "tf32", "bfloat16")
"""What may be promised about a product: results as near to float64 as those of IEEE float32; operands rounded to TF32's
11 bits; operands rounded to bfloat16's 8 bits. Sums are float32 in all of them. A promise is a lower bound: a CPU, and
a GPU that gains nothing by rounding, keep the best one."""
LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max
PANEL_BYTES = 48 * 2**20
"""Size of a panel of codes in parts, and of the change that belongs to it: about the L2 cache of an H100 or H200 (50
MB). What is made there is read again before it leaves the cache, and 16,384 codes of D = 256 are still enough for one
product to take longer than it takes to launch."""


class ProductForm(NamedTuple):
    """What matrices a library is given in place of two float matrices."""

    dtype: torch.dtype
    """Their type."""
    parts: int = 1
    """Numbers that stand for each number of an operand."""
    tf32: bool = False
    """Whether float32 may be rounded to TF32."""

    @property
    def segments(self) -> int:
        """How many products of parts are summed: 1 of 1, 6 of 9."""
        return self.parts * (self.parts + 1) // 2

    @property
    def left(self) -> tuple[int, ...]:
        """The part of the left operand in each segment; small products first."""
        return (2, 1, 0, 1, 0, 0) if self.parts == 3 else (0,)

    @property
    def right(self) -> tuple[int, ...]:
        """The part of the right operand in each segment. The first ones are all its parts, the largest first."""
        return (0, 1, 2, 0, 1, 0) if self.parts == 3 else (0,)

    @property
    def change(self) -> tuple[int, ...]:
        """The parts of a gradient, one above the other, the smallest first."""
        return tuple(reversed(range(self.parts)))

    @property
    def against_change(self) -> tuple[int, ...]:
        """The parts of what a transposed gradient is multiplied with, one above the other: part j of it once for each
        of the P − j largest parts of the gradient."""
        return (2, 1, 1, 0, 0, 0) if self.parts == 3 else (0,)


def product_form(dtype: torch.dtype, device: torch.device, matmul: str = "float32") -> ProductForm:
    """The fastest form on a device that keeps a promise.

    Args:
        dtype: of the operands. Half types and float64 are multiplied as they are.
        device: where they lie.
        matmul: one of `MATMULS`.
    Raises:
        ValueError: another promise.
    """
    require_choice("matmul", matmul, MATMULS)
    if dtype != torch.float32 or device.type != "cuda":
        return ProductForm(dtype)
    if matmul == "tf32":
        return ProductForm(dtype, tf32=True)
    if not has_bfloat16(device):
        return ProductForm(dtype)
    return ProductForm(torch.bfloat16, 1 if matmul == "bfloat16" else 3)


def operand_type(left: Tensor, right: Tensor) -> torch.dtype:
    """The type in which two matrices are multiplied: one half type on CUDA as it is, else float32 or float64."""
    if left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16):
        return left.dtype
    return torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)


def gradient_form(form: ProductForm) -> ProductForm:
    """The form of the gradients' products: float16 would lose those below 6·10⁻⁸, bfloat16 keeps them."""
    return form._replace(dtype=torch.bfloat16) if form.dtype == torch.float16 else form


@contextmanager
def multiplying(form: ProductForm, device: torch.device) -> Iterator[None]:
    """Inside the block products are what the form says: no autocast, and float32 as exact as it promises.

    Whatever the process had chosen, through torch's older switches or its newer ones, stands again afterwards. Forms of
    other types do not depend on those switches, which are left alone then.
    """
    switches = float32_products("tf32" if form.tf32 else "ieee") if form.dtype == torch.float32 else nullcontext()
    with switches, torch.autocast(autocast_device(device), enabled=False):
        yield


def row_kernels_for(scores: Tensor) -> ModuleType | None:
    """The Triton kernels that work on rows of scores of this type and device; None where there are none."""
    if scores.dtype != torch.float32 or not kernels_run_on(scores.device):
        return None
    from ibqlab.quantizers import row_kernels  # noqa: PLC0415 - imports Triton

    return row_kernels


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left · right into `out`, whose type is that of the sums: float32 also where half types are multiplied."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if not left.is_cuda:  # which has no such product; that of the same numbers in the type of the sums is equal
        return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total ← total + left · right; types as in `product`."""
    if left.dtype == total.dtype or not left.is_cuda:
        return total.addmm_(left.to(total.dtype), right.to(total.dtype))
    return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def side_by_side(form: ProductForm, values: Float[Tensor, "R D"], order: tuple[int, ...]) -> Float[Tensor, "R SD"]:
    """The parts of a matrix beside each other, (R, S·D); the matrix itself where a form has one part."""
    if form.parts == 1:
        return values.to(form.dtype)
    return _write_parts(values, order, values.new_empty(len(values), len(order), values.shape[1], dtype=form.dtype), 1)


def stacked(form: ProductForm, values: Float[Tensor, "R D"], order: tuple[int, ...]) -> Float[Tensor, "SR D"]:
    """The parts of a matrix above each other, (S·R, D); the matrix itself where a form has one part."""
    if form.parts == 1:
        return values.to(form.dtype)
    return _write_parts(values, order, values.new_empty(len(order), *values.shape, dtype=form.dtype), 0)


def _write_parts(values: Tensor, order: tuple[int, ...], out: Tensor, axis: int) -> Tensor:
    """Part order[i] of a float32 matrix into segment i of `out`, along an axis; flattened to a matrix again.

    x = h + m + l with h = x rounded to bfloat16, m and l the same of what is left. Numbers below 10⁻³³ lose their last
    bits, because parts of them fall below bfloat16's range. A number that is not finite has a part that is not.
    """
    kernels = row_kernels_for(values)
    if kernels is None:
        # Beyond the largest bfloat16 rounding would give infinity, and the rest minus infinity.
        parts, rest = [], values
        for number in range(3):
            part = (rest if number else rest.clamp(-LARGEST_BFLOAT16, LARGEST_BFLOAT16)).to(torch.bfloat16)
            parts.append(part)
            rest = rest - part.to(values.dtype)
        for segment, number in enumerate(order):
            out.select(axis, segment).copy_(parts[number])
    else:
        kernels.write_parts(values, order, out, axis)
    return out.flatten(axis, axis + 1) if axis else out.flatten(0, 1)


class CodebookOperand:
    """A codebook as the right-hand side of products, some codes at a time.

    In parts it would be three times as large as it is in float32, so parts are made of a panel of codes at a time, for
    every block of rows again, where they do not fit `PANEL_BYTES`; that costs less than a tenth of the products.

    Args:
        codebook: C, (K, D).
        form: how it is multiplied.
    """

    def __init__(self, codebook: Float[Tensor, "K D"], form: ProductForm):
        self.form = form
        self.codes, self.dim = codebook.shape
        bytes_per_code = form.segments * self.dim * form.dtype.itemsize
        # Multiples of 1,024 codes, so that every panel's rows start at addresses that tensor cores like.
        limit = max(1024, PANEL_BYTES // bytes_per_code // 1024 * 1024)
        self.panel_codes = self.codes if form.parts == 1 else min(self.codes, limit)
        whole = self.panel_codes == self.codes
        self._codebook = codebook
        self._operand = side_by_side(form, codebook, form.right) if whole else None

    def panels(self, rows: int = 0) -> list[slice]:
        """The codebook cut into panels.

        Args:
            rows: of a gradient that is written in parts for each panel, and bounds its size, too; 0 without one.
        """
        size = self.panel_codes
        if rows and self.form.dtype.itemsize == 2:
            size = min(size, max(1024, PANEL_BYTES // (rows * self.form.parts * 2) // 1024 * 1024))
        return [slice(start, min(start + size, self.codes)) for start in range(0, self.codes, size)]

    def of(self, codes: slice, *, parts_alone: bool = False) -> Float[Tensor, "k SD"]:
        """A panel's codes as they are multiplied.

        Args:
            codes: a panel.
            parts_alone: each part once is enough.
        """
        if self._operand is not None:
            return self._operand[codes]
        order = self.form.right[: self.form.parts] if parts_alone else self.form.right
        return side_by_side(self.form, self._codebook[codes], order)

    def multiply(self, lefts: list[Float[Tensor, "R SD"]], outs: list[Float[Tensor, "R K"]]) -> None:
        """left · Cᵀ into out for each pair of a left operand (`side_by_side` in the form's order) and a result."""
        for codes in self.panels():
            right = self.of(codes).T
            for left, out in zip(lefts, outs, strict=True):
                product(left, right, out[:, codes])


class GradientProducts:
    """Both gradients of scores S = z·Cᵀ from that of S: ∂z = ∂S·C and ∂C = ∂Sᵀ·z.

    Args:
        codebook: C as an operand, in the form of the gradients' products.
        features: ∂z, (N, D), float32 or float64; None where it is not needed.
        codes: ∂C, (K, D), zeros or what came from elsewhere; None where it is not needed.
    """

    def __init__(self, codebook: CodebookOperand, features: Tensor | None, codes: Tensor | None):
        self.codebook, self.features, self.codes = codebook, features, codes

    def add(self, rows: slice, operand: Float[Tensor, "R D"], change: Iterator[tuple[slice, Tensor]]) -> None:
        """Add a block of rows.

        Args:
            rows: the block; its rows of ∂z are overwritten.
            operand: z of these rows, in its own type.
            change: panels of codes and ∂S of them, `stacked` in the form's order `change`.
        """
        form = self.codebook.form
        against = stacked(form, operand, form.against_change) if self.codes is not None else None
        for codes, part in change:
            if self.features is not None:
                right = self.codebook.of(codes, parts_alone=True)
                _times_codes(form, part, right, self.features[rows], add=codes.start > 0)
            if self.codes is not None:
                _transposed_times(form, part, against, self.codes[codes])


def _times_codes(form: ProductForm, change: Tensor, right: Tensor, out: Float[Tensor, "R D"], *, add: bool) -> None:
    """out ← ∂S·C of a panel, or out + ∂S·C."""
    if form.parts == 1:
        (add_product if add else _overwrite)(out, change, right)
        return
    count, dim = out.shape
    terms, first = out.new_empty(form.segments, count, dim), 0
    for number in form.change:  # part `number` of C with the P − number largest parts of ∂S, which stand last
        last = first + form.parts - number
        part = right[:, number * dim : (number + 1) * dim]
        product(change[number * count :], part, terms[first:last].flatten(0, 1))
        first = last
    out.add_(terms.sum(0)) if add else torch.sum(terms, 0, out=out)


def _overwrite(out: Tensor, left: Tensor, right: Tensor) -> None:
    product(left, right, out)


def _transposed_times(form: ProductForm, change: Tensor, against: Tensor, total: Float[Tensor, "k D"]) -> None:
    """total ← total + ∂Sᵀ·z of a panel."""
    count, first = len(change) // form.parts, 0
    for number in form.change:
        last = first + (form.parts - number) * count
        add_product(total, change[number * count :].T, against[first:last])
        first = last


def in_panels(
    form: ProductForm, change: Float[Tensor, "R K"], panels: list[slice]
) -> Iterator[tuple[slice, Float[Tensor, "PR k"]]]:
    """A block's gradient panel by panel, in the parts that the gradients' products read."""
    for codes in panels:
        yield codes, stacked(form, change[:, codes], form.change)


@never_compiled
def multiply(left: Float[Tensor, "M K"], right: Float[Tensor, "K N"], matmul: str = "float32") -> Float[Tensor, "M N"]:
    """left · right with a promise about its accuracy, for its gradients, too.

    Args:
        left, right: of one type and on one device.
        matmul: one of `MATMULS`.
    Raises:
        ValueError: another promise.
    Cost: 2·M·K·N operations, and their parts where the form has them: six times the operands in bfloat16.
    """
    return _Multiply.apply(left, right, product_form(left.dtype, left.device, matmul))


class _Multiply(torch.autograd.Function):
    """∂left = g · rightᵀ, ∂right = leftᵀ · g, in the form of the product itself."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, form: ProductForm) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.form = form
        return _multiplied(left, right, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        return _multiplied(grad, right.T, ctx.form), _multiplied(left.T, grad, ctx.form), None


def _multiplied(left: Tensor, right: Tensor, form: ProductForm) -> Tensor:
    with multiplying(form, left.device):
        out = left.new_empty(len(left), right.shape[1])
        return product(side_by_side(form, left, form.left), stacked(form, right, form.right), out)
