"""MaskBit's tokenizers, whose codes are signs, and VQGAN+, the same autoencoder around a codebook."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ibqlab.pretrained.family import Facts, Family, register_family, reversed_levels
from ibqlab.pretrained.names import TensorRole
from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.pretrained.tokenizer_architecture import (
    Shapes,
    codebook_config,
    convolutional_config,
    count_numbered,
    sign_config,
)
from ibqlab.quantizers.codebooks import SignGrid, bit_values
from ibqlab.tokenizer import TokenizerConfig

SIGNS, BITS = "quantize.codebook", "quantize.bits_to_indices"
"""What a file of MaskBit holds beside its weights: all sign vectors, 2^c for channel c."""
LOWEST_FIRST = "decoder.up.0.upsample_conv.weight"
"""Present where the decoder's levels count from the lowest resolution and there are several."""
ROWS = 2**16
"""Sign vectors looked at together, 5 MB at 18 bits."""
_DECODER = reversed_levels(r"decoder\.up\.([0-9]+)\.", "decoder.up.{}.")


class MaskBitNames(Family):
    """The decoder's levels count from the lowest resolution.

    Not so in MaskGIT's tokenizer as MaskBit's authors saved it again (maskgit_tokenizer): there level 0 is the highest,
    which is the one without an upsampling convolution.
    """

    names = (
        (r"^((?:en|de)coder\.mid)\.res_blocks\.", r"\1."),
        (r"\.res_blocks\.", ".block."),
        (r"\.down_conv\.", ".downsample.conv."),
        (r"\.upsample_conv\.", ".upsample.conv."),
        (r"^quantize\.embedding\.", "quantizer.codes."),
    )

    def rename(self, key: str, keys: Mapping[str, Any]) -> str:
        """As the rules say, once the decoder's levels are turned round."""
        from_lowest = LOWEST_FIRST in keys
        return super().rename(_DECODER(key, keys) if from_lowest else key, keys)


@register_family("maskbit")
class MaskBit(MaskBitNames):
    """The number of channels between encoder and decoder is the number of bits."""

    title = "a tokenizer of MaskBit"
    protocol = "maskbit"
    marks = (r"encoder\.down\.0\.res_blocks\.0\.", r"quantize\.codebook$", r"quantize\.bits_to_indices$")

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """Signs are not stored by us; those in the file are compared in `check`."""
        autoencoder = convolutional_config(shapes, "maskbit")
        quantizer = sign_config(autoencoder.latent_channels, "lfq_maskbit")
        return TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer)

    def role(self, key: str, keys: Mapping[str, Any]) -> TensorRole:
        """The two tables follow from the number of bits."""
        return TensorRole("bookkeeping", key) if key in (SIGNS, BITS) else super().role(key, keys)

    def check(self, tensors: Mapping[str, Tensor], config: TokenizerConfig) -> None:
        """Both tables must be those of our sign vectors, else indices would mean other codes."""
        size, bits = config.quantizer.codebook_size, config.quantizer.code_dim
        for key, shape in ((BITS, (bits,)), (SIGNS, (size, bits))):
            if tuple(tensors[key].shape) != shape:
                raise CheckpointError(f"{key} must have the shape {shape} for {bits} bits; got {[*tensors[key].shape]}")
        if tensors[SIGNS].is_meta:
            return
        if tensors[BITS].tolist() != bit_values(bits, torch.device("cpu")).tolist():
            raise CheckpointError(
                f"{BITS} must be 1, 2, 4, … for channels 0, 1, 2, …, so that an index names the same signs here; got "
                f"{tensors[BITS].tolist()}. The file is of another version of MaskBit, or damaged"
            )
        grid = SignGrid(bits)
        for start in range(0, size, ROWS):
            stored = tensors[SIGNS][start : start + ROWS]
            wrong = (stored != grid.signs(torch.arange(start, start + len(stored)))).any(1)
            if wrong.any():
                raise CheckpointError(
                    f"{SIGNS} must hold in row k a plus for each bit of k that is set, so that an index names the same "
                    f"signs here; row {start + int(wrong.nonzero()[0, 0])} does not. The file is damaged"
                )


@register_family("vqgan_plus")
class VqganPlus(MaskBitNames):
    """MaskBit's own conversion of MaskGIT's tokenizer has these names, too, and averages pixels to halve the size."""

    title = "a tokenizer of VQGAN+ (MaskBit)"
    protocol = "maskbit"
    marks = (r"encoder\.down\.0\.res_blocks\.0\.", r"quantize\.embedding\.weight$")

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """β weighs the commitment."""
        several = count_numbered(shapes, r"encoder\.down") > 1
        averages = several and not any(".downsample.conv." in key for key in shapes)
        return TokenizerConfig(
            autoencoder=convolutional_config(shapes, "maskgit" if averages else "maskbit"),
            quantizer=codebook_config(shapes, "vq", beta_on="encoder"),
        )
