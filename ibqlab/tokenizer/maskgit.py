"""Encoder and decoder of the published MaskGIT tokenizer, and of MaskBit's and VQGAN+, which differ in one layer.

What is unusual against VQGAN's in `autoencoder`: there is no attention; convolutions of residual blocks have no biases;
a block that changes the number of channels adds a map of its own result to that result, not of its input; the decoder
has as many blocks per level as the encoder; and inside, images are in [0, 1]. "maskgit" halves its size by averaging
2 × 2 pixels, "maskbit" by a convolution.
"""

from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.tokenizer.autoencoder import Downsample, ResidualBlock, Upsample, conv3, normalisation
from ibqlab.tokenizer.autoencoder_config import AutoencoderConfig
from ibqlab.tokenizer.designs import register_design
from ibqlab.tokenizer.group_norm import normalise


class OwnResultBlock(ResidualBlock):
    """x + h with h = conv(swish(norm(conv(swish(norm(x)))))); h + W h, without x, where the channels change.

    Source: published 1d-tokenizer code (modeling/modules/maskgit_vqgan), after MaskGIT's own; W is 1 × 1.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.keeps_input = in_channels == out_channels

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H W"]:
        """What two normalised convolutions give, and the input or a map of that."""
        normed, x = normalise(self.norm1, x, swish=True)
        normed, _ = normalise(self.norm2, self.conv1(normed), swish=True)
        result = self.conv2(normed)
        # As published: an ordinary block would map its input here, and W has as many input channels as output channels.
        return result + (x if self.keeps_input else self.nin_shortcut(result))


class MaskgitEncoder(nn.Module):
    """Images to latents on a grid that is `config.downsampling` times smaller.

    Args:
        config: the architecture; 23,775,104 parameters as published by MaskGIT, 25,126,286 with MaskBit's 14 bits.
    Source: published 1d-tokenizer code (maskgit_vqgan, Encoder); published MaskBit code (ConvEncoder).
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, blocks = config.level_channels, config.num_res_blocks
        self.conv_in = conv3(config.in_channels, config.base_channels, bias=False)
        self.down = nn.ModuleList()
        for number, inputs in enumerate((config.base_channels, *channels[:-1])):
            level = _level(inputs, channels[number], blocks)
            halve = nn.AvgPool2d(2) if config.design == "maskgit" else Downsample(channels[number])
            level.downsample = halve if number < len(channels) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = _blocks(channels[-1], channels[-1], blocks)
        self.norm_out = normalisation(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], config.encoder_channels, 1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C_latent h w"]:
        """Latents as the quantizer takes them; H and W must be multiples of the downsampling."""
        x = self.conv_in((images + 1) / 2)  # published weights expect [0, 1]
        for level in self.down:
            x = level.downsample(level.block(x))
        return self.conv_out(normalise(self.norm_out, self.mid(x), swish=True)[0])


class MaskgitDecoder(nn.Module):
    """Latents to images; the output is not clamped, so values may leave [−1, 1].

    `up` counts levels as the encoder's `down` does: up[0] works at full resolution and runs last.

    Args:
        config: the architecture; 30,478,339 parameters as published by MaskGIT, 29,363,203 with MaskBit's 14 bits.
    Source: published 1d-tokenizer code (maskgit_vqgan, Decoder), which clamps its images; published MaskBit code.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, blocks = config.level_channels, config.num_res_blocks
        self.conv_in = conv3(config.latent_channels, channels[-1])
        self.mid = _blocks(channels[-1], channels[-1], blocks)
        self.up = nn.ModuleList()
        for number, inputs in enumerate((*channels[1:], channels[-1])):
            level = _level(inputs, channels[number], blocks)
            level.upsample = Upsample(channels[number]) if number else nn.Identity()
            self.up.append(level)
        self.norm_out = normalisation(channels[0])
        self.conv_out = conv3(channels[0], config.out_channels)

    def forward(self, latents: Float[Tensor, "B C_latent h w"]) -> Float[Tensor, "B C H W"]:
        """Images from latents of `latent_channels` channels, any grid size."""
        x = self.mid(self.conv_in(latents))
        for number in reversed(range(len(self.up))):
            x = self.up[number].upsample(self.up[number].block(x))
        return 2 * self.conv_out(normalise(self.norm_out, x, swish=True)[0]) - 1

    @property
    def last_layer(self) -> Float[Tensor, "C_out C 3 3"]:
        """Weight of the last convolution, where adaptive loss weights compare gradients."""
        return self.conv_out.weight


register_design("maskgit", AutoencoderConfig, MaskgitEncoder, MaskgitDecoder, convolutions=False)
register_design("maskbit", AutoencoderConfig, MaskgitEncoder, MaskgitDecoder, convolutions=False)


def _level(in_channels: int, out_channels: int, blocks: int) -> nn.Module:
    """A module that holds the blocks of one resolution; the caller adds what changes the resolution."""
    level = nn.Module()
    level.block = _blocks(in_channels, out_channels, blocks)
    return level


def _blocks(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    """Residual blocks one behind the other, the first of which changes the channels."""
    inputs = (in_channels,) + (out_channels,) * (blocks - 1)
    return nn.Sequential(*(OwnResultBlock(channels, out_channels) for channels in inputs))
