"""Indices, features and codebook read off a module while it trains, so that its loop need not hand them out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.monitor.inputs import to_tokens

KNOWN = "vector_quantize_pytorch"
"""Package whose modules are read without being told how."""


class ModuleReading:
    """The last forward pass of a module in training mode.

    Args:
        module: the quantizer.
        read: from its output to indices, or to (indices, features).
        features: from its first input to features; where `read` gives none.
        codebook: gives the codebook, or is it; None where there is none to give.
        averaged_codebook: gives a codebook that the module itself moves.
    """

    def __init__(
        self,
        module: nn.Module,
        read: Callable[[Any], Any],
        features: Callable[[Tensor], Any],
        codebook: Any,
        averaged_codebook: Callable[[], Tensor] | None = None,
    ):
        self._read, self._features, self._codebook = read, features, codebook
        self.averaged_codebook = averaged_codebook
        """Gives a codebook that the module itself moves; None where gradients move it, or nobody knows."""
        self._seen: tuple[Any, Any] | None = None
        self._handle = module.register_forward_hook(self._see)

    def _see(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        if not module.training:
            return
        values = self._read(output)
        indices, features = values if isinstance(values, tuple) else (values, None)
        if features is None and arguments and isinstance(arguments[0], Tensor):
            features = partial(self._features, arguments[0].detach())
        if isinstance(features, Tensor):
            features = features.detach()
        self._seen = (indices, features)

    def take(self, features: Any, codebook: Any) -> tuple[Any, Any, Any]:
        """Indices, features and codebook of the last pass, each pass once; what is given goes first.

        Returns:
            The three; all None where no pass has been since the last time.
        """
        if self._seen is None:
            return None, None, None
        (indices, read_features), self._seen = self._seen, None
        return (
            indices,
            read_features if features is None else features,
            self._codebook if codebook is None else codebook,
        )

    def remove(self) -> None:
        """Read no more."""
        self._handle.remove()


def follow_module(module: nn.Module, read: Callable[[Any], Any] | None, codebook: Any) -> ModuleReading:
    """Start reading a module; arguments and errors as of `CodebookMonitor.attach`."""
    if read is not None:
        return ModuleReading(module, read, lambda given: given, codebook)

    def own_codes() -> Tensor:
        return module.codebook.detach()

    kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == KNOWN}
    if "VectorQuantize" in kinds and not (module.heads > 1 and module.separate_codebook_per_head):
        features = partial(_vector_quantize_features, module) if module.heads == 1 else lambda given: None
        averaged = None if module.codebook.requires_grad else own_codes
        codes = own_codes if codebook is None else codebook
        return ModuleReading(module, lambda output: output[1], features, codes, averaged)
    if "SimVQ" in kinds:
        features = partial(_rows, module.channel_first)
        return ModuleReading(module, lambda output: output[1], features, own_codes if codebook is None else codebook)
    if kinds & {"FSQ", "LFQ"} and module.num_codebooks > 1:
        return ModuleReading(module, lambda output: output[1], lambda given: None, codebook)
    if kinds & {"FSQ", "LFQ"}:
        features, grid = (_fsq_features, _fsq_codes) if "FSQ" in kinds else (_lfq_features, _lfq_codes)
        codes = partial(grid, module) if codebook is None else codebook
        return ModuleReading(module, lambda output: output[1], partial(features, module), codes)
    advice = "read=lambda output: (indices, features)"
    if kinds & {"ResidualVQ", "GroupedResidualVQ"} or "VectorQuantize" in kinds:
        advice = "one of its codebooks, such as module.layers[0], or update(step, indices=indices[..., 0])"
    raise ValueError(f"attach does not know how to read a {type(module).__name__}; give it {advice}")


def _vector_quantize_features(module: nn.Module, given: Tensor) -> Tensor:
    """What a VectorQuantize compares with its codes: its input, projected, on the sphere where codes are."""
    is_image = module.accept_image_fmap or module.accept_3d_fmap
    tokens = module.project_in(_rows(is_image or (not module.channel_last and given.ndim > 2), given))
    return F.normalize(tokens, dim=1) if getattr(module, "use_cosine_sim", False) else tokens


def _fsq_codes(module: nn.Module) -> Tensor:
    """An FSQ's grid, one number per level's axis, in −1 to 1."""
    return module.implicit_codebook


def _fsq_features(module: nn.Module, given: Tensor) -> Tensor:
    """What an FSQ rounds: its input, projected, turned and bounded, in the units of its grid."""
    tokens = _grid_tokens(module, given, module.channel_first or given.ndim > 3)
    squash, inverse = (torch.tanh, torch.atanh) if not module.bound_hard_clamp else (_clamp, lambda shift: shift)
    if module.preserve_symmetry:
        return squash(tokens)
    levels = module._levels
    half = (levels - 1) * (1 + 1e-3) / 2  # 1e-3 is the library's ε
    offset = torch.where(levels % 2 == 0, 0.5, 0.0)
    return (squash(tokens + inverse(offset / half)) * half - offset) / (levels // 2)


def _lfq_codes(module: nn.Module) -> Tensor:
    """An LFQ's grid of signs, (K, bits), on the sphere where it is spherical."""
    return module.maybe_l2norm(module.codebook)


def _lfq_features(module: nn.Module, given: Tensor) -> Tensor:
    """What an LFQ takes the signs of: its input, projected, clamped, turned, on the sphere where codes are."""
    channels_first = given.ndim > 3 if module.channel_first is None else module.channel_first
    return module.maybe_l2norm(_grid_tokens(module, given, channels_first, module.soft_clamp_input_value))


def _grid_tokens(module: nn.Module, given: Tensor, channels_first: bool, bound: float | None = None) -> Tensor:
    """Tokens on the axes of a grid: projected, softly clamped where there is a bound, turned."""
    tokens = module.project_in(_rows(channels_first, given)).float()
    tokens = tokens if bound is None else (tokens / bound).tanh() * bound
    return tokens @ module.orthogonal_rot if module.orthogonal_rotation else tokens


def _clamp(values: Tensor) -> Tensor:
    return values.clamp(-1, 1)


def _rows(channels_first: bool, given: Tensor) -> Tensor:
    """One row per token."""
    return given.movedim(1, -1).flatten(0, -2) if channels_first else to_tokens(given, given.shape[-1])
