"""A generator's weights and caches as `sampler` keeps them: copies in the type sampled in, in memory that never moves.

What is unusual: the residual x of a block is added inside the norm that follows it, so a block hands on what it would
add. Copies are made again at each call: reading all weights once takes as long as one position, and a copy that is
compared with its original by address or version misses what is written through `.data`. Letters as in
`sampler_operations`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.generator.layers import Block
from ibqlab.generator.sampler_operations import Drawing
from ibqlab.generator.sequence import position_table

Cache = tuple[Float[Tensor, "R H T d"], Float[Tensor, "R H T d"]]
"""Keys and values of one block."""
Copies = Iterator[tuple[Tensor, Tensor]]
"""Memory of the sampler, and the weights of the generator that belong there."""


class BlockWeights(NamedTuple):
    """Of one block."""

    attention_norm: Float[Tensor, " C"]
    wqkv: Float[Tensor, "three_C C"]
    wo: Float[Tensor, "C C"]
    ffn_norm: Float[Tensor, " C"]
    w13: Float[Tensor, "two_hidden C"]
    """w1 above w3: one product instead of two."""
    w2: Float[Tensor, "C hidden"]


class BlockModulation(NamedTuple):
    """What the class does to one block; None where it does nothing."""

    gate1: Float[Tensor, "R C"] | None = None
    gate2: Float[Tensor, "R C"] | None = None
    scale1: Float[Tensor, "R C"] | None = None
    scale2: Float[Tensor, "R C"] | None = None
    shift1: Float[Tensor, "R C"] | None = None
    shift2: Float[Tensor, "R C"] | None = None


class Residual(NamedTuple):
    """The sum of the blocks so far, and what is still to be added to it."""

    x: Float[Tensor, "R C"]
    update: Float[Tensor, "R C"] | None = None
    gate: Float[Tensor, "R C"] | None = None


class RowMemory(NamedTuple):
    """What the network keeps of each row."""

    x: Float[Tensor, "R C"]
    """What stands at the next position: the class, then the token before it; float32 or wider."""
    caches: list[Cache]
    modulations: list[BlockModulation]
    last_modulation: tuple[Tensor | None, Tensor | None]
    """Scale and shift of the norm before the head."""

    def first(self, rows: int) -> "RowMemory":
        """The same memory, of the first rows alone."""
        return RowMemory(
            self.x[:rows],
            [(keys[:rows], values[:rows]) for keys, values in self.caches],
            [BlockModulation(*(_first(value, rows) for value in modulation)) for modulation in self.modulations],
            tuple(_first(value, rows) for value in self.last_modulation),
        )


class SamplerNetwork(ABC):
    """A generator's network for one position at a time.

    Args:
        generator: only its shapes are looked at, and no reference to it is kept.
        dtype: of the copies.
        rows: R, of the caches.
        blocks: of the generator, along the image.
        is_adapted: whether the class scales, shifts and gates them.
    """

    parts = 1
    """Draws per token."""
    worth = 1
    """How much a token's second part counts."""

    def __init__(
        self, generator: nn.Module, dtype: torch.dtype, rows: int, blocks: nn.ModuleList, *, is_adapted: bool
    ) -> None:
        config = generator.config
        parameter = next(generator.parameters())
        self.dtype, self.device = dtype, parameter.device
        self.table = position_table(config, parameter.new_empty(0, dtype=dtype), config.num_tokens)
        """(T, pairs, 2), in float32 or wider."""
        self.blocks = [self.empty_block(block) for block in blocks]
        shape = rows, config.width
        self.rows = RowMemory(
            x=torch.zeros(shape, dtype=self.table.dtype, device=self.device),
            caches=[self.empty_cache(rows, config.num_heads, config.num_tokens, config.head_dim) for _ in blocks],
            modulations=[BlockModulation(*self.empty_modulation(6 * is_adapted, shape)) for _ in blocks],
            last_modulation=tuple(self.empty_modulation(2, shape)) if is_adapted else (None, None),
        )

    @abstractmethod
    def copies(self, generator: nn.Module) -> Copies:
        """Where each weight goes."""

    @abstractmethod
    def begin(self, generator: nn.Module, labels: Int[Tensor, " R"]) -> None:
        """Put the classes in place for new images; reads the generator's own weights, in their own type."""

    @abstractmethod
    def scores(
        self, rows: RowMemory, earlier_parts: Sequence[Int[Tensor, " R"]], drawing: Drawing, operations: ModuleType
    ) -> Float[Tensor, "R V"]:
        """Logits of the next token, or of its next part given the earlier ones."""

    @abstractmethod
    def embed(self, tokens: Int[Tensor, " L"]) -> Float[Tensor, "L C"]:
        """Tokens as the blocks take them."""

    @torch.no_grad()
    def copy_weights(self, generator: nn.Module) -> None:
        """Take over the weights as they are now."""
        targets, sources = zip(*self.copies(generator), strict=True)
        torch._foreach_copy_(list(targets), list(sources))

    def empty_copy(self, *weights: Float[Tensor, "*sizes"]) -> Float[Tensor, "..."]:
        """Memory for weights, those of several below each other."""
        first = weights[0]
        sizes = (sum(len(weight) for weight in weights), *first.shape[1:])
        return torch.empty(sizes, dtype=self.dtype, device=self.device)

    def empty_block(self, block: Block) -> BlockWeights:
        """Memory for a block's weights."""
        attention, feed_forward = block.attention, block.feed_forward
        return BlockWeights(
            self.empty_copy(block.attention_norm.weight),
            self.empty_copy(attention.wqkv.weight),
            self.empty_copy(attention.wo.weight),
            self.empty_copy(block.ffn_norm.weight),
            self.empty_copy(feed_forward.w1.weight, feed_forward.w3.weight),
            self.empty_copy(feed_forward.w2.weight),
        )

    def block_copies(self, weights: BlockWeights, block: Block) -> Copies:
        """Where each weight of a block goes."""
        attention, feed_forward = block.attention, block.feed_forward
        above, below = weights.w13.chunk(2)
        yield weights.attention_norm, block.attention_norm.weight
        yield weights.wqkv, attention.wqkv.weight
        yield weights.wo, attention.wo.weight
        yield weights.ffn_norm, block.ffn_norm.weight
        yield above, feed_forward.w1.weight
        yield below, feed_forward.w3.weight
        yield weights.w2, feed_forward.w2.weight

    def empty_modulation(self, count: int, shape: tuple[int, int]) -> list[Float[Tensor, "R C"]]:
        """Memory for so many gates, scales and shifts."""
        return [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(count)]

    def empty_cache(self, rows: int, num_heads: int, positions: int, head_dim: int) -> Cache:
        """Memory for keys and values of one block; numbers, which a mask can rule out."""
        shape = rows, num_heads, positions, head_dim
        return tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))


