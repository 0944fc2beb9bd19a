"""Scores of tokens against codes, a block of rows at a time: how large a block is, its products, its best codes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.quantizers.precision import exact_products

BLOCK_BYTES = {"cpu": 20 * 2**20, "cuda": 512 * 2**20}
"""Size of one block of scores by type of device. Larger ones gained nothing on a CPU (experiments/results)."""
MIN_ROWS = 128
"""Rows of a block however many codes there are: with fewer, matrix products read the codebook too often."""
TILE_BYTES = 2 * 2**20
"""Size of the part of a block that elementwise work on a CPU goes through at a time, so that it stays in the cache."""
CHUNK = 128
"""Codes among which the best is found by their maximum first."""

_kept = threading.local()


def rows_per_block(codebook_size: int, like: Tensor) -> int:
    """How many tokens' scores against all codes make one block, in the type and on the device of `like`."""
    limit = BLOCK_BYTES.get(like.device.type, BLOCK_BYTES["cpu"])
    return max(MIN_ROWS, limit // (codebook_size * like.element_size()))


def row_blocks(tokens: int, codebook_size: int, like: Tensor) -> list[slice]:
    """Slices that cut `tokens` rows into blocks of `rows_per_block`, the first the largest."""
    rows = rows_per_block(codebook_size, like)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def rows_per_tile(scores: Float[Tensor, "R K"]) -> int:
    """How many rows of a block make one tile of `TILE_BYTES`, at least one."""
    return max(1, TILE_BYTES // (scores.shape[1] * scores.element_size()))


def best_codes(scores: Float[Tensor, "R K"]) -> tuple[Float[Tensor, "R 1"], Int[Tensor, " R"]]:
    """The largest score of each row and where it stands; on a tie the lowest index, NaN before everything.

    The same as `scores.max(1)`. On a CPU, where that walks a row number by number, chunks of the row are compared by
    their maxima, which is vectorised, and only the best chunk is walked.
    """
    if scores.device.type != "cpu":
        top, indices = scores.max(1, keepdim=True)
        return top, indices[:, 0]
    top, chunk = chunk_maxima(scores).max(1, keepdim=True)
    # The last chunk may end early: its last code stands in for what is missing, and loses ties against itself.
    columns = columns_of(chunk).clamp_max_(scores.shape[1] - 1)
    return top, columns.gather(1, scores.gather(1, columns).argmax(1, keepdim=True))[:, 0]


def columns_near_top(
    scores: Float[Tensor, "R K"], top: Float[Tensor, "R 1"], reach: float
) -> Int[Tensor, "R some"] | None:
    """In each row, columns with every score above top − reach among them, whole chunks of codes.

    None where they would be more than a quarter of all, where K is no multiple of `CHUNK`, and where there are no
    numbers to look at, as in tensors without memory.
    """
    if scores.shape[1] % CHUNK or type(scores) is not Tensor:
        return None
    maxima = chunk_maxima(scores)
    count = int((maxima > top - reach).sum(1).max().clamp_min(1))
    if 4 * count > maxima.shape[1]:
        return None
    return columns_of(maxima.topk(count, dim=1).indices)


def chunk_maxima(scores: Float[Tensor, "R K"]) -> Float[Tensor, "R chunks"]:
    """Largest score of every `CHUNK` codes; of the rest, where K is no multiple."""
    size = scores.shape[1]
    whole = size - size % CHUNK
    maxima = scores[:, :whole].unflatten(1, (-1, CHUNK)).amax(2) if whole else scores[:, :0]
    return torch.cat([maxima, scores[:, whole:].amax(1, keepdim=True)], dim=1) if whole < size else maxima


def columns_of(chunks: Int[Tensor, "R some"]) -> Int[Tensor, "R columns"]:
    """The columns of chunks of codes."""
    return (chunks[:, :, None] * CHUNK + torch.arange(CHUNK, device=chunks.device)).flatten(1)


def workspace(number: int, rows: int, codebook_size: int, like: Tensor) -> list[Tensor]:
    """`number` blocks of scores (rows, K) to write into, of the type and on the device of `like`.

    On a CPU blocks of up to `BLOCK_BYTES` are the same memory at each call from one thread, because fresh memory costs
    some 5 % of a step in page faults. CUDA's allocator keeps its memory by itself; tensors without memory have none.
    """
    # A parameter's blocks are plain tensors, too.
    like, wanted = like.detach(), number * rows * codebook_size
    kept = _kept.__dict__.setdefault("by_type", {})
    large = rows * codebook_size * like.element_size() > BLOCK_BYTES["cpu"]
    if large or like.device.type != "cpu" or type(like) is not Tensor:
        memory = like.new_empty(wanted)
    elif like.dtype in kept and len(kept[like.dtype]) >= wanted:
        memory = kept[like.dtype][:wanted]
    else:
        memory = kept[like.dtype] = like.new_empty(wanted)
    return list(memory.view(number, rows, codebook_size))


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left · right into `out`, whose type is that of the statistics: float32 also where CUDA multiplies half types."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside the block products are what their operands' types say: no autocast, no TF32, no bfloat16 in their place.

    Whatever the process had chosen, through torch's older switches or its newer ones, stands again afterwards.
    """
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total ← total + left · right; types as in `product`."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
