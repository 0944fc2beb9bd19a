"""Triton kernels over a block of scores (R, K): the best codes, sums over rows and columns, gradients as parts.

One program has one row and one span of columns, so that 128 rows fill a GPU, too, and each pass reads its scores once.
No two programs add into one place: partial results are stored and summed in a fixed order, and repetitions are equal in
every bit. Sizes are ordinary arguments: nothing is compiled again for another N or K, and no configuration is chosen by
the first shape. Callers ask `products.row_kernels_for`, which imports this module.

Loops are `while` loops, because the interpreter of Triton 3.6 cannot count to a number that a kernel is given.
"""
# ruff: noqa: PLR0917, PLR0124 - kernels take tensors and sizes one by one, and only NaN differs from itself

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES, WIDTH = 8, 512
"""A span is 8 tiles of 512 columns, 16 kB: a program reads it in one go, 16 numbers per thread. The maximum of each
tile is kept, and tells later which columns are too far below the best one to be read again."""
SPAN = LANES * WIDTH
GROUP = 64
"""Spans that are joined at a time, of one row by one program."""
MOST = 2**31 - 1
"""A column behind all others."""


@triton.jit
def split_number(value):
    """Three bfloat16 numbers whose sum is a float32 number to 24 bits: `products._write_parts`."""
    # Beyond the largest bfloat16 rounding would give infinity. NaN passes both comparisons by.
    within = tl.where(value > 3.3895313892515355e38, 3.3895313892515355e38, value)
    within = tl.where(within < -3.3895313892515355e38, -3.3895313892515355e38, within)
    high = within.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def parts_of_matrix(
    values, out, rows, columns, row_stride, column_stride, out_row_stride, segment_stride,
    ORDER: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A part of a float32 matrix into each segment; digit i of ORDER, from the right, is the part of segment i."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(values + row * row_stride + column.to(tl.int64) * column_stride, mask=inside, other=0.0)
    high, middle, low = split_number(value)
    place = out + row * out_row_stride + column
    for segment in tl.static_range(SEGMENTS):
        if (ORDER // 10**segment) % 10 == 0:
            tl.store(place, high, mask=inside)
        elif (ORDER // 10**segment) % 10 == 1:
            tl.store(place, middle, mask=inside)
        else:
            tl.store(place, low, mask=inside)
        place += segment_stride


@triton.jit
def span_statistics(
    scores, offset, maxima, best, sums, codes, spans, inverse_temperature,
    OFFSET: tl.constexpr, SUMS: tl.constexpr, TEMPERED: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of one span of one row: the maximum of each tile, the best column, and sums relative to the span's maximum.

    maxima (R, spans·LANES), best (R, spans), sums (3, R, spans): Σ exp(S − m), Σ exp(T), Σ T exp(T).
    """
    row, span, rows = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    columns = span * (LANES * WIDTH) + lane[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = columns < codes
    values = tl.load(scores + row * codes + columns, mask=inside, other=float("-inf"))
    if OFFSET:
        values = 2 * values + tl.load(offset + columns, mask=inside, other=0.0)
    missing = values != values
    numbers = tl.where(missing, float("-inf"), values)
    tile_top = tl.max(numbers, axis=1)
    tile_missing = tl.max(missing.to(tl.int32), axis=1)
    place = (row * spans + span) * LANES + lane
    tl.store(maxima + place, tl.where(tile_missing > 0, float("nan"), tile_top))
    top, any_missing = tl.max(tile_top, axis=0), tl.max(tile_missing, axis=0)
    # NaN before everything, else the lowest of equal maxima.
    wanted = tl.where(any_missing > 0, missing, (numbers == top) & inside)
    column = tl.min(tl.min(tl.where(wanted, columns, 2147483647), axis=1), axis=0)
    tl.store(best + row * spans + span, column)
    if SUMS:
        # A span of −∞ alone adds nothing to a row that has a number elsewhere.
        relative = values - tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.sum(tl.where(inside, tl.exp(relative), 0.0), axis=1), axis=0)
        place = row * spans + span
        tl.store(sums + place, total)
        if TEMPERED:
            exponents = relative * inverse_temperature
            weights = tl.where(inside, tl.exp(exponents), 0.0)
            products = tl.where(weights == 0, 0.0, weights * exponents)  # 0·∞ would be NaN
            tl.store(sums + rows * spans + place, tl.sum(tl.sum(weights, axis=1), axis=0))
            tl.store(sums + 2 * rows * spans + place, tl.sum(tl.sum(products, axis=1), axis=0))


@triton.jit
def join_spans(
    maxima, best, sums, indices, statistics, spans, inverse_temperature,
    SUMS: tl.constexpr, TEMPERED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of one row, its spans together: indices (R), statistics (4, R): m, ln Σ exp(S − m), ln Σ exp T, entropy of q."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    lane = tl.arange(0, LANES)[None, :]
    top, index, missing = float("-inf"), 2147483647, 0
    start = 0
    while start < spans:
        span = start + tl.arange(0, GROUP)
        present = span < spans
        tiles = (row * spans + span)[:, None] * LANES + lane
        values = tl.load(maxima + tiles, mask=present[:, None], other=float("-inf"))
        span_missing = tl.max((values != values).to(tl.int32), axis=1)
        span_top = tl.max(tl.where(values != values, float("-inf"), values), axis=1)
        column = tl.load(best + row * spans + span, mask=present, other=2147483647)
        group_missing, group_top = tl.max(span_missing, axis=0), tl.max(span_top, axis=0)
        first_missing = tl.min(tl.where(span_missing > 0, column, 2147483647), axis=0)
        first_top = tl.min(tl.where(span_top == group_top, column, 2147483647), axis=0)
        # Groups come in order, so that an equal maximum behind the first changes nothing.
        better = (missing == 0) & ((group_missing > 0) | (group_top > top) | (index == 2147483647))
        index = tl.where(better, tl.where(group_missing > 0, first_missing, first_top), index)
        top = tl.maximum(top, group_top)
        missing = tl.maximum(missing, group_missing)
        start += GROUP
    top = tl.where(missing > 0, float("nan"), top)
    tl.store(indices + row, index.to(tl.int64))
    tl.store(statistics + row, top)
    if SUMS:
        total, tempered, weighted = 0.0, 0.0, 0.0
        start = 0
        while start < spans:
            span = start + tl.arange(0, GROUP)
            present = span < spans
            tiles = (row * spans + span)[:, None] * LANES + lane
            values = tl.load(maxima + tiles, mask=present[:, None], other=float("-inf"))
            shift = tl.max(values, axis=1) - top  # ≤ 0
            place = row * spans + span
            factor = tl.where(present, tl.exp(shift), 0.0)
            total += tl.sum(factor * tl.load(sums + place, mask=present, other=0.0), axis=0)
            if TEMPERED:
                shift = shift * inverse_temperature
                factor = tl.where(present, tl.exp(shift), 0.0)
                weights = tl.load(sums + rows * spans + place, mask=present, other=0.0)
                products = tl.load(sums + 2 * rows * spans + place, mask=present, other=0.0)
                tempered += tl.sum(factor * weights, axis=0)
                # T counts from the row's maximum now: Σ (T + shift) exp(T + shift).
                moved = tl.where(factor == 0, 0.0, factor * (products + shift * weights))
                weighted += tl.sum(moved, axis=0)
            start += GROUP
        # Infinity as the maximum leaves no shares, as NaN does.
        nothing = (top - top) * 0.0
        tl.store(statistics + rows + row, tl.log(total) + nothing)
        if TEMPERED:
            tl.store(statistics + 2 * rows + row, tl.log(tempered) + nothing)
            tl.store(statistics + 3 * rows + row, tl.log(tempered) - weighted / tempered + nothing)


@triton.jit
def share_sums(
    scores, maxima, top, log_sum, sums, rows, codes, tiles, group_rows, inverse_temperature, reach,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sums (groups, K): Σ q over a group of rows, of which only those are read whose tile comes near their maximum."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < codes
    tile, group = tl.program_id(0) * COLUMNS // WIDTH, tl.program_id(1)
    last = tl.minimum(rows, (group + 1) * group_rows)
    total = tl.zeros((COLUMNS,), tl.float32)
    start = group * group_rows
    while start < last:
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        present = row < last
        row_top = tl.load(top + row, mask=present, other=0.0)
        tile_top = tl.load(maxima + row * tiles + tile, mask=present, other=0.0)
        # A row that is not finite counts everywhere, because its shares are NaN.
        near = present & ((tile_top >= row_top - reach) | (row_top - row_top != 0))
        if tl.max(near.to(tl.int32), axis=0) > 0:
            mask = near[:, None] & inside[None, :]
            values = tl.load(scores + row[:, None] * codes + columns[None, :], mask=mask, other=0.0)
            row_log_sum = tl.load(log_sum + row, mask=present, other=0.0)
            exponents = (values - row_top[:, None]) * inverse_temperature - row_log_sum[:, None]
            total += tl.sum(tl.where(mask, tl.exp(exponents), 0.0), axis=0)
        start += ROWS
    tl.store(sums + group.to(tl.int64) * codes + columns, total, mask=inside)


@triton.jit
def row_products(
    scores, gains, top, log_sum, tempered_log_sum, by_code, slope, partial, codes, spans, inverse_temperature,
    GAINS: tl.constexpr, ENTROPIES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Of one span of one row ⟨p, G⟩ and ⟨q, u⟩: partial (2, R, spans)."""
    row, span, rows = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0).to(tl.int64)
    columns = span * SPAN + tl.arange(0, SPAN)
    inside = columns < codes
    relative = tl.where(
        inside, tl.load(scores + row * codes + columns, mask=inside, other=0.0) - tl.load(top + row), 0.0
    )
    place = partial + row * spans + span
    if GAINS:
        shares = tl.exp(relative - tl.load(log_sum + row))
        gain = tl.load(gains + row * codes + columns, mask=inside, other=0.0)
        tl.store(place, tl.sum(tl.where(inside, shares * gain, 0.0), axis=0))
    if ENTROPIES:
        shares = tl.exp(relative * inverse_temperature - tl.load(tempered_log_sum + row))
        term = tl.load(by_code + columns, mask=inside, other=0.0) + tl.load(slope) * relative
        tl.store(place + rows * spans, tl.sum(tl.where(inside, shares * term, 0.0), axis=0))


@triton.jit
def score_gradient(
    scores, gains, top, log_sum, tempered_log_sum, by_code, slope, dots, out, codes, first, count, inverse_temperature,
    GAINS: tl.constexpr, ENTROPIES: tl.constexpr, PARTS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """∂L/∂S of one row at `count` codes from `first` on, in parts for the next products: out (PARTS, R, k)."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    place = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    inside, columns = place < count, first + place
    relative = tl.where(
        inside, tl.load(scores + row * codes + columns, mask=inside, other=0.0) - tl.load(top + row), 0.0
    )
    value = tl.zeros((SPAN,), tl.float32)
    if ENTROPIES:
        shares = tl.exp(relative * inverse_temperature - tl.load(tempered_log_sum + row))
        term = tl.load(by_code + columns, mask=inside, other=0.0) + tl.load(slope) * relative
        value += shares * (term - tl.load(dots + rows + row))
    if GAINS:
        shares = tl.exp(relative - tl.load(log_sum + row))
        gain = tl.load(gains + row * codes + columns, mask=inside, other=0.0)
        value += shares * (gain - tl.load(dots + row))
    target = out + row * count + place
    if PARTS == 1:
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)
    else:
        high, middle, low = split_number(value)
        tl.store(target, low, mask=inside)
        tl.store(target + rows * count, middle, mask=inside)
        tl.store(target + 2 * rows * count, high, mask=inside)


def _on(tensor: Tensor) -> Any:
    """Kernels start on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def write_parts(values: Tensor, order: tuple[int, ...], out: Tensor, axis: int) -> None:
    """Part order[i] of a float32 matrix into segment i of `out`: (R, S, D) for axis 1, (S, R, D) for axis 0."""
    rows, columns = values.shape
    code = sum(part * 10**segment for segment, part in enumerate(order))
    grid = (triton.cdiv(rows, 8), triton.cdiv(columns, 128))
    with _on(values):
        parts_of_matrix[grid](
            values, out, rows, columns, *values.stride(), out.stride(1 - axis), out.stride(axis),
            ORDER=code, SEGMENTS=len(order), ROWS=8, COLUMNS=128, num_warps=4,
        )  # fmt: skip


def _statistics(
    scores: Tensor, offset: Tensor | None, temperature: float | None, *, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (R,), statistics (4, R) and maxima of tiles (R, tiles)."""
    rows, codes = scores.shape
    spans, inverse = triton.cdiv(codes, SPAN), 1.0 / temperature if temperature else 1.0
    maxima = scores.new_empty(rows, spans * LANES)
    best = torch.empty(rows, spans, dtype=torch.int32, device=scores.device)
    partial = scores.new_empty(3, rows, spans) if sums else scores
    indices = torch.empty(rows, dtype=torch.int64, device=scores.device)
    statistics = scores.new_empty(4, rows)
    wanted = {"SUMS": sums, "TEMPERED": temperature is not None}
    with _on(scores):
        span_statistics[(rows, spans)](
            scores, scores if offset is None else offset, maxima, best, partial, codes, spans, inverse,
            OFFSET=offset is not None, **wanted, LANES=LANES, WIDTH=WIDTH, num_warps=8,
        )  # fmt: skip
        join_spans[(rows,)](
            maxima, best, partial, indices, statistics, spans, inverse, **wanted, LANES=LANES, GROUP=GROUP, num_warps=1
        )
    return indices, statistics, maxima


def best_codes(scores: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Largest of S, or of 2 S + offset, in each row (R, 1), and its column (R,); as `blocks.best_codes`."""
    indices, statistics, _ = _statistics(scores, offset, None, sums=False)
    return statistics[0, :, None], indices


def row_statistics(scores: Tensor, temperature: float | None, average: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (R,), statistics (4, R) and maxima; the sum of q over the rows is added to `average` (K,).

    Statistics: the maximum m, ln Σ exp(S − m), and with a temperature ln Σ exp T and the entropy of q.
    """
    indices, statistics, maxima = _statistics(scores, None, temperature, sums=True)
    if temperature is None:
        return indices, statistics, maxima
    (rows, codes), columns = scores.shape, 128
    blocks = triton.cdiv(codes, columns)
    # Enough programs for every processor of a large GPU, at least 32 rows to each.
    groups = max(1, min(triton.cdiv(1024, blocks), triton.cdiv(rows, 32)))
    sums = scores.new_empty(groups, codes)
    with _on(scores):
        share_sums[(blocks, groups)](
            scores, maxima, statistics[0], statistics[2], sums, rows, codes, maxima.shape[1],
            triton.cdiv(rows, groups), 1.0 / temperature, 61.0 * temperature,
            ROWS=32, COLUMNS=columns, WIDTH=WIDTH, num_warps=8,
        )  # fmt: skip
    average.add_(sums.sum(0))
    return indices, statistics, maxima


def change_in_panels(
    scores: Tensor,
    gains: Tensor | None,
    statistics: tuple[Tensor, Tensor | None, Tensor | None],
    entropies: tuple[Tensor, Tensor, float] | None,
    *,
    target: tuple[torch.dtype, int],
    panels: list[slice],
) -> Iterator[tuple[slice, Tensor]]:
    """∂L/∂S of a block, panel by panel.

    Args:
        scores, gains: (R, K); one of them is overwritten where the result is float32 and one panel.
        statistics: the maximum, ln Σ exp(S − m) and ln Σ exp T, (R, 1) each; the last two where they are needed.
        entropies: u's part by code (K,), its slope () and the temperature; None where they have no gradient.
        target: type and number of parts of the result.
        panels: of codes.
    """
    (rows, codes), (dtype, parts) = scores.shape, target
    top, log_sum, tempered_log_sum = (scores if value is None else value for value in statistics)
    by_code, slope, temperature = entropies or (scores, scores, 1.0)
    spans = triton.cdiv(codes, SPAN)
    partial = scores.new_zeros(2, rows, spans)
    inputs = scores, scores if gains is None else gains, top, log_sum, tempered_log_sum, by_code, slope
    wanted = {"GAINS": gains is not None, "ENTROPIES": entropies is not None}
    with _on(scores):
        row_products[(rows, spans)](*inputs, partial, codes, spans, 1.0 / temperature, **wanted, SPAN=SPAN, num_warps=8)
    dots = partial.sum(2)  # (2, R)
    in_place = dtype == torch.float32 and len(panels) == 1
    widest = max(panel.stop - panel.start for panel in panels)
    memory = inputs[1] if in_place else scores.new_empty(parts * rows * widest, dtype=dtype)
    for panel in panels:
        count = panel.stop - panel.start
        out = memory.view(-1)[: parts * rows * count].view(parts * rows, count)
        with _on(scores):
            score_gradient[(rows, triton.cdiv(count, 1024))](
                *inputs, dots, out, codes, panel.start, count, 1.0 / temperature,
                **wanted, PARTS=parts, SPAN=1024, num_warps=4,
            )  # fmt: skip
        yield panel, out
