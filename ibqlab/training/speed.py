"""How a step is computed: memory format, compilation, recomputed activations, shards. Results are equal to rounding.

Everything happens in place: the networks keep their classes and the names of their weights, so checkpoints, averages
and other processes do not notice.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ibqlab.base.recomputing import recompute
from ibqlab.generator import AnyGenerator
from ibqlab.generator.layers import Block
from ibqlab.recipes.generator_config import GeneratorSpeedConfig
from ibqlab.recipes.tokenizer_config import SpeedConfig
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.tokenizer import find_blocks

COMPILER = "inductor"
"""torch.compile's backend."""


def prepare_tokenizer(
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


def prepare_generator(config: GeneratorSpeedConfig, generator: AnyGenerator) -> None:
    """Set a run's generator up as the config says, in place.

    Args:
        config: what to do.
        generator: before its weights are given to an optimiser.
    """
    for block in generator.modules():
        if isinstance(block, Block):
            if config.activation_checkpointing:
                recompute(block)
            if config.compile:
                block.compile(backend=COMPILER, dynamic=False)


def shard(module: nn.Module) -> nn.Module:
    """Cut a generator's weights into one piece per process, in place: each block on its own, then what is left."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - a second, needed only here

    for block in module.modules():
        if isinstance(block, Block):
            fully_shard(block)
    return fully_shard(module)


def memory_format(config: SpeedConfig) -> torch.memory_format:
    """How pictures and convolution weights lie in memory."""
    return torch.channels_last if config.channels_last else torch.preserve_format


def uncompiled(config: SpeedConfig | GeneratorSpeedConfig) -> AbstractContextManager:
    """Inside the block compiled networks run as written, so that validation's sizes and modes compile nothing new.

    Args:
        config: of the run.
    """
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
