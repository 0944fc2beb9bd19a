"""MaskGIT's VQGAN (1d-tokenizer, converted from google-research/maskgit), which RAR uses, too."""

from ibqlab.pretrained.family import Facts, Family, register_family
from ibqlab.pretrained.tokenizer_architecture import Shapes, codebook_config, convolutional_config
from ibqlab.tokenizer import TokenizerConfig


@register_family("maskgit")
class MaskGit(Family):
    """Its images are in [0, 1], as `MaskgitEncoder` has them inside; the published `decode` clamps to that range."""

    title = "a VQGAN of MaskGIT (1d-tokenizer)"
    protocol = "titok"
    marks = (r"encoder\.down\.0\.block\.0\.", r"encoder\.mid\.0\.conv1\.", r"quantize\.embedding\.weight$")
    names = (
        (r"\.upsample_conv\.", ".upsample.conv."),
        (r"^quantize\.embedding\.", "quantizer.codes."),
    )

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """β stands on the codebook's side."""
        quantizer = codebook_config(shapes, "vq")
        return TokenizerConfig(autoencoder=convolutional_config(shapes, "maskgit"), quantizer=quantizer)
