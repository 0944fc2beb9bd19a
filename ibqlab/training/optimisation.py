"""The optimisers of both networks, and their learning rates and weight decay step by step, as published."""

import math

import torch
from torch import Tensor, nn

from ibqlab.recipes.generator_config import GeneratorOptimizerConfig
from ibqlab.recipes.tokenizer_config import OptimizerConfig

PLATEAU_SHARE = 0.05
"""Share of the steps after the warm-up for which the published schedule stays at the highest rate."""


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
        for parameter, averages in optimizer.state.items()
        for key, value in averages.items()
    }


def build_generator_optimizer(module: nn.Module, config: GeneratorOptimizerConfig) -> torch.optim.AdamW:
    """AdamW over two groups: weights of two and more dimensions, and norms and biases.

    Args:
        module: whose parameters to optimise.
        config: averages; rates and decays are set again before every step.
    Source: published IBQ generator code.
    """
    parameters = list(module.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2]}, {"params": [p for p in parameters if p.ndim < 2]}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), fused=True)


def generator_learning_rate_at(step: int, steps: int, config: GeneratorOptimizerConfig) -> float:
    """The learning rate of a step.

    With t = step − 1, w steps of warm-up and the last step's t = m:

        t < w:      s₀ + (1 − s₀) t/w                                            of the highest rate
        plateau:    1 for u < 0.05, else s₁ + (1 − s₁)(1 − u)/0.95,  u = (t − w)/(m − w)
        cosine:     max(s₁, ½ + ½ cos πu),                           u = (t − w)/(m + 1 − w)
        constant:   1

    Args:
        step: from 1.
        steps: of the whole run.
        config: the highest rate, s₀ = warmup_start, s₁ = final_share, w/steps = warmup_share.
    Source: published IBQ generator code ("plateau"), published schedulers of both code bases (the others).
    """
    t, last, warmup = step - 1, steps - 1, round(config.warmup_share * steps)
    if t < warmup:
        return config.learning_rate * (config.warmup_start + (1 - config.warmup_start) * t / warmup)
    t, last, final = t - warmup, last - warmup, config.final_share
    u = t / max(last, 1)
    if config.schedule == "cosine":
        share = max(final, 0.5 + 0.5 * math.cos(math.pi * t / (last + 1)))
    elif config.schedule == "constant" or u < PLATEAU_SHARE:
        share = 1.0
    else:
        share = final + (1 - final) * (1 - u) / (1 - PLATEAU_SHARE)
    return config.learning_rate * share


def generator_weight_decay_at(step: int, steps: int, config: GeneratorOptimizerConfig) -> float:
    """The weight decay of a step: d₁ + (d₀ − d₁)(½ + ½ cos πt/m), from weight_decay d₀ to final_weight_decay d₁.

    Args:
        step: from 1.
        steps: of the whole run.
        config: both ends.
    Source: published IBQ generator code.
    """
    u = (step - 1) / max(steps - 1, 1)
    first, final = config.weight_decay, config.final_weight_decay
    return final + (first - final) * (0.5 + 0.5 * math.cos(math.pi * u))
