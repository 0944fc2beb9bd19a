"""Token after token: keys and values are kept, the class is worked out once, and whole rows can be given at the start.

What is unusual: a class modulates every block by 6C numbers that a C × 6C matrix makes of its embedding, a third of all
weights. They are the same at every position, so a sampled image reads those matrices once and not T times. Shape
letters: B images · T sequence · C width · V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.generator.layers import AnyCache, FixedCache, KeyValueCache
from ibqlab.generator.sequence import position_table
from ibqlab.quantizers.base import require

if TYPE_CHECKING:
    from ibqlab.generator.factorized import FactorizedGenerator
    from ibqlab.generator.transformer import Generator

COMPILER_MODE = "reduce-overhead"
"""torch.compile's mode on CUDA: CUDA graphs."""


class TokenDecoding(ABC):
    """A generator part of the way through images.

    Args:
        start: (B, 1, C), what stands at the first position: the class's embedding.
        table: rows of all positions.
        blocks: how many have caches.
        compiled: compile the step of one position; shapes then stay fixed.
    """

    parts = 1
    """Draws per token."""

    def __init__(
        self, start: Float[Tensor, "B 1 C"], table: Float[Tensor, "T pairs 2"], blocks: int, compiled: bool
    ) -> None:
        self.start, self.table, self.compiled = start, table, compiled
        self.caches: list[AnyCache] = [KeyValueCache(len(table)) for _ in range(blocks)]
        self.length = 0
        """Positions that went through the blocks."""
        self.hidden = start
        """(B, 1, C), what came out for the last of them."""
        self._step: Callable | None = None

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "B new"]) -> Float[Tensor, "B new C"]:
        """Tokens as the blocks take them."""

    @abstractmethod
    def through_blocks(
        self, x: Float[Tensor, "B new C"], table: Float[Tensor, "new pairs 2"], caches: Sequence[AnyCache]
    ) -> Float[Tensor, "B new C"]:
        """The next positions, those before them in the caches."""

    @abstractmethod
    def logits(self, drawn: Sequence[Int[Tensor, " B"]] = ()) -> Float[Tensor, "B V"]:
        """Scores of the next token, or of its next part, given the parts that are drawn."""

    @abstractmethod
    def join(self, parts: Sequence[Int[Tensor, " B"]]) -> Int[Tensor, " B"]:
        """A token of its parts."""

    @abstractmethod
    def keep_classes(self, rows: int) -> None:
        """Go on with what was worked out for the first classes of the batch alone."""

    def advance(self, tokens: Int[Tensor, " B"] | None = None) -> None:
        """Go to the next position; `tokens` are those of the last one, None before the first.

        Raises:
            ValueError: there are no more positions.
        """
        most = len(self.table)
        require(
            self.length < most, f"an image has {most} tokens, and the scores of all were given; start a new decoding"
        )
        x = self.start if tokens is None else self.embed(tokens[:, None])
        if self.compiled and self.length:
            self.hidden = self._fixed_step(x)
        else:
            place = slice(self.length, self.length + 1)
            self.hidden = self.through_blocks(x, self.table[place], self.caches)
        self.length += 1

    def prefill(self, tokens: Int[Tensor, "B given"]) -> None:
        """Go to the position after the given tokens, the first of the image, in one pass.

        Raises:
            ValueError: some positions were gone through before.
        """
        require(self.length == 0, f"given tokens come first; {self.length} positions were gone through. Start anew")
        x = torch.cat([self.start, self.embed(tokens)], dim=1)
        self.hidden = self.through_blocks(x, self.table[: x.shape[1]], self.caches)[:, -1:]
        self.length = x.shape[1]

    def next_logits(self, tokens: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B V"]:
        """Scores of the next token, given the one before it; None for the first, which follows the class."""
        self.advance(tokens)
        return self.logits()

    def keep(self, rows: int) -> None:
        """Go on with the first images of the batch alone."""
        self.start, self.hidden = self.start[:rows], self.hidden[:rows]
        for cache in self.caches:
            cache.keep(rows)
        self.keep_classes(rows)
        self._step = None

    def _fixed_step(self, x: Float[Tensor, "B 1 C"]) -> Float[Tensor, "B 1 C"]:
        """One position through the compiled blocks."""
        if self._step is None:
            self._step = self._compile()
        self._position.fill_(self.length)
        self._mask[..., : self.length + 1] = True
        # CUDA graphs reuse their output's memory at the next step.
        return self._step(x, self.table[self.length : self.length + 1]).clone()

    def _compile(self) -> Callable:
        device = self.table.device
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._mask = torch.zeros(1, 1, 1, len(self.table), dtype=torch.bool, device=device)
        kept = [cache.keys_values for cache in self.caches]
        caches = [FixedCache(keys_values, self._position, self._mask) for keys_values in kept]
        # Memory that stays where it is can be written to inside a CUDA graph.
        for tensor in (*kept, self._position, self._mask):
            torch._dynamo.mark_static_address(tensor)

        def step(x: Tensor, table: Tensor) -> Tensor:
            return self.through_blocks(x, table, caches)

        mode = COMPILER_MODE if device.type == "cuda" else None
        return torch.compile(step, mode=mode, dynamic=False)


class Decoding(TokenDecoding):
    """IBQ's generator part of the way through images: the logits of `forward`, one position at a time.

    Args:
        generator: in eval mode, or its dropouts act.
        labels: int64, on the generator's device.
        compiled: compile the step of one position.
    Cost: each position is computed once; keys and values are kept, 2·T·C numbers per block and image.
    """

    def __init__(self, generator: "Generator", labels: Int[Tensor, " B"], *, compiled: bool = False) -> None:
        self.generator = generator
        condition = generator.class_emb(labels)
        table = position_table(generator.config, condition, generator.config.num_tokens)
        self.modulations = [block.modulation(condition) for block in generator.blocks]
        self.head_modulation = generator.head_nm.modulation(condition)
        super().__init__(generator.dropout(condition), table, len(generator.blocks), compiled)

    def embed(self, tokens: Int[Tensor, "B new"]) -> Float[Tensor, "B new C"]:
        return self.generator.dropout(self.generator.tok_emb(tokens))

    def through_blocks(
        self, x: Float[Tensor, "B new C"], table: Float[Tensor, "new pairs 2"], caches: Sequence[AnyCache]
    ) -> Float[Tensor, "B new C"]:
        for block, modulation, cache in zip(self.generator.blocks, self.modulations, caches, strict=True):
            x = block.apply_modulation(x, table, modulation, cache)
        return x

    def logits(self, drawn: Sequence[Int[Tensor, " B"]] = ()) -> Float[Tensor, "B V"]:
        model = self.generator
        return model.head(model.head_nm.apply_modulation(self.hidden, self.head_modulation))[:, 0]

    def join(self, parts: Sequence[Int[Tensor, " B"]]) -> Int[Tensor, " B"]:
        return parts[0]

    def keep_classes(self, rows: int) -> None:
        self.modulations = [tuple(part[:rows] for part in parts) for parts in self.modulations]
        self.head_modulation = tuple(part[:rows] for part in self.head_modulation)


class FactorizedDecoding(TokenDecoding):
    """Open-MAGVIT2's generator part of the way through images: two draws per token.

    The spatial blocks give a position's context; the factorised blocks then go along [context, first part].

    Args:
        generator: in eval mode, or its dropouts act.
        labels: int64, on the generator's device.
        compiled: compile the step of one position through the spatial blocks.
    Source: published Open-MAGVIT2 sampling code.
    """

    parts = 2

    def __init__(self, generator: "FactorizedGenerator", labels: Int[Tensor, " B"], *, compiled: bool = False) -> None:
        self.generator = generator
        condition = generator.class_emb(labels)
        table = position_table(generator.config, condition, generator.config.num_tokens)
        super().__init__(generator.dropout(condition), table, len(generator.spatial_blocks), compiled)
        # The first two rows, also where an image has a single token.
        self.pair_table = position_table(generator.config, condition, 2)
        self.pair_caches: list[KeyValueCache] = []

    def embed(self, tokens: Int[Tensor, "B new"]) -> Float[Tensor, "B new C"]:
        return self.generator.dropout(self.generator.embed(tokens)[0])

    def through_blocks(
        self, x: Float[Tensor, "B new C"], table: Float[Tensor, "new pairs 2"], caches: Sequence[AnyCache]
    ) -> Float[Tensor, "B new C"]:
        for block, cache in zip(self.generator.spatial_blocks, caches, strict=True):
            x = block(x, table, cache)
        return x

    def logits(self, drawn: Sequence[Int[Tensor, " B"]] = ()) -> Float[Tensor, "B V"]:
        model, part = self.generator, len(drawn)
        if part == 0:
            self.pair_caches = [KeyValueCache(2) for _ in model.factorized_blocks]
        x = model.pre_emb(drawn[0])[:, None] if drawn else self.hidden
        for block, cache in zip(model.factorized_blocks, self.pair_caches, strict=True):
            x = block(x, self.pair_table[part : part + 1], cache)
        return model.head[part](model.norm(x))[:, 0]

    def join(self, parts: Sequence[Int[Tensor, " B"]]) -> Int[Tensor, " B"]:
        return self.generator.join(parts)

    def keep_classes(self, rows: int) -> None:
        self.pair_caches = []
