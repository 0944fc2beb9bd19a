"""VQGAN with Gumbel quantization (taming-transformers, gumbel_f8): a 1 × 1 convolution scores the codes."""

from ibqlab.pretrained.families.ibq import VqganNames
from ibqlab.pretrained.family import Facts, register_family
from ibqlab.pretrained.tokenizer_architecture import Shapes, codebook_config, convolutional_config
from ibqlab.tokenizer import TokenizerConfig


@register_family("vqgan_gumbel")
class GumbelVqgan(VqganNames):
    """`encode` takes the best-scored code; the published code draws noise in evaluation, too, and two runs differ."""

    title = "a VQGAN with Gumbel quantization (taming-transformers)"
    protocol = "taming"
    marks = (r"encoder\.conv_in\.weight$", r"quantize\.embed\.weight$", r"quantize\.proj\.")
    names = (
        (r"^quantize\.embed\.weight$", "quantizer.codes.weight"),
        (r"^quantize\.proj\.", "quantizer.scores."),
    )

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """The weight of its KL term is the published configuration's."""
        quantizer = codebook_config(shapes, "gumbel", kl_weight=1e-8)
        return TokenizerConfig(autoencoder=convolutional_config(shapes), quantizer=quantizer)
