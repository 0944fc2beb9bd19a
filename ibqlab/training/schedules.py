"""Learning rate and weight decay of a generator's training, step by step, as published."""

import math

from ibqlab.recipes.generator_config import GeneratorOptimizerConfig

PLATEAU_SHARE = 0.05
"""Share of the steps after the warm-up for which the published schedule stays at the highest rate."""


def learning_rate_at(step: int, steps: int, config: GeneratorOptimizerConfig) -> float:
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
    return config.learning_rate * _after_warmup(t - warmup, last - warmup, config)


def _after_warmup(t: int, last: int, config: GeneratorOptimizerConfig) -> float:
    """Share of the highest rate, counting from the end of the warm-up."""
    final = config.final_share
    if config.schedule == "cosine":
        return max(final, 0.5 + 0.5 * math.cos(math.pi * t / (last + 1)))
    u = t / max(last, 1)
    if config.schedule == "constant" or u < PLATEAU_SHARE:
        return 1.0
    return final + (1 - final) * (1 - u) / (1 - PLATEAU_SHARE)


def weight_decay_at(step: int, steps: int, config: GeneratorOptimizerConfig) -> float:
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
