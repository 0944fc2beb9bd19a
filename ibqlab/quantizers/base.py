"""What every quantizer is: a codebook, an estimator over it, and upkeep between steps.

A method of the literature is one choice on each of three independent axes (see `codebooks`, `estimators`, `upkeep`).
A subclass of `Quantizer` supplies `assign`: how tokens choose codes and how gradients come back. It may have another
codebook than free parameters, upkeep, and settings of its own. Everything else, from shapes and precision to the summed
loss, is done once, here. Shape letters: B images · h w latent grid · N = B·h·w tokens · K codes · D code dimension.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import CODE_DIM, CODES, check_numbers, require, require_at_most, require_choice
from ibqlab.quantizers.assignments import (
    PACKAGE,
    Assignment,
    QuantizerOutput,
    checked,
    checked_assignment,
    checked_choice,
    weighted_sum,
)
from ibqlab.quantizers.codebooks import INITIALISATIONS, FreeCodebook, at_least_float32
from ibqlab.quantizers.indices import check_range, to_indices
from ibqlab.quantizers.looks import QuantizerLook, checked_look
from ibqlab.quantizers.precision import autocast_device
from ibqlab.quantizers.products import MATMULS
from ibqlab.quantizers.registration import as_default, check_class, check_config, check_defaults, check_name
from ibqlab.quantizers.upkeep import KMeansStart, Upkeep


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Settings that every quantizer has. A preset's own settings are fields of a subclass beside the preset."""

    config_name: ClassVar[str] = ""
    """The name under which the preset is registered; written into config files as `name`."""
    quantizer_class: ClassVar[type | None] = None
    """The class that was registered under it, and that these settings build, whatever takes the name later."""
    codebook_size: int = 1024
    """K, codes, at least 2. Paper: 1,024 to 262,144; 16,384 where not said otherwise."""
    code_dim: int = 64
    """D, numbers per code, at least 1. Paper: 256."""
    codebook_init: str = "uniform"
    """Where codes start: "uniform" U(±1/K) (published VQ), "normal" N(0, 1) (published IBQ), "unit" N(0, 1/D), or
    "kmeans" (cluster centres of the first batch). Comparisons must hold this fixed or vary it on purpose."""
    matmul: str = "float32"
    """What is promised about products of tokens and codes in float32 on a GPU: "float32", as near to float64 as IEEE
    float32; "tf32" or "bfloat16", operands rounded to 11 or 8 bits, faster. Elsewhere always float32."""

    def __post_init__(self):
        check_numbers(self)
        require(self.codebook_size >= 2, f"codebook_size must be at least 2, got {self.codebook_size}")
        require(self.code_dim >= 1, f"code_dim must be at least 1, got {self.code_dim}")
        require_at_most("codebook_size", self.codebook_size, CODES)
        require_at_most("code_dim", self.code_dim, CODE_DIM)
        require_choice("codebook_init", self.codebook_init, INITIALISATIONS)
        require_choice("matmul", self.matmul, MATMULS)

    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term, by its name."""
        return {}

    @classmethod
    def sized(cls, codes: int, dim: int) -> dict[str, Any]:
        """Settings of about so many codes of dimension D, for whoever tries every registered quantizer.

        A grid of fixed codes, whose K and D hang together, has D as asked for and the K that comes of it.
        """
        return {"codebook_size": codes, "code_dim": dim}

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Settings are pickled with their name: the class of some presets is made when they are registered."""
        if not self.config_name:
            return super().__reduce__()
        return quantizer_config, ({"name": self.config_name, **vars(self)},)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable) -> Any:
        """Read `{"name": "ibq", …}` as the registered preset's config where a field is typed `QuantizerConfig`."""
        if cls is not QuantizerConfig:
            return handler(source)
        from pydantic_core import core_schema  # noqa: PLC0415 - only configuration checking needs it

        return core_schema.no_info_plain_validator_function(quantizer_config)


