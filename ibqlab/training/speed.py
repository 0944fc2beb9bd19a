"""How a step is computed: memory format, compilation, recomputed activations, shards. Results are equal to rounding.

Everything happens in place: the networks keep their classes and the names of their weights, so checkpoints, averages
and other processes do not notice.

Compilation is by regions. A network of many equal blocks is not compiled whole, which takes minutes, but block by
block: one compiled function runs all of them, and compiles once for each shape of block that it meets.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ibqlab.base.recomputing import recompute
from ibqlab.generator import AnyGenerator
from ibqlab.generator.layers import Block
from ibqlab.recipes.generator_config import GeneratorSpeedConfig
from ibqlab.recipes.tokenizer_config import SpeedConfig
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.autoencoder import find_blocks

COMPILER = "inductor"
"""torch.compile's backend."""
MOST_GRAPHS = 200
"""Graphs of the function that all regions share, in one process. torch's own limit is 8, beyond which what is new runs
as written; a step of the published tokenizer needs 13, and a process may train several tokenizers and a generator."""


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
    judges = [network for network in (discriminator, perceptual) if network is not None]
    for network in (tokenizer, *judges):
        network.to(memory_format=config.memory_format)
    blocks = list(find_blocks(tokenizer))
    if config.compile:
        # No two layers of a judge have the same shape, so each is a region of its own; they are small.
        for region in (*blocks, *judges):
            compile_region(region)
    if config.activation_checkpointing:
        for block in blocks:
            recompute(block)


def compile_region(module: nn.Module) -> None:
    """Let a module run through the compiled function that all regions share, in place."""
    module.forward = partial(_run_compiled, module)


def _run_compiled(module: nn.Module, *inputs: Any, **settings: Any) -> Any:
    return _compiled(COMPILER)(module, *inputs, **settings)


@cache
def _compiled(compiler: Any) -> Any:
    """The function that all regions share, compiled: weights are its arguments, so equal modules share a graph."""
    return torch.compile(_run_as_written, backend=compiler, dynamic=False)


def _run_as_written(module: nn.Module, *inputs: Any, **settings: Any) -> Any:
    return type(module).forward(module, *inputs, **settings)


@contextmanager
def many_graphs(config: SpeedConfig | GeneratorSpeedConfig) -> Iterator[None]:
    """Inside the block a compiled function may have a graph for each shape of a published network.

    What its backward pass reads stays as it is, which adaptive weights need: they go through the same graph before.
    torch would otherwise let graphs write over it whose first backward pass is their only one, as before
    `loss.discriminator_start` or in another run of the process, and refuse the second pass ever after.

    Args:
        config: of the run.
    """
    if not config.compile:
        yield
        return
    import torch._dynamo  # noqa: PLC0415 - seconds, needed only to compile
    import torch._functorch.config  # noqa: PLC0415 - likewise

    shapes = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS)
    with shapes, torch._functorch.config.patch(donated_buffer=False):
        yield


def prepare_generator(config: GeneratorSpeedConfig, generator: AnyGenerator) -> None:
    """Set a run's generator up as the config says, in place.

    Args:
        config: what to do.
        generator: before its weights are given to an optimiser.
    """
    for block in generator.modules():
        if isinstance(block, Block):
            if config.compile:
                compile_region(block)
            if config.activation_checkpointing:
                recompute(block)


def shard(module: nn.Module) -> nn.Module:
    """Cut a generator's weights into one piece per process, in place: each block on its own, then what is left."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - a second, needed only here

    for block in module.modules():
        if isinstance(block, Block):
            fully_shard(block)
    return fully_shard(module)


def uncompiled(config: SpeedConfig | GeneratorSpeedConfig) -> AbstractContextManager:
    """Inside the block compiled networks run as written, so that validation's sizes and modes compile nothing new.

    Args:
        config: of the run.
    """
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
