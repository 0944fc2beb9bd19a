"""Loss terms that several quantizers share, with their settings: quantization loss of two sides, entropy penalty."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import require, require_choice
from ibqlab.quantizers.base import QuantizerConfig

BETA_SIDES = ("codebook", "encoder")


@dataclass(frozen=True, kw_only=True)
class PairLossConfig(QuantizerConfig):
    """The two-sided quantization loss that VQ, Soft VQ and IBQ share."""

    quantization_weight: float = 1.0
    """Weight of the whole quantization loss in the quantizer's loss, ≥ 0. Published: 1."""
    beta: float = 0.25
    """β, weight of one side of the loss, ≥ 0. Published: 0.25."""
    beta_on: str = "codebook"
    """The side that β multiplies. "codebook": ‖sg(c) − z‖² + β‖c − sg(z)‖², as the published code has it;
    "encoder": β‖sg(c) − z‖² + ‖c − sg(z)‖², as the paper (and VQ-VAE) has it."""

    def __post_init__(self):
        super().__post_init__()
        require(self.quantization_weight >= 0, f"quantization_weight must be ≥ 0, got {self.quantization_weight}")
        require(self.beta >= 0, f"beta must be ≥ 0, got {self.beta}")
        require_choice("beta_on", self.beta_on, BETA_SIDES)

    def loss_weights(self) -> dict[str, float]:
        """Weights of the terms "commitment" (moves the encoder) and "codebook" (moves the codes)."""
        encoder, codebook = (1.0, self.beta) if self.beta_on == "codebook" else (self.beta, 1.0)
        return {"commitment": self.quantization_weight * encoder, "codebook": self.quantization_weight * codebook}


def pair_terms(features: Float[Tensor, "N D"], codes: Float[Tensor, "N D"]) -> dict[str, Float[Tensor, ""]]:
    """The two sides of the quantization loss, each a mean over all N·D numbers.

    commitment = mean‖sg(c) − z‖², codebook = mean‖c − sg(z)‖²: equal values, different receivers of the gradient.
    """
    return {"commitment": F.mse_loss(features, codes.detach()), "codebook": F.mse_loss(codes, features.detach())}


@dataclass(frozen=True, kw_only=True)
class EntropyPenaltyConfig(QuantizerConfig):
    """The penalty w (H̄ − Ĥ) that IBQ and LFQ share: each token sure of its code, all codes used alike."""

    entropy_weight: float = 0.05
    """w, weight of the penalty in the loss, ≥ 0; 0 leaves it out. Published: 0.05."""
    entropy_temperature: float = 0.01
    """τ of the softmax inside the penalty, > 0. Published: 0.01."""
    entropy_epsilon: float = 1e-5
    """ε inside the logarithm of the average entropy, ≥ 0. Published: 1e-5, which caps that entropy at 11.19 nats
    (ln K is 12.48) for K = 262,144. 0 gives the exact entropy."""
    sample_entropy_weight: float = 1.0
    """Weight, inside the penalty, of the tokens' mean entropy (to be small: sure choices). Published: 1."""
    average_entropy_weight: float = 1.0
    """Weight, inside the penalty, of the batch's average entropy (to be large: even use). Published: 1."""

    entropy_over_processes: bool = False
    """Take the average entropy over the tokens of all processes instead of each process's own. Published: False."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("entropy_weight", "entropy_epsilon", "sample_entropy_weight", "average_entropy_weight"):
            require(getattr(self, name) >= 0, f"{name} must be ≥ 0, got {getattr(self, name)}")
        require(self.entropy_temperature > 0, f"entropy_temperature must be > 0, got {self.entropy_temperature}")

    def loss_weights(self) -> dict[str, float]:
        """Adds the weights of the terms "sample_entropy" (H̄) and "average_entropy" (Ĥ)."""
        return super().loss_weights() | {
            "sample_entropy": self.entropy_weight * self.sample_entropy_weight,
            "average_entropy": -self.entropy_weight * self.average_entropy_weight,
        }
