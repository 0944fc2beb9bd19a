"""VQ with moving averages whose starved codes restart on tokens: the baseline that the field's libraries train with."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.base.processes import same_on_all_processes
from ibqlab.quantizers.base import register_quantizer
from ibqlab.quantizers.upkeep import Upkeep
from ibqlab.quantizers.vq import VectorQuantizer, VectorQuantizerConfig


@dataclass(frozen=True, kw_only=True)
class RevivedVectorQuantizerConfig(VectorQuantizerConfig):
    """VQ with moving averages and revival, as Jukebox has it."""

    codebook: str = "ema"
    """Always "ema": the averages count the hits that revival looks at."""
    codebook_init: str = "normal"
    """As in every quantizer. Jukebox starts at tokens of the first batch; "kmeans" is the nearest to that."""
    beta_on: str = "encoder"
    """As in every quantizer; averages have no side of their own, so β weighs the commitment."""
    revive_below: float = 1.0
    """Average hits per step below which a code restarts, ≥ 0; 0 never. Published: 1 (Jukebox), 2
    (vector-quantize-pytorch). It counts tokens of all processes, so large batches revive less."""

    def __post_init__(self):
        super().__post_init__()
        require(
            self.codebook == "ema",
            f'codebook must be "ema" for vq_ema_revived; got {self.codebook!r}. Use the quantizer "vq" with '
            "revive_after for codes that learn by gradient",
        )
        require(self.revive_below >= 0, f"revive_below must be ≥ 0 hits, got {self.revive_below}")


@register_quantizer("vq_ema_revived", RevivedVectorQuantizerConfig, label="VQ, moving average, revived")
class RevivedVectorQuantizer(VectorQuantizer):
    """Moving averages as in `vq_ema`; a code with n_k below a threshold becomes a token of the batch.

        n_k ← γ n_k + (1−γ) #{tokens of code k},   code_k ← z_r for a random token r, n_k ← τ   where n_k < τ

    Source: Jukebox (Dhariwal et al., 2020), §3.1, "random restarts"; published Jukebox code, threshold 1, which leaves
    n_k as it is. The restart of n_k at τ is that of vector-quantize-pytorch: without it a restarted code moves again
    at every step until its average has grown.
    """

    def __init__(self, config: RevivedVectorQuantizerConfig):
        super().__init__(config)
        if config.revive_below:
            self.upkeep.append(UsageRevival(config.revive_below))


class UsageRevival(Upkeep):
    """Restarts the codes of an `EmaCodebook` whose average hits have fallen below a threshold.

    Args:
        threshold: average hits per step, > 0.
    """

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def after(self, codes: nn.Module, features: Float[Tensor, "N D"], indices: Int[Tensor, " N"]) -> None:
        """Move starved codes, at most one per token of the batch; which of them, where there are more, is random."""
        starved = (codes.hits < self.threshold).nonzero()[:, 0]
        if not len(starved):
            return
        if len(starved) > len(features):
            chosen = torch.randperm(len(starved), device=features.device)[: len(features)]
            starved = starved[same_on_all_processes(chosen)]
        # Different tokens for different codes: equal codes would tie, and the higher index would starve again.
        tokens = torch.randperm(len(features), device=features.device)[: len(starved)]
        vectors = same_on_all_processes(features[tokens]).to(codes.weight.dtype)
        codes.replace(starved, vectors)
        codes.hits[starved] = self.threshold
        codes.sums[starved] = vectors * self.threshold
