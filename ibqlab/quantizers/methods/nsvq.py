"""NS-VQ: the drift of the encoder is handed on to codes that no token has chosen, by a kernel of their distance."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibqlab.base.checks import require
from ibqlab.quantizers import blocks
from ibqlab.quantizers.base import Assignment, register_quantizer
from ibqlab.quantizers.compiling import never_compiled
from ibqlab.quantizers.vq import VectorQuantizer, VectorQuantizerConfig


@dataclass(frozen=True, kw_only=True)
class NonStationaryQuantizerConfig(VectorQuantizerConfig):
    """NS-VQ as published."""

    allows_unit_vectors: ClassVar[bool] = False
    codebook: str = "free"
    """Always "free": drift moves codes by its gradient."""
    drift_weight: float = 0.01
    """λ of the kernel, ≥ 0; 0 leaves the term out. Published: 0.01."""
    temperature_start: float = 10.0
    """τ of the kernel at the start, squared distance, > 0. Published: 10."""
    temperature_end: float = 0.01
    """τ at the end, > 0 and at most the start's. Published: a tenth with every epoch of 50,000 steps, 10⁻⁸ at least."""

    def __post_init__(self):
        super().__post_init__()
        require(self.codebook == "free", f'codebook must be "free" for nsvq, got {self.codebook!r}; leave it out')
        require(self.metric == "l2", f'metric must be "l2" for nsvq, whose kernel is of distances; got {self.metric!r}')
        require(self.drift_weight >= 0, f"drift_weight must be ≥ 0, got {self.drift_weight}")
        require(
            0 < self.temperature_end <= self.temperature_start,
            f"temperatures must satisfy 0 < temperature_end ≤ temperature_start, "
            f"got end {self.temperature_end} and start {self.temperature_start}",
        )

    def loss_weights(self) -> dict[str, float]:
        """Drift weighs as the codebook's side does, of which it is the part of the codes that were not chosen."""
        weights = super().loss_weights()
        return weights | {"drift": weights["codebook"]}


@register_quantizer("nsvq", NonStationaryQuantizerConfig, label="NS-VQ")
class NonStationaryQuantizer(VectorQuantizer):
    """VQ whose codes that were not chosen are drawn toward tokens, too, the nearer the more.

        w_nk = min(1, λ K softmax_k(−‖z_n − c_k‖²/τ)) for k ≠ k_n,   drift = Σ_n Σ_{k≠k_n} w_nk ‖c_k − sg(z_n)‖² / (N D)

    τ falls from its start to its end by a constant factor per share of the training progress. Weights take no gradient.
    Source: Lu et al., "Beyond Stationarity" (2026, arXiv 2602.18896); published NS-VQ code,
    VectorQuantizer2_with_soft_dist, in which the chosen code has weight 1 in one and the same term. In that class the
    branch with the kernel is entered only without an epoch, so that its τ stays at the start.
    """

    @property
    def temperature(self) -> float:
        """τ at the present `progress`."""
        start, end = self.config.temperature_start, self.config.temperature_end
        return start * (end / start) ** min(max(self.progress, 0.0), 1.0)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """As VQ, and in training the drift of the codes that were not chosen."""
        assignment = super().assign(features, codebook)
        if self.training and self.config.drift_weight > 0:
            assignment.terms["drift"] = drift_to_tokens(
                features, codebook, assignment.indices, self.config.drift_weight, self.temperature
            )
        return assignment


@never_compiled
def drift_to_tokens(
    features: Float[Tensor, "N D"],
    codebook: Float[Tensor, "K D"],
    indices: Int[Tensor, " N"],
    weight: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """Kernel-weighted mean squared distance of tokens to the codes they have not chosen; gradient to codes alone.

    Args:
        features: z, constants here.
        codebook: C.
        indices: the chosen codes, which take no part.
        weight: λ.
        temperature: τ > 0.
    Cost: 6·N·K·D operations, the gradient with them; memory O(K·D) plus two blocks of `blocks.BLOCK_BYTES`.
    """
    return _Drift.apply(codebook, features.detach(), indices, (weight, temperature))


class _Drift(torch.autograd.Function):
    """∂C_k = 2/(N D) Σ_n w_nk (c_k − z_n), made in the forward pass, where the weights are."""

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, features: Tensor, indices: Tensor, kernel: tuple[float, float]) -> Tensor:
        weight, temperature = kernel
        tokens, size = len(features), len(codebook)
        norms, lengths = codebook.square().sum(1), features.square().sum(1, keepdim=True)  # ‖c‖², ‖z‖²
        total, mass = codebook.new_zeros(()), codebook.new_zeros(size)
        pull = torch.zeros_like(codebook)  # Σ_n w_nk z_n
        with blocks.full_precision(features.device):
            for rows, (distances, weights) in blocks.score_blocks(tokens, size, features, buffers=2):
                torch.addmm(norms, features[rows], codebook.T, alpha=-2, out=distances).add_(lengths[rows])
                distances.clamp_min_(0)  # (R, K), one block; rounding can leave a distance below 0
                torch.softmax(torch.mul(distances, -1 / temperature, out=weights), 1, out=weights)
                weights.mul_(weight * size).clamp_max_(1).scatter_(1, indices[rows, None], 0)
                mass += weights.sum(0)
                pull.addmm_(weights.T, features[rows])
                total += distances.mul_(weights).sum()
        scale = 1 / features.numel()
        ctx.save_for_backward(mass[:, None].mul(codebook).sub_(pull).mul_(2 * scale))
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grad, None, None, None
