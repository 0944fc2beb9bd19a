"""Tokens: a tokenizer's codes for a whole set of images, stored once, and what they cost a generator.

A tokenizer turns each image into a grid of code numbers. `writing` does that once for a whole data set, in pieces that
survive a kill; `store` reads the result again, image by image, and `manifest` says what it was made from. The rest
measures such a stream without training anything: `entropy` says how many bits a token holds by its position, `ngrams`
what its neighbours already tell about it, and `report` puts both into one table, with trained generators beside it.
Start with `store` for the files, with `report` for the measures.
"""

from ibqlab.tokens.entropy import (
    TokenEntropy,
    bits_per_image,
    bits_per_pixel,
    bits_per_token,
    index_permutation,
    permute_indices,
    token_entropy,
)
from ibqlab.tokens.ngrams import BASELINES, measure_ngrams
from ibqlab.tokens.report import ModelCost, TokenReport, report_tokens

__all__ = [
    "BASELINES",
    "ModelCost",
    "TokenEntropy",
    "TokenReport",
    "bits_per_image",
    "bits_per_pixel",
    "bits_per_token",
    "index_permutation",
    "measure_ngrams",
    "permute_indices",
    "report_tokens",
    "token_entropy",
]
