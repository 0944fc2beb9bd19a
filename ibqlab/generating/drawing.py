"""Images drawn from a generator: its tokens, decoded by its tokenizer, each image by a seed of its own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.generator import AnyGenerator
from ibqlab.generator.sampling import Seed
from ibqlab.metrics import truncate_to_uint8
from ibqlab.tokenizer import Tokenizer
from ibqlab.training.generator.token_source import check_fit

BATCH = 64
"""Images drawn and decoded at once, where nobody says otherwise."""


class ImageGrid(NamedTuple):
    """Generated images and what they were asked to be."""

    images: UInt8[np.ndarray, "rows columns H W 3"]
    labels: Int[np.ndarray, "rows columns"]
    seeds: Int[np.ndarray, "rows columns"]


@torch.no_grad()
def decode_pictures(tokenizer: Tokenizer, tokens: Int[Tensor, "B T"], grid_size: int) -> UInt8[np.ndarray, "B H W 3"]:
    """Tokens, row by row of a square grid, as 8-bit pictures, cut off below and above as published."""
    decoded = tokenizer.decode_indices(tokens.view(-1, grid_size, grid_size))
    return truncate_to_uint8(decoded).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def draw_images(
    generator: AnyGenerator,
    tokenizer: Tokenizer,
    labels: Int[Tensor, " B"],
    *,
    seed: Seed = 0,
    batch_size: int = BATCH,
    **sampling: Any,
) -> UInt8[np.ndarray, "B H W 3"]:
    """New images of classes, as pictures.

    Args:
        generator: a transformer over the tokenizer's codes.
        tokenizer: whose decoder makes the images, on the generator's device.
        labels: classes asked for.
        seed: of all, whose image i is drawn by seed + i, or one per image.
        batch_size: images at once, which changes no image.
        **sampling: settings of `Generator.sample`: cfg_scale, temperature, top_k, top_p, …, and its dtype and compiled.
    Returns:
        8-bit pictures.
    Raises:
        ValueError: a tokenizer that does not fit the generator, labels or settings that cannot be.
    """
    check_fit(tokenizer, generator.config)
    seeds = list(range(seed, seed + len(labels)) if isinstance(seed, int) else seed)
    pictures = []
    for start in range(0, len(labels), batch_size):
        batch = slice(start, start + batch_size)
        tokens = generator.sample(labels[batch], seed=seeds[batch], **sampling)  # (B, T)
        pictures.append(decode_pictures(tokenizer, tokens, generator.config.grid_size))
    return np.concatenate(pictures)


def draw_gallery(
    generator: AnyGenerator,
    tokenizer: Tokenizer,
    classes: Sequence[int],
    *,
    columns: int = 8,
    seed: int = 0,
    **sampling: Any,
) -> ImageGrid:
    """Each class with the same seeds: seed, seed + 1, … from left to right.

    Args:
        generator: as for `draw_images`.
        tokenizer: likewise.
        classes: one row each.
        columns: images per class, at least 1.
        seed: of the first column.
        **sampling: as for `draw_images`.
    """
    require(columns >= 1 and len(classes) > 0, "a gallery needs at least one class and one column")
    labels, seeds = np.meshgrid(classes, np.arange(seed, seed + columns), indexing="ij")  # (rows, columns)
    flat_labels = torch.from_numpy(labels.flatten()).to(next(generator.parameters()).device)
    images = draw_images(generator, tokenizer, flat_labels, seed=seeds.flatten().tolist(), **sampling)
    return ImageGrid(images.reshape(*labels.shape, *images.shape[1:]), labels, seeds)
