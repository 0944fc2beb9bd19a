"""Token after token as PyTorch runs it, on any number of images: what a CPU does, and what `sampler` must equal.

Keys and values are cached, the class is computed once, and a prompt can come at the start.

What is unusual: a class modulates every block by 6C numbers that a C × 6C matrix makes of its embedding, a third of all
weights. They are the same at every position, so a sampled image reads those matrices once and not T times. Shape
letters: B images · T sequence · C width · V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.generator.attention import KeyValueCache
from ibqlab.generator.sequence import position_table


class TokenDecoding(ABC):
    """A generator part of the way through images: how far it is, and all that the next position needs.

    Args:
        generator: in eval mode, or its dropouts act.
        labels: int64, on the generator's device.
        blocks: how many of its blocks have caches.
    """

    parts = 1
    """Draws per token."""

    def __init__(self, generator: nn.Module, labels: Int[Tensor, " B"], blocks: int) -> None:
        self.generator = generator
        self.condition = generator.class_emb(labels)
        """(B, 1, C), the class's embedding."""
        self.table = position_table(generator.config, self.condition, generator.config.num_tokens)
        """(T, pairs, 2), rows of all positions."""
        self.caches: list[KeyValueCache] = [KeyValueCache(len(self.table)) for _ in range(blocks)]
        self.length = 0
        """Positions that went through the blocks."""
        self.start = generator.dropout(self.condition)
        """(B, 1, C), what stands at the first position."""
        self.hidden = self.start
        """(B, 1, C), what came out for the last of them."""

    @abstractmethod
    def embed(self, tokens: Int[Tensor, "B new"]) -> Float[Tensor, "B new C"]:
        """Tokens as the blocks take them."""

    @abstractmethod
    def through_blocks(
        self, x: Float[Tensor, "B new C"], table: Float[Tensor, "new pairs 2"], caches: Sequence[KeyValueCache]
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
