"""DiVeQ: the error of quantization as a length that learns, along a direction that does not; no loss is needed."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.base.checks import require
from ibqlab.base.processes import same_on_all_processes, sum_over_processes
from ibqlab.quantizers.base import Assignment, Quantizer, QuantizerConfig, register_quantizer
from ibqlab.quantizers.estimators import nearest_code
from ibqlab.quantizers.upkeep import Upkeep


@dataclass(frozen=True, kw_only=True)
class DifferentiableVectorQuantizerConfig(QuantizerConfig):
    """DiVeQ as published."""

    codebook_init: str = "uniform"
    """As in every quantizer. Published: U(0, 1/K), of which "uniform", U(±1/K), is the library's form."""
    noise_std: float = 1e-3
    """σ of the noise added to the direction in training, in the features' unit, ≥ 0; 0 is the published "DiVeQ detach".
    Published: 1e-3, as noise_var, but handed to a function that takes a standard deviation."""
    replace_every: int = 100
    """Training steps after which codes that were never chosen move next to chosen ones; 0: never. Published: 100."""
    replace_shift: float = 1e-9
    """σ of what is added to a moved code, in the features' unit, ≥ 0. Published: 1e-9, which float32 loses beside codes
    of length 1: the copy then equals its model, and the lower of the two indices gets all tokens."""

    def __post_init__(self):
        super().__post_init__()
        require(self.noise_std >= 0, f"noise_std must be ≥ 0, got {self.noise_std}. Use 1e-3, or 0 for no noise")
        require(self.replace_every >= 0, f"replace_every must be ≥ 0 steps, got {self.replace_every}. Use 100, or 0")
        require(self.replace_shift >= 0, f"replace_shift must be ≥ 0, got {self.replace_shift}. Use 1e-9, or 1e-3")


@register_quantizer("diveq", DifferentiableVectorQuantizerConfig, label="DiVeQ")
class DifferentiableVectorQuantizer(Quantizer):
    """Differentiable Vector Quantization.

        k = argmin_k ‖z − c_k‖,   z_q = z + ‖c_k − z‖ · sg(v/‖v‖),   v = c_k − z + ε,   ε ~ N(0, σ²)

    The length of the error takes gradient, its direction none. So a gradient of z_q along the error reaches the code
    and not the feature, one across it the feature and not the code; codes learn from the reconstruction, and there is
    no loss. Only chosen codes learn: the others are moved every `replace_every` steps. Evaluation gives the code.
    Source: DiVeQ (Vali et al., ICLR 2026, arXiv 2509.26469; its text was not at hand); published package diveq.
    """

    def __init__(self, config: DifferentiableVectorQuantizerConfig):
        size, every, shift = config.codebook_size, config.replace_every, config.replace_shift
        super().__init__(config, upkeep=[CodeReplacement(size, every, shift)] if every else [])

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The nearest code."""
        return nearest_code(features, codebook, matmul=self.config.matmul)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """The nearest code; in training up to the noise in the direction to it."""
        indices = self.choose(features, codebook)
        codes = F.embedding(indices, codebook)
        if not self.training:
            return Assignment(codes, indices, {})
        return Assignment(features + directed_error(features, codes, self.config.noise_std), indices, {})


def directed_error(
    features: Float[Tensor, "N D"], codes: Float[Tensor, "N D"], noise_std: float
) -> Float[Tensor, "N D"]:
    """c − z as a length that takes gradient times a direction that takes none: ‖c − z‖ · sg(v/‖v‖), v = c − z + ε.

    Args:
        features: z.
        codes: c, one per token.
        noise_std: σ of ε, drawn from torch's global generator where it is above 0.
    Source: published package diveq.
    """
    with torch.no_grad():
        direction = codes - features
        if noise_std > 0:
            direction = direction + noise_std * torch.randn_like(direction)
        direction = F.normalize(direction, dim=1)
    return torch.linalg.vector_norm(codes - features, dim=1, keepdim=True) * direction


class CodeReplacement(Upkeep):
    """Every so many steps moves the codes that no token has chosen since onto chosen ones, next to which they part.

    A code is drawn with the share of steps in which it was chosen. Published is a threshold, too, 1 % of the steps,
    which at 100 steps is one hit; for other intervals it is one hit here.

    Args:
        codebook_size: K.
        every: steps between replacements, at least 1.
        shift: σ of the distance to the chosen code.
    Source: published package diveq.
    """

    def __init__(self, codebook_size: int, every: int, shift: float):
        super().__init__()
        self.every, self.shift = every, shift
        self.register_buffer("steps_chosen", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def after(self, codes: nn.Module, features: Float[Tensor, "N D"], indices: Int[Tensor, " N"]) -> None:
        """Count, and replace where it is time."""
        hits = sum_over_processes(torch.bincount(indices, minlength=len(self.steps_chosen)))  # (K,)
        self.steps_chosen += hits > 0
        self.steps += 1
        if self.steps % self.every:
            return
        unused = (self.steps_chosen == 0).nonzero()[:, 0]
        if len(unused):
            # By inversion, because torch.multinomial takes at most 2^24 codes.
            shares = self.steps_chosen.double().cumsum(0)
            drawn = torch.rand(len(unused), dtype=torch.float64, device=shares.device) * shares[-1]
            models = torch.searchsorted(shares, drawn, right=True).clamp_max(len(shares) - 1)
            vectors = codes()[models]
            codes.replace(unused, same_on_all_processes(vectors + self.shift * torch.randn_like(vectors)))
        self.steps_chosen.zero_()
