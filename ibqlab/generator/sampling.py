"""From scores to tokens: guidance and its schedules, filters, draws that a seed repeats, and the loop over an image.

Shape letters: B images · T sequence · V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import FLOAT32, check_numbers, finite_number, require, require_choice
from ibqlab.base.progress import counted
from ibqlab.generator.decoding import TokenDecoding
from ibqlab.generator.sequence import check_inputs, check_labels
from ibqlab.quantizers.codebooks import at_least_float32
from ibqlab.quantizers.indices import indices_in_memory, to_indices

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

Seed = int | Sequence[int]
"""One for the batch, whose image i then has the seed `seed` + i, or one per image."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn from a generator's scores. The defaults draw from its distribution as it is."""

    cfg_scale: Setting = 1.0
    """Guidance s ≥ 0: u + s (c − u) with the logits c for the class and u for none; 1 is no guidance and costs half.
    Two numbers: for the first and the second part of Open-MAGVIT2's tokens. Paper: 2.25 (B), 2.0 (L), 2.35 (XL), 2.85
    (XXL)."""
    cfg_schedule: str = "constant"
    """How guidance grows from the first token (u = 0) to the last (u = 1), as 1 + (s − 1)·f(u): "constant" f = 1
    (paper), "linear" f = u, "cosine" f = (1 − cos πu)/2, "power" f = u^cfg_power."""
    cfg_power: float = 1.0
    """Exponent of the schedule "power", > 0."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Share of the tokens between which guidance acts, from the first up to below the second; outside it is 1. Paper:
    all, 0 to 1."""
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
        for scale in _pair("cfg_scale", self.cfg_scale):
            require(
                0 <= scale <= LARGEST_SCALE,
                f"cfg_scale must be 0 to {LARGEST_SCALE:,.0f}; got {scale}. Use 1.0 for no guidance.",
            )
        for temperature in _pair("temperature", self.temperature):
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
        first, last = self.cfg_interval
        if not first <= position / positions < last:
            return 1.0
        share = SCHEDULES[self.cfg_schedule](position / max(positions - 1, 1), self.cfg_power)
        return 1 + (_pair("cfg_scale", self.cfg_scale)[part] - 1) * share

    def temperature_of(self, part: int) -> float:
        """The temperature of one part of a token."""
        return _pair("temperature", self.temperature)[part]


def _pair(name: str, setting: Setting) -> tuple[float, float]:
    if not isinstance(setting, tuple | list):
        setting = finite_number(name, setting)
        return setting, setting
    require(
        len(setting) == 2,
        f"{name} must be one number, or two for the two parts of Open-MAGVIT2's tokens; got {len(setting)}: {setting}.",
    )
    return finite_number(f"{name}[0]", setting[0]), finite_number(f"{name}[1]", setting[1])


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What is drawn: everything that `sample` is given beside the settings."""

    labels: Int[Tensor, " B"]
    """Classes, on the generator's device."""
    seed: Seed
    """Of the batch, or one per image."""
    prompt: Int[Tensor, "B given"] | None
    """The first tokens, given; fewer than T."""
    compiled: bool
    """Compile the step of one position."""
    progress: bool
    """Show a bar over the positions."""


def sample_from(
    model: nn.Module, decoding: type[TokenDecoding], settings: Mapping[str, Any], **given: Any
) -> Int[Tensor, "B T"]:
    """Draw images' tokens from a generator in eval mode, everything checked before it begins.

    Args:
        model: a generator.
        decoding: of its kind.
        settings: fields of `SamplingConfig`.
        **given: fields of `Draw`.
    Raises:
        ValueError: labels, tokens or settings that do not fit.
    """
    known = [field.name for field in fields(SamplingConfig)]
    for name in settings:
        require_choice("a setting of sample(…)", name, known)
    config, draw = SamplingConfig(**settings), _checked(Draw(**given), model)
    _check_parts(config, decoding.parts)
    was_training = model.training
    model.eval()
    try:
        return _sample(model, decoding, config, draw)
    finally:
        model.train(was_training)


def _check_parts(config: SamplingConfig, parts: int) -> None:
    """Two different numbers are for the two parts of a token; ValueError where a generator's tokens have one."""
    for name in ("cfg_scale", "temperature"):
        pair = _pair(name, getattr(config, name))
        require(
            parts == 2 or pair[0] == pair[1],
            f"{name} must be one number for this generator, whose tokens have one part; got {pair}, which are for the "
            "two parts of Open-MAGVIT2's tokens.",
        )


