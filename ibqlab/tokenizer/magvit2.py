"""Encoder and decoder of the published Open-MAGVIT2 tokenizer: convolutions alone, and a decoder that looks twice.

What is unusual against VQGAN's in `autoencoder`: there is no attention; residual blocks have no biases; downsampling
pads on all sides; upsampling is a convolution to four times the channels, dealt out over 2 × 2 pixels; and the mean and
spread of each latent channel over the image set scale and shift of a normalisation before every decoder level.
Submodule names are the published ones, so published weights load without a translation table.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.tokenizer.autoencoder import NORM_EPSILON, Level, ResidualBlock, conv3, normalisation
from ibqlab.tokenizer.autoencoder_config import NORM_GROUPS, AutoencoderConfig
from ibqlab.tokenizer.designs import register_design
from ibqlab.tokenizer.group_norm import lies_channels_last, normalise, normalise_per_image


class AdaptiveGroupNorm(nn.Module):
    """γ(s) ⊙ GroupNorm(x) + β(m): each image's latents set scale and shift of its normalised features.

    m and s are mean and spread of each latent channel over the grid, s = √(variance + 10⁻⁶) with the unbiased variance;
    γ and β are learned affine maps from latent channels to feature channels.
    Source: published Open-MAGVIT2 tokenizer code, AdaptiveGroupNorm.
    """

    def __init__(self, latent_channels: int, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(latent_channels, channels)
        self.beta = nn.Linear(latent_channels, channels)

    def forward(
        self, x: Float[Tensor, "B C H W"], latents: Float[Tensor, "B C_latent h w"]
    ) -> Float[Tensor, "B C H W"]:
        """Features normalised and set to the latents' statistics; the grid must have two positions or more."""
        variance, mean = torch.var_mean(latents, dim=(2, 3))  # (B, C_latent), the same for every position of x
        scale, shift = self.gamma((variance + NORM_EPSILON).sqrt()), self.beta(mean)  # (B, C)
        return normalise_per_image(x, scale, shift, NORM_GROUPS, NORM_EPSILON)


class DepthToSpace(nn.Module):
    """Double height and width: a 3 × 3 convolution to four times the channels, each four dealt out over 2 × 2 pixels.

    The convolution's channels are ordered (row, column, channel), not (channel, row, column) as in
    `torch.nn.functional.pixel_shuffle`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3(channels, 4 * channels)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        """Twice the height and width."""
        batch, channels, height, width = x.shape
        dealt = self.conv1(x)
        if lies_channels_last(dealt):
            # Pixel by pixel, so that the result and its gradient lie channels-last as well: one copy each way.
            pixels = dealt.permute(0, 2, 3, 1).view(batch, height, width, 2, 2, channels).transpose(2, 3)
            return pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
        pixels = dealt.view(batch, 2, 2, channels, height, width)  # row and column inside the 2 × 2 first
        pixels = pixels.permute(0, 3, 4, 1, 5, 2)  # (B, C, h, 2, w, 2)
        return pixels.reshape(batch, channels, 2 * height, 2 * width)


class Magvit2Encoder(nn.Module):
    """Images to latents on a grid that is `config.downsampling` times smaller.

    Args:
        config: the architecture; 49,751,442 parameters as published for 256 pixels.
    Source: published Open-MAGVIT2 tokenizer configuration.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, blocks = config.level_channels, config.num_res_blocks
        self.conv_in = conv3(config.in_channels, config.base_channels, bias=False)
        self.down = nn.ModuleList()
        for number, inputs in enumerate((config.base_channels, *channels[:-1])):
            level, width = Level(config, number, inputs, blocks), channels[number]
            is_last = number == len(channels) - 1
            level.downsample = nn.Identity() if is_last else nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.down.append(level)
        self.mid_block = _middle(channels[-1], blocks)
        self.norm_out = normalisation(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.encoder_channels, 1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C_latent h w"]:
        """Latents as the quantizer takes them; H and W must be multiples of the downsampling."""
        x = self.conv_in(images)
        for level in self.down:
            x = level.downsample(level(x))
        return self.conv_out(normalise(self.norm_out, self.mid_block(x), swish=True)[0])


class Magvit2Decoder(nn.Module):
    """Latents to images; the output is not clamped, so values may leave [−1, 1].

    `up` and `adaptive` count levels as the encoder's `down` does: up[0] works at full resolution and runs last. The
    design "magvit2_plain" has no `adaptive`.

    Args:
        config: the architecture; 65,376,387 parameters as published for 256 pixels.
    Source: published Open-MAGVIT2 tokenizer configuration.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, blocks = config.level_channels, config.num_res_blocks
        self.conv_in = conv3(config.latent_channels, channels[-1])
        self.mid_block = _middle(channels[-1], blocks)
        self.up, self.adaptive = nn.ModuleList(), nn.ModuleList()
        for number, inputs in enumerate((*channels[1:], channels[-1])):
            level = Level(config, number, inputs, blocks)
            level.upsample = DepthToSpace(channels[number]) if number else nn.Identity()
            self.up.append(level)
            if config.design == "magvit2":
                self.adaptive.append(AdaptiveGroupNorm(config.latent_channels, inputs))
        self.norm_out = normalisation(channels[0])
        self.conv_out = conv3(channels[0], config.out_channels)

    def forward(self, latents: Float[Tensor, "B C_latent h w"]) -> Float[Tensor, "B C H W"]:
        """Images from latents of `latent_channels` channels.

        Raises:
            ValueError: a grid of a single position, over which a latent channel has no spread.
        """
        height, width = latents.shape[-2:]
        require(
            height * width > 1 or not self.adaptive,
            'the design "magvit2" normalises by the spread of the latents over the grid, which must have at least 2 '
            f'positions; got {height} × {width}. Use larger images, fewer channel_multipliers, or the design "vqgan".',
        )
        x = self.mid_block(self.conv_in(latents))
        for number in reversed(range(len(self.up))):
            if self.adaptive:
                x = self.adaptive[number](x, latents)
            x = self.up[number].upsample(self.up[number](x))
        return self.conv_out(normalise(self.norm_out, x, swish=True)[0])

    @property
    def last_layer(self) -> Float[Tensor, "C_out C 3 3"]:
        """Weight of the last convolution, where adaptive loss weights compare gradients."""
        return self.conv_out.weight


register_design("magvit2", AutoencoderConfig, Magvit2Encoder, Magvit2Decoder, convolutions=False)
register_design("magvit2_plain", AutoencoderConfig, Magvit2Encoder, Magvit2Decoder, convolutions=False)


def _middle(channels: int, blocks: int) -> nn.Sequential:
    """Residual blocks at the lowest resolution."""
    return nn.Sequential(*(ResidualBlock(channels, channels, bias=False) for _ in range(blocks)))
