"""What one position of `sampler` is made of, in PyTorch's operations: on a CPU, in float64, and without Triton.

`sampler_kernels` has the same functions as kernels. None of them looks at a number on the host, and none makes a shape
of one, so that a whole position can be recorded. Shape letters: R rows of the network, which are L lanes, or twice as
many under guidance · C width · H heads · d = C/H · T positions · V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from ibqlab.generator.attention import rotate
from ibqlab.generator.layers import NORM_EPSILON
from ibqlab.generator.token_choice import guide, keep_most_probable, keep_near_top, keep_probability, tokens_at
from ibqlab.quantizers.codebooks import at_least_float32


class Drawing(NamedTuple):
    """All that says how tokens are drawn and how far the images are, as numbers that a recorded step finds again."""

    position: Int[Tensor, "1"]
    """The next one, 0 to T − 1; a step moves it on."""
    prompt_length: Int[Tensor, "1"]
    """Positions whose tokens are given."""
    active: Int[Tensor, "1"]
    """Lanes with an image; the others are idle."""
    tokens: Int[Tensor, "L T"]
    """Those of a prompt from the beginning; the others are written position by position."""
    numbers: Float[Tensor, "L T parts"]
    """Uniform, float64, at most `LARGEST_NUMBER`; what draws each token."""
    scales: Float[Tensor, "T parts"]
    """Guidance of each position."""
    temperatures: Float[Tensor, " parts"]
    top_p: Float[Tensor, "1"]
    log_min_p: Float[Tensor, "1"]
    broken: UInt8[Tensor, " L"]
    """1 for images whose scores were no numbers at some position that was drawn."""


class DrawingForm(NamedTuple):
    """What of a draw is built into a recorded step."""

    greedy: tuple[bool, ...]
    """For each part of a token: take the most probable one."""
    top_k: int
    """0: no such filter."""
    has_top_p: bool
    has_min_p: bool

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens may be ruled out."""
        return self.top_k > 0 or self.has_top_p or self.has_min_p


def add_and_normalise(
    x: Float[Tensor, "R C"],
    update: Float[Tensor, "R C"] | None,
    gate: Float[Tensor, "R C"] | None,
    *,
    weight: Float[Tensor, " C"],
    scale: Float[Tensor, "R C"] | None = None,
    shift: Float[Tensor, "R C"] | None = None,
) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]]:
    """h = x + gate ⊙ update, and RMS(h) · weight ⊙ (1 + scale) + shift: a residual and the norm behind it.

    Args:
        x: in float32 or wider, whatever the weights' type: half types would round the sum of all blocks 2·depth times.
        update: what a block adds; None: nothing.
        gate: of the update; None: 1.
        weight: of the norm, in the type of its output.
        scale, shift: of the norm's output; None: 0.
    Returns:
        h, and its norm in the type of `weight`. The kernel writes h over x.
    """
    if update is not None:
        update = update.to(x.dtype)
        x = x + (update if gate is None else gate * update)
    normed = x * (x.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()
    normed = normed.to(weight.dtype).to(x.dtype) * weight  # half types are rounded before the weight, as `RMSNorm` does
    if scale is not None:
        normed = normed * (1 + scale.to(x.dtype)) + shift
    return x, normed.to(weight.dtype)


def attend(
    qkv: Float[Tensor, "R three_C"],
    cache: tuple[Float[Tensor, "R H T d"], Float[Tensor, "R H T d"]],
    table: Float[Tensor, "T pairs 2"],
    position: Int[Tensor, "1"],
    drawing: Drawing,
) -> Float[Tensor, "R C"]:
    """Attention of the newest position to itself and to those before it; its keys and values go into the cache.

    Args:
        qkv: queries, keys and values of one position side by side, not turned.
        cache: keys, turned, and values. Those behind the position may be anything that is a number.
        table: `rotary_table`.
        position: where the newest one stands.
        drawing: says which lanes have an image.
    Cost: all T places are read, and a mask rules out those to come; the kernel reads the filled ones alone.
    """
    keys, values = cache
    q, k, v = (vectors.unflatten(-1, (keys.shape[1], -1))[:, None] for vectors in qkv.chunk(3, dim=-1))  # (R, 1, H, d)
    row = table.index_select(0, position)
    keys.index_copy_(2, position, rotate(k, row).transpose(1, 2))
    values.index_copy_(2, position, v.transpose(1, 2))
    mask = torch.arange(len(table), device=qkv.device) <= position
    mixed = F.scaled_dot_product_attention(rotate(q, row).transpose(1, 2), keys, values, attn_mask=mask[None])
    return mixed.flatten(1)


def gate_hidden(both: Float[Tensor, "R two_hidden"]) -> Float[Tensor, "R hidden"]:
    """SiLU(w1 x) ⊙ w3 x of both products side by side."""
    gate, value = both.chunk(2, dim=-1)
    return F.silu(gate) * value


def score(normed: Float[Tensor, "R C"], head: Float[Tensor, "V C"]) -> Float[Tensor, "R V"]:
    """Logits in float32 or wider; on a GPU the sums of half types are not rounded on the way."""
    if normed.is_cuda and normed.element_size() == 2:
        return torch.mm(normed, head.t(), out_dtype=torch.float32)
    return at_least_float32(F.linear(normed, head))


def choose(scores: Float[Tensor, "R V"], drawing: Drawing, form: DrawingForm, part: int) -> Int[Tensor, " L"]:
    """Tokens, or parts of tokens, by the scores: guidance, temperature, filters and draw, as in `choose_tokens`.

    Args:
        scores: of all lanes; for twice as many rows, the second half those of the null class.
        drawing: whose `broken` is marked.
        form: which filters there are.
        part: 0, or 1 for the second part of Open-MAGVIT2's tokens.
    """
    if len(scores) > len(drawing.broken):
        scores = guide(*scores.chunk(2), drawing.scales.index_select(0, drawing.position)[:, part])
    is_drawn = drawing.position >= drawing.prompt_length
    drawing.broken.logical_or_(~scores.amax(-1).isfinite() & is_drawn)
    if form.greedy[part]:
        return scores.argmax(-1)
    scores = scores / drawing.temperatures[part]
    if form.top_k:
        scores = keep_most_probable(scores, form.top_k)
    if form.has_top_p:
        scores = keep_probability(scores, drawing.top_p)
    if form.has_min_p:
        scores = keep_near_top(scores, drawing.log_min_p)
    return tokens_at(scores, drawing.numbers.index_select(1, drawing.position)[:, 0, part])


def write_tokens(parts: Sequence[Int[Tensor, " L"]], worth: int, drawing: Drawing) -> Int[Tensor, " L"]:
    """Join a token's parts and write it at the position, where the prompt has none.

    Args:
        parts: one, or two of which the second counts `worth` times.
        worth: 2^(bits of the first part).
        drawing: whose `tokens` are written.
    Returns:
        The tokens that now stand at the position.
    """
    drawn = parts[0] if len(parts) == 1 else parts[0] + worth * parts[1]
    given = drawing.tokens.index_select(1, drawing.position)[:, 0]
    token = torch.where(drawing.position < drawing.prompt_length, given, drawn)
    drawing.tokens.index_copy_(1, drawing.position, token[:, None])
    return token
