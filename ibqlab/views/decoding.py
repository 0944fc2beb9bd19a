"""What a code decodes to: alone, among average neighbours, and put into a real image."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ibqlab.data import to_uint8
from ibqlab.tokenizer import Tokenizer
from ibqlab.views.patches import PatchIndex

SURROUNDINGS = 2
"""Squares on each side of a lone code when it is decoded: what lies further away hardly changes its own."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Pictures of one code; each with a square's surroundings."""

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


def decode_code(tokenizer: Tokenizer, index: PatchIndex, code: int) -> Decoded:
    """Decode a code in three ways.

    Args:
        tokenizer: the network.
        index: of the images; the one whose token is replaced is the first that does not use the code at its middle.
        code: its number, below K.
    """
    rows, columns = index.codes.shape[1:]
    side = min(2 * SURROUNDINGS + 1, rows, columns)
    here = side // 2
    quantizer = tokenizer.quantizer
    with torch.no_grad():
        one = quantizer.decode(torch.full((1, side, side), code))  # (1, D, side, side)
        mean = _mean_vector(tokenizer, index)
    among = mean.view(1, -1, 1, 1).repeat(1, 1, side, side)
    among[..., here, here] = one[..., here, here]
    pictures = grid_of(tokenizer, torch.cat([one, among]))
    image, row, column = _place_for(index, code)
    tokens = torch.from_numpy(index.codes[image].astype(np.int64))[None].repeat(2, 1, 1)
    tokens[1, row, column] = code
    with torch.no_grad():
        before, after = grid_of(tokenizer, quantizer.decode(tokens))
    return Decoded(alone=pictures[0], among_average=pictures[1], before=before, after=after, place=(image, row, column))


def _mean_vector(tokenizer: Tokenizer, index: PatchIndex) -> Float[Tensor, " D"]:
    """Mean code vector over the images' tokens, of some thousand of them."""
    tokens = torch.from_numpy(index.codes.reshape(-1)[:: max(1, index.tokens // 4096)].astype(np.int64))
    return tokenizer.quantizer.decode(tokens[None, None])[0, :, 0].float().mean(1)


def _place_for(index: PatchIndex, code: int) -> tuple[int, int, int]:
    """The middle of the first image that holds another code there."""
    rows, columns = index.codes.shape[1:]
    row, column = rows // 2, columns // 2
    others = np.flatnonzero(index.codes[:, row, column] != code)
    return (int(others[0]) if len(others) else 0), row, column
