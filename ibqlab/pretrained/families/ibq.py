"""IBQ (SEED-Voken): the names are ours but for the codebook."""

from ibqlab.pretrained.family import Facts, Family, register_family
from ibqlab.pretrained.tokenizer_architecture import (
    CODEBOOK,
    Shapes,
    codebook_config,
    convolutional_config,
    sign_config,
    tensor_shape,
)
from ibqlab.tokenizer import TokenizerConfig


class VqganNames(Family):
    """Files whose names are those of a VQGAN: IBQ's, taming-transformers' and latent-diffusion's alike."""

    marks = (r"encoder\.conv_in\.weight$", r"encoder\.mid\.block_1\.", r"quant_conv\.", r"quantize\.embedding\.weight$")
    names = ((r"^quantize\.embedding\.", "quantizer.codes."),)
    quantizer = "vq"
    """Unless somebody says another."""

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """Encoder, decoder and one codebook; or none, where the quantizer is said to be LFQ."""
        name = facts.quantizer or self.quantizer
        if name == "lfq" and CODEBOOK not in shapes:
            quantizer = sign_config(tensor_shape(shapes, "quant_conv.weight", 4)[0])
        else:
            quantizer = codebook_config(shapes, name)
        return TokenizerConfig(autoencoder=convolutional_config(shapes), quantizer=quantizer)


@register_family("ibq")
class Ibq(VqganNames):
    """Averages are evaluated; the codebook is searched by dot product."""

    title = "a tokenizer of IBQ"
    protocol = "seed-voken-ibq"
    averaged = True
    quantizer = "ibq"
