"""The tokenizer's adversary: discriminator, its optimiser, its regulariser and its averaged weights.

As published, the discriminator is called three times per step in training mode (real images and reconstructions to
learn, reconstructions once more to judge), and each call moves its batch norms' running statistics. With several
processes those statistics are each process's own, as published; a checkpoint keeps the first one's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.losses.errors import count_nonfinite
from ibqlab.losses.gan_losses import DISCRIMINATOR_LOSS_FUNCTIONS, LeCam, generator_loss
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokenizer.discriminator import PatchDiscriminator
from ibqlab.training.ema import WeightAverage
from ibqlab.training.optimisation import build_optimizer, named_moments, set_learning_rate

Pair = tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]
"""Images and their reconstructions, without a graph."""


class Adversary:
    """A discriminator in training.

    Args:
        config: of the run; reads loss, optimizer and ema_decay.
        discriminator: fresh or from a checkpoint, not yet on a device.
        fabric: the run's Fabric.
    """

    def __init__(self, config: TrainConfig, discriminator: PatchDiscriminator, fabric: Any):
        self.config, self.fabric, self.discriminator = config.loss, fabric, discriminator
        self.model, self.optimizer = fabric.setup(
            _Both(discriminator), build_optimizer(discriminator, config.scaled_optimizer)
        )
        discriminator.train()
        self.average = WeightAverage(discriminator, config.ema_decay) if config.ema_decay else None
        self.lecam = LeCam(config.loss.lecam_decay)
        self.nonfinite = torch.zeros((), dtype=torch.int64)
        """How many losses of the last `learn` were NaN or infinite, on any process; on the device."""
        self._terms: list[dict[str, Tensor]] = []

    def learn(
        self, pairs: Sequence[Pair], learning_rate: float, nonfinite: Int[Tensor, ""] | None = None
    ) -> dict[str, Tensor]:
        """One optimiser step on telling images from reconstructions; the gradients of several pairs add up.

        Weights stay as they are where a loss is NaN or infinite. The device sees to that: nothing here waits for it.
        Whoever wants to know looks at `nonfinite`, and asks `culprit` then.

        Args:
            pairs: the parts of a batch.
            learning_rate: of this step.
            nonfinite: above 0 where the weights shall stay whatever the losses are.
        Returns:
            Unweighted terms by their names in metrics.jsonl, averaged over the pairs: discriminator, lecam (where it
            is on), and the mean logits.
        """
        config = self.config
        sums: dict[str, Tensor] = {}
        self.nonfinite, self._terms = torch.zeros((), dtype=torch.int64, device=pairs[0][0].device), []
        for number, (images, reconstructions) in enumerate(pairs, start=1):
            with self.fabric.no_backward_sync(self.model, enabled=number < len(pairs)):
                real, fake = self.model(images, reconstructions)
                terms = {"discriminator": DISCRIMINATOR_LOSS_FUNCTIONS[config.discriminator_loss](real, fake)}
                loss = terms["discriminator"]
                if config.lecam_weight:
                    terms["lecam"] = self.lecam(real, fake)
                    loss = loss + config.lecam_weight * terms["lecam"]
                self.fabric.backward(loss / len(pairs))
            self.nonfinite = self.nonfinite + count_nonfinite(loss)
            self._terms.append({name: term.detach() for name, term in terms.items()})
            terms |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(pairs)
        set_learning_rate(self.optimizer, learning_rate)
        stays = self.nonfinite if nonfinite is None else self.nonfinite + nonfinite
        # Read on the device by torch's fused Adam, which was given it for gradient scaling: other than 0, no step.
        self.optimizer.optimizer.found_inf = (stays > 0).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    def culprit(self) -> str:
        """The first term of the last `learn` that is NaN or infinite, for an error message; asked where one is."""
        names = (name for terms in self._terms for name, term in terms.items() if not torch.isfinite(term))
        return f"the discriminator's {next(names, 'loss')!r}"

    def judge(self, reconstructions: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
        """The generator's loss on reconstructions, with a gradient to them and none to the discriminator."""
        self.discriminator.requires_grad_(False)
        with self.fabric.autocast():
            logits = self.discriminator(reconstructions)
        self.discriminator.requires_grad_(True)
        return generator_loss(logits if logits.dtype == torch.float64 else logits.float())

    def tensors(self) -> dict[str, Tensor]:
        """Weights, statistics and Adam's averages with names for error messages."""
        state = {f"the discriminator's {name!r}": value for name, value in self.discriminator.state_dict().items()}
        return state | named_moments(self.discriminator, self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, under the checkpoint's own keys."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": self.optimizer.state_dict(),
            "discriminator_ema": self.average.state_dict() if self.average else {},
            "lecam": self.lecam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["discriminator_optimizer"])
        self.lecam.load_state_dict(state["lecam"])
        if self.average:
            self.average.load_state_dict(state["discriminator_ema"])


class _Both(nn.Module):
    """The two calls of a discriminator's step as one, because distributed training wants one forward per backward."""

    def __init__(self, discriminator: PatchDiscriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(images), self.discriminator(reconstructions)
