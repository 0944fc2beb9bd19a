"""latent-diffusion's VQ first stages: a VQGAN, of which one (vq-f4-noattn) has no attention at all."""

from ibqlab.pretrained.families.ibq import VqganNames
from ibqlab.pretrained.family import register_family


@register_family("ldm")
class Ldm(VqganNames):
    """What latent-diffusion's VQModelInterface decodes is quantized first: `decode_indices(encode_indices(x))`."""

    title = "a VQ first stage of latent-diffusion"
    protocol = "taming"
