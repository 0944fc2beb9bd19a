"""The image tokenizer: the published encoder and decoder around any quantizer."""

from ibqlab.tokenizer.autoencoder import AutoencoderConfig, Decoder, Encoder
from ibqlab.tokenizer.tokenizer import Images, Tokenizer, TokenizerConfig, TokenizerOutput, prepare_images

__all__ = [
    "AutoencoderConfig",
    "Decoder",
    "Encoder",
    "Images",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "prepare_images",
]
