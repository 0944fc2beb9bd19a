"""Any quantizer of the package vector-quantize-pytorch by its class, with this library's shapes, indices and terms."""

import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import check_numbers, require, require_choice
from ibqlab.quantizers.base import Assignment, Quantizer, QuantizerConfig, register_quantizer
from ibqlab.quantizers.codebooks import INITIALISATIONS
from ibqlab.quantizers.compiling import never_compiled

PACKAGE = "vector_quantize_pytorch"
CLASSES = (
    *("VectorQuantize", "SimVQ", "FSQ", "FSP", "LFQ", "LatentQuantize"),
    *("ResidualVQ", "ResidualSimVQ", "ResidualFSQ", "ResidualLFQ"),
    *("GroupedResidualVQ", "GroupedResidualFSQ", "GroupedResidualLFQ", "BinaryMapper"),
)
"""Classes that quantize single tokens: they give an index, or one per level and group, and vectors for indices."""
REFUSED = {
    "HierarchicalVQ": "it quantizes a whole grid at several scales, so that no token has an index of its own; use "
    "the quantizer 'multi_scale', which does so around any quantizer",
    "RandomProjectionQuantizer": "it gives indices alone: its codes lie behind a random projection, from which no way "
    "leads back to features",
    "EvoLFQ": "it is a whole autoencoder with a search over its bits; its quantizer is cls='LFQ'",
    "Sequential": "it is a chain of modules, which settings cannot describe; name the class of the quantizer in it",
}
"""Public classes of the package that no quantizer can be made of → why."""
GRIDS = ("FSQ", "FSP", "LFQ", "BinaryMapper")
"""Ends of the names of classes whose codes are a grid."""
COUNTS = ("groups", "num_quantizers", "num_codebooks", "heads")
"""Arguments that say how many indices a token has."""
LAYOUT = ("accept_image_fmap", "accept_3d_fmap", "channel_first", "channel_last", "keep_num_codebooks_dim")
"""Arguments that say how tensors lie, which is the adapter's affair."""


@dataclass(frozen=True, kw_only=True)
class VectorQuantizePytorchConfig(QuantizerConfig):
    """A class of vector-quantize-pytorch and its arguments."""

    codebook_size: int = 1024
    """K, codes; of residual classes all combinations of their levels. Handed to the class where it takes codebook_size
    and `arguments` has none; a class whose size follows from its arguments must come out at this K."""
    code_dim: int = 64
    """D; handed to the class as `dim`."""
    codebook_init: str = ""
    """Follows from the class: "grid" where no code ever moves; else "library", because how codes start is the class's
    own affair (`arguments`, for instance {"kmeans_init": true})."""
    cls: str = "VectorQuantize"
    """Name of the class, one of `CLASSES`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class beside `dim` and `codebook_size`, for instance {"rotation_trick": false}."""
    loss_weight: float = 1.0
    """Weight of the loss that the class returns, ≥ 0, its levels' losses summed. Published: 1."""

    def __post_init__(self):
        check_numbers(self)
        if self.codebook_init:
            require_choice("codebook_init", self.codebook_init, INITIALISATIONS)
        require(
            self.codebook_init in ("", "grid", "library"),
            f"codebook_init does not apply to vqp; got {self.codebook_init!r}. Leave it out, and write into arguments "
            "what the class takes, such as kmeans_init",
        )
        # Earlier versions wrote "grid" for every class.
        object.__setattr__(self, "codebook_init", "grid" if self._is_fixed() else "library")
        super().__post_init__()
        require(self.cls not in REFUSED, f"cls cannot be {self.cls}: {REFUSED.get(self.cls)}")
        require_choice("cls", self.cls, CLASSES)
        for name in (name for name in LAYOUT if name in self.arguments):
            raise ValueError(f"arguments must not say how tensors lie; got {name}. Leave it out")
        for name, value in self.arguments.items():
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(
                name not in COUNTS or is_count, f"arguments: {name} must be a whole number, at least 1; got {value!r}"
            )
        require(
            self.arguments.get("dim", self.code_dim) == self.code_dim,
            f"arguments: dim is code_dim = {self.code_dim}; got {self.arguments.get('dim')!r}. Leave it out",
        )
        require(
            not self.arguments.get("quantize_dropout"),
            "arguments must not have quantize_dropout: a level that is dropped has no index. Leave it out",
        )
        require(self.loss_weight >= 0, f"loss_weight must be ≥ 0, got {self.loss_weight}")

    def _is_fixed(self) -> bool:
        """Whether no code ever moves: the class has a grid, and its numbers are the codes', without a learned map."""
        if not self.cls.endswith(GRIDS) or self.arguments.get("has_projections"):
            return False
        levels, counts = self.arguments.get("levels"), dict.fromkeys(("num_codebooks", "groups", "num_quantizers"), 1)
        counts |= {key: value for key, value in self.arguments.items() if key in counts and isinstance(value, int)}
        if isinstance(levels, (list, tuple)):
            return len(levels) * counts["num_codebooks"] * counts["groups"] == self.code_dim
        # Of signs: 2^D codes per level of a residual class.
        return self.codebook_size == 2 ** (self.code_dim * counts["num_quantizers"])

    def loss_weights(self) -> dict[str, float]:
        """The one loss of the class."""
        return {"library_loss": self.loss_weight}


