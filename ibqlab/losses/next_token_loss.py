"""The generator's training loss as a module."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.generator import AnyGenerator


class NextTokenLoss(nn.Module):
    """A generator's loss as the module that wrappers for several processes ask for.

    Args:
        generator: whose loss; its weights are this module's, under `generator.`.
    """

    def __init__(self, generator: AnyGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(
        self, indices: Int[Tensor, "B T"], labels: Int[Tensor, " B"], reduction: Literal["mean", "none"] = "mean"
    ) -> Float[Tensor, ""] | Float[Tensor, "B T"]:
        """Nats per token; see `Generator.loss`."""
        return self.generator.loss(indices, labels, reduction=reduction)
