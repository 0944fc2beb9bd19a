"""When results mean little: runs that are too short, usage that was counted in too few tokens."""

import math
from collections.abc import Mapping
from typing import Any

from ibqlab.runs.kinds import quantizer_settings

SHORTEST = 100
"""Training steps; figures and results of shorter runs say that they mean nothing."""


def why_too_short(steps: Any, preset: str = "") -> str:
    """Why runs are too short to mean anything: their preset, or their steps; "" where they are not."""
    if preset == "smoke":
        return "preset smoke"
    return f"{steps:,.0f} steps" if isinstance(steps, (int, float)) and steps < SHORTEST else ""


def few_tokens(tokens: float, config: Mapping[str, Any]) -> str:
    """What to keep in mind of usage in few tokens; "" from ten tokens per code on.

    Args:
        tokens: in which usage was counted.
        config: of the run.
    """
    size = quantizer_settings(config).get("codebook_size")
    if type(size) is not int or size < 2 or not 0 < tokens < 10 * size:
        return ""
    even = -math.expm1(tokens * math.log1p(-1 / size))
    return f"even use of all {size:,} codes would hit {even:.0%} in so few"
