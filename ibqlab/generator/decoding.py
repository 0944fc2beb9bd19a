"""Token after token: keys and values are cached, the class is computed once, and a prompt can come at the start.

What is unusual: a class modulates every block by 6C numbers that a C × 6C matrix makes of its embedding, a third of all
weights. They are the same at every position, so a sampled image reads those matrices once and not T times. Shape
letters: B images · T sequence · C width · V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.generator.attention import AnyCache, FixedCache, KeyValueCache
from ibqlab.generator.sequence import position_table

COMPILER_MODE = "reduce-overhead"
"""torch.compile's mode on CUDA: CUDA graphs."""


class TokenDecoding(ABC):
    """A generator part of the way through images: how far it is, and all that the next position needs.

    Args:
        generator: in eval mode, or its dropouts act.
        labels: int64, on the generator's device.
        blocks: how many of its blocks have caches.
        compiled: compile the step of one position; shapes then stay fixed.
    """

    parts = 1
    """Draws per token."""

    def __init__(self, generator: nn.Module, labels: Int[Tensor, " B"], blocks: int, compiled: bool) -> None:
        self.generator, self.compiled = generator, compiled
        self.condition = generator.class_emb(labels)
        """(B, 1, C), the class's embedding."""
        self.table = position_table(generator.config, self.condition, generator.config.num_tokens)
        """(T, pairs, 2), rows of all positions."""
        self.caches: list[AnyCache] = [KeyValueCache(len(self.table)) for _ in range(blocks)]
        self.length = 0
        """Positions that went through the blocks."""
        self.start = generator.dropout(self.condition)
        """(B, 1, C), what stands at the first position."""
        self.hidden = self.start
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
    def logits(self, earlier_parts: Sequence[Int[Tensor, " B"]] = ()) -> Float[Tensor, "B V"]:
        """Scores of the next token, or of its next part, given the parts that are drawn."""

    def join(self, parts: Sequence[Int[Tensor, " B"]]) -> Int[Tensor, " B"]:
        """A token of its parts."""
        return parts[0]

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
            table = self.table[self.length : self.length + 1]
            self.hidden = self.through_blocks(x, table, self.caches)  # one position, (B, 1, C); the caches hold T
        self.length += 1

    def prefill(self, tokens: Int[Tensor, "B P"]) -> None:
        """Go to the position behind a prompt, the first tokens of the image, in one pass.

        Raises:
            ValueError: some positions were computed before.
        """
        require(self.length == 0, f"a prompt comes first; {self.length} positions were computed. Start a new decoding")
        x = torch.cat([self.start, self.embed(tokens)], dim=1)
        self.hidden = self.through_blocks(x, self.table[: x.shape[1]], self.caches)[:, -1:]
        self.length = x.shape[1]

    def truncate(self, rows: int) -> None:
        """Go on with the first `rows` images of the batch alone; a subclass drops what it computed of the others."""
        self.start, self.hidden = self.start[:rows], self.hidden[:rows]
        for cache in self.caches:
            cache.truncate(rows)
        self._step = None  # compiled for the old batch size, over the old caches

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
        keys_values = [cache.keys_values for cache in self.caches]
        caches = [FixedCache(tensor, self._position, self._mask) for tensor in keys_values]
        # Memory that stays where it is can be written to inside a CUDA graph.
        for tensor in (*keys_values, self._position, self._mask):
            torch._dynamo.mark_static_address(tensor)

        def step(x: Tensor, table: Tensor) -> Tensor:
            return self.through_blocks(x, table, caches)

        mode = COMPILER_MODE if device.type == "cuda" else None
        return torch.compile(step, mode=mode, dynamic=False)
