"""Scores of tokens against codes, a block of rows at a time: how large a block is, and its best codes.

The N × K matrix of all scores is the largest tensor of a training step, 17 GB in float32 for 16,384 tokens and 262,144
codes. Every computation over it here goes through blocks of rows, (R, K), and keeps a few numbers per row.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.quantizers.products import ProductForm, multiplying, row_kernels_for

BLOCK_BYTES = {"cpu": 20 * 2**20, "cuda": 512 * 2**20}
"""Size of one block of scores by type of device. Larger ones gained nothing on a CPU (experiments/results). On CUDA 512
rows of 262,144 codes: with half of that a product reads the codebook about as long as it computes, and two such blocks,
the codebook's gradient and its parts by panels stay within a twentieth of the published form's memory."""
MIN_ROWS = 128
"""Rows of a block however many codes there are: with fewer, matrix products read the codebook too often."""
TILE_BYTES = 2 * 2**20
"""Size of a tile, the rows of a block that elementwise work on a CPU goes through at a time, so that they stay in the
cache."""
CHUNK = 128
"""Codes among which the best is found by their maximum first."""

_memory = threading.local()


def rows_per_block(codebook_size: int, like: Tensor) -> int:
    """How many tokens' scores against all codes make one block, in the type and on the device of `like`."""
    limit = BLOCK_BYTES.get(like.device.type, BLOCK_BYTES["cpu"])
    return max(MIN_ROWS, limit // (codebook_size * like.element_size()))


def score_blocks(
    tokens: int, codebook_size: int, like: Tensor, *, buffers: int = 1
) -> Iterator[tuple[slice, list[Float[Tensor, "R K"]]]]:
    """Cut N tokens into blocks of rows: each block's rows, and memory for its scores.

        for rows, (scores,) in score_blocks(len(features), len(codebook), features):
            torch.mm(features[rows], codebook.T, out=scores)

    Args:
        tokens: N, at least 1.
        codebook_size: K.
        like: of the type and on the device that the scores are to have.
        buffers: tensors (R, K) per block. They hold whatever the last block left there.
    """
    rows = rows_per_block(codebook_size, like)
    memory = workspace(buffers, min(rows, tokens), codebook_size, like)
    for start in range(0, tokens, rows):
        block = slice(start, min(start + rows, tokens))
        yield block, [buffer[: block.stop - block.start] for buffer in memory]  # the last block may be shorter


def rows_per_tile(scores: Float[Tensor, "R K"]) -> int:
    """How many rows of a block make one tile of `TILE_BYTES`, at least one; on CUDA, with no such cache, all."""
    if scores.is_cuda:
        return len(scores)
    return max(1, TILE_BYTES // (scores.shape[1] * scores.element_size()))


def best_codes(
    scores: Float[Tensor, "R K"], offset: Float[Tensor, " K"] | None = None
) -> tuple[Float[Tensor, "R 1"], Int[Tensor, " R"]]:
    """The largest score of each row and where it stands; on a tie the lowest index, NaN before everything.

    The same as `scores.max(1)`. On a CPU, where that walks a row number by number, chunks of the row are compared by
    their maxima, which is vectorised, and only the best chunk is walked.

    Args:
        scores: S; overwritten where there is an offset.
        offset: compare 2 S + offset instead.
    """
    kernels = row_kernels_for(scores)
    if kernels is not None:
        return kernels.best_codes(scores, offset)
    if offset is not None:
        scores.mul_(2).add_(offset)
    if scores.device.type != "cpu":
        top, indices = scores.max(1, keepdim=True)
        return top, indices[:, 0]
    top, chunk = chunk_maxima(scores).max(1, keepdim=True)  # (R, 1): the first of equal chunks, so ties stay lowest
    # The last chunk may end early: its last code stands in for what is missing, and loses ties against itself.
    columns = columns_of(chunk).clamp_max_(scores.shape[1] - 1)  # (R, CHUNK)
    return top, columns.gather(1, scores.gather(1, columns).argmax(1, keepdim=True))[:, 0]


def columns_near_top(
    scores: Float[Tensor, "R K"], top: Float[Tensor, "R 1"], reach: float
) -> Int[Tensor, "R some"] | None:
    """In each row, columns with every score above top − reach among them, whole chunks of codes.

    None where they would be more than a quarter of all, where K is no multiple of `CHUNK`, and where there are no
    numbers to look at without waiting for a device, as in tensors without memory.
    """
    if scores.shape[1] % CHUNK or type(scores) is not Tensor or scores.device.type != "cpu":
        return None
    maxima = chunk_maxima(scores)  # (R, K / CHUNK)
    # One count for all rows, that of the row with most, so that the result is a rectangle. At least one: rows of NaN.
    count = int((maxima > top - reach).sum(1).max().clamp_min(1))
    # Gathering costs more than it saves long before all columns are gathered.
    if 4 * count > maxima.shape[1]:
        return None
    return columns_of(maxima.topk(count, dim=1).indices)  # (R, count · CHUNK)


def chunk_maxima(scores: Float[Tensor, "R K"]) -> Float[Tensor, "R chunks"]:
    """Largest score of every `CHUNK` codes; of the rest, where K is no multiple."""
    size = scores.shape[1]
    whole = size - size % CHUNK
    maxima = scores[:, :whole].unflatten(1, (-1, CHUNK)).amax(2) if whole else scores[:, :0]
    return torch.cat([maxima, scores[:, whole:].amax(1, keepdim=True)], dim=1) if whole < size else maxima


def columns_of(chunks: Int[Tensor, "R some"]) -> Int[Tensor, "R columns"]:
    """The columns of chunks of codes."""
    return (chunks[:, :, None] * CHUNK + torch.arange(CHUNK, device=chunks.device)).flatten(1)


def lowest_exponent(dtype: torch.dtype) -> float:
    """The exponent below which a share counts as e^that: −61 for float32, where shares end at e^−87.

    Smaller shares, and their products with small gradients, would be denormal numbers, with which a CPU computes up to
    sixty times slower. K shares of e^−61 add up to 10⁻²¹ for K = 262,144, far below the type's rounding.
    """
    return 0.7 * math.log(torch.finfo(dtype).tiny)


def softmax_backward(gradient: Float[Tensor, "R K"], shares: Float[Tensor, "R K"]) -> None:
    """gradient ← shares ⊙ (gradient − ⟨shares, gradient⟩), PyTorch's own fused kernel."""
    torch.ops.aten._softmax_backward_data.out(gradient, shares, 1, shares.dtype, grad_input=gradient)


def workspace(number: int, rows: int, codebook_size: int, like: Tensor) -> list[Float[Tensor, "R K"]]:
    """`number` blocks of scores (rows, K) to write into, of the type and on the device of `like`.

    On a CPU blocks of up to `BLOCK_BYTES` are the same memory at each call from one thread, because fresh memory costs
    some 5 % of a step in page faults. CUDA's allocator keeps its memory by itself; tensors without memory have none.
    """
    # A parameter's blocks are plain tensors, too.
    like, numbers = like.detach(), number * rows * codebook_size
    by_type = _memory.__dict__.setdefault("by_type", {})
    large = rows * codebook_size * like.element_size() > BLOCK_BYTES["cpu"]
    if large or like.device.type != "cpu" or type(like) is not Tensor:
        memory = like.new_empty(numbers)
    elif like.dtype in by_type and len(by_type[like.dtype]) >= numbers:
        memory = by_type[like.dtype][:numbers]
    else:
        memory = by_type[like.dtype] = like.new_empty(numbers)
    return list(memory.view(number, rows, codebook_size))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside the block products are what their operands' types say: no autocast, no TF32, no bfloat16 in their place.

    Whatever the process had chosen, through torch's older switches or its newer ones, stands again afterwards.
    """
    with multiplying(ProductForm(torch.float32), device):
        yield
