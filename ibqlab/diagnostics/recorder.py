"""The recorder: what a run writes down about its codebook while it trains, cheaply enough to be always on.

Every step costs one copy of the step's indices into a ring and one write of the step's number per hit code; the
numbers are worked out from these at logged steps only, the expensive ones on a few hundred probe tokens.

Two kinds of usage stand in a row. `step_usage` is of the step's own tokens and remembers nothing; it stands beside
`step_usage_even`, what an evenly used codebook would show for so few tokens. `usage` is of a window of at least 10·K
tokens, which is many steps: it falls only when the window has forgotten, so it says how far and not when.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.processes import largest_over_processes, sum_over_processes
from ibqlab.diagnostics.geometry import (
    gradient_reach,
    measure_probe,
    norm_statistics,
)
from ibqlab.diagnostics.usage import count_indices, even_usage, perplexity, usage_by_age
from ibqlab.quantizers import Quantizer
from ibqlab.quantizers.codebooks import as_compared
from ibqlab.quantizers.composite import CompositeQuantizer

EARLY_STEPS = (1, 2, 3, 5, 10, 15, 20, 30, 50)
"""Training steps after which usage is measured on validation images whatever a run's settings: collapse is decided in
the first few, long before the first validation is due. Step 0 is always validated."""
FIRST_STEPS = EARLY_STEPS[-1]
"""Each of so many first steps has a row of metrics, so that the order in which measures fall can be read off."""


@dataclass(frozen=True, kw_only=True)
class PlainCodebook:
    """A codebook that is no quantizer of this library: its size, and how to read it when a row is due."""

    size: int
    """K, codes."""
    read: Callable[[], Tensor]
    """Gives the codebook (K, D) as it is now; of a tensor without rows only the device counts."""
    read_gradient: Callable[[], Tensor | None] = lambda: None
    """Gives the gradient of the last backward pass, a row per code, averaged over processes; None where there is
    none."""

    @property
    def codebook(self) -> Tensor:
        """The codes now."""
        return self.read()

    @property
    def codebook_gradient(self) -> Tensor | None:
        """Their gradient now."""
        return self.read_gradient()


class Recorder:
    """Follows the indices of a training run and reports on the codebook.

    Args:
        quantizer: whose codes are followed; a `PlainCodebook` for those of somebody else's model.
        window_tokens: length of the usage window over all processes, tokens; at least 10·K to mean something.
        probe_tokens: tokens on which distances and softmax perplexity are measured.
        processes: how many processes share the window.
        old_codes: of a codebook that was grown, how many codes it had before, the first ones; 0: it was not.
    """

    _alive: Tensor | None = None
    """Which codes the window held at the last report; None where that is not known."""
    _latest: Tensor | None = None
    """Indices that were observed last."""

    def __init__(
        self,
        quantizer: Quantizer | PlainCodebook,
        window_tokens: int,
        probe_tokens: int,
        processes: int = 1,
        old_codes: int = 0,
    ):
        self.old_codes = old_codes
        self.quantizer = quantizer
        self.probe_tokens = probe_tokens
        self._is_composite = isinstance(quantizer, CompositeQuantizer)
        device = self._measured()[0].codebook.device
        self.codebook_size = quantizer.size if isinstance(quantizer, PlainCodebook) else quantizer.config.codebook_size
        self.window = torch.full((-(-window_tokens // processes),), -1, dtype=torch.int32, device=device)
        self.last_hit = torch.full((self.codebook_size,), -1, dtype=torch.int64, device=device)
        self.cursor = 0
        self._step, self._step_tokens = 0, 0
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def before_step(self) -> None:
        """At a step that will be logged: keep the codebook that its tokens will meet.

        All numbers of a row then belong to one forward pass, and what a moving average moves can be seen.
        Cost: a copy of the codebook until `report`; of a composite, of its parts' codebooks.
        """
        self._before = [one.codebook.detach().clone() for one in self._measured()]

    @torch.no_grad()
    def observe(self, indices: Int[Tensor, "..."], step: int) -> None:
        """Take in the indices that a step chose (step: number of the step being done, counted from 1)."""
        flat = self._latest = indices.reshape(-1)
        self.last_hit[flat] = step
        self._step_tokens = flat.numel() + (self._step_tokens if step == self._step else 0)
        self._step = step
        # The window is a ring: what does not fit before its end goes to its beginning.
        latest = flat[-len(self.window) :].to(torch.int32)
        end = min(len(latest), len(self.window) - self.cursor)
        self.window[self.cursor : self.cursor + end] = latest[:end]
        self.window[: len(latest) - end] = latest[end:]
        self.cursor = (self.cursor + len(latest)) % len(self.window)

    @torch.no_grad()
    def counts(self) -> Int[Tensor, " K"]:
        """Hits per code among the window's tokens, over all processes."""
        filled = self.window[self.window >= 0].long()
        return sum_over_processes(count_indices(filled, self.codebook_size))

    @torch.no_grad()
    def last_hits(self) -> Int[Tensor, " K"]:
        """The step at which each code was last chosen, −1 if never, over all processes."""
        return largest_over_processes(self.last_hit.clone())

    @torch.no_grad()
    def report(self, features: Float[Tensor, "B D h w"], step: int) -> dict[str, Any]:
        """One row of numbers about the codebook, after a step's backward pass and update.

        All but the window's belong to the step's own forward pass: its features, and the codebook before the update
        where `before_step` was called. What falls first can therefore be read off the rows.

        Args:
            features: the encoder's output of the step.
            step: the step just done.
        Returns:
            step_usage (share of codes hit by this step's step_tokens tokens, over all processes) with step_usage_even
            (what even use would show for them); usage (share of codes hit in the window) with usage_tokens, perplexity
            (codes, of the window), dead_codes (not hit in the window), steps_since_hit (median over codes; a code never
            hit counts from step 0), gradient_reach (share of codes whose gradient exceeds 10⁻³ of the largest; for
            moving averages, whose displacement does), norms (mean and spread over codes and probe tokens),
            softmax_perplexity (codes per token), distances between codes and features (L2, mean over each side),
            winner_margin and logit_margin (lead of the nearest code and of the largest z·C). Where it is known besides:
            quantization_error (mean squared difference of probe tokens and their codes), code_drift (distance that the
            step moved a code, mean), births and deaths (codes that the window has gained and lost since the last
            report; while it fills, many are born). Of a grown codebook usage_old and usage_new, usage of the codes
            before and of those behind them, and the same with step_. Usage of a composite is that of its combinations;
            what is measured of its codes is the mean over its parts, each with the features that it gets, because the
            codebook of all combinations would be too large to make.
        """
        features = as_compared(self.quantizer, features.detach().float())
        dim = features.shape[1]
        tokens = features.detach().float().permute(0, 2, 3, 1).reshape(-1, dim)  # (N, D)
        every = max(1, len(tokens) // self.probe_tokens)
        probe = tokens[::every][: self.probe_tokens]
        counts, last_hit = self.counts(), self.last_hits()
        hit = int((counts > 0).sum())
        local_tokens = last_hit.new_tensor(self._step_tokens if step == self._step else 0)
        step_tokens = int(sum_over_processes(local_tokens))
        feature_norms = norm_statistics(probe)
        row = {
            # A code that this step hit was last hit now.
            "step_usage": float((last_hit == step).float().mean()) if step_tokens else 0.0,
            "step_tokens": step_tokens,
            "step_usage_even": even_usage(len(counts), step_tokens),
            "usage": hit / len(counts),
            "usage_tokens": int(counts.sum()),
            "perplexity": perplexity(counts),
            "dead_codes": len(counts) - hit,
            "steps_since_hit": float((step - last_hit.clamp_min(0)).double().median()),
            "feature_norm_mean": feature_norms.mean,
            "feature_norm_std": feature_norms.std,
            **self._of_codes(features, probe),
            **usage_by_age(counts, self.old_codes),
        }
        if step_tokens:
            by_age = usage_by_age((last_hit == step).long(), self.old_codes)
            row |= {f"step_{key}": value for key, value in by_age.items()}
        if self._latest is not None and len(self._latest) == len(tokens):
            chosen = self._chosen_codes(features)[::every][: self.probe_tokens]
            row["quantization_error"] = float((probe - chosen).square().mean())
        alive = counts > 0
        if self._alive is not None:
            row["births"] = int((alive & ~self._alive).sum())
            row["deaths"] = int((self._alive & ~alive).sum())
        self._before, self._alive = None, alive
        return row

    @torch.no_grad()
    def gradient_norms(self) -> Float[Tensor, " K"] | None:
        """Norm of each code's gradient in the last backward pass, for a snapshot of the same step.

        None where codes take no gradient (moving averages, frozen codes), where it is not finite, and for a composite,
        whose parts have gradients of their own. Every process must call it.
        """
        if self._is_composite:
            return None
        gradient = self._movement(self.quantizer, None)
        if gradient is None:
            return None
        rows = gradient.flatten(0, -2).float()
        # Squares of small float32 gradients vanish; dividing by the largest entry first keeps them.
        largest = rows.abs().max()
        norms = torch.linalg.vector_norm(rows / largest.clamp_min(1e-38), dim=1) * largest
        return norms if torch.isfinite(norms).all() else None

    def _measured(self) -> list[Quantizer | PlainCodebook]:
        """Whose codebooks are measured: the parts of a composite, one per digit of an index, else the quantizer."""
        return self.quantizer.parts if self._is_composite else [self.quantizer]

    def _of_codes(self, features: Float[Tensor, "B D h w"], probe: Float[Tensor, "n D"]) -> dict[str, float]:
        """What a row says of codes and their distances to features, the mean over all that are measured."""
        measured, probes = self._measured(), [probe]
        if self._is_composite:
            images = -(-self.probe_tokens // features[0, 0].numel())
            probes = self.quantizer.part_features(features[:images].detach().float())
            probes = [tokens[:: max(1, len(tokens) // self.probe_tokens)][: self.probe_tokens] for tokens in probes]
        before = self._before or [None] * len(measured)
        rows = [self._of_codebook(*of_one) for of_one in zip(measured, probes, before, strict=True)]
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def _of_codebook(
        self, quantizer: Quantizer | PlainCodebook, probe: Float[Tensor, "n d"], before: Float[Tensor, "k d"] | None
    ) -> dict[str, float]:
        """The same of one codebook."""
        codebook = quantizer.codebook if before is None else before
        moved = None if before is None else quantizer.codebook - before
        norms = norm_statistics(codebook)
        row = {
            "gradient_reach": gradient_reach(self._movement(quantizer, moved)),
            "code_norm_mean": norms.mean,
            "code_norm_std": norms.std,
            **measure_probe(probe, codebook)._asdict(),
        }
        if moved is not None:
            row["code_drift"] = float(torch.linalg.vector_norm(moved.float(), dim=1).mean())
        return row

    def _chosen_codes(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "N D"]:
        """Vectors of the latest indices; of a composite as its parts' codes are now."""
        if self._is_composite:
            grid = self._latest.view(len(features), *features.shape[2:])
            return self.quantizer.look_up(grid).flatten(0, 2).float()
        return (self.quantizer.codebook if self._before is None else self._before[0])[self._latest]

    @staticmethod
    def _movement(quantizer: Quantizer | PlainCodebook, moved: Tensor | None) -> Tensor | None:
        """What moves the codes in a step: their gradient; where they take none, what they have moved."""
        if isinstance(quantizer, PlainCodebook):
            return quantizer.codebook_gradient
        codebook = quantizer.codebook
        if any(p.requires_grad for p in quantizer.codes.parameters()):
            gradient = quantizer.codebook_gradient
            # Only gradients of parameters have been averaged over processes.
            averaged = gradient is None or isinstance(codebook, nn.Parameter)
            return gradient if averaged else sum_over_processes(gradient.clone())
        return moved

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: this process's window and last hits, and which codes lived at the last report."""
        return {
            "window": self.window,
            "last_hit": self.last_hit,
            "cursor": self.cursor,
            "alive": self._alive,
            "old_codes": self.old_codes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a stored state; an older one does not say which codes lived, nor that it was grown."""
        self.window.copy_(state["window"])
        self.last_hit.copy_(state["last_hit"])
        self.cursor, self.old_codes = state["cursor"], state.get("old_codes", 0)
        alive = state.get("alive")
        self._alive = None if alive is None else alive.to(self.window.device)
