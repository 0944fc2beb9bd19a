"""How much of the codebook learns in one step."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ibqlab.base.checks import finite_number
from ibqlab.quantizers.vectors import to_vectors


@torch.no_grad()
def gradient_reach(gradient: Float[Tensor, "K D"] | None, threshold: float = 1e-3) -> float:
    """Share of codes that a training step moves noticeably.

    |{k : ‖g_k‖ > threshold · max_j ‖g_j‖}| / K. VQ reaches only the codes its tokens chose; index backpropagation can
    reach all, but with a sharp softmax it reaches hardly more than VQ. A code that nothing reaches stays where it is
    while the features move away: that is how codes die.

    Args:
        gradient: gradient of the loss with respect to the codebook after `backward`, any scale or float type. None
            where the codebook is no parameter or got no gradient (moving averages, frozen codes).
        threshold: share of the largest norm above which a code counts as reached, 0 to 1.
    Returns:
        Share of codes, 0 to 1; 0.0 without gradient; nan for a gradient with NaN or infinity, which is no error
        here because mixed precision skips such steps by itself.
    Raises:
        ValueError: threshold outside [0, 1), or no gradient of a codebook.
    Cost: O(K·D) operations and memory, one wait for the device.
    """
    if not 0 <= (threshold := finite_number("threshold", threshold)) < 1:
        raise ValueError(f"threshold must lie in [0, 1): a share of the largest gradient norm; got {threshold}")
    if gradient is None:
        return 0.0
    gradient = to_vectors(gradient, "gradient")
    if not len(gradient):
        raise ValueError("gradient must have one row per code; got none")
    # Squares of float32 gradients below 1e-23 vanish; dividing by the largest entry first keeps them.
    widest = torch.promote_types(gradient.dtype, torch.float32)
    largest = float(torch.linalg.vector_norm(gradient, ord=math.inf, dtype=widest))
    if not math.isfinite(largest):
        return math.nan
    if largest == 0:
        return 0.0
    norms = torch.linalg.vector_norm(gradient.to(widest) / largest, dim=1)
    return float((norms > threshold * norms.max()).float().mean())
