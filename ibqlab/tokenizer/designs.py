"""Known pairs of encoder and decoder, each under the name that settings write as `design`.

A design is a class of settings and two modules made of them. Whoever brings one of their own registers it here, as a
plugin does, and names it in the settings of their family (`ibqlab.pretrained.register_family`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ibqlab.base.checks import require, require_choice


class Design(NamedTuple):
    """What belongs to a design's name."""

    config: type
    """Class of its settings; see `register_design`."""
    encoder: Callable[[Any], nn.Module]
    """Settings → encoder: images (B, C, H, W) in [−1, 1] → latents (B, encoder_channels, h, w)."""
    decoder: Callable[[Any], nn.Module]
    """Settings → decoder: latents (B, latent_channels, h, w) → images, nominally in [−1, 1]; `last_layer` is the weight
    of its last layer."""
    convolutions: bool
    """Whether 1 × 1 convolutions stand between latents and codes; without them latent_channels is code_dim."""
    grid: bool = True
    """Whether token (r, c) stands for the image around there; without a grid an image is one row of T tokens."""


DEFAULT = "vqgan"
_DESIGNS: dict[str, Design] = {}


def register_design(
    name: str,
    config: type,
    encoder: Callable[[Any], nn.Module],
    decoder: Callable[[Any], nn.Module],
    *,
    convolutions: bool = True,
    grid: bool = True,
) -> None:
    """Make a pair of encoder and decoder known to `TokenizerConfig` and recipes.

    Args:
        name: what settings write as `design`.
        config: `AutoencoderConfig`, or a frozen keyword-only dataclass with a field `design` (default: the name), the
            fields or properties in_channels, out_channels, latent_channels, encoder_channels, resolution (pixels along
            one side) and downsampling, and a method latent_grid(height, width) → rows and columns of tokens.
        encoder, decoder: make a module of such settings; see `Design`.
        convolutions, grid: see `Design`.
    Raises:
        ValueError: another pair has the name, or the settings lack what every design has.
    """
    design = Design(config, encoder, decoder, convolutions, grid)
    known = _DESIGNS.get(name, design)
    same = known.encoder.__qualname__ == encoder.__qualname__ and not known.encoder.__module__.startswith("ibqlab.")
    require(same or known == design, f"a design named {name!r} exists already: {known.encoder!r}; choose another name")
    wanted = ("in_channels", "out_channels", "latent_channels", "encoder_channels", "resolution", "downsampling")
    fields = getattr(config, "__dataclass_fields__", {})
    missing = [word for word in (*wanted, "design", "latent_grid") if word not in fields and not hasattr(config, word)]
    require(not missing, f"{name!r}: the settings {config.__name__} must have {', '.join(missing)}")
    _DESIGNS[name] = design


def all_designs() -> dict[str, Design]:
    """All of them by name; a copy."""
    return dict(_DESIGNS)


def replace_designs(designs: Mapping[str, Design]) -> None:
    """Put others in place of all that are registered, as when a file of the user's is read in another version."""
    _DESIGNS.clear()
    _DESIGNS.update(designs)


def find_design(name: str) -> Design:
    """A design by its name. ValueError for an unknown one; the message names the nearest."""
    require_choice("design", name, _DESIGNS)
    return _DESIGNS[name]


def available_designs(config: type | None = None) -> list[str]:
    """Names of designs, sorted; those with a class of settings, where one is given."""
    return sorted(name for name, design in _DESIGNS.items() if config in (None, design.config))


class AsDesign:
    """Beside an annotation: settings are read as the class of the design that they name, "vqgan" unless they do."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: Callable) -> Any:
        """A check that reads {"design": …, setting: value, …}."""
        from pydantic_core import core_schema  # noqa: PLC0415 - only configuration checking needs it

        return core_schema.no_info_plain_validator_function(design_config)


def design_config(settings: Any) -> Any:
    """The settings of an encoder and a decoder from `{"design": …, setting: value, …}`; configs pass unchanged.

    Raises:
        ValueError: an unknown design or key, a wrong type, an impossible value; the message names the nearest.
    """
    if any(isinstance(settings, design.config) for design in _DESIGNS.values()):
        return settings
    from ibqlab import config  # noqa: PLC0415 - it needs pydantic, a plain tokenizer does not

    name = settings.get("design", DEFAULT) if isinstance(settings, dict) else DEFAULT
    name = name if isinstance(name, str) else DEFAULT  # whose check tells of the type
    return config.parse(find_design(name).config, settings, source="autoencoder")