class Quantizer(nn.Module):
    """Base class: subclass it, write `assign`, name the weights of its terms, and register it.

    Args:
        config: K, D, the start of the codebook, and what the subclass adds.
        codes: the codebook's module (axis 1); calling it returns the (K, D) codebook. None: free parameters.
        upkeep: what is done to the codes in training (axis 3), in order, behind the k-means start where the config asks
            for that.
    """

    looks_up: ClassVar[bool] = True
    """Whether `assign` and `choose` read the codebook they are given; False spares making one of 2^D sign vectors."""
    reaches: ClassVar[str] = ""
    """Codes that a step moves: the "chosen", "all", all by a "softmax" over z·C, or by a shared "map"; "": unsaid."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Rules of `contract` that a method cannot keep → why; they are not tried."""

    def __init__(self, config: QuantizerConfig, codes: nn.Module | None = None, upkeep: Sequence[Upkeep] = ()):
        super().__init__()
        self.config = config
        self.codes = (
            FreeCodebook(config.codebook_init, config.codebook_size, config.code_dim) if codes is None else codes
        )
        start = [KMeansStart()] if config.codebook_init == "kmeans" else []
        self.upkeep = nn.ModuleList([*start, *upkeep])
        self.progress = 0.0
        """Share of training done, 0 to 1, set by the training loop; schedules read it."""
        self._mapped_gradient: Tensor | None = None

    @property
    def codebook(self) -> Float[Tensor, "K D"]:
        """The codebook as the forward pass uses it."""
        return self.codes()

    @property
    def codebook_gradient(self) -> Float[Tensor, "K D"] | None:
        """∂loss/∂codebook of the last backward pass, code by code, from which diagnostics read which codes learn.

        None where codes take no gradient (moving averages) and before the first backward pass.
        """
        with torch.no_grad():
            codebook = self.codebook
        return codebook.grad if isinstance(codebook, nn.Parameter) else self._mapped_gradient

    def loss_weights(self) -> dict[str, float]:
        """Weight of each term in `QuantizerOutput.loss`; a term without a weight is a mistake and raises an error."""
        return self.config.loss_weights()

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Choose a code per token and carry the gradient back (axis 2). The one method a new quantizer must write."""
        raise TypeError(f"{type(self).__name__} must define assign(features, codebook) -> Assignment")

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The code of each token and nothing else, as `assign` would choose it in evaluation."""
        return checked(self.name, self.assign(features, codebook), features, False).indices

    @torch.no_grad()
    def encode(self, features: Float[Tensor, "B D h w"]) -> Int[Tensor, "B h w"]:
        """The index of every token, without losses, gradient, upkeep or quantized vectors.

        Args:
            features: encoder output, any scale, contiguous or channels-last.
        Returns:
            int64, 0 to K−1; the indices of the forward pass in eval mode.
        Raises:
            ValueError: wrong number of dimensions or channels, no tokens, or NaN or infinity among them, which no index
                can stand for.
        """
        self._check_features(features)
        batch, _, height, width = features.shape
        with torch.autocast(autocast_device(features.device), enabled=False):
            tokens = _tokens(features)
            # NaN is neither larger nor smaller than anything, so a search would answer with some index.
            finite = torch.isfinite(tokens).all(1)
            if not finite.all():
                raise ValueError(
                    f"features must be finite to have an index; {int((~finite).sum())} of {len(finite)} tokens hold "
                    f"NaN or infinity, first token {int((~finite).nonzero()[0, 0])}. Look at the images and the "
                    "encoder's weights with torch.isfinite"
                )
            return checked_choice(self, *self._in_one_type(tokens)).view(batch, height, width)

    def forward(self, features: Float[Tensor, "B D h w"]) -> QuantizerOutput:
        """Replace every feature vector by a code.

        Computed in float32 whatever the types of features and codebook, and outside autocast, because the entropy
        temperature 0.01 multiplies rounding by 100 and float16 logits overflow; float64 stays float64.

        Args:
            features: encoder output, any scale, contiguous or channels-last.
        Returns:
            QuantizerOutput. In training mode the codebook's upkeep has been applied.
        Raises:
            ValueError: wrong number of dimensions or channels, or no tokens.
            QuantizerError: `assign` of a user's quantizer raised, or did not return what it must.
        """
        self._check_features(features)
        batch, dim, height, width = features.shape
        with torch.autocast(autocast_device(features.device), enabled=False):
            tokens = _tokens(features)
            upkeep = self.upkeep if self.training else ()
            for step in upkeep:
                step.before(self.codes, tokens)
            tokens, codebook = self._in_one_type(tokens)  # after upkeep, which may have replaced codes
            if codebook.requires_grad and not codebook.is_leaf:
                # Codes that come out of a map have no .grad of their own, and diagnostics read which codes learn.
                codebook.register_hook(self._store_gradient)
            assignment = checked_assignment(self, tokens, codebook)
            loss = weighted_sum(self.name, assignment.terms, self.loss_weights(), tokens)
            for step in upkeep:
                step.after(self.codes, tokens.detach(), assignment.indices)
        quantized = assignment.quantized.view(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()
        return QuantizerOutput(quantized, assignment.indices.view(batch, height, width), loss, assignment.terms)

    def decode(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B D h w"]:
        """Code vectors of stored indices; equals `quantized` of the forward pass in eval mode.

        Args:
            indices: of any integer type; arrays and lists are taken, too.
        Raises:
            ValueError: no whole numbers on a (B, h, w) grid, or one outside 0 … K−1.
        """
        # What `forward` gives is float32 whatever the codebook's type is, and so is this.
        vectors = self.look_up(self.checked_indices(indices))
        return at_least_float32(vectors).permute(0, 3, 1, 2).contiguous()

    def look_up(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B h w D"]:
        """Code vectors of int64 indices within 0 … K−1."""
        codebook = self.codebook
        return nn.functional.embedding(indices.to(codebook.device), codebook)

    def checked_indices(self, indices: Any) -> Int[Tensor, "B h w"]:
        """Indices as an int64 tensor; ValueError unless they are a (B, h, w) grid of codes."""
        indices, size = to_indices(indices), self.config.codebook_size
        require(
            indices.ndim == 3,
            f"indices must be of shape (B, h, w); got {tuple(indices.shape)}. "
            "Use indices.view(B, h, w) for a sequence of h·w tokens.",
        )
        check_range("indices", indices, size, f" (codebook_size {size})")
        return indices

    @contextmanager
    def without_upkeep(self) -> Iterator[None]:
        """Inside the block a forward pass in training mode leaves the codebook alone."""
        upkeep, self.upkeep = self.upkeep, nn.ModuleList()
        try:
            yield
        finally:
            self.upkeep = upkeep

    @property
    def name(self) -> str:
        """The name that it is registered under; its class's for one that is not."""
        return self.config.config_name or type(self).__name__

    def _in_one_type(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and codebook in one type, the wider of theirs; without the codes where nothing looks at them."""
        if not self.looks_up:
            return tokens, tokens.new_empty(0, tokens.shape[1])
        codebook = self.codebook
        wider = torch.promote_types(tokens.dtype, codebook.dtype)
        return tokens.to(wider), codebook.to(wider)

    def _store_gradient(self, gradient: Tensor) -> None:
        self._mapped_gradient = gradient.detach()

    def _check_features(self, features: Tensor) -> None:
        shape, dim = tuple(features.shape), self.config.code_dim
        rule = f"features must be (B, D, h, w) with D = code_dim = {dim}, got {shape}"
        require(len(shape) == 4 and shape[1] == dim, f"{rule}; set code_dim to the number of channels")
        require(features.numel() > 0, f"features hold no token: {shape}; give at least one image")

    def extra_repr(self) -> str:
        """The config, for print(quantizer)."""
        return repr(self.config)


def _tokens(features: Float[Tensor, "B D h w"]) -> Float[Tensor, "N D"]:
    """Features token by token, float32 unless they are float64."""
    return at_least_float32(features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]))


class Registration(NamedTuple):
    """What is known of a quantizer by its name."""

    quantizer: type[Quantizer]
    config: type[QuantizerConfig]
    look: QuantizerLook
    module: str  # that defines the class


_PRESETS: dict[str, Registration] = {}
"""Registered quantizers by name."""


def register_quantizer(
    name: str,
    config: type[QuantizerConfig] = QuantizerConfig,
    *,
    label: str = "",
    color: str = "",
    marker: str = "",
    **defaults: Any,
) -> Callable[[type], type]:
    """Class decorator: make a quantizer known under a name to `build_quantizer`, recipes and notebooks.

    Args:
        name: what recipes write as `name`.
        config: its settings, a frozen keyword-only dataclass derived from `QuantizerConfig`.
        label: its proper name in figures and tables; "": the name.
        color, marker: in figures, #RRGGBB and a marker of matplotlib; "": the next that are free.
        **defaults: settings that have another default under this name.
    Raises:
        ValueError: the name is taken or cannot be typed; the class is no Quantizer; the config is no class of settings,
            has a setting called as an argument here or an impossible default, or lacks one that has a default here; a
            look that no figure can show.
    """
    check_name(name)
    check_config(name, config, QuantizerConfig)
    settings = [field.name for field in fields(config)]
    require("name" not in settings, f"{name!r}: `name` is the quantizer's own in recipes; call the setting otherwise")
    for word in QuantizerLook._fields:
        says = f"{name!r}: `{word}` is for figures, of a registration; call the setting otherwise"
        require(word not in settings, says)
    look = checked_look(name, label, color, marker)
    for setting in defaults:
        require_choice(f"{name!r}: a setting with a default", setting, settings)

    def decorate(quantizer: type[Quantizer]) -> type[Quantizer]:
        check_class(name, quantizer, Quantizer)
        if name in _PRESETS and not _is_again(_PRESETS[name], quantizer):
            raise ValueError(f"a quantizer named {name!r} exists already: {_PRESETS[name].quantizer}; choose another")
        config_class = config
        # A config's class holds the name and the defaults of one quantizer, so a shared class gets a subclass.
        if defaults or config is QuantizerConfig or vars(config).get("config_name", "") not in ("", name):
            types = {field.name: field.type for field in fields(config)}
            changed = [(setting, types[setting], as_default(value)) for setting, value in defaults.items()]
            class_name = f"{quantizer.__name__}Config"
            config_class = make_dataclass(class_name, changed, bases=(config,), frozen=True, kw_only=True)
            config_class.__module__ = quantizer.__module__
        check_defaults(name, config_class)
        config_class.config_name, config_class.quantizer_class = name, quantizer
        _PRESETS[name] = Registration(quantizer, config_class, look, quantizer.__module__)
        return quantizer

    return decorate


def _is_again(registration: Registration, quantizer: type[Quantizer]) -> bool:
    """Whether a class is a registered one defined once more, as by a notebook's cell that is run again."""
    modules = {registration.module, quantizer.__module__}
    may_be = len(modules) == 1 or not any(module.startswith(PACKAGE) for module in modules)
    return may_be and registration.quantizer.__qualname__ == quantizer.__qualname__


def registrations() -> dict[str, Registration]:
    """All registered quantizers by name; a copy."""
    return dict(_PRESETS)


def replace_registrations(registered: Mapping[str, Registration]) -> None:
    """Put others in place of all that are registered, as when a file of the user's is read in another version."""
    _PRESETS.clear()
    _PRESETS.update(registered)


def available_quantizers() -> list[str]:
    """Names that `build_quantizer` takes, sorted."""
    return sorted(_PRESETS)


def quantizer_config(settings: Any) -> QuantizerConfig:
    """A preset's config from `{"name": …, setting: value, …}`; configs pass through unchanged.

    Raises:
        ValueError: no or unknown name, unknown key, wrong type, impossible value; the message names the nearest key.
    """
    if isinstance(settings, QuantizerConfig):
        return settings
    if not isinstance(settings, dict) or "name" not in settings:
        raise ValueError(f"a quantizer needs a name, one of {', '.join(available_quantizers())}; got {settings!r}")
    from ibqlab import config  # noqa: PLC0415 - it needs pydantic, a plain quantizer does not

    values = {key: value for key, value in settings.items() if key != "name"}
    return config.parse(_preset(settings["name"]).config, values, source=f"quantizer {settings['name']!r}")


def make_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that a config describes."""
    return (config.quantizer_class or _preset(config.config_name).quantizer)(config)


def build_quantizer(name: str, **settings: Any) -> Quantizer:
    """A quantizer by its registered name: `build_quantizer("ibq", codebook_size=16384, code_dim=256)`.

    Args:
        name: one of `available_quantizers()`.
        **settings: fields of the preset's config; the rest keep their published defaults.
    Raises:
        ValueError: unknown name or setting (the message names the nearest), wrong type or impossible value.
    """
    return make_quantizer(quantizer_config({"name": name, **settings}))


def _preset(name: str) -> Registration:
    require_choice("quantizer name", name, _PRESETS)
    return _PRESETS[name]
