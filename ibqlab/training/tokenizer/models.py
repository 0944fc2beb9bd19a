"""The networks of a run as they start: fresh, or from a checkpoint."""

import torch
from torch import Tensor

from ibqlab.pretrained import Checkpoint, read_checkpoint
from ibqlab.quantizers.methods.vqgan_lc import weights_follow
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.discriminator import PatchDiscriminator
from ibqlab.training.tokenizer.step import Models, TokenizerStep


def build_models(config: TrainConfig, resumes: bool = False) -> tuple[Models, Checkpoint | None]:
    """Tokenizer, discriminator and LPIPS network of a run, weights drawn from its seed or read from its checkpoint.

    Args:
        config: of the run.
        resumes: whether the run's own checkpoint is loaded into the networks afterwards.
    Returns:
        The networks, and the checkpoint that they start from, whose averages `load_averages` takes over.
    Raises:
        ValueError: a missing weight file, a checkpoint that does not fit the settings, images that are too small.
    """
    loss = config.loss
    perceptual = None
    if loss.perceptual_weight:
        from ibqlab.metrics.perceptual import load_lpips  # noqa: PLC0415 - needs a package that training alone does not

        perceptual = load_lpips(loss.perceptual_net, loss.perceptual_weights)
    torch.manual_seed(config.seed)
    with weights_follow(resumes or bool(config.start_from)):
        tokenizer = Tokenizer.from_config(config.tokenizer)
    discriminator = None
    if loss.adversarial_weight:
        discriminator = PatchDiscriminator(loss.discriminator, config.tokenizer.autoencoder.in_channels)
        discriminator.check_size(config.data.image_size, config.data.image_size)
    models = Models(tokenizer, discriminator, perceptual)
    for network in models if config.precision == "64-true" else ():
        if network is not None:
            network.double()
    if not config.start_from:
        return models, None
    checkpoint = read_checkpoint(config.start_from)
    _fill(tokenizer, checkpoint.tokenizer, "tokenizer", config.start_from)
    if discriminator and checkpoint.discriminator:
        _fill(discriminator, checkpoint.discriminator, "loss.discriminator", config.start_from)
    return models, checkpoint


def load_averages(networks: TokenizerStep, checkpoint: Checkpoint) -> None:
    """Averages go on where a checkpoint's stand; those that it lacks start at the checkpoint's weights."""
    averages = [(networks.average, checkpoint.tokenizer_ema, networks.tokenizer)]
    if networks.adversary and checkpoint.discriminator:
        adversary = networks.adversary
        averages.append((adversary.average, checkpoint.discriminator_ema, adversary.discriminator))
    for average, stored, module in averages:
        if average:
            average.load_state_dict(stored or {n: p.detach() for n, p in module.named_parameters() if p.requires_grad})


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
