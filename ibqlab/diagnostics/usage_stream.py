"""Every definition of usage from tokens that come batch by batch.

Memory is that of the codebook and of the longest window, however many images there are.
"""

import torch
from jaxtyping import Integer
from torch import Tensor

from ibqlab.base.checks import CODES, require, whole_number
from ibqlab.diagnostics.usage import (
    IMAGES_OF_A_GROUP,
    WINDOW_TOKENS,
    Usage,
    count_indices,
    measure_usage_of_counts,
)
from ibqlab.quantizers.indices import indices_in_memory

IMAGES_OF_A_BATCH = 32
"""Images of the batch that "one_batch" counts, where nobody says how many."""


class UsageCounter:
    """Usage of a stream of tokens under every definition of `USAGE_DEFINITIONS`, without keeping the stream.

        counter = UsageCounter(codebook_size=16384)
        for images in batches:
            counter.update(tokenizer.encode_indices(images))   # (B, h, w), image after image
        print(counter.usages()["window_65536"])

    Equal to `measure_usage` of all tokens at once.

    Args:
        codebook_size: K.
        images_per_batch: images of the first batch, for "one_batch".
    """

    def __init__(self, codebook_size: int, images_per_batch: int = IMAGES_OF_A_BATCH) -> None:
        self.codebook_size = whole_number("codebook_size", codebook_size, 1, CODES)
        self.images_per_batch = whole_number("images_per_batch", images_per_batch, 1)
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device="cpu")
        """Hits per code."""
        self.images = 0
        self._first = torch.zeros_like(self.counts)
        self._first_tokens = 0
        self._group = torch.zeros(codebook_size, dtype=torch.bool, device="cpu")
        self._group_tokens = 0
        self._groups: list[tuple[int, int]] = []  # codes hit and tokens, one pair for 256 images
        self._window = torch.zeros(0, dtype=torch.int64, device="cpu")

    def update(self, indices: Integer[Tensor, "B ..."]) -> None:
        """Add images in their order.

        Args:
            indices: code numbers, the first axis counts images.
        Raises:
            ValueError: an index outside 0 to K − 1, or no whole numbers.
        """
        indices = indices_in_memory(indices).cpu()
        rows = indices.reshape(len(indices), -1)
        self.counts += count_indices(rows, self.codebook_size)
        start = rows[: max(0, self.images_per_batch - self.images)]
        self._first += count_indices(start, self.codebook_size)
        self._first_tokens += start.numel()
        self._window = torch.cat([self._window, rows.flatten()])[-WINDOW_TOKENS:]
        while len(rows):
            piece, rows = rows.split_with_sizes(_first_of(len(rows), self.images % IMAGES_OF_A_GROUP))
            self._group[piece.flatten()] = True
            self._group_tokens += piece.numel()
            self.images += len(piece)
            if self.images % IMAGES_OF_A_GROUP == 0:
                self._groups.append((int(self._group.sum()), self._group_tokens))
                self._group.zero_()
                self._group_tokens = 0

    def usages(self) -> dict[str, Usage]:
        """Definition → usage, of those for which enough tokens came; a shorter window would be another definition.

        Raises:
            ValueError: nothing came.
        """
        require(self.images > 0, "usage needs at least 1 image; none came. Call update first")
        names = ("any_hit", "above_uniform_8pct")
        found = {name: measure_usage_of_counts(self.counts, name) for name in names}
        if self.images >= self.images_per_batch:
            found["one_batch"] = self._usage(int((self._first > 0).sum()), self._first_tokens, "one_batch")
        if self._groups:
            hit = sum(codes for codes, _ in self._groups) / len(self._groups)
            found["images_256"] = self._usage(hit, self._groups[0][1], "images_256")
        if len(self._window) == WINDOW_TOKENS:
            hit = int((count_indices(self._window, self.codebook_size) > 0).sum())
            found["window_65536"] = self._usage(hit, WINDOW_TOKENS, "window_65536")
        return found

    def _usage(self, hit: float, tokens: int, definition: str) -> Usage:
        size = self.codebook_size
        return Usage(value=hit / size, tokens=tokens, codebook_size=size, definition=definition)


def _first_of(images: int, in_group: int) -> tuple[int, int]:
    """How many of so many images still belong to a group that holds some already, and the rest."""
    first = min(images, IMAGES_OF_A_GROUP - in_group)
    return first, images - first
