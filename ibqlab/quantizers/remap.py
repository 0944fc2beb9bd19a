"""Indices of the codes that a codebook really uses, numbered without gaps, as VQGAN's `remap` has them."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.quantizers.indices import check_range, to_indices


class IndexRemap:
    """Numbers of codes ↔ positions in a list of the codes that are kept.

    A generator over the positions has a vocabulary of `size` instead of the whole codebook's K.

    Args:
        used: numbers of the codes that are kept, in the order of their positions. A number that stands twice keeps its
            first position.
        unknown: the position of all other codes: "random", drawn at every call; "extra", one behind the last, which
            leads back to the first code that is kept; or a position.
    Raises:
        ValueError: no whole numbers on one axis, none at all, a negative one, or an unknown position that is none.
    Source: published taming-transformers code, VectorQuantizer2 (remap, unknown_index).
    """

    def __init__(self, used: Any, unknown: str | int = "random"):
        self.used = to_indices(used, "used")
        shape = tuple(self.used.shape)
        require(len(shape) == 1 and shape[0] > 0, f"used must be a list of the codes kept, at least one; got {shape}")
        require(int(self.used.min()) >= 0, f"used must hold numbers of codes, 0 or more; got {int(self.used.min())}")
        is_position = isinstance(unknown, int) and not isinstance(unknown, bool) and 0 <= unknown < len(self.used)
        require(
            unknown in ("random", "extra") or is_position,
            f"unknown must be 'random', 'extra' or a position, 0 to {len(self.used) - 1}; got {unknown!r:.60}",
        )
        self.unknown = unknown
        self.size = len(self.used) + (unknown == "extra")
        """Positions that there are."""

    def to_positions(
        self, indices: Int[Tensor, "*grid"], *, generator: torch.Generator | None = None
    ) -> Int[Tensor, "*grid"]:
        """Positions of codes.

        Args:
            indices: numbers of codes, 0 or more, any shape.
            generator: of the positions that are drawn where `unknown` is "random"; None: torch's own.
        Returns:
            int64, 0 to size − 1.
        Raises:
            ValueError: no whole numbers, or a negative one.
        """
        indices = to_indices(indices)
        if indices.numel():
            require(int(indices.min()) >= 0, f"indices must be 0 or more; got {int(indices.min())}")
        used = self.used.to(indices.device)
        # Stable, so that of equal numbers the first position is found.
        ordered, positions = used.sort(stable=True)
        found = torch.searchsorted(ordered, indices).clamp_max(len(used) - 1)
        return torch.where(ordered[found] == indices, positions[found], self._unknown_positions(indices, generator))

    def to_codes(self, positions: Int[Tensor, "*grid"]) -> Int[Tensor, "*grid"]:
        """Numbers of codes from positions; the extra position gives the first code that is kept.

        Raises:
            ValueError: no whole numbers, or one outside 0 … size − 1.
        """
        positions = to_indices(positions, "positions")
        check_range("positions", positions, self.size, f" ({len(self.used)} codes are kept)")
        used = self.used.to(positions.device)
        return used[torch.where(positions < len(used), positions, 0)]

    def _unknown_positions(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        """What stands in place of codes that are not kept."""
        if self.unknown == "random":
            device = generator.device if generator is not None else indices.device
            drawn = torch.randint(len(self.used), indices.shape, generator=generator, device=device)
            return drawn.to(indices.device)
        return torch.full_like(indices, len(self.used) if self.unknown == "extra" else int(self.unknown))
