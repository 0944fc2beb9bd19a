"""What the published generators share: settings of grid, classes and width, the positions, and what they refuse.

Shape letters: B images · T sequence · C width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.base.checks import CHANNELS, CLASSES, check_numbers, require, require_at_most, require_choice
from ibqlab.generator.attention import Attention, rotary_table
from ibqlab.generator.layers import FeedForward
from ibqlab.quantizers.indices import to_indices, value_bounds

MOST_TOKENS_ALONG_A_SIDE = 1024
"""Published: 16; an image of 10⁶ tokens is beyond every generator of single tokens."""
Config = TypeVar("Config", bound="SequenceConfig")


@dataclass(frozen=True, kw_only=True)
class SequenceConfig:
    """What the published generators share: the grid, the classes, the width and the dropouts."""

    config_name: ClassVar[str] = ""
    """The design's name; written into config files as `name`."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Published configurations by name: what differs from the defaults."""

    num_classes: int = 1000
    """Classes of images, at least 1; the label num_classes is the null class. Paper: 1,000."""

    grid_size: int = 16
    """Tokens along one side of an image, at least 1: T = grid_size². Paper: 16."""

    width: int = 1024
    """C, channels of a token, a multiple of 4·num_heads. Paper: 64 times the depth."""

    num_heads: int = 16
    """Attention heads, at least 1. Paper: as many as blocks, of 64 channels each."""

    hidden_multiple: int = 256
    """The hidden width, ⌊8C/3⌋, is rounded up to a multiple of this, at least 1. Published: 256."""

    attention_dropout: float = 0.1
    """Share of values dropped after each attention in training, 0 to below 1. Published: 0.1."""

    feed_forward_dropout: float = 0.1
    """Share of values dropped after each feed-forward in training, 0 to below 1. Published: 0.1."""

    token_dropout: float = 0.1
    """Share of values dropped from the embedded class and tokens in training, 0 to below 1. Published: 0.1."""

    label_dropout: float = 0.1
    """Chance that training replaces a label by the null class, 0 to 1; guidance needs some. Published: 0.1."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_positive(self, "num_classes", "grid_size", "width", "num_heads", "hidden_multiple")
        require_at_most("num_classes", self.num_classes, CLASSES)
        require_at_most("grid_size", self.grid_size, MOST_TOKENS_ALONG_A_SIDE)
        for name in ("width", "num_heads", "hidden_multiple"):
            require_at_most(name, getattr(self, name), CHANNELS)
        step = 4 * self.num_heads
        require(
            self.width % step == 0,
            f"width must be a multiple of 4·num_heads = {step}, so that every head has pairs of channels for rows and "
            f"for columns; got {self.width}. Use width={max(1, round(self.width / step)) * step}.",
        )
        for name in ("attention_dropout", "feed_forward_dropout", "token_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must lie in 0 to below 1; got {value}. Published: 0.1.")
        chance = self.label_dropout
        require(0 <= chance <= 1, f"label_dropout must lie in 0 to 1; got {chance}. Published: 0.1.")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable) -> Any:
        """Read `{"name": "ibq", …}` as that design's config where a field is typed `SequenceConfig`."""
        if cls is not SequenceConfig:
            return handler(source)
        from pydantic_core import core_schema  # noqa: PLC0415 - only configuration checking needs it

        return core_schema.no_info_plain_validator_function(generator_config)

    @classmethod
    def preset(cls: type[Config], name: str, **changes: Any) -> Config:
        """A published configuration.

        Args:
            name: of the published model, such as "B".
            **changes: settings that are to differ from it.
        Raises:
            ValueError: no such preset, or values that do not fit.
        """
        require_choice("preset", name, cls.presets)
        return cls(**{**cls.presets[name], **changes})

    @property
    def num_tokens(self) -> int:
        """T, tokens of an image."""
        return self.grid_size**2

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.num_heads


