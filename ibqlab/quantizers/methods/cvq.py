"""CVQ: codes that are hardly used are blended, each by its own share, toward features of the batch."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.base.checks import require, require_choice
from ibqlab.base.processes import same_on_all_processes, sum_over_processes
from ibqlab.quantizers import blocks
from ibqlab.quantizers.base import register_quantizer
from ibqlab.quantizers.estimators import nearest_code
from ibqlab.quantizers.upkeep import Upkeep
from ibqlab.quantizers.vq import VectorQuantizer, VectorQuantizerConfig

ANCHORS = ("closest", "random", "probability")


@dataclass(frozen=True, kw_only=True)
class ClusteredVectorQuantizerConfig(VectorQuantizerConfig):
    """CVQ as published."""

    allows_unit_vectors: ClassVar[bool] = False
    codebook: str = "free"
    """Always "free": codes learn by gradient and are moved between steps."""
    metric: str = "cosine"
    """As in VQ; it chooses anchors, too. The published class compares by angle by default."""
    beta_on: str = "encoder"
    """As in every quantizer; the published code weighs the commitment by β."""
    usage_decay: float = 0.99
    """γ of the running usage, 0 to 1. Published: 0.99."""
    anchor: str = "probability"
    """The feature that a code is blended toward: its "closest", one at "random", or one drawn with "probability"
    softmax of closeness over the batch. Published class: "probrandom", here "probability"."""

    def __post_init__(self):
        super().__post_init__()
        require(self.codebook == "free", f'codebook must be "free" for cvq, got {self.codebook!r}; leave it out')
        require(self.metric != "dot", 'metric must be "l2" or "cosine" for cvq, got "dot"')
        require(
            self.codebook_init != "kmeans",
            'codebook_init "kmeans" does not apply to cvq, whose codes move onto features from the first batch on; '
            'use "uniform"',
        )
        require(0 <= self.usage_decay < 1, f"usage_decay must lie in [0, 1), got {self.usage_decay}")
        require_choice("anchor", self.anchor, ANCHORS)


@register_quantizer("cvq", ClusteredVectorQuantizerConfig, label="CVQ")
class ClusteredVectorQuantizer(VectorQuantizer):
    """VQ whose codes are re-anchored after every training batch.

        p_k ← γ p_k + (1−γ) #{tokens of code k}/N,   α_k = exp(−10 K p_k/(1−γ) − 10⁻³)
        c_k ← (1 − α_k) c_k + α_k z_r(k),   r(k) by `anchor`

    An unused code has α ≈ 1 and jumps onto a feature; a code with its even share 1/K of the tokens has α = e⁻¹⁰⁰⁰.
    Source: Zheng and Vedaldi, "Online Clustered Codebook" (2023), §3; published CVQ-VAE code, VectorQuantiser. Its
    "random" draws from a pool of past features, here from the batch; its contrastive loss, off by default, is left out.
    """

    def __init__(self, config: ClusteredVectorQuantizerConfig):
        super().__init__(config)
        self.upkeep.append(ReAnchoring(config.codebook_size, config.usage_decay, config.anchor, config.metric))


class ReAnchoring(Upkeep):
    """Blends every code toward an anchor, the more the less it is used.

    Args:
        codebook_size: K.
        decay: γ.
        anchor: one of `ANCHORS`.
        metric: by which features are close to codes.
    Cost: N·K·D multiplications, as many as the choice of codes; memory one block of scores.
    """

    def __init__(self, codebook_size: int, decay: float, anchor: str, metric: str):
        super().__init__()
        self.decay, self.anchor, self.metric = decay, anchor, metric
        self.register_buffer("usage", torch.zeros(codebook_size, dtype=torch.float32))

    @torch.no_grad()
    def after(self, codes: nn.Module, features: Float[Tensor, "N D"], indices: Int[Tensor, " N"]) -> None:
        """Move usage and codes by one batch."""
        size = len(self.usage)
        hits = sum_over_processes(torch.bincount(indices, minlength=size).to(features.dtype))  # (K,)
        usage = self.usage.to(features.dtype).lerp(hits / hits.sum(), 1 - self.decay)
        self.usage.copy_(usage)
        codebook = codes().to(features.dtype)
        blend = torch.exp(-usage * size * 10 / (1 - self.decay) - 1e-3)[:, None]  # α, (K, 1)
        # The published code lets every process draw its own anchors; here codes stay equal everywhere.
        anchors = same_on_all_processes(features[self._anchors(codebook, features)])
        codes.replace(torch.arange(size, device=features.device), codebook * (1 - blend) + anchors * blend)

    def _anchors(self, codebook: Float[Tensor, "K D"], features: Float[Tensor, "N D"]) -> Int[Tensor, " K"]:
        """The token that each code is blended toward."""
        if self.anchor == "random":
            return torch.randint(len(features), (len(codebook),), device=features.device)
        if self.metric == "cosine":
            codebook, features = F.normalize(codebook, dim=1), F.normalize(features, dim=1)
        if self.anchor == "closest":
            return nearest_code(codebook, features, "dot" if self.metric == "cosine" else "l2")
        return _draw_tokens(codebook, features, self.metric)


def _draw_tokens(codebook: Float[Tensor, "K D"], features: Float[Tensor, "N D"], metric: str) -> Int[Tensor, " K"]:
    """A token per code from softmax_n(−‖z_n − c_k‖²), or from softmax_n⟨z_n, c_k⟩ for "cosine".

    Drawn as argmax of closeness plus Gumbel noise, which needs no normalisation and goes by blocks of codes.
    """
    # −‖z‖², (N,); ‖c‖² is the same for all tokens of a code.
    offset = -features.square().sum(1) if metric == "l2" else features.new_zeros(len(features))
    tokens = torch.empty(len(codebook), dtype=torch.int64, device=features.device)
    with blocks.full_precision(features.device):
        for rows, (scores, noise) in blocks.score_blocks(len(codebook), len(features), features, buffers=2):
            scale = 2 if metric == "l2" else 1
            torch.addmm(offset, codebook[rows], features.T, alpha=scale, out=scores)  # (R, N), one block
            noise.exponential_().clamp_min_(torch.finfo(noise.dtype).tiny).log_()
            tokens[rows] = blocks.best_codes(scores.sub_(noise))[1]
    return tokens
