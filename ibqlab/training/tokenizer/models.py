"""The networks of a run as they start: fresh, or from a checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibqlab.pretrained import read_checkpoint
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.discriminator import PatchDiscriminator
from ibqlab.training.ema import WeightAverage
from ibqlab.training.tokenizer.step import Models, TokenizerStep


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a checkpoint gives a run beside the weights that are already in its networks."""

    path: str
    """Where it lies."""
    discriminator: bool
    """Whether it held a discriminator."""
    tokenizer_average: dict[str, Tensor] | None
    """Averaged weights by parameter name, None if it holds none."""
    discriminator_average: dict[str, Tensor] | None
    """Likewise."""

    def load_averages(self, networks: TokenizerStep) -> None:
        """Averages go on where the checkpoint's stand; those that it lacks start at the checkpoint's weights."""
        _start_average(networks.average, self.tokenizer_average, networks.tokenizer)
        if networks.adversary and self.discriminator:
            _start_average(networks.adversary.average, self.discriminator_average, networks.adversary.discriminator)

    def describe(self) -> dict[str, Any]:
        """For provenance."""
        averages = "its averages" if self.tokenizer_average else "averages from its weights"
        return {"path": self.path, "discriminator": "its own" if self.discriminator else "fresh", "averages": averages}


def build_models(config: TrainConfig) -> tuple[Models, Start | None]:
    """Tokenizer, discriminator and LPIPS network of a run, weights drawn from its seed or read from its checkpoint.

    Raises:
        ValueError: a missing weight file, a checkpoint that does not fit the settings, images that are too small.
    """
    loss = config.loss
    perceptual = None
    if loss.perceptual_weight:
        from ibqlab.metrics.perceptual import load_lpips  # noqa: PLC0415 - needs a package that training alone does not

        perceptual = load_lpips(loss.perceptual_net, loss.perceptual_weights)
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.from_config(config.tokenizer)
    discriminator = None
    if loss.adversarial_weight:
        discriminator = PatchDiscriminator(loss.discriminator, config.tokenizer.autoencoder.in_channels)
        discriminator.check_size(config.data.image_size, config.data.image_size)
    models = Models(tokenizer, discriminator, perceptual)
    for network in models if config.precision == "64-true" else ():
        if network is not None:
            network.double()
    return models, _read_start(config, models) if config.start_from else None


def _read_start(config: TrainConfig, models: Models) -> Start:
    """Fill the networks from the checkpoint."""
    checkpoint = read_checkpoint(config.start_from)
    _fill(models.tokenizer, checkpoint.tokenizer, "tokenizer", config.start_from)
    if models.discriminator and checkpoint.discriminator:
        _fill(models.discriminator, checkpoint.discriminator, "loss.discriminator", config.start_from)
    return Start(
        path=config.start_from,
        discriminator=bool(checkpoint.discriminator),
        tokenizer_average=checkpoint.tokenizer_ema,
        discriminator_average=checkpoint.discriminator_ema,
    )


def _fill(module: torch.nn.Module, weights: dict[str, Tensor], setting: str, path: str) -> None:
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    stored = {name: tuple(value.shape) for name, value in weights.items()}
    differ = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
    if differ:
        name = differ[0]
        raise ValueError(
            f"start_from {path}: {len(differ)} tensors do not fit the settings under {setting}, first {name!r}: "
            f"{stored.get(name, 'none')} in the checkpoint, {expected.get(name, 'none')} by the settings. Change the "
            "settings to the checkpoint's, which `ibqlab inspect` prints"
        )
    module.load_state_dict(weights)


def _start_average(average: WeightAverage | None, stored: dict[str, Tensor] | None, module: torch.nn.Module) -> None:
    if average:
        average.load_state_dict(stored or {n: p.detach() for n, p in module.named_parameters() if p.requires_grad})