def generator_config(settings: Any) -> SequenceConfig:
    """A design's config from `{"name": "ibq", "preset": "XL", setting: value, …}`; configs pass through unchanged.

    Args:
        settings: `name` is "ibq", "llamagen" or "magvit2"; `preset`, which may be missing, a published configuration
            that the other settings change.
    Raises:
        ValueError: no or unknown name or preset, unknown key, wrong type, impossible value; the message names the
            nearest key.
    """
    if isinstance(settings, SequenceConfig):
        return settings
    designs = {design.config_name: design for design in SequenceConfig.__subclasses__()}
    if not isinstance(settings, dict) or "name" not in settings:
        raise ValueError(f"a generator needs a name, one of {', '.join(sorted(designs))}; got {settings!r}")
    from ibqlab import config  # noqa: PLC0415 - it needs pydantic, a plain generator does not

    values = {key: value for key, value in settings.items() if key not in ("name", "preset")}
    require_choice("generator name", settings["name"], designs)
    design = designs[settings["name"]]
    if "preset" in settings:
        require_choice("preset", settings["preset"], design.presets)
        values = {**design.presets[settings["preset"]], **values}
    return config.parse(design, values, source=f"generator {settings['name']!r}")


def block_parts(config: SequenceConfig) -> tuple[Attention, FeedForward]:
    """New parts of one block."""
    return (
        Attention(config.width, config.num_heads, config.attention_dropout),
        FeedForward(config.width, config.hidden_multiple, config.feed_forward_dropout),
    )


def position_table(config: SequenceConfig, x: Float[Tensor, "..."], length: int) -> Float[Tensor, "length pairs 2"]:
    """The first `length` rows of `rotary_table`, on the device of `x`, in float32 or wider.

    Made again every time, which costs next to nothing: a stored table would lose its precision with `.half()` and its
    values on the meta device.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rotary_table(config.grid_size, config.head_dim, dtype=dtype, device=x.device)[:length]


def check_inputs(
    indices: Any, labels: Any, config: SequenceConfig, device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """Tokens and classes as int64; ValueError unless a generator can take them. Waits once for the device.

    Both may be arrays or lists, too, which go to the device.
    """
    indices, labels = to_indices(indices, device=device), to_indices(labels, "labels", device)
    most = config.num_tokens
    if indices.ndim != 2 or not 1 <= indices.shape[1] <= most or not len(indices):
        remedy = "Use indices.flatten(1) for a grid (B, h, w)." if indices.ndim == 3 else ""
        raise ValueError(
            f"indices must be (B, T) with T in 1 to {most} (grid_size {config.grid_size}) and at least one image; got "
            f"{tuple(indices.shape)}. {remedy or 'Give whole images in rows, or set grid_size.'}"
        )
    if labels.shape != indices.shape[:1]:
        raise ValueError(
            f"labels must be (B,), one class per image, here ({len(indices)},); got {tuple(labels.shape)}. "
            "Use labels.flatten() for a column, torch.full((B,), label) for one class."
        )
    if labels.device != indices.device:
        raise ValueError(f"indices are on {indices.device}, labels on {labels.device}; move them with .to(device)")
    _check_values({"indices": (indices, config.vocabulary_size), "labels": (labels, config.num_classes + 1)})
    return indices, labels


def check_labels(labels: Any, config: SequenceConfig) -> Int[Tensor, " B"]:
    """Classes as int64, of a tensor, an array or a list; ValueError unless a generator can take them."""
    labels = to_indices(labels, "labels")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"labels must be (B,), one class per image and at least one; got {tuple(labels.shape)}. "
            "Use labels.flatten() for a column, torch.full((B,), label) for one class."
        )
    _check_values({"labels": (labels, config.num_classes + 1)})
    return labels


def _check_values(sizes: Mapping[str, tuple[Tensor, int]]) -> None:
    """Raise unless each tensor by that name holds numbers from 0 to below its size."""
    bounds = value_bounds(*(values for values, _ in sizes.values()))
    if bounds is None:
        return
    for (name, (_, size)), low, high in zip(sizes.items(), bounds[::2], bounds[1::2], strict=True):
        remedy = (
            "were they made by another tokenizer? Its codebook_size is the generator's vocabulary"
            if name == "indices"
            else f"{size - 1} is the null class, num_classes is {size - 1}"
        )
        require(0 <= low <= high < size, f"{name} must lie in 0 to {size - 1}; got {low} to {high}; {remedy}.")


def check_positive(config: SequenceConfig, *names: str) -> None:
    """Raise ValueError unless these settings are at least 1."""
    for name in names:
        value = getattr(config, name)
        published = type(config).__dataclass_fields__[name].default
        require(value >= 1, f"{name} must be at least 1; got {value}. Published: {published}.")