def through_blocks(
    residual: Residual,
    blocks: Sequence[BlockWeights],
    modulations: Sequence[BlockModulation],
    caches: Sequence[Cache],
    table: Float[Tensor, "T pairs 2"],
    *,
    position: Int[Tensor, "1"],
    drawing: Drawing,
    operations: ModuleType,
) -> Residual:
    """One position through blocks, as `AdaptiveBlock.apply_modulation` and `Block.forward` compute it.

    Args:
        residual: what goes in.
        blocks, modulations, caches: one of each per block.
        table: rows of `rotary_table` that `position` counts.
        position: of the sequence that the caches hold.
        drawing: says which lanes have an image.
        operations: `sampler_operations` or `sampler_kernels`.
    """
    linear = nn.functional.linear
    for block, modulation, cache in zip(blocks, modulations, caches, strict=True):
        x, normed = operations.add_and_normalise(
            *residual, weight=block.attention_norm, scale=modulation.scale1, shift=modulation.shift1
        )
        mixed = linear(operations.attend(linear(normed, block.wqkv), cache, table, position, drawing), block.wo)
        x, normed = operations.add_and_normalise(
            *(x, mixed, modulation.gate1), weight=block.ffn_norm, scale=modulation.scale2, shift=modulation.shift2
        )
        hidden = operations.gate_hidden(linear(normed, block.w13))
        residual = Residual(x, linear(hidden, block.w2), modulation.gate2)
    return residual


def _first(value: Tensor | None, rows: int) -> Tensor | None:
    return None if value is None else value[:rows]
