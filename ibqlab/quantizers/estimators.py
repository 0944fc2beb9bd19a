"""Axis 2, how tokens choose codes and how gradients come back through the choice."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import require_choice
from ibqlab.quantizers.blocks import best_codes, score_blocks
from ibqlab.quantizers.compiling import never_compiled
from ibqlab.quantizers.products import CodebookOperand, multiplying, product_form, side_by_side
from ibqlab.quantizers.vectors import check_alike, check_same_shape

METRICS = ("l2", "cosine", "dot")


@never_compiled
@torch.no_grad()
def nearest_code(
    features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"], metric: str = "l2", *, matmul: str = "float32"
) -> Int[Tensor, " N"]:
    """The index of each token's nearest code; on a tie the lowest index.

        l2: argmin_k ‖z − c_k‖²     cosine: argmax_k ⟨z/‖z‖, c_k/‖c_k‖⟩     dot: argmax_k ⟨z, c_k⟩

    Args:
        features: tokens.
        codebook: codes, same type and device.
        metric: "l2", "cosine" or "dot".
        matmul: what is promised about products of float32 on CUDA, one of `products.MATMULS`. A code whose distance
            differs from the nearest one's by less than their rounding may win.
    Returns:
        int64, 0 to K−1; whatever the process has chosen for its own products.
    Cost: 2·N·K·D operations; memory O(N + K·D) plus one block of `blocks.BLOCK_BYTES`, and on CUDA one panel of
        `products.PANEL_BYTES`.
    Raises:
        ValueError: shapes, types or devices that do not fit, another metric or another promise.
    Source: IBQ eq. 1; published VectorQuantizer2 for l2 and cosine.
    """
    require_choice("metric", metric, METRICS)
    check_alike(features, codebook)
    if metric == "cosine":
        features, codebook = F.normalize(features, dim=1), F.normalize(codebook, dim=1)
    # −‖c‖², (K,), some codes at a time: the squares of all of them would be as large as the codebook.
    offset = -torch.cat([codes.square().sum(1) for codes in codebook.split(4096)]) if metric == "l2" else None
    indices = torch.empty(len(features), dtype=torch.int64, device=features.device)
    form = product_form(features.dtype, features.device, matmul)
    with multiplying(form, features.device):
        left, codes = side_by_side(form, features, form.left), CodebookOperand(codebook, form)
        for rows, (scores,) in score_blocks(len(features), len(codebook), codebook):  # (R, K), one block, never (N, K)
            # 2⟨z, c⟩ − ‖c‖² = ‖z‖² − ‖z − c‖²: ‖z‖² is the same for all codes and moves no maximum.
            if offset is not None and left.dtype == scores.dtype:
                torch.addmm(offset, left[rows], codebook.T, alpha=2, out=scores)
                indices[rows] = best_codes(scores)[1]
            else:
                codes.multiply([left[rows]], [scores])
                indices[rows] = best_codes(scores, offset)[1]
    return indices


def straight_through(features: Float[Tensor, "N D"], codes: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """The codes' value with the features' gradient: z + sg(c − z) (IBQ eq. 2).

    Raises:
        ValueError: no two floating-point tensors of one shape.
    """
    check_same_shape(features, codes)
    return features + (codes - features).detach()


def rotate_to_codes(features: Float[Tensor, "N D"], codes: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """The codes' value with a gradient that keeps its angle to them: features under a fixed rotation and rescaling.

    R z · ‖c‖/‖z‖ with R the rotation that takes z's direction to c's, held constant; the Householder form
    R = I − 2rrᵀ + 2 ĉ ẑᵀ with r = (ẑ + ĉ)/‖ẑ + ĉ‖.
    Source: Fifty et al., "Restructuring Vector Quantization with the Rotation Trick" (2024), §4.
    Raises:
        ValueError: no two floating-point tensors of one shape.
    """
    check_same_shape(features, codes)
    with torch.no_grad():
        length = features.norm(dim=1, keepdim=True).clamp_min(1e-6)  # (N, 1); a feature of length 0 has no direction
        from_unit, to_unit = features / length, F.normalize(codes, dim=1)
        middle = F.normalize(from_unit + to_unit, dim=1)
        scale = codes.norm(dim=1, keepdim=True) / length
    # R·z from two inner products per token, (N, 1) each; the matrices R, (N, D, D), are never made.
    along_middle = (features * middle).sum(1, keepdim=True)
    along_feature = (features * from_unit).sum(1, keepdim=True)
    return scale * (features - 2 * along_middle * middle + 2 * along_feature * to_unit)
