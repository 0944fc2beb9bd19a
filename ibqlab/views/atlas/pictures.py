"""The pictures of an atlas: every image once, and sheets of what the codes decode to."""

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ibqlab.base.progress import CountingLine
from ibqlab.views.atlas.gather import SHARD
from ibqlab.views.cards import CardReader
from ibqlab.views.decoding import SURROUNDINGS, grid_of
from ibqlab.views.patches import EDGE, WHOLE_SIDE, PatchIndex, shrink

QUALITY = 90
"""Of the images' JPEG."""
ACROSS = int(SHARD**0.5)
"""Pictures side by side on a sheet, which holds those of one file of cards."""
_BATCH = 64
WHOLE_CODES = 256
"""Codes that are decoded at most where tokens lie on no grid, because each then takes a whole image."""


def jpeg(pixels: np.ndarray) -> bytes:
    """An image as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def write_images(folder: Path, index: PatchIndex, progress: bool) -> None:
    """Every image as a file of its own, by number."""
    with CountingLine("atlas: images", len(index.pictures), "images", progress) as line:
        for number, pixels in enumerate(index.pictures):
            (folder / f"{number}.jpg").write_bytes(jpeg(pixels))
            line.advance()


def decoded_codes(reader: CardReader, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """What codes in use decode to where all tokens are this code, computed once.

    Returns:
        Codes (U,), and the middle square of each (U, h, w, 3). Without a grid the most used codes alone, and of each
        the whole image, small.
    """
    used = np.flatnonzero(reader.index.counts)
    if not reader.index.has_grid:
        most = np.argsort(-reader.index.counts, kind="stable")[:WHOLE_CODES]
        used = np.intersect1d(used, most)
    arrays = reader.subject.store.get(
        "decoded",
        lambda: {"pictures": _decode(reader, used, progress)},
        weights=reader.subject.weights_mark,
        codes=hashlib.sha256(used).hexdigest(),
        version=1,
    )
    return used, arrays["pictures"]


def _decode(reader: CardReader, used: np.ndarray, progress: bool) -> np.ndarray:
    index, tokenizer = reader.index, reader.subject.tokenizer
    if not index.has_grid:
        return _decode_whole(reader, used, progress)
    side = min(2 * SURROUNDINGS + 1, *index.codes.shape[1:])
    height, width = index.patch
    top, left = (side // 2) * height, (side // 2) * width
    pictures = np.empty((len(used), height, width, 3), np.uint8)
    with CountingLine("atlas: decoding", len(used), "codes", progress) as line:
        for first in range(0, len(used), _BATCH):
            some = torch.from_numpy(used[first : first + _BATCH])
            with torch.no_grad():
                vectors = tokenizer.quantizer.decode(some[:, None, None].repeat(1, side, side))
            shown = grid_of(tokenizer, vectors)
            pictures[first : first + _BATCH] = shown[:, top : top + height, left : left + width]
            line.advance(len(some))
    return pictures


def _decode_whole(reader: CardReader, used: np.ndarray, progress: bool) -> np.ndarray:
    """Small pictures of whole images of which every token is one code."""
    tokenizer, pictures = reader.subject.tokenizer, []
    tokens = reader.index.codes.shape[2]
    with CountingLine("atlas: decoding", len(used), "codes", progress) as line:
        for code in used.tolist():
            with torch.no_grad():
                vectors = tokenizer.quantizer.decode(torch.full((1, 1, tokens), code))
            pictures.append(shrink(grid_of(tokenizer, vectors)[0], WHOLE_SIDE))
            line.advance(1)
    return np.stack(pictures)


def write_sheets(folder: Path, codes: np.ndarray, pictures: np.ndarray) -> None:
    """Decoded codes as one sheet per file of cards; of codes that are not there it is grey."""
    height, width = pictures.shape[1:3]
    for shard in np.unique(codes // SHARD):
        sheet = np.full((ACROSS, height, ACROSS, width, 3), EDGE, np.uint8)
        here = codes // SHARD == shard
        places = codes[here] % SHARD
        sheet[places // ACROSS, :, places % ACROSS] = pictures[here]
        Image.fromarray(sheet.reshape(ACROSS * height, ACROSS * width, 3)).save(folder / f"{shard}.png")
