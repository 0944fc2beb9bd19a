"""SimVQ: Open-MAGVIT2's autoencoder without adaptive norms, around a frozen table under one linear map."""

from dataclasses import replace

from ibqlab.pretrained.family import Facts, Family, register_family
from ibqlab.pretrained.tokenizer_architecture import Shapes, convolutional_config, tensor_shape
from ibqlab.quantizers import quantizer_config
from ibqlab.tokenizer import TokenizerConfig

RESOLUTION = 128
"""Pixels along a side of the images that every published one was trained on."""


@register_family("simvq")
class SimVq(Family):
    """Averages are evaluated; the frozen table has none."""

    title = "a tokenizer of SimVQ"
    protocol = "simvq"
    averaged = True
    marks = (r"encoder\.mid_block\.", r"quantize\.embedding_proj\.")
    names = (
        (r"^quantize\.embedding\.weight$", "quantizer.codes.anchors"),
        (r"^quantize\.embedding_proj\.", "quantizer.codes.map."),
    )

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """β weighs the commitment (legacy False)."""
        size, dim = tensor_shape(shapes, "quantizer.codes.anchors", 2)
        return TokenizerConfig(
            autoencoder=replace(convolutional_config(shapes, "magvit2_plain"), resolution=RESOLUTION),
            quantizer=quantizer_config({"name": "simvq", "codebook_size": size, "code_dim": dim}),
        )
