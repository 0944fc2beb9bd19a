"""What codes of a set have in common: whether they are neighbours of each other, by distance and in the images."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ibqlab.views.patches import PatchIndex

NEAREST = 6
"""Nearest codes of each code of the set that are looked up."""
_ASKED = 256
"""Codes of the set whose nearest are looked for, at most."""
_WORK = 2**31
"""Operations that the search may take, at most: a fifth of a second."""
_RANKING = 64
"""Operations that ranking one distance is worth."""


class NearInside(NamedTuple):
    """By distance in code space."""

    share: float
    """Of the nearest codes of the set's codes, how many are in the set, 0 to 1."""
    by_chance: float
    """The share that a set of this size drawn at random would have."""
    asked: int
    """Codes of the set that were looked at."""
    nearest: int
    """Nearest codes of each."""


class BesideInside(NamedTuple):
    """In the images."""

    pairs: int
    """Pairs of different codes of the set of which both are in use there."""
    seen: int
    """Pairs that stand beside each other, above, below, left or right, at least once."""
    lift: float
    """How many times as often as if tokens were shuffled."""


def near_inside(
    codebook: Float[Tensor, "K D"], squares: Float[Tensor, " K"], codes: tuple[int, ...]
) -> NearInside | None:
    """Whether the codes of a set are each other's nearest; None where there is nothing to compare.

    Args:
        codebook: all code vectors, finite.
        squares: their squared norms.
        codes: the set.
    """
    size, dim = codebook.shape
    nearest = min(NEAREST, size - 1)
    if not 1 < len(codes) < size:
        return None
    asked = int(max(1, min(_ASKED, len(codes), _WORK // (size * (dim + _RANKING)))))
    chosen = torch.tensor(codes)[torch.linspace(0, len(codes) - 1, asked).long()]
    distances = squares - 2 * codebook[chosen] @ codebook.T  # (asked, K), up to each row's own square
    distances[torch.arange(asked), chosen] = torch.inf
    found = distances.topk(nearest, largest=False).indices
    inside = torch.zeros(size, dtype=torch.bool)
    inside[list(codes)] = True
    return NearInside(float(inside[found].float().mean()), (len(codes) - 1) / (size - 1), asked, nearest)


def beside_inside(index: PatchIndex, codes: tuple[int, ...]) -> BesideInside | None:
    """Whether the codes of a set stand beside each other; None where fewer than two are in use, or without a grid."""
    if not index.has_grid:
        return None
    inside = np.zeros(index.codebook_size, bool)
    inside[list(codes)] = True
    used = index.counts[inside & (index.counts > 0)].astype(float)
    if len(used) < 2:
        return None
    seen, times, everywhere = index.pairs_within(inside)
    # Two tokens drawn at random: both of the set, and of different codes; the same of all codes.
    hits = index.counts.astype(float)
    chance = (used.sum() ** 2 - (used**2).sum()) / max(hits.sum() ** 2 - (hits**2).sum(), 1.0)
    expected = everywhere * chance
    return BesideInside(len(used) * (len(used) - 1) // 2, seen, times / expected if expected else 0.0)
