"""Quantizers: VQ, Soft VQ, IBQ and LFQ as presets over three axes; index backpropagation without an N × K matrix."""

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
from ibqlab.quantizers.estimators import nearest_code, rotate_to_codes, straight_through
from ibqlab.quantizers.ibq import IndexBackpropQuantizer, IndexBackpropQuantizerConfig
from ibqlab.quantizers.index_backprop import IndexBackprop, index_backprop
from ibqlab.quantizers.indices import to_indices
from ibqlab.quantizers.lfq import (
    LookupFreeQuantizer,
    LookupFreeQuantizerConfig,
    factorize_indices,
    join_indices,
)
from ibqlab.quantizers.soft_assignment import mixture_of_codes
from ibqlab.quantizers.soft_vq import SoftVectorQuantizer, SoftVectorQuantizerConfig
from ibqlab.quantizers.vq import VectorQuantizer, VectorQuantizerConfig

__all__ = [
    "INITIALISATIONS",
    "Assignment",
    "IndexBackprop",
    "IndexBackpropQuantizer",
    "IndexBackpropQuantizerConfig",
    "LookupFreeQuantizer",
    "LookupFreeQuantizerConfig",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "SoftVectorQuantizer",
    "SoftVectorQuantizerConfig",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "available_quantizers",
    "build_quantizer",
    "factorize_indices",
    "index_backprop",
    "join_indices",
    "make_quantizer",
    "mixture_of_codes",
    "nearest_code",
    "quantizer_config",
    "register_quantizer",
    "rotate_to_codes",
    "straight_through",
    "to_indices",
]
