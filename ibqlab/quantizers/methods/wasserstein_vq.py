"""Wasserstein VQ: codes are drawn to where features lie by the distance of the two as Gaussians."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.base.processes import sum_over_processes
from ibqlab.quantizers.base import Assignment, register_quantizer
from ibqlab.quantizers.blocks import full_precision
from ibqlab.quantizers.vq import VectorQuantizer, VectorQuantizerConfig

LARGEST_DIM = 256
"""Matrix square roots of D × D numbers are taken at every step."""


@dataclass(frozen=True, kw_only=True)
class WassersteinQuantizerConfig(VectorQuantizerConfig):
    """VQ with the Wasserstein term."""

    allows_unit_vectors: ClassVar[bool] = False
    codebook: str = "free"
    """Always "free": the term moves codes by its gradient."""
    codebook_init: str = "unit"
    """As in every quantizer. Published: N(0, 0.01²); here N(0, 1/D), with which the term begins near its minimum for
    features of length 1."""
    beta: float = 1.0
    """As in every quantizer. Published default: 1, both sides alike."""
    wasserstein_weight: float = 0.5
    """γ, weight of the distance in the loss, ≥ 0; 0 leaves it out. The published file's default is 0; the value of
    the paper's runs could not be established, and 0.5 is a choice of this library."""

    def __post_init__(self):
        super().__post_init__()
        require(
            self.codebook == "free", f'codebook must be "free" for wasserstein_vq, got {self.codebook!r}; leave it out'
        )
        require(self.wasserstein_weight >= 0, f"wasserstein_weight must be ≥ 0, got {self.wasserstein_weight}")
        require(
            self.code_dim <= LARGEST_DIM,
            f"code_dim must be at most {LARGEST_DIM} for wasserstein_vq, which takes roots of D × D matrices; "
            f"got {self.code_dim}. Lower code_dim",
        )

    def loss_weights(self) -> dict[str, float]:
        """Quantization loss and the distance of the two distributions."""
        return super().loss_weights() | {"wasserstein": self.wasserstein_weight}


@register_quantizer("wasserstein_vq", WassersteinQuantizerConfig, label="Wasserstein VQ")
class WassersteinQuantizer(VectorQuantizer):
    """VQ with W₂ between the Gaussians of features and codes, which reaches every code.

        loss = ‖sg(c) − z‖² + β‖c − sg(z)‖² + γ W₂(N(μ_z, Σ_z), N(μ_c, Σ_c))   (see `gaussian_distance`)

    The term takes features as they are and moves codes alone. Evaluation leaves it out.
    Source: Wasserstein VQ (2025, arXiv 2506.15078); published Wasserstein-VQ code, Wasserstein_Quantizer. That takes
    the features' moments from a queue of 65,536 past tokens of one process. Here they are the batch's over all
    processes, so that codes never follow features that the encoder has left.
    """

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """As VQ, and in training the distance."""
        assignment = super().assign(features, codebook)
        if self.training and self.config.wasserstein_weight > 0:
            assignment.terms["wasserstein"] = gaussian_distance(features, codebook)
        return assignment


def gaussian_distance(features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Float[Tensor, ""]:
    """The 2-Wasserstein distance of the Gaussians of features and codes, in the features' largest spread.

        W₂² = ‖μ_z − μ_c‖² + tr(Σ_z + Σ_c − 2 (Σ_z^½ Σ_c Σ_z^½)^½),   all divided by s² = max_i Σ_z,ii

    Roots are taken of eigenvalues plus 10⁻⁸ in float64, the distance's of W₂² plus 10⁻¹⁰, as published.

    Args:
        features: z, constants here; all processes of a job must call this together.
        codebook: C, to which the gradient goes.
    Returns:
        The distance, ≥ 0; 0 where means and covariances agree. 1 is about one spread of the features.
    Cost: O((N + K)·D² + D³) operations.
    """
    with full_precision(features.device):
        mean, covariance = _moments(features.detach())
        centred = codebook - codebook.mean(0)
        code_covariance = (centred.T @ centred).double() / (len(codebook) - 1)
    mean, covariance = mean.double(), _finite(covariance.double())
    scale = covariance.diagonal().max().clamp_min(0).sqrt() + 1e-8
    mean, covariance = mean / scale, covariance / scale**2
    code_mean, code_covariance = codebook.mean(0).double() / scale, code_covariance / scale**2
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * (values.relu() + 1e-8).sqrt()) @ vectors.T  # Σ_z^½, (D, D)
    crossed = torch.linalg.eigvalsh(_finite(root @ code_covariance @ root))
    spread = (covariance + code_covariance).trace() - 2 * (crossed.relu() + 1e-8).sqrt().sum()
    distance = ((mean - code_mean).square().sum() + spread.relu() + 1e-10).sqrt()
    return distance.to(codebook.dtype)


def _finite(matrix: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """0 in place of NaN and infinity, of which no roots can be taken; means and traces carry them on to the loss."""
    return torch.where(matrix.isfinite(), matrix, 0.0)


def _moments(features: Float[Tensor, "N D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Mean and covariance (of N − 1) of the tokens of all processes; one token alone has covariance 0."""
    count = sum_over_processes(features.new_full((), len(features)))
    mean = sum_over_processes(features.sum(0)) / count
    centred = features - mean
    return mean, sum_over_processes(centred.T @ centred) / (count - 1).clamp_min(1)
