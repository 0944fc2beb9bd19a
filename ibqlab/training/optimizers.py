"""Adam over a module's parameters, and its learning rate at a step."""

import torch
from torch import Tensor, nn

from ibqlab.recipes.tokenizer_config import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; without weight decay it is the published Adam.

    Parameters of fewer than two dimensions (norms, biases) are a group of their own where the config spares them from
    decay.

    Args:
        module: whose parameters to optimise.
        config: step size, averages, weight decay.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": parameters}]
    if config.weight_decay and not config.decay_norms:
        flat = [p for p in parameters if p.ndim < 2]
        groups = [{"params": [p for p in parameters if p.ndim >= 2]}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=tuple(config.betas),
        weight_decay=config.weight_decay,
        # One kernel over all parameters: the same update to rounding, on CPUs, too.
        fused=True,
    )


def learning_rate_at(step: int, config: OptimizerConfig) -> float:
    """The learning rate of a step, counted from 1: constant, times drop_factor after each of drop_steps."""
    return config.learning_rate * config.drop_factor ** sum(step > drop for drop in config.drop_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give all groups one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def named_moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's averages with the name of their parameter, for error messages."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"Adam's {key} of {names[parameter]!r}": value
        for parameter, kept in optimizer.state.items()
        for key, value in kept.items()
    }
