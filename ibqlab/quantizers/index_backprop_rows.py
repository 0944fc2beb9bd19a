"""What index backpropagation does to one block of scores: statistics going forward, gradient of the scores coming back.

Two forms of the same sums, because the two kinds of device want opposite things. On a CPU, in-place operations over
tiles that fit the cache (`IN_PLACE`); they are also what runs on CUDA without Triton, and for float64. On CUDA, Triton
kernels that read each score once per pass (`kernel_functions`).

With S a row of scores, m its maximum, T = (S − m)/τ: p = softmax(S), q = softmax(T). Scores are taken relative to m
throughout, since τ would multiply the rounding of |S|.
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.quantizers.blocks import best_codes, columns_near_top, lowest_exponent, rows_per_tile, softmax_backward
from ibqlab.quantizers.products import ProductForm, in_panels, row_kernels_for


class RowStatistics(NamedTuple):
    """All that the forward pass keeps of a block of scores, token by token."""

    indices: Int[Tensor, " R"]
    """The best codes."""
    top: Float[Tensor, "R 1"]
    """m, their scores."""
    log_sum: Float[Tensor, "R 1"] | None
    """ln Σ_k exp(S_k − m); None where the backward pass does without."""
    tempered_log_sum: Float[Tensor, "R 1"] | None
    """ln Σ_k exp(T_k); None without a temperature."""
    entropy: Float[Tensor, "R 1"] | None
    """Entropy of q, nats; None without a temperature."""


class EntropyGradient(NamedTuple):
    """The entropies' gradient at the scores: ∂(a H̄ + b Ĥ)/∂S = q ⊙ (u − ⟨q, u⟩) with u = by_code + slope·(S − m)."""

    by_code: Float[Tensor, " K"]
    """−b (ln(q̄ + ε) + q̄/(q̄ + ε)) / (τN), code by code."""
    slope: Float[Tensor, ""]
    """−a / (τ²N)."""
    temperature: float
    """τ."""


class BlockFunctions(NamedTuple):
    """One form of the work on a block."""

    statistics: Callable[..., RowStatistics]
    """(scores (R, K), temperature, average (K,)) → statistics; the sum of q over the rows is added to `average`."""
    changes: Callable[..., Iterator[tuple[slice, Tensor]]]
    """(scores, gains, statistics, entropies, form=, panels=) → ∂L/∂S panel by panel, in the form's parts. Scores and
    gains may be overwritten."""


def statistics_in_place(
    scores: Float[Tensor, "R K"], temperature: float | None, average: Float[Tensor, " K"]
) -> RowStatistics:
    """Statistics of a block; the sum of its q is added to `average`, and the scores are overwritten.

    Entropies cost a few passes over all scores only where many codes are near the best one. At τ = 0.01 a code that is
    0.61 below it has a share of e^−61 in q, which counts as nothing (`lowest_exponent`), so they are computed on the
    chunks of codes that reach that near, and tile by tile on all codes where these are too many.
    """
    top, indices = best_codes(scores)
    if temperature is None:
        return RowStatistics(indices, top, None, None, None)
    columns = columns_near_top(scores, top, _reach(scores, temperature))
    if columns is not None:
        near = scores.gather(1, columns).sub_(top)  # (R, some), at most a quarter of K
        weights, total, entropy = _tempered_weights(near, temperature, torch.empty_like(near))
        # A code may be near the best one of several rows; index_add_ sums them, plain indexing would keep one.
        average.index_add_(0, columns.flatten(), weights.div_(total).flatten())
        return RowStatistics(indices, top, None, total.log(), entropy)
    scratch = torch.empty_like(scores[: rows_per_tile(scores)])  # (tile, K), used again by every tile
    log_sums, entropies = [], []
    for start in range(0, len(scores), len(scratch)):
        rows = slice(start, start + len(scratch))
        tile = scores[rows].sub_(top[rows])
        weights, total, entropy = _tempered_weights(tile, temperature, scratch[: len(tile)])
        # Σ_n weights_n / total_n over the tile's rows as a product with a vector: q itself is never stored.
        average.addmv_(weights.T, 1 / total[:, 0])
        log_sums.append(total.log_())
        entropies.append(entropy)
    return RowStatistics(indices, top, None, torch.cat(log_sums), torch.cat(entropies))


