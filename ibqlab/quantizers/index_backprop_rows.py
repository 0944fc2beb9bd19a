"""What index backpropagation does to one block of scores: statistics going forward, gradient of the scores coming back.

Written twice, because the two kinds of device want opposite things. `InPlace`, for the CPU: a chain of vectorised
in-place operations over tiles that fit the cache. `Fused`, for CUDA and for a codebook split over processes: plain
expressions without side effects, of which torch.compile makes one kernel for each direction.

With S a row of scores, m its maximum, T = (S − m)/τ: p = softmax(S), q = softmax(T). Scores are taken relative to m
throughout, since τ would multiply the rounding of |S|.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.quantizers.blocks import best_codes, columns_near_top, rows_per_tile


class Rows(NamedTuple):
    """What the forward pass finds in a block of scores, token by token."""

    indices: Int[Tensor, " R"]
    """The best codes."""
    top: Float[Tensor, "R 1"]
    """m, their scores."""
    log_sum: Float[Tensor, "R 1"] | None
    """ln Σ_k exp(S_k − m); None where the backward pass does without."""
    log_sum_cold: Float[Tensor, "R 1"] | None
    """ln Σ_k exp(T_k); None without a temperature."""
    entropy: Float[Tensor, "R 1"] | None
    """Entropy of q, nats; None without a temperature."""


class Pull(NamedTuple):
    """How the entropies pull on the scores: ∂(a H̄ + b Ĥ)/∂S = q ⊙ (u − ⟨q, u⟩) with u = codes + scores·(S − m)."""

    codes: Float[Tensor, " K"]
    """−b (ln(q̄ + ε) + q̄/(q̄ + ε)) / (τN), code by code."""
    scores: Float[Tensor, ""]
    """−a / (τ²N)."""
    temperature: float
    """τ."""


def lowest_exponent(dtype: torch.dtype) -> float:
    """The exponent below which a share counts as e^that: −61 for float32, where shares end at e^−87.

    Smaller shares, and their products with small gradients, would be denormal numbers, with which a CPU computes up to
    sixty times slower. K shares of e^−61 add up to 10⁻²¹ for K = 262,144, far below the type's rounding.
    """
    return 0.7 * math.log(torch.finfo(dtype).tiny)


@runtime_checkable
class Split(Protocol):
    """How codes on other processes come in; see `code_parallel.SplitCodebook`."""

    size: int
    """K, codes on all processes."""
    largest: int
    """Codes on the process that has most: what all processes cut their blocks for."""

    def best(self, scores: Float[Tensor, "R K"]) -> tuple[Float[Tensor, "R 1"], Int[Tensor, " R"]]:
        """`best_codes` over all processes, indices counted across them."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """Sum over all processes."""
        ...

    def own(self, indices: Int[Tensor, " N"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Which tokens chose a code of this process, and which of its codes."""
        ...

    def take(self, codes: Float[Tensor, "part D"], indices: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """The chosen codes, wherever they are."""
        ...


class InPlace:
    """Operations that write over what is no longer needed.

    Entropies cost a few passes over all scores only where many codes are near the best one. At τ = 0.01 a code that is
    0.61 below it has a share of e^−61 in q, which counts as nothing (`lowest_exponent`), so they are worked out on the
    chunks of codes that reach that near, and tile by tile on all codes where these are too many.
    """

    @staticmethod
    def forward(scores: Float[Tensor, "R K"], temperature: float | None, average: Float[Tensor, " K"]) -> Rows:
        """Statistics of a block; the sum of its q is added to `average`, the scores are used up."""
        top, indices = best_codes(scores)
        if temperature is None:
            return Rows(indices, top, None, None, None)
        columns = columns_near_top(scores, top, _reach(scores, temperature))
        if columns is not None:
            near = scores.gather(1, columns).sub_(top)
            weights, total, entropy = InPlace._cool(near, temperature, torch.empty_like(near))
            average.index_add_(0, columns.flatten(), weights.div_(total).flatten())
            return Rows(indices, top, None, total.log(), entropy)
        scratch, found = torch.empty_like(scores[: rows_per_tile(scores)]), []
        for start in range(0, len(scores), len(scratch)):
            part = slice(start, start + len(scratch))
            tile = scores[part].sub_(top[part])
            weights, total, entropy = InPlace._cool(tile, temperature, scratch[: len(tile)])
            average.addmv_(weights.T, 1 / total[:, 0])
            found.append((total.log_(), entropy))
        return Rows(indices, top, None, *(torch.cat(parts) for parts in zip(*found, strict=True)))

    @staticmethod
    def backward(
        scores: Float[Tensor, "R K"],
        gains: Float[Tensor, "R K"] | None,
        rows: Rows,
        pull: Pull | None,
        into: torch.dtype,
    ) -> Float[Tensor, "R K"]:
        """∂L/∂S of a block, written over the gains where there are any and over the scores elsewhere.

        Args:
            scores: S, used up.
            gains: G = g·Cᵀ, what each code would bring each token; None where z_q has no gradient.
            rows: of the forward pass.
            pull: of the entropies; None where they have no gradient. Gains or pull are there.
            into: type of the result, that of the scores.
        """
        columns = columns_near_top(scores, rows.top, _reach(scores, pull.temperature)) if pull else None
        if columns is not None:
            near = scores.gather(1, columns).sub_(rows.top)
            there = pull._replace(codes=pull.codes[columns])
            pulled_near = InPlace._pull(near, rows.log_sum_cold, there, [torch.empty_like(near) for _ in range(2)])
        count = rows_per_tile(scores)
        scratch = [torch.empty_like(scores[:count]) for _ in range(2 if pull and columns is None else 0)]
        for start in range(0, len(scores), count):
            part = slice(start, start + count)
            tile = scores[part].sub_(rows.top[part])
            if scratch:
                pulled = InPlace._pull(tile, rows.log_sum_cold[part], pull, [work[: len(tile)] for work in scratch])
            if gains is not None:
                shares = torch.softmax(tile.clamp_(min=lowest_exponent(tile.dtype)), 1, out=tile)
                softmax_backward(gains[part], shares)
                if scratch:
                    gains[part].add_(pulled)
            elif scratch:
                tile.copy_(pulled)
        if columns is None:
            return scores if gains is None else gains
        return (scores.zero_() if gains is None else gains).scatter_add_(1, columns, pulled_near)

    @staticmethod
    def _cool(relative: Float[Tensor, "r k"], temperature: float, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """exp T into `out`, its sum over codes and the entropy of q, from S − m, which is used up."""
        exponents = relative.mul_(1 / temperature).clamp_(min=lowest_exponent(relative.dtype))
        weights = torch.exp(exponents, out=out)
        total = weights.sum(1, keepdim=True)
        return weights, total, total.log() - exponents.mul_(weights).sum(1, keepdim=True) / total

    @staticmethod
    def _pull(relative: Float[Tensor, "r k"], log_sum: Float[Tensor, "r 1"], pull: Pull, out: list[Tensor]) -> Tensor:
        """The entropies' part of ∂L/∂S from S − m, into the second of `out`; `pull.codes` are those of the columns."""
        shares, pulled = out
        torch.mul(relative, pull.scores, out=pulled).add_(pull.codes)
        torch.clamp(relative, min=-_reach(relative, pull.temperature), out=shares)
        torch.add(-log_sum, shares, alpha=1 / pull.temperature, out=shares).exp_()
        softmax_backward(pulled, shares)
        return pulled


def _reach(scores: Tensor, temperature: float) -> float:
    """How far below the best score a score has a share in q that counts."""
    return -lowest_exponent(scores.dtype) * temperature


def softmax_backward(gradient: Float[Tensor, "R K"], shares: Float[Tensor, "R K"]) -> None:
    """gradient ← shares ⊙ (gradient − ⟨shares, gradient⟩), PyTorch's own fused kernel."""
    torch.ops.aten._softmax_backward_data.out(gradient, shares, 1, shares.dtype, grad_input=gradient)


class Fused:
    """The same as expressions.

    Args:
        split: None where all codes are here.
        compiled: make kernels of the expressions.
    """

    def __init__(self, split: Split | None = None, compiled: bool = False):
        def prepare(function: Callable) -> Callable:
            return torch.compile(function, dynamic=True) if compiled else function

        self._split = split
        self._describe, self._differentiate = prepare(_describe), prepare(_differentiate)

    def forward(self, scores: Float[Tensor, "R K"], temperature: float | None, average: Float[Tensor, " K"]) -> Rows:
        """As in `InPlace`; the scores stay."""
        top, indices = best_codes(scores) if self._split is None else self._split.best(scores)
        log_sum, log_sum_cold, entropy, used = self._describe(scores, top, temperature, self._split)
        if used is not None:
            average.add_(used)
        return Rows(indices, top, log_sum, log_sum_cold, entropy)

    def backward(
        self,
        scores: Float[Tensor, "R K"],
        gains: Float[Tensor, "R K"] | None,
        rows: Rows,
        pull: Pull | None,
        into: torch.dtype,
    ) -> Float[Tensor, "R K"]:
        """As in `InPlace`, in a tensor of its own of type `into`."""
        return self._differentiate(scores, gains, rows, pull, into=into, split=self._split)


def _row_sum(values: Tensor, split: Split | None) -> Tensor:
    sums = values.sum(1, keepdim=True)
    return sums if split is None else split.total(sums)


def _exp(values: Tensor) -> Tensor:
    return values.clamp(min=lowest_exponent(values.dtype)).exp()


def _describe(scores: Tensor, top: Tensor, temperature: float | None, split: Split | None) -> tuple[Tensor | None, ...]:
    """log_sum, log_sum_cold and entropy of a block's rows, and the sum of its q over rows."""
    relative = scores - top
    log_sum = _row_sum(_exp(relative), split).log()
    if temperature is None:
        return log_sum, None, None, None
    exponents = relative / temperature
    weights = _exp(exponents)
    total = _row_sum(weights, split)
    entropy = total.log() - _row_sum(weights * exponents, split) / total
    return log_sum, total.log(), entropy, (weights / total).sum(0)


def _differentiate(
    scores: Tensor,
    gains: Tensor | None,
    rows: Rows,
    pull: Pull | None,
    *,
    into: torch.dtype,
    split: Split | None,
) -> Tensor:
    """∂L/∂S of a block."""
    relative, result = scores - rows.top, 0.0
    if pull is not None:
        cold = _exp(relative / pull.temperature - rows.log_sum_cold)
        force = pull.codes + pull.scores * relative
        result = cold * (force - _row_sum(cold * force, split))
    if gains is not None:
        shares = _exp(relative - rows.log_sum)
        result = result + shares * (gains - _row_sum(shares * gains, split))
    return result.to(into)
