"""LlamaGen's tokenizers: VQGAN's blocks under other names, around codes of unit length."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ibqlab.pretrained.family import Facts, Family, register_family, reversed_levels
from ibqlab.pretrained.tokenizer_architecture import Shapes, codebook_config, convolutional_config
from ibqlab.tokenizer import TokenizerConfig

_DECODER = reversed_levels(r"decoder\.conv_blocks\.([0-9]+)\.", "decoder.up.{}.")


@register_family("llamagen")
class LlamaGen(Family):
    """The decoder's levels count from the lowest resolution; averages, where a file has them, are an entry `ema`."""

    title = "a tokenizer of LlamaGen"
    protocol = "llamagen"
    marks = (r"encoder\.conv_blocks\.0\.res\.0\.", r"quantize\.embedding\.weight$")
    names = (
        (r"^encoder\.conv_blocks\.", "encoder.down."),
        (r"^((?:encoder\.down|decoder\.up)\.[0-9]+)\.res\.", r"\1.block."),
        (r"^((?:en|de)coder\.mid)\.0\.", r"\1.block_1."),
        (r"^((?:en|de)coder\.mid)\.1\.", r"\1.attn_1."),
        (r"^((?:en|de)coder\.mid)\.2\.", r"\1.block_2."),
        (r"^quantize\.embedding\.", "quantizer.codes."),
    )
    beside: ClassVar = {"quantize.codebook_used": "indices chosen last"}

    def rename(self, key: str, keys: Mapping[str, Any]) -> str:
        """As the rules say, once the decoder's levels are turned round."""
        return super().rename(_DECODER(key, keys), keys)

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """Tokens and codes are unit vectors wherever they are used; β weighs the commitment."""
        quantizer = codebook_config(shapes, "vq", unit_vectors=True, beta_on="encoder")
        return TokenizerConfig(autoencoder=convolutional_config(shapes), quantizer=quantizer)
