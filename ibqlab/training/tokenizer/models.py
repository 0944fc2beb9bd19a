"""The networks of a run as they start: fresh, or from a checkpoint."""

import torch

from ibqlab.quantizers.methods.vqgan_lc import weights_follow
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.discriminator import PatchDiscriminator
from ibqlab.training.tokenizer.starting import Start, start_networks
from ibqlab.training.tokenizer.step import Models


def build_models(config: TrainConfig, resumes: bool = False) -> tuple[Models, Start | None]:
    """Tokenizer, discriminator and LPIPS network of a run, weights drawn from its seed or read from its checkpoint.

    Args:
        config: of the run.
        resumes: whether the run's own checkpoint is loaded into the networks afterwards, so that the file that it
            started from is not needed.
    Returns:
        The networks, and what they start with, whose averages `load_averages` takes over; None for fresh weights.
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
    if resumes or not config.start_from:
        return models, None
    return models, start_networks(config, tokenizer, discriminator)
