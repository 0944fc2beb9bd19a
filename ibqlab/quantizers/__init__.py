"""Quantizers: what replaces each feature vector by a code, and lets the codes learn.

Every method of the literature is one choice on each of three axes: where code vectors come from (`codebooks`), how
tokens choose codes and how gradients come back through the choice (`estimators`), and what is done to codes between
steps (`upkeep`). `base` joins the three to a module with named loss terms; VQ, Soft VQ, IBQ and LFQ are small classes
over it, and further methods are a file each in `methods`. Read `base`, `codebooks`, `estimators`, `upkeep`, `vq` and
`ibq`, in this order. What costs is scores of all tokens against all codes, N × K numbers; `blocks` and `index_backprop`
compute with them without ever holding them. Your own quantizer is a class with `assign` under `register_quantizer`, or
a function under `quantizer_from`; `contract` says what it must do, and tries it.
"""

from ibqlab.quantizers import methods
from ibqlab.quantizers.assignments import Assignment, QuantizerError, QuantizerOutput
from ibqlab.quantizers.base import (
    Quantizer,
    QuantizerConfig,
    available_quantizers,
    build_quantizer,
    make_quantizer,
    quantizer_config,
    register_quantizer,
)
from ibqlab.quantizers.codebooks import CHOSEN_STARTS, INITIALISATIONS
from ibqlab.quantizers.contract import check_quantizer
from ibqlab.quantizers.estimators import nearest_code, rotate_to_codes, straight_through
from ibqlab.quantizers.from_function import quantizer_from
from ibqlab.quantizers.ibq import IndexBackpropQuantizer, IndexBackpropQuantizerConfig
from ibqlab.quantizers.index_backprop import IndexBackprop, index_backprop
from ibqlab.quantizers.indices import to_indices
from ibqlab.quantizers.lfq import LookupFreeQuantizer, LookupFreeQuantizerConfig, factorize_indices, join_indices
from ibqlab.quantizers.remap import IndexRemap
from ibqlab.quantizers.soft_vq import SoftVectorQuantizer, SoftVectorQuantizerConfig, mixture_of_codes
from ibqlab.quantizers.vq import VectorQuantizer, VectorQuantizerConfig

__all__ = [
    "CHOSEN_STARTS",
    "INITIALISATIONS",
    "Assignment",
    "IndexBackprop",
    "IndexBackpropQuantizer",
    "IndexBackpropQuantizerConfig",
    "IndexRemap",
    "LookupFreeQuantizer",
    "LookupFreeQuantizerConfig",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerError",
    "QuantizerOutput",
    "SoftVectorQuantizer",
    "SoftVectorQuantizerConfig",
    "VectorQuantizer",
    "VectorQuantizerConfig",
    "available_quantizers",
    "build_quantizer",
    "check_quantizer",
    "factorize_indices",
    "index_backprop",
    "join_indices",
    "make_quantizer",
    "methods",
    "mixture_of_codes",
    "nearest_code",
    "quantizer_config",
    "quantizer_from",
    "register_quantizer",
    "rotate_to_codes",
    "straight_through",
    "to_indices",
]
