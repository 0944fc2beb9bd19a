"""Axis 3, what is done to codes between steps: moving averages, a k-means start, revival of dead codes.

Upkeep has `before(codes, features)`, called ahead of the assignment, and `after(codes, features, indices)`, called
behind it; both only in training. Where several processes train together, every process makes the same change.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.processes import same_on_all_processes, sum_over_processes
from ibqlab.quantizers.estimators import nearest_code


class Upkeep(nn.Module):
    """Does nothing; subclasses override one of the two moments."""

    def before(self, codes: nn.Module, features: Float[Tensor, "N D"]) -> None:
        """Called ahead of the assignment of a training batch."""

    def after(self, codes: nn.Module, features: Float[Tensor, "N D"], indices: Int[Tensor, " N"]) -> None:
        """Called behind the assignment of a training batch."""


class MovingAverage(Upkeep):
    """Feeds each batch to an `EmaCodebook`."""

    def after(self, codes: nn.Module, features: Float[Tensor, "N D"], indices: Int[Tensor, " N"]) -> None:
        """Update the averages."""
        codes.update(features, indices)


class KMeansStart(Upkeep):
    """Replaces the codebook once, before the first training batch, by k-means centres of that batch.

    With fewer tokens than codes the remaining codes start at tokens drawn at random, slightly jittered.
    """

    def __init__(self, iterations: int = 10):
        super().__init__()
        self.iterations = iterations
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def before(self, codes: nn.Module, features: Float[Tensor, "N D"]) -> None:
        """Cluster the first batch (the first process's, where there are several)."""
        if self.started:
            return
        size = len(codes())
        # Each token starts one centre before any token starts a second one.
        draw = torch.randint(len(features), (size,), device=features.device)  # (K,) of N tokens
        draw[: min(size, len(features))] = torch.randperm(len(features), device=features.device)[:size]
        # Two centres at one place would never part: of equal distances the lower index wins every token.
        spread = features.std() * 1e-3
        centres = features[draw] + spread * torch.randn_like(features[draw])  # (K, D)
        for _ in range(self.iterations):
            indices = nearest_code(features, centres)
            hits = torch.bincount(indices, minlength=size).to(features.dtype)[:, None]
            sums = torch.zeros_like(centres).index_add_(0, indices, features)
            # A centre without tokens stays where it is: its mean would be 0/0.
            centres = torch.where(hits > 0, sums / hits.clamp_min(1), centres)
        codes.replace(torch.arange(size, device=centres.device), same_on_all_processes(centres))
        self.started.fill_(True)


class DeadCodeRevival(Upkeep):
    """Moves a code that no token has chosen for `patience` steps onto a token of the current batch.

    Args:
        codebook_size: K.
        patience: training steps without a hit before a code is moved, at least 1.
    Source: the "restart" of Jukebox (Dhariwal et al., 2020), counted in steps as DESIGN of the recorder counts them.
    """

    def __init__(self, codebook_size: int, patience: int):
        super().__init__()
        self.patience = patience
        self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.int64))

    @torch.no_grad()
    def after(self, codes: nn.Module, features: Float[Tensor, "N D"], indices: Int[Tensor, " N"]) -> None:
        """Count idle steps and move the codes whose patience has run out, at most one per token of the batch."""
        # Hits of all processes, so that a code that lives elsewhere is not moved here.
        hits = sum_over_processes(torch.bincount(indices, minlength=len(self.idle)))  # (K,)
        self.idle.add_(1)[hits > 0] = 0
        dead = (self.idle >= self.patience).nonzero()[:, 0][: len(features)]
        if not len(dead):
            return
        # Different tokens for different codes: equal codes would tie, and the higher index would die again at once.
        tokens = torch.randperm(len(features), device=features.device)[: len(dead)]
        codes.replace(dead, same_on_all_processes(features[tokens]))
        self.idle[dead] = 0
