"""How a step is computed: memory format, compilation, recomputed activations. Results stay the same to rounding.

Everything happens in place: the networks keep their classes and the names of their weights, so checkpoints, averages
and other processes do not notice.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ibqlab.base.recomputing import recompute
from ibqlab.recipes.tokenizer_config import SpeedConfig
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.recomputing import find_blocks

COMPILER = "inductor"
"""torch.compile's backend."""


def prepare(
    config: SpeedConfig,
    tokenizer: Tokenizer,
    discriminator: nn.Module | None = None,
    perceptual: nn.Module | None = None,
) -> None:
    """Set the networks of a run up as the config says, in place.

    Args:
        config: what to do.
        tokenizer: before its weights are averaged or given to an optimiser.
        discriminator: likewise; None where there is none.
        perceptual: the LPIPS network; None where there is none.
    """
    networks = [network for network in (tokenizer, discriminator, perceptual) if network is not None]
    for network in networks:
        network.to(memory_format=memory_format(config))
    if config.activation_checkpointing:
        for block in find_blocks(tokenizer):
            recompute(block)
    if config.compile:
        # The quantizer's blocks of rows and hooks would cut the tokenizer's graph in any case.
        for network in (tokenizer.encoder, tokenizer.decoder, *networks[1:]):
            network.compile(backend=COMPILER, dynamic=False)


def memory_format(config: SpeedConfig) -> torch.memory_format:
    """How pictures and convolution weights lie in memory."""
    return torch.channels_last if config.channels_last else torch.preserve_format


def uncompiled(config: Any) -> AbstractContextManager:
    """Inside the block compiled networks run as written, so that validation's sizes and modes compile nothing new.

    Args:
        config: settings with a field `compile`.
    """
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
