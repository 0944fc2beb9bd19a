"""VQGAN-LC: a VQGAN whose codes are frozen features of CLIP under a learned projector."""

from typing import ClassVar

from ibqlab.pretrained.families.ibq import VqganNames
from ibqlab.pretrained.family import BESIDE, Facts, register_family
from ibqlab.pretrained.tokenizer_architecture import Shapes, convolutional_config, tensor_shape
from ibqlab.quantizers import quantizer_config
from ibqlab.tokenizer import TokenizerConfig


@register_family("vqgan_lc")
class VqganLc(VqganNames):
    """The projector is one layer, or two with 256 units between them (use_cblinear 2).

    The loss is the quantizer's own; the published trainer multiplies it by 0.1 (rate_q), which a recipe writes as
    tokenizer.quantizer.quantization_weight.
    """

    title = "a tokenizer of VQGAN-LC"
    protocol = "vqgan-lc"
    marks = (r"encoder\.conv_in\.weight$", r"tok_embeddings\.weight$", r"codebook_projection\.")
    names = (
        (r"^tok_embeddings\.weight$", "quantizer.codes.anchors"),
        (r"^codebook_projection\.([wb])", r"quantizer.codes.layers.0.\1"),
        (r"^codebook_projection\.0\.", "quantizer.codes.layers.0."),
        (r"^codebook_projection\.2\.", "quantizer.codes.layers.1."),
    )
    beside: ClassVar = {"discriminator.": "discriminator", "perceptual_loss.": "perceptual loss", **BESIDE}

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """K and the anchors' dimension are the table's, D is what the projector gives."""
        size, anchor_dim = tensor_shape(shapes, "quantizer.codes.anchors", 2)
        deep = "quantizer.codes.layers.1.weight" in shapes
        quantizer = {
            "name": "vqgan_lc",
            "codebook_size": size,
            "code_dim": tensor_shape(shapes, f"quantizer.codes.layers.{int(deep)}.weight", 2)[0],
            "anchor_dim": anchor_dim,
            "projector": "mlp" if deep else "linear",
            "quantization_weight": 1.0,
        }
        return TokenizerConfig(autoencoder=convolutional_config(shapes), quantizer=quantizer_config(quantizer))
