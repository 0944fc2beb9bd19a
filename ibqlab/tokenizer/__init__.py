"""The image tokenizer: one of two published pairs of encoder and decoder around any quantizer."""

from ibqlab.tokenizer.autoencoder import AutoencoderConfig, Decoder, Encoder
from ibqlab.tokenizer.magvit2 import Magvit2Decoder, Magvit2Encoder
from ibqlab.tokenizer.tokenizer import (
    Images,
    Tokenizer,
    TokenizerConfig,
    TokenizerOutput,
    fingerprint_weights,
    prepare_images,
)

__all__ = [
    "AutoencoderConfig",
    "Decoder",
    "Encoder",
    "Images",
    "Magvit2Decoder",
    "Magvit2Encoder",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "fingerprint_weights",
    "prepare_images",
]
