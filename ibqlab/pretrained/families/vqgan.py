"""VQGAN (taming-transformers): IBQ's names, searched by distance, and no averages."""

from typing import ClassVar

from ibqlab.pretrained.families.ibq import VqganNames
from ibqlab.pretrained.family import BESIDE, register_family


@register_family("vqgan")
class Vqgan(VqganNames):
    """β stands on the codebook's side, as in every published file ("legacy")."""

    title = "a VQGAN (taming-transformers)"
    protocol = "taming"
    beside: ClassVar = {
        "quantize.used": "numbers of the codes that were kept (remap)",
        "colorize": "colours of segmentation maps",
        **BESIDE,
    }
