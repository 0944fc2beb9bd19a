"""Activations that are computed again for the backward pass instead of being kept (activation checkpointing)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
