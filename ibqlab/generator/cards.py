"""How the published generators were sampled for their published numbers."""

from ibqlab.generator.sampling_config import SamplingConfig

SAMPLING_CARDS: dict[str, SamplingConfig] = {
    "ibq_b": SamplingConfig(temperature=1.1, cfg_scale=2.25),
    "ibq_l": SamplingConfig(temperature=1.0, cfg_scale=2.0),
    "ibq_xl": SamplingConfig(temperature=1.15, cfg_scale=2.35),
    "ibq_xxl": SamplingConfig(temperature=1.2, cfg_scale=2.85),
    "magvit2_b": SamplingConfig(temperature=1.0, cfg_scale=(1.9, 2.0)),
    "magvit2_l": SamplingConfig(temperature=(1.1, 1.0), cfg_scale=1.9),
    "magvit2_xl": SamplingConfig(temperature=(1.1, 1.0), cfg_scale=(1.75, 1.85)),
}
"""By the recipe's name under experiments/generators: 50 images per class, all tokens to draw from, no schedule.
Source: the authors' sampling scripts."""
