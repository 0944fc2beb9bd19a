"""Open-MAGVIT2 (SEED-Voken): the names are ours; codes are signs, which are not stored."""

from ibqlab.pretrained.family import Facts, Family, register_family
from ibqlab.pretrained.tokenizer_architecture import (
    CODEBOOK,
    Shapes,
    codebook_config,
    convolutional_config,
    sign_config,
)
from ibqlab.tokenizer import TokenizerConfig


@register_family("magvit2")
class Magvit2(Family):
    """Averages are evaluated. A file that stores a codebook holds another quantizer in the same autoencoder."""

    title = "a tokenizer of Open-MAGVIT2"
    protocol = "open-magvit2"
    averaged = True
    marks = (r"encoder\.mid_block\.", r"decoder\.adaptive\.")
    names = ((r"^quantize\.embedding\.", "quantizer.codes."),)

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """LFQ, unless a codebook is stored."""
        autoencoder = convolutional_config(shapes, "magvit2")
        if CODEBOOK in shapes or facts.quantizer not in (None, "lfq"):
            quantizer = codebook_config(shapes, facts.quantizer or "ibq")
        else:
            quantizer = sign_config(autoencoder.latent_channels)
        return TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer)
