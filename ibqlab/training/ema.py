"""Exponential moving average of weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """One shadow per trainable parameter: s ← s − (1 − d)(s − p) after every step, without warm-up.

    Args:
        module: whose parameters to follow.
        decay: d in [0, 1), kept as float32 like the published one.
        starts: where some shadows start, by parameter name; the others start at their parameter.
    """

    def __init__(self, module: nn.Module, decay: float, starts: Mapping[str, Tensor] | None = None):
        self.decay = float(torch.tensor(decay, dtype=torch.float32))
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadows = {name: p.detach().clone() for name, p in self._parameters.items()}
        for name, start in (starts or {}).items():
            self.shadows[name].copy_(start)

    @torch.no_grad()
    def update(self) -> None:
        """Follow one optimiser step."""
        # lerp(s, p, 1 − d) = s + (1 − d)(p − s), all shadows in one kernel.
        torch._foreach_lerp_(list(self.shadows.values()), list(self._parameters.values()), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The shadows by parameter name."""
        return self.shadows

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over stored shadows; names must match."""
        if state.keys() != self.shadows.keys():
            raise ValueError(f"averaged weights do not match the model: {sorted(state.keys() ^ self.shadows.keys())}")
        for name, shadow in self.shadows.items():
            shadow.copy_(state[name])
