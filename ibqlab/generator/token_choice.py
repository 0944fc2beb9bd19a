"""From scores to tokens: guidance, temperature, filters, and draws that a seed repeats.

What is unusual: a draw looks for the token at which the cumulative probability passes the image's number. Float32 is
too coarse for that sum over a large vocabulary, and float64 is slow. So chunks of 128 tokens are summed first, the sums
are added up in float64, and only the chunk that the number falls in is looked at token by token. Nothing here looks at
a number on the host, so that a whole position can be recorded. Shape letters: B images · V vocabulary.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import require
from ibqlab.generator.sampling_config import SamplingConfig
from ibqlab.quantizers.codebooks import at_least_float32
from ibqlab.quantizers.indices import to_indices

Seed = int | Sequence[int]
"""One for the batch, whose image i then has the seed `seed` + i, or one per image."""
CHUNK = 128
"""Tokens whose probabilities are summed before anything is compared: about √V, where both steps read the least."""
FEW_TOKENS = 2048
"""V up to which there are no chunks: a CPU adds up so few sooner than it starts more operations."""
LARGEST_NUMBER = 1 - 1e-12
"""What numbers are cut off at, so that the token that they fall in always exists and has a probability."""


def choose_tokens(
    logits: Float[Tensor, "B V"], numbers: Float[Tensor, " B"], config: SamplingConfig, part: int = 0
) -> Int[Tensor, " B"]:
    """Tokens by their guided scores: temperature, filters, and a draw; the most probable ones at temperature 0.

    Scores that are no numbers give any token: `sample` says so at its end, because a look at them waits for a GPU.
    """
    temperature = config.temperature_of(part)
    if temperature == 0:
        return logits.argmax(-1)
    filtered = filter_logits(at_least_float32(logits) / temperature, config.top_k, config.top_p, config.min_p)
    return tokens_at(filtered, numbers)


def guide(
    conditional: Float[Tensor, "*positions V"], unconditional: Float[Tensor, "*positions V"], scale: float | Tensor
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
    logits: Float[Tensor, "*positions V"], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float[Tensor, "*positions V"]:
    """Leave the most probable tokens and rule the others out, first by rank, then by probability.

    Args:
        logits: already divided by the temperature.
        top_k: tokens that stay, with all that tie with the last of them; 0 leaves all. Paper: 0.
        top_p: tokens stay while those before them have a probability of at most this, above 0 to 1; the most probable
            always does. 1 leaves all. Paper: 1.
        min_p: tokens stay that have at least this share of the most probable one's probability, 0 to 1. Paper: 0.
    Returns:
        −∞ for tokens that are ruled out; `logits` keeps its values.
    Source: published IBQ sampling code; min-p (arXiv 2407.01082).
    """
    if top_k > 0:
        logits = keep_most_probable(logits, top_k)
    if top_p < 1:
        logits = keep_probability(logits, top_p)
    if min_p > 0:
        logits = keep_near_top(logits, math.log(min_p))
    return logits


def keep_most_probable(logits: Float[Tensor, "*positions V"], top_k: int) -> Float[Tensor, "*positions V"]:
    """The `top_k` largest scores, with all that tie with the last of them; −∞ for the others."""
    lowest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < lowest, -math.inf)


def keep_probability(logits: Float[Tensor, "*positions V"], top_p: float | Tensor) -> Float[Tensor, "*positions V"]:
    """The scores before which stands a probability of at most `top_p`, by rank; −∞ for the others."""
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # probability of all tokens before each one, by rank
    before[..., 0] = 0  # the roll put the total there; the most probable token always stays
    ruled_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > top_p)
    return logits.masked_fill(ruled_out, -math.inf)


def keep_near_top(logits: Float[Tensor, "*positions V"], log_min_p: float | Tensor) -> Float[Tensor, "*positions V"]:
    """The scores at most −`log_min_p` below the largest one; −∞ for the others."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + log_min_p, -math.inf)


