"""From scores to tokens: guidance, filters, and draws that a seed repeats.

Shape letters: B images · T sequence · V vocabulary.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.quantizers.base import require


def guide(
    conditional: Float[Tensor, "*positions V"], unconditional: Float[Tensor, "*positions V"], scale: float
) -> Float[Tensor, "*positions V"]:
    """Classifier-free guidance: u + s (c − u).

    Args:
        conditional: c, logits for the class.
        unconditional: u, logits for the null class.
        scale: s; 1 leaves c, 0 leaves u, more than 1 goes beyond c, away from u. Paper: 2 to 2.85.
    Source: published IBQ sampling code; classifier-free guidance (arXiv 2207.12598), with s = 1 + w.
    """
    return unconditional + scale * (conditional - unconditional)


def filter_logits(
    logits: Float[Tensor, "*positions V"], top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "*positions V"]:
    """Leave the most probable tokens and rule the others out, first by rank, then by probability.

    Args:
        logits: already divided by the temperature.
        top_k: tokens that stay, with all that tie with the last of them; 0 leaves all. Paper: 0.
        top_p: tokens stay while those before them have a probability of at most this, above 0 to 1; the most probable
            always does. 1 leaves all. Paper: 1.
    Returns:
        −∞ for tokens that are ruled out; `logits` keeps its values.
    Source: published IBQ sampling code.
    """
    if top_k > 0:
        last = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < last, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        ruled_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(ruled_out, -math.inf)
    return logits


def draw_tokens(logits: Float[Tensor, "B V"], numbers: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Tokens drawn from softmax(logits): each the first whose cumulative probability exceeds its image's number.

    Args:
        logits: −∞ for tokens that cannot be drawn.
        numbers: uniform, 0 to below 1, float64; what makes a draw repeatable on every device.
    Returns:
        int64, 0 to V − 1.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # Below the last value, so that the first beyond it exists and has a probability.
    goal = numbers.clamp_max(1 - 1e-12) * cumulative[:, -1]
    return torch.searchsorted(cumulative, goal[:, None], right=True)[:, 0]


def uniform_numbers(images: int, positions: int, seed: int) -> Float[Tensor, "B T"]:
    """What draws an image's tokens: image i's numbers come from the seed `seed` + i and nothing else.

    So a large batch gives the images of small ones: image i of a batch with one seed is the first image of a batch with
    that seed + i.
    """
    rows = (
        torch.rand(positions, generator=torch.Generator().manual_seed(seed + image), dtype=torch.float64)
        for image in range(images)
    )
    return torch.stack(list(rows))


def check_sampling(cfg_scale: float, temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for settings with which nothing can be drawn."""
    require(0 <= cfg_scale < math.inf, f"cfg_scale must be ≥ 0 and finite; got {cfg_scale}. Use 1.0 for no guidance.")
    require(
        0 <= temperature < math.inf,
        f"temperature must be ≥ 0 and finite; got {temperature}. Use 0 for the most probable token.",
    )
    require(top_k >= 0, f"top_k must be ≥ 0; got {top_k}. Use 0 to leave all tokens.")
    require(0 < top_p <= 1, f"top_p must lie above 0 to 1; got {top_p}. Use 1.0 to leave all tokens.")
