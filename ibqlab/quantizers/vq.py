"""VQ: the nearest code, the straight-through estimator, and losses that pull code and feature together.

Presets over one class: `vq` (published baseline), `vq_cosine`, `vq_ema`, `simvq`. They differ in the codebook's
source, the metric and the upkeep only.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import require, require_choice
from ibqlab.quantizers.base import Assignment, Quantizer, register_quantizer
from ibqlab.quantizers.codebooks import EmaCodebook, FreeCodebook, LinearCodebook, UnitCodebook
from ibqlab.quantizers.estimators import METRICS, nearest_code, rotate_to_codes, straight_through
from ibqlab.quantizers.terms import PairLossConfig, pair_terms
from ibqlab.quantizers.upkeep import DeadCodeRevival, MovingAverage

CODEBOOKS = ("free", "ema", "linear")
GRADIENTS = {"straight_through": straight_through, "rotation": rotate_to_codes}


@dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig(PairLossConfig):
    """VQ as the published baseline has it."""

    allows_unit_vectors: ClassVar[bool] = True
    """Whether `unit_vectors` means something; a method that also uses features of any length says False."""
    codebook: str = "free"
    """Where codes come from: "free" parameters, "ema" of assigned features, or "linear" map of a frozen set."""
    metric: str = "l2"
    """Which code is nearest: "l2", "cosine" or "dot". The metric chooses; value and loss use the vectors as they are,
    like the published VectorQuantizer2 with l2_normalize, unless unit_vectors is True."""
    unit_vectors: bool = False
    """Divide tokens and codes by their lengths before the choice, the value and the loss, so that quantized vectors
    have length 1; stored codes keep theirs. Published VQ: False; LlamaGen and TiTok-L32: True."""
    gradient: str = "straight_through"
    """How the gradient passes the choice: "straight_through" (published) or "rotation"."""
    ema_decay: float = 0.99
    """γ of the moving averages, 0 to 1; read where codebook is "ema"."""
    revive_after: int = 0
    """Steps without a hit after which a code is moved onto a token of the batch; 0 never. Published: never."""

    def __post_init__(self):
        super().__post_init__()
        require_choice("codebook", self.codebook, CODEBOOKS)
        require_choice("metric", self.metric, METRICS)
        require_choice("gradient", self.gradient, GRADIENTS)
        require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        require(self.revive_after >= 0, f"revive_after must be ≥ 0 steps, got {self.revive_after}")
        if self.codebook == "linear":
            moved = self.codebook_init == "kmeans" or self.revive_after > 0
            require(not moved, 'a "linear" codebook is frozen: codebook_init "kmeans" and revive_after do not apply')
        if self.unit_vectors:
            self._check_unit_vectors()

    def _check_unit_vectors(self) -> None:
        """Raises where vectors of length 1 would contradict another setting."""
        name, remedy = self.config_name or "vq", "Leave unit_vectors out, or use the quantizer 'vq' with it"
        rule = f"unit_vectors does not apply to {name}, which also uses features of any length. {remedy}"
        require(self.allows_unit_vectors, rule)
        require(self.codebook == "free", f'unit_vectors needs codebook "free", got {self.codebook!r}. {remedy}')
        require(self.metric != "dot", f'unit_vectors needs metric "l2" or "cosine", got {self.metric!r}. {remedy}')
        says = 'unit_vectors needs another codebook_init than "kmeans", which clusters features of any length'
        require(self.codebook_init != "kmeans", f'{says}. Use "uniform"')


class NearestCodeQuantizer(Quantizer):
    """The nearest code, its straight-through gradient and both sides of the loss, whatever codebook a subclass gives.

    k = argmin_k ‖z − c_k‖,   z_q = z + sg(c_k − z)
    """

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The nearest code."""
        return nearest_code(features, codebook, matmul=self.config.matmul)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Nearest code; in evaluation its exact value."""
        indices = self.choose(features, codebook)
        codes = F.embedding(indices, codebook)  # (N, D)
        quantized = straight_through(features, codes) if self.training else codes
        return Assignment(quantized, indices, pair_terms(features, codes))


# SimVQ: a random codebook, frozen at N(0, 1/D), under a learned linear map.
@register_quantizer("simvq", VectorQuantizerConfig, codebook="linear", codebook_init="unit", beta_on="encoder")
# Codes are moving averages that start at N(0, 1), and β weighs the commitment, the only side left: as in VQ-VAE.
@register_quantizer("vq_ema", VectorQuantizerConfig, codebook="ema", codebook_init="normal", beta_on="encoder")
# The code at the smallest angle.
@register_quantizer("vq_cosine", VectorQuantizerConfig, metric="cosine")
@register_quantizer("vq", VectorQuantizerConfig)
class VectorQuantizer(Quantizer):
    """Nearest-code quantization: only chosen codes learn, which is what lets the others fall behind.

        k = argmin_k ‖z − c_k‖,   z_q = z + sg(c_k − z),   loss = ‖sg(c) − z‖² + β‖c − sg(z)‖²   (β_on "codebook")

    With `unit_vectors` z/‖z‖ and c/‖c‖ stand for z and c everywhere, and gradients pass both divisions.
    Source: IBQ eqs. 1–2; published VectorQuantizer2 (legacy order of β by default); unit vectors: published LlamaGen
    and TiTok code.
    """

    reaches = "chosen"

    def __init__(self, config: VectorQuantizerConfig):
        size, dim, start = config.codebook_size, config.code_dim, config.codebook_init
        if config.codebook == "ema":
            codes = EmaCodebook(start, size, dim, config.ema_decay)
        else:
            free = UnitCodebook if config.unit_vectors else FreeCodebook
            codes = {"free": free, "linear": LinearCodebook}[config.codebook](start, size, dim)
        upkeep = [MovingAverage()] if config.codebook == "ema" else []
        upkeep += [DeadCodeRevival(size, config.revive_after)] if config.revive_after else []
        super().__init__(config, codes, upkeep)

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The nearest code by the config's metric."""
        if self.config.unit_vectors:
            features = F.normalize(features, dim=1)
        return nearest_code(features, codebook, self.config.metric, matmul=self.config.matmul)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Nearest code; in evaluation its exact value, in training the same with the chosen gradient."""
        indices = self.choose(features, codebook)
        if self.config.unit_vectors:
            features = F.normalize(features, dim=1)
        codes = F.embedding(indices, codebook)  # (N, D); its gradient reaches the chosen codes alone
        terms = pair_terms(features, codes)
        if self.config.codebook == "ema":
            del terms["codebook"]  # averages take no gradient, so it would only add to the loss that is logged
        carry = GRADIENTS[self.config.gradient]
        return Assignment(carry(features, codes) if self.training else codes, indices, terms)
