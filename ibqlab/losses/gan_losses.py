"""Losses between a tokenizer and the discriminator that judges it, as functions of the discriminator's logits."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.processes import average_over_processes

Logits = Float[Tensor, "B 1 h w"]
Scalar = Float[Tensor, ""]


def hinge_loss(real: Logits, fake: Logits) -> Scalar:
    """½ (mean max(0, 1 − real) + mean max(0, 1 + fake)) over all patches: the published discriminator loss.

    1 while it has no opinion (logits 0), 0 once every patch is told apart by a margin of 1.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Logits, fake: Logits) -> Scalar:
    """½ (mean softplus(−real) + mean softplus(fake)) over all patches: the original GAN's cross-entropy, halved."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def non_saturating_loss(real: Logits, fake: Logits) -> Scalar:
    """softplus(−mean real) + softplus(mean fake), means over an image's patches first; Open-MAGVIT2's alternative."""
    return F.softplus(-_per_image(real)).mean() + F.softplus(_per_image(fake)).mean()


DISCRIMINATOR_LOSS_FUNCTIONS: dict[str, Callable[[Logits, Logits], Scalar]] = {
    "hinge": hinge_loss,
    "vanilla": vanilla_loss,
    "non_saturating": non_saturating_loss,
}


def generator_loss(fake: Logits) -> Scalar:
    """softplus(−mean of an image's patch logits), averaged over images: the published non-saturating loss.

    ln 2 for an undecided discriminator, 0 for one that is fooled. The mean over patches comes before the softplus.
    """
    return F.softplus(-_per_image(fake)).mean()


def adaptive_weight(likelihood: Scalar, adversarial: Scalar, last_layer: Tensor) -> Scalar:
    """‖∂likelihood/∂w‖ / (‖∂adversarial/∂w‖ + 1e-4), clamped to 0 … 10,000: both losses pull equally at the last layer.

    Args:
        likelihood: L1 plus perceptual loss; its graph is kept.
        adversarial: `generator_loss`; its graph is kept.
        last_layer: w, the weight of the decoder's last convolution.
    Returns:
        The weight, without a gradient.
    Source: VQGAN (Esser et al., 2021), eq. 7; in the published IBQ code, but unused by its configurations.
    """
    # Gradients have the layer's shape (3, C, 3, 3); only their lengths count. The graphs stay for the backward pass.
    lengths = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (likelihood, adversarial)]
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(0, 1e4).detach()


class LeCam:
    """LeCAM regularisation: neither side of the discriminator may run away from where the other has been.

        r ← d·r + (1−d)·mean D(x),   f ← d·f + (1−d)·mean D(x̂),
        value = mean max(0, D(x) − f)² + mean max(0, r − D(x̂))²

    The averages move first and carry no gradient. They start at 0, are taken over all processes (published: per
    process) and belong into a checkpoint (published: lost at a resume).

    Args:
        decay: d, in [0, 1). Published: 0.999.
    Source: Tseng et al., 2021; published LeCAM_EMA.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.real = self.fake = torch.zeros((), dtype=torch.float64)

    def __call__(self, real: Logits, fake: Logits) -> Scalar:
        """Move the averages by this step's logits and return the regulariser."""
        means = torch.stack([real.detach().double().mean(), fake.detach().double().mean()])
        means = average_over_processes(means)
        self.real = self.decay * self.real.to(means.device) + (1 - self.decay) * means[0]
        self.fake = self.decay * self.fake.to(means.device) + (1 - self.decay) * means[1]
        above = F.relu(real - self.fake.to(real.dtype)).square().mean()
        below = F.relu(self.real.to(fake.dtype) - fake).square().mean()
        return above + below

    def state_dict(self) -> dict[str, Tensor]:
        """Both averages."""
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over stored averages."""
        self.real, self.fake = state["real"].double(), state["fake"].double()


def _per_image(logits: Logits) -> Float[Tensor, " B"]:
    return logits.flatten(1).mean(1)
