"""What a code decodes to: alone, among average neighbours, and put into a real image."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ibqlab.data import to_uint8
from ibqlab.tokenizer import Tokenizer
from ibqlab.views.patches import PatchIndex

SURROUNDINGS = 2
"""Squares on each side of a lone code when it is decoded: what lies further away hardly changes its own."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Pictures of one code; each with a square's surroundings, or whole where tokens lie on no grid."""

    alone: UInt8[np.ndarray, "h w 3"]
    """All tokens are the code."""
    among_average: UInt8[np.ndarray, "h w 3"]
    """The code among tokens that hold the mean code vector of the images."""
    before: UInt8[np.ndarray, "H W 3"]
    """A real image, decoded from its tokens."""
    after: UInt8[np.ndarray, "H W 3"]
    """The same with one token replaced by the code."""
    place: tuple[int, int, int]
    """Image, row and column of that token."""


def grid_of(tokenizer: Tokenizer, vectors: Float[Tensor, "B D h w"]) -> UInt8[np.ndarray, "B H W 3"]:
    """Pictures of code vectors on a grid."""
    with torch.no_grad():
        return to_uint8(tokenizer.decode(vectors).float()).permute(0, 2, 3, 1).contiguous().numpy()


class Decoder:
    """Decodes codes, one after another, into the same real image as far as that goes.

    Args:
        tokenizer: the network.
        index: of the images; the one whose token is replaced is the first that does not use the code at its middle.
    """

    def __init__(self, tokenizer: Tokenizer, index: PatchIndex):
        self.tokenizer, self.index = tokenizer, index
        self._images: dict[int, UInt8[np.ndarray, "H W 3"]] = {}

    def decode(self, code: int) -> Decoded:
        """Decode a code in three ways.

        Args:
            code: its number, below K.
        Raises:
            ValueError: NaN, which has no colour.
        """
        tokenizer, index, quantizer = self.tokenizer, self.index, self.tokenizer.quantizer
        rows, columns = index.codes.shape[1:]
        height, width = rows, columns
        if index.has_grid:
            height, width = min(2 * SURROUNDINGS + 1, rows), min(2 * SURROUNDINGS + 1, columns)
        with torch.no_grad():
            one = quantizer.decode(torch.full((1, height, width), code))  # (1, D, height, width)
        among = self._mean_vector.view(1, -1, 1, 1).repeat(1, 1, height, width)
        among[..., height // 2, width // 2] = one[..., height // 2, width // 2]
        pictures = grid_of(tokenizer, torch.cat([one, among]))
        image, row, column = _place_for(index, code)
        tokens = torch.from_numpy(index.codes[image].astype(np.int64))[None].clone()
        if image not in self._images:
            self._images = {image: self._picture(tokens)}
        tokens[0, row, column] = code
        return Decoded(
            alone=pictures[0],
            among_average=pictures[1],
            before=self._images[image],
            after=self._picture(tokens),
            place=(image, row, column),
        )

    def _picture(self, tokens: Int[Tensor, "1 h w"]) -> UInt8[np.ndarray, "H W 3"]:
        with torch.no_grad():
            return grid_of(self.tokenizer, self.tokenizer.quantizer.decode(tokens))[0]

    @cached_property
    def _mean_vector(self) -> Float[Tensor, " D"]:
        """Mean code vector over the images' tokens, of some thousand of them."""
        step = max(1, self.index.tokens // 4096)
        tokens = torch.from_numpy(self.index.codes.reshape(-1)[::step].astype(np.int64))
        with torch.no_grad():
            return self.tokenizer.quantizer.decode(tokens[None, None])[0, :, 0].float().mean(1)


def _place_for(index: PatchIndex, code: int) -> tuple[int, int, int]:
    """The middle of the first image that holds another code there."""
    rows, columns = index.codes.shape[1:]
    row, column = rows // 2, columns // 2
    others = np.flatnonzero(index.codes[:, row, column] != code)
    return (int(others[0]) if len(others) else 0), row, column
