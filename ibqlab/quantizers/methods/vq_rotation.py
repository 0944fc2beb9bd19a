"""VQ with the rotation trick: the gradient is turned with the feature onto its code instead of copied."""

from ibqlab.quantizers.base import register_quantizer
from ibqlab.quantizers.vq import VectorQuantizer, VectorQuantizerConfig


@register_quantizer("vq_rotation", VectorQuantizerConfig, label="VQ, rotation trick", gradient="rotation")
class RotationVectorQuantizer(VectorQuantizer):
    """VQ whose gradient keeps its angle to the code.

        z_q = sg(‖c‖/‖z‖ · R) z,   R = I − 2rrᵀ + 2 ĉ ẑᵀ,   r = (ẑ + ĉ)/‖ẑ + ĉ‖

    R is the rotation that takes ẑ = z/‖z‖ to ĉ = c/‖c‖. Features of one cell then get different gradients, and those
    far out in the cell are pushed apart or together, where the straight-through estimator moves all alike. Everything
    else is that of "vq": which codes learn does not change.
    Source: Fifty et al. (2024), §4.2. Their published VQGAN code rotates ẑ, whose division by ‖z‖ it differentiates, so
    that its gradient has no part along z; here, as in their VQ-VAE code, the length is held constant like R.
    """
