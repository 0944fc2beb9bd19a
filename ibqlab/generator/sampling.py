"""From scores to tokens: guidance, filters, draws that a seed repeats, and the loop over an image.

Shape letters: B images · T sequence · V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import require, require_choice
from ibqlab.base.progress import track_items
from ibqlab.generator.cross_entropy import linear_cross_entropy
from ibqlab.generator.decoding import TokenDecoding
from ibqlab.generator.sampling_config import SamplingConfig, setting_pair
from ibqlab.generator.sequence import check_inputs, check_labels
from ibqlab.quantizers.codebooks import at_least_float32
from ibqlab.quantizers.indices import indices_in_memory, to_indices

Seed = int | Sequence[int]
"""One for the batch, whose image i then has the seed `seed` + i, or one per image."""
Prediction = tuple[Float[Tensor, "B T C"], nn.Linear, Int[Tensor, "B T"]]
"""Hidden states, the head that multiplies them, and the tokens, or parts of tokens, that it predicts."""


class TokenGenerator(nn.Module):
    """What the generators share: the loss of given tokens, and images drawn one token after another.

    A subclass has its settings in `config`, in `class_emb` and `dropout` what its `decoding` starts from, and in
    `hidden_states` and `predictions` what its loss is made of.
    """

    decoding: ClassVar[type[TokenDecoding]]
    """How it goes from one position to the next."""

    def loss(
        self, indices: Int[Tensor, "B T"], labels: Int[Tensor, " B"], *, reduction: Literal["mean", "none"] = "mean"
    ) -> Float[Tensor, ""] | Float[Tensor, "B T"]:
        """Cross-entropy of all tokens, without the logits: their mean, or one per token.

        In nats per token: ln V for no idea at all, where training starts. No label smoothing, as published. A token of
        two parts costs the sum of both, which is comparable with that of another generator over the same V tokens.

        Args:
            indices, labels: as in `forward`.
            reduction: "mean" or "none".
        Raises:
            ValueError: as in `forward`.
        Cost: that of `hidden_states`, and of `linear_cross_entropy`.
        """
        indices = to_indices(indices, device=next(self.parameters()).device)
        hidden = self.hidden_states(indices, labels)
        losses = [
            linear_cross_entropy(states, head.weight, tokens, reduction=reduction)
            for states, head, tokens in self.predictions(hidden, indices)
        ]
        return sum(losses[1:], losses[0])

    def sample(
        self,
        labels: Int[Tensor, " B"],
        *,
        seed: Seed = 0,
        prompt: Int[Tensor, "B P"] | None = None,
        compiled: bool = False,
        progress: bool = False,
        **settings: Any,
    ) -> Int[Tensor, "B T"]:
        """New images' tokens, drawn one position after another; dropouts are off meanwhile.

            tokens = generator.sample(labels, cfg_scale=2.25, temperature=1.1, top_k=0, top_p=1.0, seed=0)

        Args:
            labels: classes, 0 to num_classes − 1, or num_classes for none in particular.
            seed: the same seed, labels and settings give the same tokens, whatever the batch, but for rounding on
                another device: image i is drawn by the seed `seed` + i, or by its own where one per image is given.
            prompt: tokens of the first positions, such as the first rows of an image.
            compiled: compile the step of one position: CUDA graphs on a GPU. Pays off from some images on; the first
                call takes a minute.
            progress: show a bar over the tokens.
            **settings: fields of `SamplingConfig`: cfg_scale, cfg_schedule, cfg_power, cfg_interval, temperature,
                top_k, top_p, min_p. Guidance needs label_dropout in training and costs twice the time. Open-MAGVIT2's
                generator draws a token in two parts, and cfg_scale and temperature may be pairs for them.
        Returns:
            int64, T = grid_size²; `.view(B, grid_size, grid_size)` is what a tokenizer decodes.
        Raises:
            ValueError: labels, tokens or settings that do not fit; the message says what to type.
        Cost: T passes of one position; 2·T·C numbers of memory per block and image, twice that with guidance.
        Source: published IBQ sampling code, which draws from torch's global random state instead.
        """
        setting_names = [field.name for field in fields(SamplingConfig)]
        for name in settings:
            require_choice("a setting of sample(…)", name, setting_names)
        config, sizes, device = SamplingConfig(**settings), self.config, next(self.parameters()).device
        labels = check_labels(indices_in_memory(labels, "labels"), sizes).to(device)
        if prompt is not None:
            prompt, most = to_indices(prompt, "prompt"), sizes.num_tokens - 1
            require(
                prompt.ndim == 2 and 1 <= prompt.shape[1] <= most,
                f"prompt must be (B, given) with 1 to {most} tokens given; got {tuple(prompt.shape)}. Use "
                "indices.flatten(1)[:, :rows * grid_size] for the first rows of images.",
            )
            prompt = check_inputs(prompt.to(device), labels, sizes, device)[0]
        for name in ("cfg_scale", "temperature"):
            pair = setting_pair(name, getattr(config, name))
            require(
                self.decoding.parts == 2 or pair[0] == pair[1],
                f"{name} must be one number for this generator, whose tokens have one part; got {pair}, which are for "
                "the two parts of Open-MAGVIT2's tokens.",
            )
        shape = len(labels), sizes.num_tokens, self.decoding.parts
        numbers = uniform_numbers(shape[0], shape[1] * shape[2], seed).view(shape).to(device)
        was_training = self.training
        self.eval()
        try:
            return self._sample(config, labels, prompt, numbers, compiled=compiled, progress=progress)
        finally:
            self.train(was_training)

    @torch.no_grad()
    def _sample(
        self,
        config: SamplingConfig,
        labels: Int[Tensor, " B"],
        prompt: Int[Tensor, "B P"] | None,
        numbers: Float[Tensor, "B T parts"],
        *,
        compiled: bool,
        progress: bool,
    ) -> Int[Tensor, "B T"]:
        """One position after another; `numbers` draw the tokens.

        With guidance the classes and the null class go through the blocks as one batch; after the last guided position
        the null class is dropped, and without guidance it is never there.
        """
        images, positions, parts = numbers.shape
        tokens = [] if prompt is None else list(prompt.T)  # one (B,) per position
        scales = [[config.scale_at(at, positions, part) for part in range(parts)] for at in range(positions)]
        guided = [position for position, of_parts in enumerate(scales) if any(scale != 1 for scale in of_parts)]
        first, last_guided = len(tokens), max(guided, default=-1)
        copies = 2 if last_guided >= first else 1
        null = torch.full_like(labels, self.config.num_classes)
        classes = torch.cat([labels, null])[: copies * images]  # (2B,) when guided, else (B,)
        state = self.decoding(self, classes, compiled=compiled)
        broken = torch.zeros_like(labels, dtype=torch.bool)  # looked at once at the end: each look waits for the GPU
        for position in track_items(range(first, positions), "sampling", "tokens", shown=progress):
            if copies == 2 and position > last_guided:
                state.truncate(images)  # the null class is the second half of the batch
                copies = 1
            if position == first and tokens:
                state.prefill(torch.stack(tokens, dim=1).repeat(copies, 1))
            else:
                state.advance(tokens[-1].repeat(copies) if tokens else None)
            token_parts: list[Tensor] = []  # the parts of this token, (B,) each
            for part in range(parts):
                earlier_parts = [indices.repeat(copies) for indices in token_parts]
                logits = state.logits(earlier_parts)  # (B, V), or (2B, V) when guided
                if copies == 2:
                    logits = guide(*logits.chunk(2), scales[position][part])
                broken |= ~logits.amax(-1).isfinite()
                token_parts.append(choose_tokens(logits, numbers[:, position, part], config, part))
            tokens.append(state.join(token_parts))
        refuse_broken(broken)
        return torch.stack(tokens, dim=1)


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
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # probability of all tokens before each one, by rank
        before[..., 0] = 0  # the roll put the total there; the most probable token always stays
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
    # float64: in float32 the steps of a sum over 262,144 tokens are as large as many tokens' probabilities.
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (B, V)
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
    values = to_indices(seed, "seed")
    require(
        values.ndim == 0 or len(values) == images,
        f"seed must be one number, or one per image, here {images}; got {values.numel()}. Use seed=0.",
    )
    seeds = range(int(values), int(values) + images) if values.ndim == 0 else values.tolist()
    # Always the CPU's generator, whatever the process's default device is.
    numbers = partial(torch.rand, positions, dtype=torch.float64, device="cpu")
    return torch.stack([numbers(generator=torch.Generator("cpu").manual_seed(image_seed)) for image_seed in seeds])
