"""Settings of TiTok: two vision transformers with a fixed number of tokens between them, which lie on no grid."""

from dataclasses import dataclass

from ibqlab.base.checks import BLOCKS, CHANNELS, IMAGE_SIDE, require, require_at_most
from ibqlab.tokenizer.autoencoder_config import AutoencoderConfig

PIXEL_DESIGN = "maskgit"
"""Design of the decoder that draws an image from a grid of pixel codes."""
MOST_TOKENS = 4096
"""Bound of tokens and of patches, whose attention grows with the square of both together."""


@dataclass(frozen=True, kw_only=True)
class TitokConfig:
    """Sizes of encoder and decoder. The defaults are the published TiTok-BL-64 with 8,192 codes, 390,016,148 numbers.

    Source: fact sheet of the published systems §5.2; TiTok §3.
    """

    design: str = "titok"
    """The name of this design."""

    resolution: int = 256
    """Height and width of every image in pixels; no other size can be encoded. Published: 256."""

    patch: int = 16
    """Height and width of a patch in pixels, of encoder and decoder alike; divides the resolution. Published: 16."""

    tokens: int = 64
    """T, tokens of an image. Published: 32, 64, 128, 256."""

    encoder_width: int = 768
    """Channels of the encoder's tokens, a multiple of encoder_heads. Published: S 512, B 768, L 1024."""

    encoder_layers: int = 12
    """Blocks of the encoder, at least 1. Published: S 8, B 12, L 24."""

    encoder_heads: int = 12
    """Attention heads of the encoder. Published: width / 64, that is S 8, B 12, L 16."""

    decoder_width: int = 1024
    """Channels of the decoder's tokens, a multiple of decoder_heads. Published: S 512, B 768, L 1024."""

    decoder_layers: int = 24
    """Blocks of the decoder, at least 1. Published: S 8, B 12, L 24."""

    decoder_heads: int = 16
    """Attention heads of the decoder. Published: width / 64, that is S 8, B 12, L 16."""

    latent_channels: int = 64
    """D, the dimension of a token between encoder and decoder, equal to code_dim. Published: 64, and 12 in the files
    that predict pixel codes."""

    mixed_latents: bool = False
    """Read the encoder's (T, W) tokens as (W, T) in memory order before the last layer, which mixes tokens and
    channels. A mistake that the published L-32, B-64 and S-128 were trained with. Published: True in those files."""

    pixel_codes: int = 0
    """Codes that the decoder predicts for each patch, of which pixel_decoder draws the image; 0: the decoder predicts
    the pixels themselves. Published: 1,024 in L-32, B-64 and S-128, else 0."""

    pixel_decoder: AutoencoderConfig | None = None
    """The decoder behind the pixel codes, of the design "maskgit"; its latent_channels are the dimension of a pixel
    code. None where pixel_codes is 0."""

    in_channels: int = 3
    """Channels of an image. Published: 3."""

    out_channels: int = 3
    """Channels of a reconstruction. Published: 3."""

    def __post_init__(self) -> None:
        require(self.design == "titok", f'design must be "titok" in TitokConfig; got {self.design!r}.')
        sizes = ("resolution", "patch", "tokens", "encoder_width", "encoder_layers", "encoder_heads", "decoder_width")
        sizes += ("decoder_layers", "decoder_heads", "latent_channels", "in_channels", "out_channels")
        for name in sizes:
            value, published = getattr(self, name), TitokConfig.__dataclass_fields__[name].default
            require(value >= 1, f"{name} must be at least 1; got {value}. Published: {published}.")
        self._check_bounds()
        require(
            self.resolution % self.patch == 0,
            f"patch must divide the resolution {self.resolution}; got {self.patch}. Use patch=16 and resolution=256.",
        )
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            require(
                width % heads == 0,
                f"{part}_width must be a multiple of {part}_heads; got {width} and {heads}. Use {part}_heads=1, or "
                f"{part}_width={heads * max(1, round(width / heads))}.",
            )
        self._check_pixel_codes()

    @property
    def downsampling(self) -> int:
        """Image pixels along each side of a patch. It places no token: use `latent_grid` to count tokens."""
        return self.patch

    @property
    def patches(self) -> int:
        """Patches along each side of the image."""
        return self.resolution // self.patch

    @property
    def encoder_channels(self) -> int:
        """Channels that the encoder gives."""
        return self.latent_channels

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """(1, T): one row of tokens, whose order is no place in the image.

        Raises:
            ValueError: another image size than the resolution.
        """
        side = self.resolution
        require(
            height == width == side,
            f"TiTok's images must be {side} × {side} pixels, the size it was trained with; got {height} × {width}. "
            f"Resize and crop them to {side} × {side} (data.image_size={side}).",
        )
        return 1, self.tokens

    def _check_bounds(self) -> None:
        require_at_most("resolution", self.resolution, IMAGE_SIDE)
        require_at_most("tokens", self.tokens, MOST_TOKENS)
        require_at_most("(resolution / patch)²", (self.resolution // self.patch) ** 2, MOST_TOKENS, "so many patches")
        for name in ("encoder_layers", "decoder_layers"):
            require_at_most(name, getattr(self, name), BLOCKS)
        for name in ("encoder_width", "decoder_width", "latent_channels", "in_channels", "out_channels"):
            require_at_most(name, getattr(self, name), CHANNELS)
        require_at_most("pixel_codes", self.pixel_codes, CHANNELS)

    def _check_pixel_codes(self) -> None:
        decoder = self.pixel_decoder
        require(self.pixel_codes >= 0, f"pixel_codes must be ≥ 0; got {self.pixel_codes}. Use 0 for pixels.")
        if decoder is None:
            require(
                self.pixel_codes == 0,
                f"pixel_codes={self.pixel_codes} needs a decoder that draws the image of them. Set pixel_decoder to "
                'settings of the design "maskgit", or pixel_codes=0.',
            )
            return
        require(
            self.pixel_codes >= 1,
            "pixel_decoder draws the image of pixel codes; got pixel_codes=0. Use pixel_codes=1024 as published, or "
            "leave pixel_decoder out.",
        )
        require(
            decoder.design == PIXEL_DESIGN,
            f'pixel_decoder must have the design "{PIXEL_DESIGN}"; got "{decoder.design}". Set '
            f"pixel_decoder.design={PIXEL_DESIGN}.",
        )
        require(
            decoder.out_channels == self.out_channels,
            f"pixel_decoder.out_channels must equal out_channels; got {decoder.out_channels} and {self.out_channels}.",
        )
