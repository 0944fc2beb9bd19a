"""The functions of `sampler_operations` as Triton kernels: eight launches for a block, two for a draw.

What is unusual: a recorded step is launched once per position and reads the position from memory, so a kernel finds out
by itself how far the cache is filled and where the next token goes. All sums are float32, of draws float64, in an order
that depends on the position alone. Letters as in `sampler_operations`.
"""

# ruff: noqa: PLR0917 - pointers, sizes, and constants by name: a kernel's arguments are many

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.generator import sampler_operations
from ibqlab.generator.layers import NORM_EPSILON
from ibqlab.generator.sampler_operations import Drawing, DrawingForm

WARPS = 4
TILE_BYTES = 8192
"""Of a tile of keys: 64 positions of 64 channels in bfloat16. Keys and values of a tile stay in registers, few enough
for nine programs on a multiprocessor, whose reads overlap."""
HIDDEN_BLOCK = 1024
DRAW_BLOCK = 1024
"""Eight scores for each of 128 threads: one program draws for a lane, and its threads' reads have to overlap."""
DRAW_REGISTERS = 128
"""A bound that is never reached: without one, the assembler of B200 keeps to 32 registers and spills others."""

score = sampler_operations.score  # a product, which is cuBLAS's


def add_and_normalise(
    x: Float[Tensor, "R C"],
    update: Float[Tensor, "R C"] | None,
    gate: Float[Tensor, "R C"] | None,
    *,
    weight: Float[Tensor, " C"],
    scale: Float[Tensor, "R C"] | None = None,
    shift: Float[Tensor, "R C"] | None = None,
) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R C"]]:
    """As `sampler_operations.add_and_normalise`, with the sum written over x."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=weight.dtype, device=x.device)
    _add_and_normalise[(rows,)](
        *(x, update, gate, weight, scale, shift, out),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        EPSILON=NORM_EPSILON,
        num_warps=WARPS,
    )
    return x, out


@triton.jit
def _add_and_normalise(
    x, update, gate, weight, scale, shift, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr
):
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    place = tl.program_id(0) * WIDTH + channel
    value = tl.load(x + place, mask=inside, other=0.0)
    if update is not None:
        change = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            change *= tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        value += change
        tl.store(x + place, value, mask=inside)
    normed = value * tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + EPSILON)
    normed = normed.to(out.dtype.element_ty).to(tl.float32)  # half types are rounded before the weight, as published
    normed *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        normed *= 1 + tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
        normed += tl.load(shift + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)


def attend(
    qkv: Float[Tensor, "R three_C"],
    cache: tuple[Float[Tensor, "R H T d"], Float[Tensor, "R H T d"]],
    table: Float[Tensor, "T pairs 2"],
    position: Int[Tensor, "1"],
    drawing: Drawing,
) -> Float[Tensor, "R C"]:
    """As `sampler_operations.attend`; rows of idle lanes come out as zeros, and their caches stay as they are.

    Cost: reads the filled places of the cache of active lanes and no others.
    """
    keys, values = cache
    rows, heads, positions, channels = keys.shape
    out = torch.empty(rows, heads * channels, dtype=qkv.dtype, device=qkv.device)
    block = triton.next_power_of_2(channels)
    _attend[(heads, rows)](
        *(qkv, keys, values, table, position, drawing.active, out),
        *(heads, positions, len(drawing.broken), channels**-0.5),
        CHANNELS=channels,
        BLOCK=block,
        PLACES=max(16, TILE_BYTES // (block * keys.element_size())),
        num_warps=WARPS,
    )
    return out


@triton.jit(do_not_specialize=["heads", "positions", "lanes"])
def _attend(
    qkv,
    keys,
    values,
    table,
    position,
    active,
    out,
    heads,
    positions,
    lanes,
    root,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)  # rows · heads · positions · channels may pass 2^31
    width = heads * CHANNELS
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    result = out + row * width + head * CHANNELS + channel
    if row % lanes >= tl.load(active):
        tl.store(result, tl.zeros([BLOCK], out.dtype.element_ty), mask=inside)
        return
    newest = tl.load(position)
    # Neighbouring channels turn as a pair: (a, b) to (a cos − b sin, b cos + a sin).
    angle = table + newest * CHANNELS + channel // 2 * 2
    cos = tl.load(angle, mask=inside, other=0.0)
    sin = tl.load(angle + 1, mask=inside, other=0.0)
    sin = tl.where(channel % 2 == 0, -sin, sin)
    own = qkv + row * 3 * width + head * CHANNELS
    other = channel ^ 1
    query = tl.load(own + channel, mask=inside, other=0.0).to(tl.float32) * cos
    query += tl.load(own + other, mask=inside, other=0.0).to(tl.float32) * sin
    query = query.to(out.dtype.element_ty).to(tl.float32)
    own += width
    key = tl.load(own + channel, mask=inside, other=0.0).to(tl.float32) * cos
    key += tl.load(own + other, mask=inside, other=0.0).to(tl.float32) * sin
    key = key.to(out.dtype.element_ty)
    own += width
    value = tl.load(own + channel, mask=inside, other=0.0)
    cache = (row * heads + head) * positions * CHANNELS
    tl.store(keys + cache + newest * CHANNELS + channel, key, mask=inside)
    tl.store(values + cache + newest * CHANNELS + channel, value, mask=inside)
    # The newest place comes first and from registers: what was just written need not be readable yet.
    top = tl.sum(query * key.to(tl.float32), axis=0) * root
    total = tl.exp(top - top)  # 1, or NaN where the score is
    mixed = value.to(tl.float32)
    start = newest * 0
    while start < newest:  # Triton 3.6's interpreter has no `range` up to a number that was loaded
        place = start + tl.arange(0, PLACES)
        filled = place < newest
        numbers = cache + place[:, None] * CHANNELS + channel[None, :]
        mask = filled[:, None] & inside[None, :]
        key_tile = tl.load(keys + numbers, mask=mask, other=0.0).to(tl.float32)  # (PLACES, d)
        value_tile = tl.load(values + numbers, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(filled, tl.sum(key_tile * query[None, :], axis=1) * root, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=0))
        shares = tl.exp(scores - highest)
        shrunk = tl.exp(top - highest)
        total = total * shrunk + tl.sum(shares, axis=0)
        mixed = mixed * shrunk + tl.sum(shares[:, None] * value_tile, axis=0)
        top = highest
        start += PLACES
    mixed /= total
    tl.store(result, mixed.to(out.dtype.element_ty), mask=inside)


def gate_hidden(both: Float[Tensor, "R two_hidden"]) -> Float[Tensor, "R hidden"]:
    """As `sampler_operations.gate_hidden`."""
    rows, hidden = len(both), both.shape[1] // 2
    out = torch.empty(rows, hidden, dtype=both.dtype, device=both.device)
    grid = (rows, triton.cdiv(hidden, HIDDEN_BLOCK))
    _gate_hidden[grid](both, out, HIDDEN=hidden, BLOCK=HIDDEN_BLOCK, num_warps=WARPS)
    return out


@triton.jit
def _gate_hidden(both, out, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < HIDDEN
    gate = tl.load(both + row * 2 * HIDDEN + channel, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(both + row * 2 * HIDDEN + HIDDEN + channel, mask=inside, other=0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * value
    tl.store(out + row * HIDDEN + channel, gated.to(out.dtype.element_ty), mask=inside)


def choose(scores: Float[Tensor, "R V"], drawing: Drawing, form: DrawingForm, part: int) -> Int[Tensor, " L"]:
    """As `sampler_operations.choose`, which does it by itself where tokens are ruled out: sorting takes the time."""
    if form.is_filtered and not form.greedy[part]:
        return sampler_operations.choose(scores, drawing, form, part)
    rows, vocabulary = scores.shape
    lanes, positions, parts = drawing.numbers.shape
    chosen = torch.empty(lanes, dtype=torch.int64, device=scores.device)
    block = min(DRAW_BLOCK, triton.next_power_of_2(vocabulary))
    _choose[(lanes,)](
        *(scores, drawing.numbers, drawing.scales, drawing.temperatures, drawing.position, drawing.prompt_length),
        *(drawing.broken, chosen, positions),
        VOCABULARY=vocabulary,
        GUIDED=rows > lanes,
        GREEDY=form.greedy[part],
        PARTS=parts,
        PART=part,
        BLOCK=block,
        BLOCKS=triton.next_power_of_2(triton.cdiv(vocabulary, block)),
        num_warps=WARPS,
        maxnreg=DRAW_REGISTERS,
    )
    return chosen


@triton.jit
def _guided_scores(
    scores, lane, token, scale, temperature, VOCABULARY: tl.constexpr, GUIDED: tl.constexpr, GREEDY: tl.constexpr
):
    """Of one lane's tokens, guided and divided by the temperature; −∞ beyond the vocabulary."""
    inside = token < VOCABULARY
    score = tl.load(scores + lane * VOCABULARY + token, mask=inside, other=0.0)
    if GUIDED:
        null = tl.load(scores + (lane + tl.num_programs(0)) * VOCABULARY + token, mask=inside, other=0.0)
        score = null + scale * (score - null)
    if not GREEDY:
        score = score / temperature
    return tl.where(inside, score, float("-inf"))


