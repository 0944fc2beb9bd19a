"""Index backpropagation with the codebook split over processes: each holds some codes, for everyone's tokens.

For codebooks, or their Adam averages, that one device does not hold. Tokens (N·D numbers) and statistics (a few numbers
per token) travel; codes and their gradients never do, while data-parallel training sums K·D numbers at every step.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibqlab.quantizers.blocks import best_codes
from ibqlab.quantizers.compilation import never_compiled
from ibqlab.quantizers.index_backprop import Entropies, IndexBackprop, quantize_by_blocks


@never_compiled
def code_parallel_index_backprop(
    features: Float[Tensor, "N D"],
    codes: Float[Tensor, "part D"],
    entropy_temperature: float | None = 0.01,
    entropy_epsilon: float = 1e-5,
    *,
    group: Any = None,
) -> IndexBackprop:
    """`index_backprop` of all processes' tokens over all processes' codes, bit for bit the same choice of codes.

    Every process of the group calls this with tokens and codes of its own. The whole codebook is the processes' parts
    in order of rank. Both entropies are those of all tokens.

    Args:
        features: this process's tokens; as many on every process.
        codes: this process's part of the codebook; parts may differ in size.
        entropy_temperature: τ > 0; None skips both entropies. The same on all processes.
        entropy_epsilon: ε ≥ 0, the same on all processes.
        group: a torch.distributed process group; None for all processes.
    Returns:
        IndexBackprop of this process's tokens, indices counted over the whole codebook. Gradients are those of the sum
        of all processes' losses, as with torch.distributed's own differentiable operations: where losses are averaged
        over processes, divide the codes' gradient by their number. Every process must use the same outputs.
    Raises:
        ValueError: no process group; different numbers of tokens; what `index_backprop` refuses.
    Cost: 10·N·K·D operations for all N tokens and K codes, spread evenly; memory as in `index_backprop` for all tokens
        and this process's codes, with three blocks. Per token 3·D + 5 numbers are exchanged (forward) and 2·D + 2
        (backward).
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "code_parallel_index_backprop needs a process group; call torch.distributed.init_process_group first, or "
            "use index_backprop in a single process"
        )
    counts = _gather_counts(torch.tensor([len(features), len(codes)], device=features.device), group)
    if len(set(counts[:, 0].tolist())) > 1:
        raise ValueError(
            f"every process must give as many tokens; got {counts[:, 0].tolist()}. Use a batch size that the "
            "number of processes divides"
        )
    split = SplitCodebook(counts[:, 1].tolist(), group)
    everyones = _GatherTokens.apply(features, group)
    out = quantize_by_blocks(everyones, codes, Entropies(entropy_temperature, entropy_epsilon), split)
    rank = dist.get_rank(group)
    own = slice(rank * len(features), (rank + 1) * len(features))
    quantized, indices = _OwnTokens.apply(out.quantized, own, group), out.indices[own]
    if entropy_temperature is None:
        return IndexBackprop(quantized, indices, None, None)
    shared = (_SharedValue.apply(value, group) for value in (out.sample_entropy, out.average_entropy))
    return IndexBackprop(quantized, indices, *shared)


class SplitCodebook:
    """Statistics over codes that are spread over processes.

    Args:
        sizes: codes on each process, by rank.
        group: the process group.
    """

    def __init__(self, sizes: list[int], group: Any):
        rank = dist.get_rank(group)
        self.size, self.largest, self._group = sum(sizes), max(sizes), group
        self._start, self._stop = sum(sizes[:rank]), sum(sizes[: rank + 1])

    def best(self, scores: Float[Tensor, "R K"]) -> tuple[Float[Tensor, "R 1"], Int[Tensor, " R"]]:
        """Largest score of each row over all processes, and the lowest index that has it."""
        here, indices = best_codes(scores)
        top = here.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, self._group)
        indices = torch.where(here[:, 0] == top[:, 0], indices + self._start, self.size)
        dist.all_reduce(indices, dist.ReduceOp.MIN, self._group)
        # A row of NaN has no best code; its quantized vector becomes NaN whatever the index.
        return top, indices.clamp_max_(self.size - 1)

    def total(self, sums: Tensor) -> Tensor:
        """Sum over all processes."""
        sums = sums.clone()
        dist.all_reduce(sums, group=self._group)
        return sums

    def own(self, indices: Int[Tensor, " N"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Which tokens chose a code of this process, and which of its codes."""
        tokens = ((indices >= self._start) & (indices < self._stop)).nonzero()[:, 0]
        return tokens, indices[tokens] - self._start

    def take(self, codes: Float[Tensor, "part D"], indices: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """The chosen codes, wherever they are."""
        tokens, here = self.own(indices)
        chosen = codes.new_zeros(len(indices), codes.shape[1])
        chosen[tokens] = codes[here]
        dist.all_reduce(chosen, group=self._group)
        return chosen


def _gather_counts(counts: Tensor, group: Any) -> Tensor:
    return torch.stack(_all_gather(counts, group)).cpu()


def _all_gather(values: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return parts


class _GatherTokens(torch.autograd.Function):
    """Everyone's tokens; back, each token's gradient is summed over the processes' parts of the codebook."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.count = group, len(features)
        return torch.cat(_all_gather(features, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.count
        return grad[start : start + ctx.count], None


class _OwnTokens(torch.autograd.Function):
    """This process's tokens out of everyone's; back, everyone's gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, own: slice, group: Any) -> Tensor:
        ctx.group = group
        return values[own].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat(_all_gather(grad, ctx.group)), None, None


class _SharedValue(torch.autograd.Function):
    """A number that all processes have; back, the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
