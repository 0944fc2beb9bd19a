"""Quantizers made of several quantizers of one kind: their settings, their indices, and their codebook.

A token's index is a number whose digits, base k, are the indices of the parts, so that whatever counts indices works
unchanged: K = k^parts. The first part's digit is worth most. A composite has no codes of its own, so that a k-means
start, moving averages and revival are the parts' own and happen in the parts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import CODES, check_numbers, require
from ibqlab.base.codebook_parts import CONCATENATED, MOST_STORED, SUMMED
from ibqlab.quantizers.base import Quantizer, QuantizerConfig, QuantizerOutput, make_quantizer, quantizer_config
from ibqlab.quantizers.codebooks import at_least_float32

DEFAULT_BITS = 20
"""Bits of all parts' indices together where no size is given."""

OF_GRIDS = ("multi_scale", "hierarchical")
"""Composites that need a grid of tokens, so that they are no part of another."""

Join = Callable[[Sequence[Tensor]], Tensor]
"""Vectors of the parts to those of the whole."""


@dataclass(frozen=True, kw_only=True)
class CompositeConfig(QuantizerConfig):
    """Settings that all composites have."""

    codebook_size: int = 0
    """K, combinations of the parts' codes: the parts' codebook_size to the power of their number, at most 2^24.
    0 fills it in; given, it says the parts' size where `inner` does not."""
    code_dim: int = 0
    """D of the whole. 0 fills it in; given, it says the parts' dimension where `inner` does not."""
    codebook_init: str = ""
    """Start of the parts' codebooks, that of `inner` where empty. A start by k-means is written into `inner`."""
    matmul: str = ""
    """As in every quantizer; that of `inner` where empty."""
    inner: dict[str, Any] = field(default_factory=lambda: {"name": "vq"})
    """Settings of the quantizer that every part is: {"name": "ibq", …}, any registered one but those of
    `OF_GRIDS`."""
    shared: bool = False
    """Whether all parts are one and the same quantizer with one codebook."""

    number_setting: ClassVar[str] = ""
    """The setting that says how many parts there are, for messages."""

    def number(self) -> int:
        """How many parts there are."""
        raise TypeError(f"{type(self).__name__} must define number() -> int")

    def splits(self) -> int:
        """Into how many pieces the channels are cut, one for each part: 1 where every part sees all of them."""
        return 1

    def __post_init__(self):
        check_numbers(self)
        if self.codebook_size and not 2 <= self.codebook_size <= CODES:
            object.__setattr__(self, "code_dim", self.code_dim or 1)
            object.__setattr__(self, "codebook_init", self.codebook_init or "normal")
            object.__setattr__(self, "matmul", self.matmul or "float32")
            super().__post_init__()  # refuses it
        inner = _config_below("inner", self._inner_settings())
        number, size, dim = self.number(), inner.codebook_size, inner.code_dim * self.splits()
        require(
            size**number <= CODES,
            f"codebook_size of all parts together, {size:,}^{number}, must be at most {CODES:,}; use "
            f"inner.codebook_size={_root(CODES, number)} or less, or a smaller {self.number_setting}",
        )
        facts = {"codebook_size": size**number, "code_dim": dim, "codebook_init": inner.codebook_init}
        facts["matmul"] = inner.matmul
        for name, value in facts.items():
            require(
                getattr(self, name) in (0, "", value),
                f"{name} must be {value!r} for {number} parts of {inner.config_name} with codebook_size {size} and "
                f"code_dim {inner.code_dim}; got {getattr(self, name)!r}. Leave it out, or change inner.{name}",
            )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "inner", {"name": inner.config_name, **vars(inner)})
        super().__post_init__()

    def loss_weights(self) -> dict[str, float]:
        """Those of a part, whose terms are averaged over the parts."""
        return quantizer_config(self.inner).loss_weights()

    @classmethod
    def sized(cls, codes: int, dim: int) -> dict[str, int]:
        """As many codes as have a whole root."""
        number = cls().number()
        return {"codebook_size": max(2, round(codes ** (1 / number))) ** number, "code_dim": dim}

    def _inner_settings(self) -> dict[str, Any]:
        """`inner` with the sizes that follow from the whole's."""
        settings = self.inner
        if isinstance(settings, QuantizerConfig):
            settings = {"name": settings.config_name, **vars(settings)}
        require(
            isinstance(settings, dict) and settings.get("name") not in OF_GRIDS,
            f'inner must be settings of a quantizer of single tokens, such as {{"name": "ibq"}}; got {settings!r:.60}',
        )
        settings, number, splits = dict(settings), self.number(), self.splits()
        if not _says_size(settings) or (self.codebook_size and "codebook_size" not in settings and "inner" in settings):
            root = _root(self.codebook_size, number) if self.codebook_size else 2 ** max(1, DEFAULT_BITS // number)
            if self.codebook_size:
                _require_power(self.codebook_size, number * _parts_of(settings), self.number_setting)
            settings["codebook_size"] = root
        if self.code_dim and "code_dim" not in settings:
            require(
                self.code_dim % splits == 0,
                f"code_dim must be a multiple of {self.number_setting} = {splits}; got {self.code_dim}. "
                f"Use {max(1, self.code_dim // splits) * splits}",
            )
            settings["code_dim"] = self.code_dim // splits
        if self.codebook_init and "codebook_init" not in settings:
            require(
                self.codebook_init != "kmeans",
                "codebook_init 'kmeans' is each part's own, at the features that it gets; "
                'write it into inner: {"codebook_init": "kmeans", …}',
            )
            settings["codebook_init"] = self.codebook_init
        if self.matmul:
            settings.setdefault("matmul", self.matmul)
        return settings


def open_sizes(settings: dict[str, Any], codes: int, dim: int) -> dict[str, Any]:
    """What is to be filled in for settings that leave sizes open: about so many codes of dimension D.

    Levels, groups and parts that the settings say decide the size, whatever number of codes is asked for.

    Args:
        settings: of any quantizer, with its name; what they say wins over what is returned.
        codes: K asked for.
        dim: D.
    """
    kind = type(quantizer_config({"name": settings["name"]}))
    if not issubclass(kind, CompositeConfig):
        says_levels = _says_size(settings) and not settings.get("codebook_size")
        return {} if says_levels else kind.sized(settings.get("codebook_size") or codes, dim)
    if _says_size(settings):
        return {"code_dim": dim}
    whole = quantizer_config({key: value for key, value in settings.items() if key != "code_dim"})
    inner = settings.get("inner", {"name": whole.inner["name"]})
    part_codes = max(2, round(codes ** (1 / whole.number())))
    part = quantizer_config({**open_sizes(inner, part_codes, max(1, dim // whole.splits())), **inner})
    return {"codebook_size": part.codebook_size ** whole.number(), "code_dim": dim}


def _says_size(settings: Any) -> bool:
    """Whether settings of a part say its codebook's size: by themselves, by levels, or in the parts of the part."""
    if not isinstance(settings, dict):
        return isinstance(settings, QuantizerConfig)
    levels = settings.get("name") == "fsq" and "levels" in settings
    return bool(settings.get("codebook_size")) or levels or ("inner" in settings and _says_size(settings["inner"]))


def _parts_of(settings: dict[str, Any]) -> int:
    """How many innermost parts a part has: 1 where it is no composite."""
    if not issubclass(type(_config_below("inner", {"name": settings.get("name")})), CompositeConfig):
        return 1
    part = _config_below("inner", {key: value for key, value in settings.items() if key not in _SIZES})
    return part.number() * _parts_of(part.inner)


_SIZES = ("codebook_size", "code_dim")


def _require_power(size: int, parts: int, number_setting: str) -> None:
    """Refuse a size that is no number of codes to the power of all innermost parts; sizes that are one are named."""
    root = max(2, _root(size, parts))
    sizes = " or ".join(str(codes**parts) for codes in (root, root + 1) if codes**parts <= CODES)
    require(
        root**parts == size,
        f"codebook_size must be a whole number to the power of {parts}, the number of parts; got {size}. "
        f"Use {sizes or f'a smaller {number_setting}'}",
    )


class CompositeQuantizer(Quantizer):
    """Base class of composites: a subclass says in `assign` and `choose` which features each part gets.

    Args:
        config: the whole's.
        join: how the parts' vectors make the whole's.
    """

    looks_up = False

    def __init__(self, config: CompositeConfig, join: Join):
        super().__init__(config, Parts(quantizer_config(config.inner), config.number(), config.shared, join))
        self.upkeep = nn.ModuleList()  # the parts have their own

    @property
    def parts(self) -> list[Quantizer]:
        """The part behind each digit of an index; the same one several times where they share a codebook."""
        return [self.codes.part(digit) for digit in range(self.codes.number)]

    @property
    def codebook_gradient(self) -> Float[Tensor, "K D"] | None:
        """Of each combination, its codes' gradients joined as its codes are; None where no part's code has one."""
        return self.codes.joined_gradient()

    def loss_weights(self) -> dict[str, float]:
        """Weight of each term, the same for all parts."""
        return self.parts[0].loss_weights()

    def look_up(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B h w D"]:
        """The joined codes of some combinations."""
        return self.codes.vectors(indices)

    @contextmanager
    def without_upkeep(self) -> Iterator[None]:
        """Inside the block a forward pass in training mode leaves all parts' codebooks alone."""
        with ExitStack() as stack:
            for part in self.codes.parts:
                stack.enter_context(part.without_upkeep())
            yield

    def quantize_part(
        self, part: Quantizer, features: Float[Tensor, "N d"]
    ) -> tuple[Float[Tensor, "N d"], Int[Tensor, " N"], dict[str, Tensor]]:
        """A part's vectors, indices and terms for its features, its upkeep done."""
        part.progress = self.progress
        out = part(as_grid(features))
        return as_rows(out.quantized), out.indices.flatten(), out.terms

    @torch.no_grad()
    def part_features(self, features: Float[Tensor, "B D h w"]) -> list[Float[Tensor, "n d"]]:
        """What each part gets to quantize, for diagnostics: they measure a part by its own features.

        Args:
            features: of the whole.
        Returns:
            Tokens by part; as many as the features hold, or fewer where a part sees a coarser grid.
        """
        raise TypeError(f"{type(self).__name__} must define part_features(features) -> list of tensors")

    def averaged(self, terms: Sequence[dict[str, Tensor]]) -> dict[str, Float[Tensor, ""]]:
        """Mean of each term over the parts."""
        return {name: sum(part[name] for part in terms) / len(terms) for name in terms[0]}


class GridComposite(CompositeQuantizer):
    """Base class of composites whose parts see other grids than the tokens' own: `forward` and `encode` keep the grid's
    shape, which `assign` and `choose` need."""

    _shape = (1, 1, 1)
    """Images, height and width of the grid at hand."""

    def forward(self, features: Float[Tensor, "B D h w"]) -> QuantizerOutput:
        """As in every quantizer."""
        self._keep_shape(features)
        return super().forward(features)

    def encode(self, features: Float[Tensor, "B D h w"]) -> Int[Tensor, "B h w"]:
        """As in every quantizer."""
        self._keep_shape(features)
        return super().encode(features)

    def _keep_shape(self, features: Tensor) -> None:
        self._check_features(features)
        self._shape = (len(features), *features.shape[2:])


class Parts(nn.Module):
    """The parts of a composite; calling it returns the codebook of all combinations.

    Args:
        inner: settings of a part.
        number: how many digits an index has.
        shared: one part for all digits.
        join: how the parts' vectors make the whole's.
    """

    def __init__(self, inner: QuantizerConfig, number: int, shared: bool, join: Join):
        super().__init__()
        self.parts = nn.ModuleList(make_quantizer(inner) for _ in range(1 if shared else number))
        self.number, self.size, self.join = number, inner.codebook_size, join

    def part(self, digit: int) -> Quantizer:
        """The part behind a digit."""
        return self.parts[digit % len(self.parts)]

    def forward(self) -> Float[Tensor, "K D"]:
        """Vectors of all combinations. Cost: O(K·D) operations and memory, so that only diagnostics ask for them."""
        return self.vectors(torch.arange(self.size**self.number)[None, None])[0, 0]

    def vectors(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B h w D"]:
        """Vectors of some combinations, joined in float32 at least."""
        digits = self.digits(indices)
        return self.join([at_least_float32(self.part(i).look_up(digit)) for i, digit in enumerate(digits)])

    def contributions(self) -> list[Float[Tensor, "k d"]]:
        """What each part's codes add to a combination's vector, or their piece of its channels."""
        return [at_least_float32(self.part(level).codebook) for level in range(self.number)]

    def digits(self, indices: Int[Tensor, "*grid"]) -> list[Int[Tensor, "*grid"]]:
        """The parts' indices, the first part's first."""
        return [indices // self.size**power % self.size for power in reversed(range(self.number))]

    def index(self, digits: Sequence[Int[Tensor, "*grid"]]) -> Int[Tensor, "*grid"]:
        """The index that has these digits."""
        return sum(digit * self.size**power for digit, power in zip(digits, reversed(range(self.number)), strict=True))

    @torch.no_grad()
    def joined_gradient(self) -> Float[Tensor, "K D"] | None:
        """Gradients of the parts' codes, joined for every combination."""
        gradients = [part.codebook_gradient for part in self.parts]
        known = next((gradient for gradient in gradients if gradient is not None), None)
        if known is None:
            return None
        gradients = [torch.zeros_like(known) if gradient is None else gradient for gradient in gradients]
        digits = self.digits(torch.arange(self.size**self.number, device=known.device))
        return self.join([gradients[i % len(gradients)][digit] for i, digit in enumerate(digits)])


@torch.no_grad()
def codebook_arrays(quantizer: Quantizer) -> dict[str, np.ndarray]:
    """For a snapshot: the codebook (K, D); of a composite with many combinations what its parts' codes add to them.

    `ibqlab.base.codebook_parts.with_codebook` makes the codebook of either.
    """
    if not stores_parts(quantizer.config):
        return {"codebook": quantizer.codebook.detach().float().cpu().numpy().copy()}
    name = CONCATENATED if quantizer.codes.join is joined_channels else SUMMED
    return {name: torch.stack(quantizer.codes.contributions()).float().cpu().numpy()}


def stores_parts(config: QuantizerConfig) -> bool:
    """Whether snapshots hold the parts' codebooks in place of that of all combinations."""
    return isinstance(config, CompositeConfig) and config.codebook_size * config.code_dim > MOST_STORED


def stored_codebook_numbers(config: QuantizerConfig) -> int:
    """Numbers of the codebook, or of the parts' codebooks, in a snapshot."""
    if not stores_parts(config):
        return config.codebook_size * config.code_dim
    return config.number() * config.inner["codebook_size"] * config.inner["code_dim"]


def _config_below(key: str, settings: dict[str, Any]) -> QuantizerConfig:
    """A quantizer's config, whose problems have their path below a key."""
    try:
        return quantizer_config(settings)
    except ValueError as error:
        problems = getattr(error, "problems", ())  # a ConfigError's, whose module only configuration needs
        if not problems:
            raise
        below = [problem._replace(path=(key, *problem.path)) for problem in problems]
        raise type(error).from_problems(f"quantizer {settings['name']!r}", below) from None


def as_grid(rows: Float[Tensor, "N d"]) -> Float[Tensor, "1 d 1 N"]:
    """Tokens as an image of one row of the latent grid."""
    return rows.T[None, :, None]


def as_rows(grid: Float[Tensor, "B d h w"]) -> Float[Tensor, "N d"]:
    """A latent grid token by token."""
    return grid.permute(0, 2, 3, 1).reshape(-1, grid.shape[1])


def _root(value: int, degree: int) -> int:
    """The largest whole number whose power is at most the value."""
    root = max(1, round(value ** (1 / degree)))
    return root - 1 if root**degree > value else root


def joined_channels(vectors: Sequence[Float[Tensor, "*grid d"]]) -> Float[Tensor, "*grid D"]:
    """Vectors side by side."""
    return torch.cat(list(vectors), dim=-1)


def summed(vectors: Sequence[Float[Tensor, "*grid D"]]) -> Float[Tensor, "*grid D"]:
    """Vectors one upon the other, the first first: sums of floats depend on their order."""
    return sum(vectors[1:], start=vectors[0])


def nearest_cells(
    whole: tuple[int, int], size: tuple[int, int], device: torch.device
) -> tuple[Int[Tensor, " h"], Int[Tensor, " w"]]:
    """Of each row and column of a grid the row and column of a coarser one that lies above it."""
    rows, columns = (torch.arange(many, device=device) * few // many for many, few in zip(whole, size, strict=True))
    return rows, columns
