"""Quantizers: VQ, Soft VQ and IBQ as presets over three axes, and index backpropagation without the N × K matrix."""

from ibqlab.quantizers.base import (
    Assignment,
    Quantizer,
    QuantizerConfig,
    QuantizerOutput,
    available_quantizers,
    build_quantizer,
    make_quantizer,
    quantizer_config,
    register_quantizer,
)
from ibqlab.quantizers.codebooks import INITIALISATIONS
from ibqlab.quantizers.estimators import mixture_of_codes, nearest_code, rotate_to_codes, straight_through
from ibqlab.quantizers.ibq import IndexBackpropQuantizer, IndexBackpropQuantizerConfig
from ibqlab.quantizers.index_backprop import IndexBackprop, index_backprop
from ibqlab.quantizers.soft_vq import SoftVectorQuantizer, SoftVectorQuantizerConfig
from ibqlab.quantizers.vq import VectorQuantizer, VectorQuantizerConfig

__all__ = [
    "INITIALISATIONS",
    "Assignment",
    "IndexBackprop",
    "IndexBackpropQuantizer",
    "IndexBackpropQuantizerConfig",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "SoftVectorQuantizer",
    "SoftVectorQuantizerConfig",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "available_quantizers",
    "build_quantizer",
    "index_backprop",
    "make_quantizer",
    "mixture_of_codes",
    "nearest_code",
    "quantizer_config",
    "register_quantizer",
    "rotate_to_codes",
    "straight_through",
]