def _checked(draw: Draw, model: nn.Module) -> Draw:
    """On the generator's device, labels and prompt within its vocabulary."""
    sizes, device = model.config, next(model.parameters()).device
    labels, prompt = check_labels(indices_in_memory(draw.labels, "labels"), sizes).to(device), draw.prompt
    if prompt is not None:
        prompt, most = to_indices(prompt, "prompt"), sizes.num_tokens - 1
        require(
            prompt.ndim == 2 and 1 <= prompt.shape[1] <= most,
            f"prompt must be (B, given) with 1 to {most} tokens given; got {tuple(prompt.shape)}. Use "
            "indices.flatten(1)[:, :rows * grid_size] for the first rows of images.",
        )
        prompt = check_inputs(prompt.to(device), labels, sizes, sizes.vocabulary_size, device)[0]
    return replace(draw, labels=labels, prompt=prompt)


@torch.no_grad()
def _sample(model: nn.Module, decoding: type[TokenDecoding], config: SamplingConfig, draw: Draw) -> Int[Tensor, "B T"]:
    """One position after another.

    With guidance the classes and the null class go through the blocks as one batch; after the last guided position the
    null class is dropped, and without guidance it is never there.
    """
    labels, positions, parts = draw.labels, model.config.num_tokens, decoding.parts
    tokens = [] if draw.prompt is None else list(draw.prompt.T)
    first, images = len(tokens), len(labels)
    last = _last_guided(config, positions, parts)
    copies = 2 if last >= first else 1
    null = torch.full_like(labels, model.config.num_classes)
    state = decoding(model, torch.cat([labels, null])[: copies * images], compiled=draw.compiled)
    numbers = uniform_numbers(images, positions * parts, draw.seed).view(images, positions, parts).to(labels.device)
    broken = torch.zeros_like(labels, dtype=torch.bool)  # looked at once at the end: each look waits for the GPU
    for place in counted(range(first, positions), "sampling", "tokens", shown=draw.progress):
        if copies == 2 and place > last:
            state.keep(images)
            copies = 1
        if place == first and tokens:
            state.prefill(torch.stack(tokens, dim=1).repeat(copies, 1))
        else:
            state.advance(tokens[-1].repeat(copies) if tokens else None)
        drawn: list[Tensor] = []
        for part in range(parts):
            logits = state.logits([chosen.repeat(copies) for chosen in drawn])
            if copies == 2:
                logits = guide(*logits.chunk(2), config.scale_at(place, positions, part))
            broken |= ~logits.amax(-1).isfinite()
            drawn.append(choose_tokens(logits, numbers[:, place, part], config, part))
        tokens.append(state.join(drawn))
    refuse_broken(broken)
    return torch.stack(tokens, dim=1)


def _last_guided(config: SamplingConfig, positions: int, parts: int) -> int:
    """The last position at which guidance is not 1; −1 where it always is."""
    guided = (p for p in range(positions) for part in range(parts) if config.scale_at(p, positions, part) != 1)
    return max(guided, default=-1)


def choose_tokens(
    logits: Float[Tensor, "B V"], numbers: Float[Tensor, " B"], config: SamplingConfig, part: int = 0
) -> Int[Tensor, " B"]:
    """Tokens by their guided scores: temperature, filters, and a draw; the most probable ones at temperature 0."""
    temperature = config.temperature_of(part)
    if temperature == 0:
        return logits.argmax(-1)
    return draw_tokens(
        filter_logits(at_least_float32(logits) / temperature, config.top_k, config.top_p, config.min_p), numbers
    )


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
        last = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < last, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        ruled_out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(ruled_out, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits


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
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # Below the last value, so that the first beyond it exists and has a probability.
    goal = numbers.clamp_max(1 - 1e-12) * cumulative[:, -1]
    if not goal.is_cuda:
        refuse_broken(goal.isnan())
    return torch.searchsorted(cumulative, goal[:, None], right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


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
        "generator.float(), or cfg_scale=1.0.",
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
    given = to_indices(seed, "seed")
    require(
        given.ndim == 0 or len(given) == images,
        f"seed must be one number, or one per image, here {images}; got {given.numel()}. Use seed=0.",
    )
    seeds = range(int(given), int(given) + images) if given.ndim == 0 else given.tolist()
    # Always the CPU's generator, whatever the process's default device is.
    numbers = partial(torch.rand, positions, dtype=torch.float64, device="cpu")
    return torch.stack([numbers(generator=torch.Generator("cpu").manual_seed(own)) for own in seeds])
