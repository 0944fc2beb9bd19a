"""How a step is computed: memory format, compilation, recomputed activations. Results stay the same to rounding.

Everything happens in place: the networks keep their classes and the names of their weights, so checkpoints, averages
and other processes do not notice.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.autoencoder import AttentionBlock, ResidualBlock

COMPILER = "inductor"
"""torch.compile's backend."""


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Ways to compute the same step. Results differ by rounding, so a run goes on with the settings it began with."""

    channels_last: bool = False
    """Keep pictures, activations and convolution weights with the channels of a pixel side by side, as tensor cores
    read them. Group normalisation on CUDA turns its input around unless it is compiled: switch on together with
    compile. Published: False."""
    compile: bool = False
    """Let torch.compile fuse encoder, decoder, discriminator and LPIPS network in training; validation and quantizer
    stay as they are. Costs minutes at every start and a C++ compiler. Published: False."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the residual and attention blocks of encoder and decoder, and compute each block again,
    up to its last convolution, for its backward pass. By `ibqlab plan` that takes a fifth of the memory per image and a
    seventh more operations for the published tokenizer. Published: False."""


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


def find_blocks(tokenizer: Tokenizer) -> Iterator[nn.Module]:
    """Residual and attention blocks of encoder and decoder, in the order of the modules."""
    return (module for module in tokenizer.modules() if isinstance(module, (ResidualBlock, AttentionBlock)))


def recompute(block: nn.Module) -> None:
    """Make a module keep its inputs alone for the backward pass, which then calls it a second time, in place.

    Dropout draws the same numbers in the second call.
    """
    drops = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in block.modules())
    # Saving and restoring random states costs time in every block, and only dropout reads them.
    block.forward = partial(_recomputed, block.forward, drops)


def _recomputed(forward: Callable[..., Tensor], drops: bool, *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=drops)


def uncompiled(config: Any) -> AbstractContextManager:
    """Inside the block compiled networks run as written, so that validation's sizes and modes compile nothing new.

    Args:
        config: settings with a field `compile`.
    """
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
