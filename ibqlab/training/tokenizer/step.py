"""One step of a tokenizer's training: who learns from a batch, in which order, and what a checkpoint keeps of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ibqlab.data import to_model_range
from ibqlab.losses.errors import NonFinite, count_nonfinite
from ibqlab.losses.tokenizer_loss import SUM, name_first_nonfinite, tokenizer_loss
from ibqlab.quantizers import IndexBackpropQuantizer
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokenizer import Tokenizer, TokenizerOutput
from ibqlab.tokenizer.discriminator import PatchDiscriminator
from ibqlab.training.ema import WeightAverage
from ibqlab.training.optimisation import build_optimizer, learning_rate_at, named_moments, set_learning_rate
from ibqlab.training.speed import many_graphs, prepare_tokenizer
from ibqlab.training.tokenizer.discriminator_training import Adversary

Losses = dict[str, Float[Tensor, ""]]


class Models(NamedTuple):
    """The networks of a run, on the CPU."""

    tokenizer: Tokenizer
    discriminator: PatchDiscriminator | None
    """None where the adversarial loss is off."""
    perceptual: nn.Module | None
    """LPIPS; None where it is off."""


class TokenizerStep:
    """Tokenizer and adversary with their optimisers and averages.

    As published: the discriminator learns from images and reconstructions, then judges the same reconstructions with
    its new weights, the tokenizer learns, and the averages follow. A batch in parts is rebuilt once more, without a
    graph, for the discriminator to learn from all of it first.

    Args:
        config: of the run.
        models: networks as they start.
        fabric: the run's Fabric.
    """

    def __init__(self, config: TrainConfig, models: Models, fabric: Any):
        self.config, self.fabric = config, fabric
        prepare_tokenizer(config.speed, *models)
        self.rates = config.scaled_optimizer
        """The optimiser's settings, its learning rate at this run's batch size."""
        optimizer = build_optimizer(models.tokenizer, self.rates)
        self.model, self.optimizer = fabric.setup(models.tokenizer, optimizer)
        self.tokenizer: Tokenizer = self.model.module
        self.average = _weight_average(self.tokenizer, config) if config.ema_decay else None
        self.adversary = Adversary(config, models.discriminator, fabric) if models.discriminator else None
        self.perceptual = fabric.to_device(models.perceptual) if models.perceptual else None
        self.learning_rate = self.rates.learning_rate
        """Of the last step."""

    def learn(
        self, step: int, images: UInt8[Tensor, "B 3 H W"], observe: Callable[[Int[Tensor, "b h w"]], None]
    ) -> tuple[Losses, Float[Tensor, "b D h w"]]:
        """Everything learns from a batch. The tokenizer's gradients stay, for whoever wants to look at them.

        The one moment that waits for the device is the look at whether all losses are numbers. It comes when both
        networks' gradients are under way, so that the device has work meanwhile.

        Args:
            step: number of the step, from 1.
            images: this process's share of the batch, as stored.
            observe: called with the indices of each part.
        Returns:
            Mean loss terms by their names in metrics.jsonl, and the features of the last part.
        Raises:
            NonFinite: a loss is NaN or infinite; nothing has learned from it. A discriminator that learns first has
                learned, where only a loss of the tokenizer is.
        """
        with many_graphs(self.config.speed):
            return self._learn(step, images, observe)

    def _learn(
        self, step: int, images: UInt8[Tensor, "B 3 H W"], observe: Callable[[Int[Tensor, "b h w"]], None]
    ) -> tuple[Losses, Float[Tensor, "b D h w"]]:
        config = self.config
        parts = images.chunk(config.accumulate)
        rate = self.learning_rate = learning_rate_at(step, self.rates)
        adversary = self.adversary if step > config.loss.discriminator_start else None
        judge = adversary.judge if adversary else None
        losses: Losses = {}
        if adversary and config.loss.discriminator_first and len(parts) > 1:
            # It must have learned from the whole batch before it judges the first part.
            losses |= adversary.learn([self._rebuild(part) for part in parts], rate)
        pairs = []  # (B/parts, C, H, W) images with their reconstructions, without a graph
        links = []  # of each part what `name_first_nonfinite` goes through
        for number, part in enumerate(parts, start=1):
            pictures = self._pictures(part)
            # Processes exchange gradients once, with the last part.
            with self.fabric.no_backward_sync(self.model, enabled=number < len(parts)):
                out = self.model(pictures)
                pairs.append((pictures, out.reconstruction.detach()))
                if adversary and config.loss.discriminator_first and len(parts) == 1:
                    losses |= adversary.learn(pairs, rate)
                terms = self._backward(pictures, out, judge, len(parts))
            # Without the sum, which is never the first.
            summands = {name: term for name, term in terms.items() if name != "loss"}
            links.append((pictures, self.tokenizer, out, summands))
            observe(out.quantizer.indices)
            for name, value in terms.items():
                losses[name] = losses.get(name, 0.0) + value.detach() / len(parts)
        nonfinite = count_nonfinite(losses["loss"])
        if adversary and not config.loss.discriminator_first:
            losses |= adversary.learn(pairs, rate, nonfinite)
        self._require_finite(nonfinite, adversary, links)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        for average in (self.average, self.adversary and self.adversary.average):
            if average:
                average.update()
        return losses, out.features

    def tensors(self) -> dict[str, Tensor]:
        """All learned tensors and Adam's averages with names for error messages."""
        state = {f"the weight {name!r}": value for name, value in self.tokenizer.state_dict().items()}
        state |= named_moments(self.tokenizer, self.optimizer)
        return state | (self.adversary.tensors() if self.adversary else {})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, under the checkpoint's own keys."""
        state = {
            "model": self.tokenizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.average.state_dict() if self.average else {},
        }
        return state | (self.adversary.state_dict() if self.adversary else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.tokenizer.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["ema"])
        if self.adversary:
            self.adversary.load_state_dict(state)

    def _backward(self, pictures: Tensor, out: TokenizerOutput, judge: Callable | None, parts: int) -> Losses:
        """Gradients of one part; its loss and terms."""
        loss, terms = tokenizer_loss(
            self.config.loss,
            pictures,
            out,
            perceptual=self._perceive if self.perceptual else None,
            judge=judge,
            last_layer=self.tokenizer.decoder.last_layer,
        )
        self.fabric.backward(loss / parts)
        return {"loss": loss, **terms}

    def _require_finite(self, nonfinite: Tensor, adversary: Adversary | None, links: Sequence[tuple]) -> None:
        """Wait for the device, and stop at a loss that is no number, with the first tensor on the way to it."""
        if not (nonfinite + adversary.nonfinite if adversary else nonfinite):
            return
        learned_first = self.config.loss.discriminator_first
        if adversary and adversary.nonfinite and (learned_first or not nonfinite):
            raise NonFinite(adversary.culprit())
        culprits = [name_first_nonfinite(*part) for part in links]
        raise NonFinite(next((culprit for culprit in culprits if culprit != SUM), SUM))

    def _perceive(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """LPIPS per image, its network in the run's precision."""
        with self.fabric.autocast():
            return self.perceptual(images, reconstructions).to(images.dtype)

    @torch.no_grad()
    def _rebuild(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """A part and its reconstruction, as training gives it but without the codebook's upkeep."""
        pictures = self._pictures(part)
        with self.tokenizer.quantizer.without_upkeep():
            return pictures, self.model(pictures).reconstruction

    def _pictures(self, part: Tensor) -> Tensor:
        """Stored pixels in the model's range, on the device, in the weights' type."""
        # From pinned memory the copy is queued behind the step before instead of waiting for it.
        pictures = to_model_range(part.to(self.fabric.device, non_blocking=True))
        return pictures.to(self.tokenizer.decoder.last_layer.dtype, memory_format=self.config.speed.memory_format)


def _weight_average(tokenizer: Tokenizer, config: TrainConfig) -> WeightAverage:
    """Averages of a tokenizer's weights, the codebook's from where the config says."""
    placeholder = config.ema_codebook_start == "placeholder" and isinstance(tokenizer.quantizer, IndexBackpropQuantizer)
    if not placeholder:
        return WeightAverage(tokenizer, config.ema_decay)
    codebook = tokenizer.quantizer.codes.weight
    size = len(codebook)
    # The published code makes its averages before the codebook gets its own start, so they begin at U(±1/K).
    start = torch.empty(codebook.shape).uniform_(
        -1 / size, 1 / size, generator=torch.Generator().manual_seed(config.seed)
    )
    return WeightAverage(tokenizer, config.ema_decay, {"quantizer.codes.weight": start})
