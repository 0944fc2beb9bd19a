"""What a reader has to know who draws conclusions from the tokens of some images."""

import math

from ibqlab.data.broken import name_a_few
from ibqlab.views.patches import PatchIndex

_MISSED = 0.01
"""Share of evenly used codes that counts may miss before a card says that they are too few."""


def cautions_of(index: PatchIndex) -> list[str]:
    """No grid, too few tokens, images left out, no classes, no ruler: a sentence for each that holds."""
    cautions = []
    if not index.has_grid:
        cautions.append(
            f"The {index.codes.shape[2]:,} tokens of an image lie on no grid: each is about the whole image, which is "
            "shown in the place of a patch, and no code stands beside another."
        )
    missed = math.exp(-index.tokens / index.codebook_size)
    if missed > _MISSED:
        cautions.append(
            f"Counts are too few: {index.tokens:,} tokens for {index.codebook_size:,} codes, so that of codes that are "
            f"used evenly {100 * missed:.0f} % would have no hit here. A code without a hit need not be dead; look at "
            "more images."
        )
    if index.broken:
        cautions.append(f"Unreadable images were left out: {name_a_few(index.broken)}.")
    if len(index.classes) < 2 or not (index.labels >= 0).any():
        cautions.append("The images have no classes.")
    if not index.ruler:
        cautions.append(
            "No distance between features and codes chooses this method's codes, so no patch is nearest or at a margin."
        )
    return cautions