def draw_tokens(logits: Float[Tensor, "B V"], numbers: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Tokens drawn from softmax(logits): each the first whose cumulative probability exceeds its image's number.

    Args:
        logits: −∞ for tokens that cannot be drawn.
        numbers: uniform, 0 to below 1, float64; what makes a draw repeatable on every device.
    Returns:
        int64, 0 to V − 1.
    Raises:
        ValueError: scores that are NaN or +∞; on a GPU, which would have to be waited for, `sample` says so at its end.
    """
    if not logits.is_cuda:
        refuse_broken(~logits.amax(-1).isfinite())
    return tokens_at(at_least_float32(logits), numbers)


def tokens_at(logits: Float[Tensor, "B V"], numbers: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """What `draw_tokens` draws, from scores in float32 or wider, without a look at whether they are numbers.

    Cost: three passes over the scores in their own type; float64 only for V / 128 sums and 128 tokens per image.
    """
    weights, numbers = logits.softmax(-1), numbers.clamp_max(LARGEST_NUMBER)[:, None]  # (B, V), (B, 1)
    if weights.shape[-1] <= FEW_TOKENS:
        weights = weights.double()
        cumulative = weights.cumsum(-1)
        return first_beyond(numbers * cumulative[:, -1:], cumulative, weights)[:, 0]
    missing = -weights.shape[-1] % CHUNK
    chunks = (F.pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, CHUNK))  # (B, V / 128, 128)
    sums = chunks.sum(-1).double()
    cumulative = sums.cumsum(-1)  # (B, V / 128)
    goal = numbers * cumulative[:, -1:]  # (B, 1), below the last sum
    chunk = first_beyond(goal, cumulative, sums)
    before = F.pad(cumulative, (1, 0)).gather(1, chunk)  # (B, 1), probability of all chunks before it
    inside = chunks.gather(1, chunk[..., None].expand(-1, -1, CHUNK))[:, 0].double()  # (B, 128)
    return (chunk * CHUNK + first_beyond(goal - before, inside.cumsum(-1), inside))[:, 0]


def first_beyond(
    goal: Float[Tensor, "B 1"], cumulative: Float[Tensor, "B places"], weights: Float[Tensor, "B places"]
) -> Int[Tensor, "B 1"]:
    """The first place whose cumulative sum exceeds the goal.

    Sums of the same numbers in another order round otherwise, and a goal may fall between two of them, on a place
    without weight or behind the last one. A place without weight is a token that is ruled out, and is never drawn: the
    place with the largest weight is taken instead.
    """
    place = torch.searchsorted(cumulative, goal, right=True).clamp_max(weights.shape[-1] - 1)
    return torch.where(weights.gather(1, place) > 0, place, weights.argmax(-1, keepdim=True))


def refuse_broken(broken: Bool[Tensor, " B"]) -> None:
    """Refuse scores of which no token can be chosen.

    Args:
        broken: images whose scores are NaN or infinite.
    Raises:
        ValueError: there are some; the message says of how many images.
    """
    count = int(broken.sum())
    require(
        count == 0,
        f"the generator's scores are NaN (not a number) or infinite for {count} of {len(broken)} images: its weights "
        "are broken or overflow in their number type, or cfg_scale is too large. Use another checkpoint, "
        'dtype="float32", or cfg_scale=1.0.',
    )


def uniform_numbers(images: int, positions: int, seed: Seed) -> Float[Tensor, "B T"]:
    """What draws an image's tokens: an image's numbers come from its own seed and nothing else.

    So a large batch gives the images of small ones: image i of a batch with one seed is the first image of a batch with
    that seed + i.

    Args:
        images: B.
        positions: numbers per image.
        seed: of the batch, or one per image.
    Raises:
        ValueError: a wrong number of seeds.
    """
    values = to_indices(seed, "seed")
    require(
        values.ndim == 0 or len(values) == images,
        f"seed must be one number, or one per image, here {images}; got {values.numel()}. Use seed=0.",
    )
    seeds = range(int(values), int(values) + images) if values.ndim == 0 else values.tolist()
    # Always the CPU's generator, whatever the process's default device is.
    numbers = partial(torch.rand, positions, dtype=torch.float64, device="cpu")
    return torch.stack([numbers(generator=torch.Generator("cpu").manual_seed(image_seed)) for image_seed in seeds])
