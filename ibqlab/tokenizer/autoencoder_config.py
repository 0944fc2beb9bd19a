"""Settings of a convolutional encoder and decoder: one of the published designs, its width, depth and attention."""

from dataclasses import dataclass

from ibqlab.base.checks import BLOCKS, CHANNELS, IMAGE_SIDE, require, require_at_most, require_choice
from ibqlab.tokenizer.designs import available_designs

NORM_GROUPS = 32
"""Groups of every normalisation, so that channels come in multiples of 32."""
MOST_LEVELS = IMAGE_SIDE.bit_length()
"""Levels that leave a single position of the largest image."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Width, depth and attention of encoder and decoder. The defaults are IBQ's published configuration."""

    design: str = "vqgan"
    """"vqgan", as published by IBQ, or one without attention, dropout and convolutions around the quantizer:
    "magvit2", as published by Open-MAGVIT2, whose decoder normalises by statistics of the latents; "magvit2_plain",
    which does not, as published by SimVQ; "maskgit", as published by MaskGIT; or "maskbit", which downsamples by
    convolutions, as published by MaskBit and VQGAN+."""

    base_channels: int = 128
    """Channels at full resolution; every level's channels must be a multiple of 32. Paper: 128."""

    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level as multiples of base_channels, full resolution first. Each level after the first halves
    height and width, so five levels downsample by 16. Paper: 1, 1, 2, 2, 4."""

    num_res_blocks: int = 4
    """Residual blocks per encoder level, at least 1. The decoder has one more in "vqgan", and as many in the other
    designs, whose middle has as many, too. Paper: 4; MaskGIT and MaskBit: 2."""

    attention_resolutions: tuple[int, ...] = (16,)
    """Nominal resolutions, in pixels, of the levels with attention after each block; () for attention in the middle
    only, and for the other designs. Paper: 16."""

    middle_attention: bool = True
    """Whether the middle has attention in the design "vqgan". Paper: True; latent-diffusion's vq-f4-noattn: False."""

    resolution: int = 256
    """Nominal image size in pixels: it places the attention and limits nothing, any divisible size can be encoded.
    Paper: 256."""

    in_channels: int = 3
    """Channels of an image. Paper: 3."""

    out_channels: int = 3
    """Channels of a reconstruction. Paper: 3."""

    latent_channels: int = 256
    """Channels between encoder and quantizer, before the 1 × 1 convolution to code_dim; equal to code_dim in designs
    without such a convolution. Paper: 256 (z_channels); Open-MAGVIT2: 18; MaskGIT: 256; MaskBit: 10 to 18."""

    double_latent: bool = False
    """The encoder gives twice latent_channels, as one with a mean and a variance would. Paper: False."""

    dropout: float = 0.0
    """Share of activations dropped in each residual block in training, 0 to below 1. Paper: 0."""

    def __post_init__(self) -> None:
        require_choice("design", self.design, available_designs(AutoencoderConfig))
        absent = {"attention_resolutions": (), "middle_attention": True, "double_latent": False, "dropout": 0.0}
        for name, value in absent.items() if self.design != "vqgan" else ():
            setting = getattr(self, name)
            require(
                setting == value,
                f'{name} must be {value!r} in the design "{self.design}", which has none; got {setting!r}.',
            )
        _check_positive(self)
        _check_channels(self.base_channels, self.channel_multipliers)
        _check_resolutions(self)
        require(0 <= self.dropout < 1, f"dropout must lie in 0 to below 1; got {self.dropout}. Use 0.0 as published.")

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position along each side: 2 to the number of levels less one."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        """Nominal resolution of each level in pixels, full resolution first."""
        return tuple(self.resolution // 2**level for level in range(len(self.channel_multipliers)))

    @property
    def encoder_channels(self) -> int:
        """Channels that the encoder gives."""
        return self.latent_channels * (2 if self.double_latent else 1)

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an image of that size in pixels.

        Raises:
            ValueError: the downsampling does not divide the size; the message gives the nearest sizes.
        """
        factor = self.downsampling
        if height < 1 or width < 1 or height % factor or width % factor:
            raise ValueError(
                f"image height and width must be multiples of the downsampling {factor}; got {height} × {width} "
                f"pixels. Resize or crop to a height of {_near_sizes(height, factor)} and a width of "
                f"{_near_sizes(width, factor)}."
            )
        return height // factor, width // factor


def _near_sizes(size: int, factor: int) -> str:
    below = size // factor * factor
    if size == below and size:
        return f"{size}"
    return f"{below} or {below + factor}" if below else f"{factor}"


def _check_positive(config: AutoencoderConfig) -> None:
    for name in ("base_channels", "num_res_blocks", "resolution", "in_channels", "out_channels", "latent_channels"):
        value, published = getattr(config, name), AutoencoderConfig.__dataclass_fields__[name].default
        require(value >= 1, f"{name} must be at least 1; got {value}. Published: {published}.")
    require_at_most("num_res_blocks", config.num_res_blocks, BLOCKS)
    require_at_most("resolution", config.resolution, IMAGE_SIDE)
    require_at_most("channel_multipliers' levels", len(config.channel_multipliers), MOST_LEVELS)
    for name in ("base_channels", "in_channels", "out_channels", "latent_channels"):
        require_at_most(name, getattr(config, name), CHANNELS)
    for level, channels in enumerate(config.level_channels):
        require_at_most(f"base_channels × channel_multipliers[{level}]", channels, CHANNELS)


def _check_channels(base_channels: int, multipliers: tuple[int, ...]) -> None:
    if not multipliers:
        raise ValueError("channel_multipliers must name at least one level; got (). Use (1, 2, 2) to downsample by 4.")
    widths = {"base_channels": base_channels}
    widths |= {f"base_channels × channel_multipliers[{i}]": base_channels * m for i, m in enumerate(multipliers)}
    for name, channels in widths.items():
        if channels < 1 or channels % NORM_GROUPS:
            raise ValueError(
                f"{name} must be a positive multiple of {NORM_GROUPS}, the groups of each normalisation; got "
                f"{channels} (base_channels={base_channels}, channel_multipliers={multipliers}). "
                f"Use base_channels={_nearest_multiple(base_channels, NORM_GROUPS)} and multipliers of at least 1."
            )


def _check_resolutions(config: AutoencoderConfig) -> None:
    factor = config.downsampling
    if config.resolution % factor:
        raise ValueError(
            f"resolution must be a multiple of {factor}, because {len(config.channel_multipliers)} levels downsample "
            f"by {factor}; got {config.resolution}. "
            f"Use resolution={_nearest_multiple(config.resolution, factor)} or fewer channel_multipliers."
        )
    without_level = [size for size in config.attention_resolutions if size not in config.level_resolutions]
    if without_level:
        levels = ", ".join(map(str, config.level_resolutions))
        raise ValueError(
            f"attention_resolutions must be nominal resolutions of levels ({levels}); got {without_level[0]}. "
            f"Use one of those, attention_resolutions=() for none, or another resolution than {config.resolution}."
        )


def _nearest_multiple(value: int, factor: int) -> int:
    return max(1, round(value / factor)) * factor
