"""The image tokenizer: an encoder, any quantizer, and a decoder.

A tokenizer turns an image into a small grid of codes and back. The encoder shrinks the image to a grid of feature
vectors, a quantizer of `ibqlab.quantizers` replaces each vector by a code, and the decoder draws the image again from
the codes. Published pairs of encoder and decoder are here: that of IBQ, which is VQGAN's (`autoencoder`), that of
Open-MAGVIT2 (`magvit2`), that of MaskGIT and MaskBit (`maskgit`), and that of TiTok (`titok`), whose tokens lie on no
grid. `designs` holds them by name and takes yours. Start with `Tokenizer` in `tokenizer`; `image_input` says which
images it takes, `discriminator` is the opponent in adversarial training.
"""

from ibqlab.tokenizer.autoencoder import Decoder, Encoder
from ibqlab.tokenizer.autoencoder_config import AutoencoderConfig
from ibqlab.tokenizer.designs import available_designs, register_design
from ibqlab.tokenizer.image_input import Images, prepare_images
from ibqlab.tokenizer.magvit2 import Magvit2Decoder, Magvit2Encoder
from ibqlab.tokenizer.maskgit import MaskgitDecoder, MaskgitEncoder
from ibqlab.tokenizer.titok import TitokDecoder, TitokEncoder
from ibqlab.tokenizer.titok_config import TitokConfig
from ibqlab.tokenizer.tokenizer import Tokenizer, TokenizerConfig, TokenizerOutput, fingerprint_weights

__all__ = [
    "AutoencoderConfig",
    "Decoder",
    "Encoder",
    "Images",
    "Magvit2Decoder",
    "Magvit2Encoder",
    "MaskgitDecoder",
    "MaskgitEncoder",
    "TitokConfig",
    "TitokDecoder",
    "TitokEncoder",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "available_designs",
    "fingerprint_weights",
    "prepare_images",
    "register_design",
]
