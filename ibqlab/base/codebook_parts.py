"""A codebook of many combinations in a snapshot: its parts instead of all their sums.

A composite of four parts with 32 codes each has 2^20 combinations. A snapshot of it holds (4, 32, D) numbers in place
of (2^20, D); `with_codebook` makes the codebook again for whoever draws it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

MOST_STORED = 2**20
"""Numbers of a codebook of combinations that is stored as it is: 4 MiB."""
SUMMED, CONCATENATED = "summed_codebooks", "concatenated_codebooks"
"""Names of the parts' array (parts, k, d) in a snapshot, by what makes a combination's vector of the parts'."""


def with_codebook(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A snapshot's arrays with its codebook (K, D), made of its parts where those are stored.

    The index of a combination is a number whose digits, base k, are the parts' indices, the first part's worth most.
    Cost: O(K·D) memory, where parts are stored.
    """
    arrays = dict(arrays)
    for name in (SUMMED, CONCATENATED):
        if name in arrays:
            arrays = {"codebook": _joined(arrays.pop(name), name), **arrays}
    return arrays


def _joined(parts: Sequence[np.ndarray], name: str) -> np.ndarray:
    """Vectors of all combinations, (K, D)."""
    codebook = parts[0]
    for part in parts[1:]:
        pairs = len(codebook), len(part)
        left, right = np.repeat(codebook, pairs[1], axis=0), np.tile(part, (pairs[0], 1))
        codebook = left + right if name == SUMMED else np.concatenate([left, right], axis=1)
    return codebook
