"""The blocks of a tokenizer whose activations may be computed again instead of being kept."""

from collections.abc import Iterator

from torch import nn

from ibqlab.tokenizer.autoencoder import AttentionBlock, ResidualBlock
from ibqlab.tokenizer.tokenizer import Tokenizer


def find_blocks(tokenizer: Tokenizer) -> Iterator[nn.Module]:
    """Residual and attention blocks of encoder and decoder, in the order of the modules."""
    return (module for module in tokenizer.modules() if isinstance(module, (ResidualBlock, AttentionBlock)))
