"""How tokens are drawn from a generator's scores: guidance and its schedule, temperature and filters, as settings."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ibqlab.base.checks import FLOAT32, check_numbers, finite_number, require, require_choice

SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda _, __: 1.0,
    "linear": lambda u, _: u,
    "cosine": lambda u, _: (1 - math.cos(math.pi * u)) / 2,
    "power": lambda u, power: u**power,
}
"""How much of the guidance beyond 1 acts at the share u of the way from the first token to the last."""
Setting = float | tuple[float, float]
"""One number, or one for each of the two parts of Open-MAGVIT2's tokens."""
LEAST_TEMPERATURE = 1e-4
"""Below it, apart from 0, scores divided by the temperature leave the range of numbers."""
LARGEST_SCALE = 1e4
"""Guidance beyond it leaves the range of numbers; published: up to 2.85."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn from a generator's scores. The defaults draw from its distribution as it is."""

    cfg_scale: Setting = 1.0
    """Guidance s ≥ 0: u + s (c − u) with the logits c for the class and u for none; 1 is no guidance and costs half.
    Two numbers: for the first and the second part of Open-MAGVIT2's tokens. Paper: 2.25 (B), 2.0 (L), 2.35 (XL), 2.85
    (XXL). LlamaGen's code takes every s ≤ 1 for 1."""
    cfg_schedule: str = "constant"
    """How guidance grows from the first token (u = 0) to the last (u = 1), as 1 + (s − 1)·f(u): "constant" f = 1
    (paper), "linear" f = u, "cosine" f = (1 − cos πu)/2, "power" f = u^cfg_power."""
    cfg_power: float = 1.0
    """Exponent of the schedule "power", > 0."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Share of the tokens between which guidance acts, from the first up to below the second; outside it is 1. Paper:
    all, 0 to 1. LlamaGen's code counts tokens: its cfg_interval i is (0, (i + 2) / T) here, as it guides tokens 0 to
    i + 1, and its −1 is all."""
    temperature: Setting = 1.0
    """What logits are divided by, ≥ 0; 0 takes the most probable token. Two numbers as for cfg_scale. Paper: 1.1 (B),
    1.0 (L), 1.15 (XL), 1.2 (XXL)."""
    top_k: int = 0
    """Draw from so many most probable tokens, ≥ 0; 0 from all. Paper: 0."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together have this probability, above 0 to 1. Paper: 1."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the most probable one's probability, 0 to 1. Paper: 0."""

    def __post_init__(self):
        check_numbers(self)
        for scale in setting_pair("cfg_scale", self.cfg_scale):
            require(
                0 <= scale <= LARGEST_SCALE,
                f"cfg_scale must be 0 to {LARGEST_SCALE:,.0f}; got {scale}. Use 1.0 for no guidance.",
            )
        for temperature in setting_pair("temperature", self.temperature):
            require(
                temperature == 0 or LEAST_TEMPERATURE <= temperature <= FLOAT32,
                f"temperature must be 0 or finite and at least {LEAST_TEMPERATURE}; got {temperature}. Use 0 for the "
                "most probable token.",
            )
        require_choice("cfg_schedule", self.cfg_schedule, SCHEDULES)
        require(0 < self.cfg_power < math.inf, f"cfg_power must be > 0 and finite; got {self.cfg_power}. Use 1.0.")
        interval = self.cfg_interval if isinstance(self.cfg_interval, tuple | list) else (self.cfg_interval,)
        interval = tuple(finite_number("cfg_interval", share) for share in interval)
        require(
            len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1,
            f"cfg_interval must be two shares 0 ≤ first < last ≤ 1; got {interval}. Use (0.0, 1.0) for all.",
        )
        require(self.top_k >= 0, f"top_k must be ≥ 0; got {self.top_k}. Use 0 to leave all tokens.")
        require(0 < self.top_p <= 1, f"top_p must lie above 0 to 1; got {self.top_p}. Use 1.0 to leave all tokens.")
        require(0 <= self.min_p <= 1, f"min_p must lie in 0 to 1; got {self.min_p}. Use 0.0 to leave all tokens.")

    def scale_at(self, position: int, positions: int, part: int = 0) -> float:
        """Guidance of one position.

        Args:
            position: 0 to positions − 1.
            positions: T.
            part: of Open-MAGVIT2's tokens, 0 or 1.
        """
        # The share of an interval is that of tokens, below 1 at the last one; the share of a schedule reaches 1 there.
        first, last = self.cfg_interval
        if not first <= position / positions < last:
            return 1.0
        share = SCHEDULES[self.cfg_schedule](position / max(positions - 1, 1), self.cfg_power)
        return 1 + (setting_pair("cfg_scale", self.cfg_scale)[part] - 1) * share

    def temperature_of(self, part: int) -> float:
        """The temperature of one part of a token."""
        return setting_pair("temperature", self.temperature)[part]


def setting_pair(name: str, setting: Setting) -> tuple[float, float]:
    """A setting of one or two numbers as two, one for each part of a token; ValueError unless they are finite."""
    if not isinstance(setting, tuple | list):
        setting = finite_number(name, setting)
        return setting, setting
    require(
        len(setting) == 2,
        f"{name} must be one number, or two for the two parts of Open-MAGVIT2's tokens; got {len(setting)}: {setting}.",
    )
    return finite_number(f"{name}[0]", setting[0]), finite_number(f"{name}[1]", setting[1])


SAMPLING_CARDS: dict[str, SamplingConfig] = {
    "ibq_b": SamplingConfig(temperature=1.1, cfg_scale=2.25),
    "ibq_l": SamplingConfig(temperature=1.0, cfg_scale=2.0),
    "ibq_xl": SamplingConfig(temperature=1.15, cfg_scale=2.35),
    "ibq_xxl": SamplingConfig(temperature=1.2, cfg_scale=2.85),
    "magvit2_b": SamplingConfig(temperature=1.0, cfg_scale=(1.9, 2.0)),
    "magvit2_l": SamplingConfig(temperature=(1.1, 1.0), cfg_scale=1.9),
    "magvit2_xl": SamplingConfig(temperature=(1.1, 1.0), cfg_scale=(1.75, 1.85)),
    "llamagen_b": SamplingConfig(cfg_scale=2.0),
    "llamagen_l": SamplingConfig(cfg_scale=2.0),
    "llamagen_xl": SamplingConfig(cfg_scale=1.75),
    "llamagen_xxl": SamplingConfig(cfg_scale=1.75),
    "llamagen_3b": SamplingConfig(cfg_scale=1.65),
}
"""How the published generators were sampled for their published numbers, by design and size, as recipes under
experiments/generators are named: 50 images per class, all tokens to draw from, no schedule. LlamaGen's are those of its
384-pixel files, whose images were resized to 256 for the numbers; of its 256-pixel files none were published.
Source: the authors' sampling scripts."""