def score_gradient_in_place(
    scores: Float[Tensor, "R K"],
    gains: Float[Tensor, "R K"] | None,
    statistics: RowStatistics,
    entropies: EntropyGradient | None,
) -> Float[Tensor, "R K"]:
    """∂L/∂S of a block, written over the gains where there are any and over the scores elsewhere.

    Args:
        scores: S, overwritten.
        gains: G = g·Cᵀ, what each code would bring each token; None where z_q has no gradient.
        statistics: of the forward pass.
        entropies: their gradient; None where they have none. Gains or entropies have one.
    """
    columns = columns_near_top(scores, statistics.top, _reach(scores, entropies.temperature)) if entropies else None
    if columns is not None:
        # Before the tiles overwrite the scores. The other columns' shares of q count as nothing.
        near = scores.gather(1, columns).sub_(statistics.top)  # (R, some)
        near_entropies = entropies._replace(by_code=entropies.by_code[columns])
        workspaces = [torch.empty_like(near) for _ in range(2)]
        near_gradient = _entropy_score_gradient(near, statistics.tempered_log_sum, near_entropies, workspaces)
    on_all_codes = entropies is not None and columns is None
    tile_rows = rows_per_tile(scores)
    scratch = [torch.empty_like(scores[:tile_rows]) for _ in range(2 if on_all_codes else 0)]
    for start in range(0, len(scores), tile_rows):
        rows = slice(start, start + tile_rows)
        tile = scores[rows].sub_(statistics.top[rows])
        if on_all_codes:
            workspaces = [work[: len(tile)] for work in scratch]
            change = _entropy_score_gradient(tile, statistics.tempered_log_sum[rows], entropies, workspaces)
        if gains is not None:
            # p again, in place of the scores; cheaper than having stored (N, K) of it.
            shares = torch.softmax(tile.clamp_(min=lowest_exponent(tile.dtype)), 1, out=tile)
            softmax_backward(gains[rows], shares)
            if on_all_codes:
                gains[rows].add_(change)
        elif on_all_codes:
            tile.copy_(change)
    if columns is None:
        return scores if gains is None else gains
    return (scores.zero_() if gains is None else gains).scatter_add_(1, columns, near_gradient)


def _changes_in_place(
    scores: Tensor,
    gains: Tensor | None,
    statistics: RowStatistics,
    entropies: EntropyGradient | None,
    *,
    form: ProductForm,
    panels: list[slice],
) -> Iterator[tuple[slice, Tensor]]:
    yield from in_panels(form, score_gradient_in_place(scores, gains, statistics, entropies), panels)


IN_PLACE = BlockFunctions(statistics_in_place, _changes_in_place)


def _tempered_weights(
    relative: Float[Tensor, "r k"], temperature: float, out: Float[Tensor, "r k"]
) -> tuple[Float[Tensor, "r k"], Float[Tensor, "r 1"], Float[Tensor, "r 1"]]:
    """exp T into `out`, its sum over codes and the entropy of q, from S − m, which is overwritten."""
    exponents = relative.mul_(1 / temperature).clamp_(min=lowest_exponent(relative.dtype))
    weights = torch.exp(exponents, out=out)
    total = weights.sum(1, keepdim=True)
    # H(q) = ln Σ exp T − ⟨q, T⟩; no logarithm of single shares, which may be 0.
    return weights, total, total.log() - exponents.mul_(weights).sum(1, keepdim=True) / total


def _entropy_score_gradient(
    relative: Float[Tensor, "r k"],
    log_sum: Float[Tensor, "r 1"],
    entropies: EntropyGradient,
    workspaces: list[Float[Tensor, "r k"]],
) -> Float[Tensor, "r k"]:
    """The entropies' part of ∂L/∂S from S − m, in the second workspace; `by_code` is that of the columns."""
    shares, gradient = workspaces
    torch.mul(relative, entropies.slope, out=gradient).add_(entropies.by_code)  # u
    torch.clamp(relative, min=-_reach(relative, entropies.temperature), out=shares)
    torch.add(-log_sum, shares, alpha=1 / entropies.temperature, out=shares).exp_()  # q = exp(T − ln Σ exp T)
    softmax_backward(gradient, shares)
    return gradient


def _reach(scores: Tensor, temperature: float) -> float:
    """How far below the best score a score has a share in q that counts."""
    return -lowest_exponent(scores.dtype) * temperature


def block_functions(like: Tensor) -> BlockFunctions:
    """How blocks of scores of this type and device are worked on."""
    kernels = row_kernels_for(like)
    return IN_PLACE if kernels is None else kernel_functions(kernels)


def kernel_functions(kernels: ModuleType) -> BlockFunctions:
    """The form of `row_kernels`, the module given."""
    return BlockFunctions(partial(_statistics, kernels), partial(_changes, kernels))


def _statistics(kernels: ModuleType, scores: Tensor, temperature: float | None, average: Tensor) -> RowStatistics:
    indices, (top, log_sum, tempered_log_sum, entropy), _ = kernels.row_statistics(scores, temperature, average)
    if temperature is None:
        return RowStatistics(indices, top[:, None], log_sum[:, None], None, None)
    return RowStatistics(indices, top[:, None], log_sum[:, None], tempered_log_sum[:, None], entropy[:, None])


def _changes(
    kernels: ModuleType,
    scores: Tensor,
    gains: Tensor | None,
    statistics: RowStatistics,
    entropies: EntropyGradient | None,
    *,
    form: ProductForm,
    panels: list[slice],
) -> Iterator[tuple[slice, Tensor]]:
    of_rows, target = (statistics.top, statistics.log_sum, statistics.tempered_log_sum), (form.dtype, form.parts)
    return kernels.change_in_panels(scores, gains, of_rows, entropies, target=target, panels=panels)