@register_quantizer("vqp", VectorQuantizePytorchConfig, label="vector-quantize-pytorch")
class VectorQuantizePytorchQuantizer(Quantizer):
    """A quantizer of vector-quantize-pytorch behind this library's interface.

    Value, gradient, loss and upkeep in training are the class's. In evaluation the vectors are looked up by their
    indices, so that decoding gives the same. The class computes in float32 or wider whatever the module's type is. Its
    codes' gradients are not read, so that diagnostics show none.
    Source: lucidrains/vector-quantize-pytorch, version 1.32; no dependency: pip install vector-quantize-pytorch.
    """

    looks_up = False
    exempt: ClassVar = {
        "two processes learn the same": "the package keeps what it found out before the rule's processes were forked"
    }

    def __init__(self, config: VectorQuantizePytorchConfig):
        super().__init__(config, LibraryModule(config))
        self.keeps_up = True

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The indices of evaluation."""
        was_training = self.codes.training
        self.codes.eval()
        try:
            return self.codes.run(features)[1]
        finally:
            self.codes.train(was_training)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """What the class gives."""
        quantized, indices, loss = self.codes.run(features, keeps_up=self.keeps_up)
        if not self.training:
            quantized = self.codes.vectors(indices).to(features.dtype)
        return Assignment(quantized, indices, {"library_loss": loss})

    def look_up(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B h w D"]:
        """Vectors of indices, as the class has them."""
        return self.codes.vectors(indices.flatten()).view(*indices.shape, -1)

    @contextmanager
    def without_upkeep(self) -> Iterator[None]:
        """Inside the block a forward pass leaves the codebook alone, in classes that can freeze it."""
        self.keeps_up = False
        try:
            yield
        finally:
            self.keeps_up = True


class LibraryModule(nn.Module):
    """A module of the package; calling it returns its codebook.

    Args:
        config: class, arguments and sizes.
    Raises:
        ImportError: the package is missing; the message says how to install it.
        ValueError: arguments that the class does not take, or another size than the config's.
    """

    def __init__(self, config: VectorQuantizePytorchConfig):
        super().__init__()
        cls = _library_class(config.cls)
        arguments, takes = dict(config.arguments), inspect.signature(cls).parameters
        digits = math.prod(arguments.get(key, 1) for key in COUNTS)
        self.is_binary = config.cls == "BinaryMapper"
        if self.is_binary:
            arguments = {"bits": config.code_dim, "deterministic_on_eval": True} | arguments
            says = "deterministic_on_eval must be true: evaluation must give the same indices each time. Leave it out"
            require(bool(arguments["deterministic_on_eval"]), says)
            says = f"bits must be code_dim, {config.code_dim}, a bit per channel; got {arguments['bits']}. Leave it out"
            require(arguments["bits"] == config.code_dim, says)
        if "dim" in takes:
            arguments.setdefault("dim", config.code_dim)
        if "codebook_size" in takes or ("kwargs" in takes and "levels" not in arguments):
            arguments.setdefault("codebook_size", round(config.codebook_size ** (1 / digits)))
        try:
            # A network without memory is filled from a file, which lacks tensors that the package keeps to itself.
            device = torch.get_default_device()
            with torch.device("cpu" if device.type == "meta" else device):
                self.module = cls(**arguments)
        except (TypeError, AssertionError) as error:
            raise ValueError(
                f"{PACKAGE}.{config.cls} refuses the arguments {arguments}: {error}. It takes {', '.join(takes)}"
            ) from error
        require(
            getattr(self.module, "heads", 1) == 1 or self.module.separate_codebook_per_head,
            "heads that share a codebook cannot be decoded by the package; write into arguments "
            "separate_codebook_per_head: true",
        )
        self.code_dim = config.code_dim
        self.is_latent = config.cls == "LatentQuantize"
        groups = getattr(self.module, "rvqs", [self.module])
        layers = [layer for group in groups for layer in getattr(group, "layers", [group])]
        self.groups = len(groups)
        self.sizes = [
            int(layer.num_codes if self.is_binary else layer.codebook_size)
            for layer in layers
            for _ in range(getattr(layer, "num_codebooks", getattr(layer, "heads", 1)))
        ]
        self.can_freeze = "freeze_codebook" in inspect.signature(self.module.forward).parameters
        size = math.prod(self.sizes)
        require(
            size == config.codebook_size,
            f"codebook_size must be {size} for {config.cls} with {arguments}; got {config.codebook_size}. "
            f"Use codebook_size={size}",
        )

    def forward(self) -> Float[Tensor, "K D"]:
        """Vectors of all indices. Cost: O(K·D) operations and memory."""
        return self.vectors(torch.arange(math.prod(self.sizes), device=self._like().device))

    @never_compiled
    def run(
        self, features: Float[Tensor, "N D"], keeps_up: bool = True
    ) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"], Float[Tensor, ""]]:
        """Vectors, indices and loss for tokens; of tensors without numbers what a search of all codes costs."""
        if type(features) is not Tensor or features.is_meta:
            # The package asks for values as it goes, which a calculation of costs does not have.
            scores = features @ features.new_empty(features.shape[1], sum(self.sizes))
            return features * 1, scores.argmax(1), features.square().mean()
        frozen = {"freeze_codebook": True} if self.can_freeze and not keeps_up else {}
        tokens = features[None].to(self._like().dtype)
        if self.is_binary:  # its one-hot vector of 2^D numbers carries the gradient to the signs of its D bits
            one_hot, index, *rest = self.module(tokens[0], return_indices=True)
            quantized, digits = (one_hot @ self._signs())[None], index[:, None]
        elif self.is_latent:  # the one class with channels first
            quantized, _, *rest = self.module(tokens.mT)
            quantized, digits = quantized.mT, self._latent_digits(tokens[0])
        else:
            quantized, indices, *rest = self.module(tokens, **frozen)
            # Groups come first, levels last: (G, 1, N, L), (1, N, L) or (1, N).
            digits = indices.long().view(self.groups, len(features), -1).transpose(0, 1).flatten(1)  # (N, G·L)
        loss = rest[0].sum() if rest else features.new_zeros(())
        index = torch.zeros_like(digits[:, 0])
        for size, digit in zip(self.sizes, digits.unbind(1), strict=True):
            index = index * size + digit
        return quantized[0].to(features.dtype), index, loss.to(features.dtype)

    @never_compiled
    def vectors(self, indices: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
        """Vectors of some indices, 0 to K−1; of tensors without numbers their shape."""
        if type(indices) is not Tensor or indices.is_meta:
            return indices.new_empty((len(indices), self.code_dim), dtype=self._like().dtype)
        rest, digits = indices.to(self._like().device), []
        for size in reversed(self.sizes):
            digits.insert(0, rest % size)
            rest = rest // size
        if self.is_binary:
            return self._signs()[digits[0]]
        if self.is_latent:
            return self._latent_vectors(torch.stack(digits, 1))
        if self.groups > 1 or hasattr(self.module, "rvqs"):
            digits = torch.stack(digits, 1).unflatten(1, (self.groups, -1)).transpose(0, 1)[:, None]  # (G, 1, N, L)
            return self.module.get_output_from_indices(digits)[0]
        digits = digits[0] if len(digits) == 1 else torch.stack(digits, 1)
        read = getattr(self.module, "get_output_from_indices", None) or self.module.indices_to_codes
        return read(digits[None])[0]

    def _signs(self) -> Float[Tensor, "K D"]:
        """Codes of BinaryMapper, which names no vectors: −1 and 1 for its bits 0 and 1, as LFQ has them."""
        return self.module.codes.to(self._like().dtype) * 2 - 1

    def _latent_digits(self, tokens: Float[Tensor, "N D"]) -> Int[Tensor, "N c"]:
        """Indices of LatentQuantize, whose own are cut off after sums of floats and know of no values that learn."""
        module = self.module
        latents = module.project_in(tokens).unflatten(1, (module.num_codebooks, -1))  # (N, c, d)
        nearest = [
            (latents[..., i, None] - values).abs().argmin(-1) for i, values in enumerate(module.values_per_latent)
        ]
        return (torch.stack(nearest, -1) * module._basis).sum(-1)

    def _latent_vectors(self, digits: Int[Tensor, "N c"]) -> Float[Tensor, "N D"]:
        """Vectors of LatentQuantize, of the values as they are now."""
        module = self.module
        levels = digits[..., None] // module._basis % module._levels  # (N, c, d)
        latents = torch.stack([values[levels[..., i]] for i, values in enumerate(module.values_per_latent)], -1)
        return module.project_out(latents.flatten(1))

    def _like(self) -> Tensor:
        """A number that tells the module's device and type."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return next((values for values in tensors if values.is_floating_point()), torch.empty(0))

    def _apply(self, function: Callable, recurse: bool = True) -> nn.Module:
        """Moves and converts, but never below float32, in which the package cannot compute."""
        super()._apply(function, recurse)
        if self.is_latent and isinstance(self.module.values_per_latent, list):  # fixed values are no buffers there
            self.module.values_per_latent = [function(values) for values in self.module.values_per_latent]
        return self.float() if self._like().dtype in (torch.float16, torch.bfloat16) else self


def _library_class(name: str) -> type:
    try:
        return getattr(importlib.import_module(PACKAGE), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the quantizer 'vqp' needs vector-quantize-pytorch; type pip install vector-quantize-pytorch ({error})"
        ) from error