@triton.jit
def _first_beyond(goal, cumulative, weights, SIZE: tl.constexpr):
    """As `token_choice.first_beyond`, of one row."""
    places = tl.arange(0, SIZE)
    has_weight = weights > 0
    first = tl.min(tl.where(has_weight & (cumulative > goal), places, SIZE), axis=0)
    return tl.minimum(first, tl.max(tl.where(has_weight, places, 0), axis=0))


@triton.jit(do_not_specialize=["positions"])
def _choose(
    scores,
    numbers,
    scales,
    temperatures,
    position,
    prompt_length,
    broken,
    chosen,
    positions,
    VOCABULARY: tl.constexpr,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    newest = tl.load(position)
    scale = tl.load(scales + newest * PARTS + PART)
    temperature = tl.load(temperatures + PART)
    # Compared place by place first: a maximum over all threads in every block would make each block wait.
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    tokens = tl.zeros([BLOCK], tl.int32)
    is_nan = tokens > 0
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        block = _guided_scores(scores, lane, token, scale, temperature, VOCABULARY, GUIDED, GREEDY)
        is_nan = is_nan | (block != block)  # noqa: PLR0124 - true for NaN alone
        if GREEDY:
            tokens = tl.where(block > tops, token, tokens)
        tops = tl.maximum(tops, block)
    top = tl.max(tops, axis=0)
    best = tl.min(tl.where(tops == top, tokens, VOCABULARY - 1), axis=0)  # the first one on a tie
    nans = tl.max(is_nan.to(tl.int32), axis=0)
    is_number = (nans == 0) & (top > float("-inf")) & (top < float("inf"))
    if (not is_number) & (newest >= tl.load(prompt_length)):
        tl.store(broken + lane, 1)
    if not GREEDY:
        number = tl.load(numbers + (lane * positions + newest) * PARTS + PART)
        block_places = tl.arange(0, BLOCKS)
        sums = tl.zeros([BLOCKS], tl.float64)
        for start in range(0, VOCABULARY, BLOCK):
            token = start + tl.arange(0, BLOCK)
            block = _guided_scores(scores, lane, token, scale, temperature, VOCABULARY, GUIDED, GREEDY)
            # Float32 within a block; from block to block the sums would lose what single tokens weigh.
            weight = tl.sum(tl.exp(block - top), axis=0).to(tl.float64)
            sums = tl.where(block_places == start // BLOCK, weight, sums)
        cumulative = tl.cumsum(sums, axis=0)
        goal = number * tl.max(cumulative, axis=0)
        block_place = _first_beyond(goal, cumulative, sums, BLOCKS)
        before = tl.sum(tl.where(block_places < block_place, sums, 0.0), axis=0)
        token = block_place * BLOCK + tl.arange(0, BLOCK)
        block = _guided_scores(scores, lane, token, scale, temperature, VOCABULARY, GUIDED, GREEDY)
        inside = tl.exp(block - top).to(tl.float64)
        best = block_place * BLOCK + _first_beyond(goal - before, tl.cumsum(inside, axis=0), inside, BLOCK)
    tl.store(chosen + lane, best)


def write_tokens(parts: Sequence[Int[Tensor, " L"]], worth: int, drawing: Drawing) -> Int[Tensor, " L"]:
    """As `sampler_operations.write_tokens`."""
    lanes, positions = drawing.tokens.shape
    token = torch.empty(lanes, dtype=torch.int64, device=drawing.tokens.device)
    _write_tokens[(1,)](
        *(parts[0], None if len(parts) == 1 else parts[1], drawing.tokens, drawing.position, drawing.prompt_length),
        *(token, worth, positions, lanes),
        LANES=triton.next_power_of_2(lanes),
        num_warps=1,
    )
    return token


@triton.jit(do_not_specialize=["worth", "positions", "lanes"])
def _write_tokens(first, second, tokens, position, prompt_length, token, worth, positions, lanes, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    inside = lane < lanes
    newest = tl.load(position)
    value = tl.load(first + lane, mask=inside, other=0)
    if second is not None:
        value += worth * tl.load(second + lane, mask=inside, other=0)
    place = tokens + lane.to(tl.int64) * positions + newest
    given = tl.load(place, mask=inside, other=0)
    value = tl.where(newest < tl.load(prompt_length), given, value)
    tl.store(place, value, mask=inside)
    tl.store(token + lane, value, mask=inside)
