"""How much of the features their codes keep, in a measure that compares between methods."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ibqlab.quantizers.vectors import to_vectors


@torch.no_grad()
def variance_lost(features: Float[Tensor, "N D"], codes: Float[Tensor, "N D"]) -> float:
    """What codes leave over of the features' variance, whatever linear layer stands behind them.

        min over A, b of  Σ‖z − (A·c + b)‖² / Σ‖z − mean z‖²  ·  (N − 1)/(N − 1 − rank)

    Every decoder begins with a linear layer, so that methods which bound, normalise or project features before they
    look for a code are not charged for that, and their errors compare; what normalising throws away is an error, since
    no decoder can have it back. The last factor takes back what a fit to few vectors gains by chance.

    Args:
        features: (N, D) as the encoder gives them; N well above D.
        codes: (N, D), the code of each.
    Returns:
        0 (nothing lost) to 1 (no better than the mean of the features); NaN where the features do not vary, or N does
        not exceed the rank of the codes by at least 2.
    """
    z, c = (to_vectors(vectors, name).double() for vectors, name in ((features, "features"), (codes, "codes")))
    z, c = z - z.mean(0), c - c.mean(0)
    variance = float(z.square().sum())
    directions, sizes, _ = torch.linalg.svd(c, full_matrices=False)
    directions = directions[:, sizes > 1e-6 * sizes.max()]
    freedom = len(z) - 1 - directions.shape[1]
    if not variance > 0 or freedom < 1:
        return math.nan
    left = variance - float((directions.T @ z).square().sum())
    return min(1.0, max(0.0, left / variance * (len(z) - 1) / freedom))
