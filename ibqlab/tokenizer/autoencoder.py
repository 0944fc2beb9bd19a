"""Encoder and decoder of the published IBQ tokenizer (those of VQGAN), fully convolutional.

What is unusual: attention is placed by *nominal* resolution, the one in the config, not by the size of the image at
hand; downsampling pads on the right and below only; the decoder has one block more per level than the encoder.
Submodule names are the published ones, so published weights load without a translation table. The other designs of
`AutoencoderConfig` stand in `magvit2` and `maskgit`. Shape letters: B images · C channels · H W image · h w latent
grid.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.tokenizer.autoencoder_config import NORM_GROUPS, AutoencoderConfig
from ibqlab.tokenizer.designs import register_design
from ibqlab.tokenizer.group_norm import normalise
from ibqlab.tokenizer.vision_transformer import TransformerBlock

NORM_EPSILON = 1e-6


class ResidualBlock(nn.Module):
    """x + conv(dropout(swish(norm(conv(swish(norm(x))))))), with a 1 × 1 convolution on x where the channels change.

    Source: published IBQ tokenizer code, ResnetBlock; Open-MAGVIT2's convolutions have no bias.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.norm1 = normalisation(in_channels)
        self.conv1 = conv3(in_channels, out_channels, bias)
        self.norm2 = normalisation(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3(out_channels, out_channels, bias)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H W"]:
        """Input plus what two normalised convolutions add to it."""
        normed, x = normalise(self.norm1, x, swish=True)
        normed, _ = normalise(self.norm2, self.conv1(normed), swish=True)
        return self.nin_shortcut(x) + self.conv2(self.dropout(normed))


class AttentionBlock(nn.Module):
    """x + proj(softmax(qᵀk / √C) v), one head over all positions.

    Cost: O((HW)²·C) operations; the memory of the fused kernel grows with HW, not with its square.
    Source: published IBQ tokenizer code, AttnBlock.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalisation(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Input plus what every position takes from all others."""
        normed, x = normalise(self.norm, x, swish=False)
        # Contiguous: with channels apart, no fused kernel applies and the whole HW × HW matrix would be kept.
        q, k, v = (
            layer(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for layer in (self.q, self.k, self.v)
        )  # (B, 1, HW, C): one head
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Halve height and width: 3 × 3 convolution with stride 2, zeros added on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """Half the height and width."""
        # Windows begin at even pixels, as published; zeros on all sides would move every one of them by a pixel.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: each pixel repeated, then a 3 × 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        """Twice the height and width."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it.

    Args:
        config: of encoder and decoder.
        number: of the level, 0 at full resolution.
        in_channels: of what comes in.
        blocks: residual blocks, at least 1.
    """

    def __init__(self, config: AutoencoderConfig, number: int, in_channels: int, blocks: int) -> None:
        super().__init__()
        out_channels, bias = config.level_channels[number], config.design == "vqgan"
        attention = config.level_resolutions[number] in config.attention_resolutions
        inputs = (in_channels,) + (out_channels,) * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(channels, out_channels, config.dropout, bias) for channels in inputs)
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in inputs if attention)

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H W"]:
        """Every block, each followed by its attention where the level has it."""
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution, whatever `attention_resolutions` says.

    Without attention where `middle_attention` is False.
    """

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        dropout = config.dropout
        self.block_1 = ResidualBlock(channels, channels, dropout)
        self.attn_1 = AttentionBlock(channels) if config.middle_attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, dropout)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Block, attention, block."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images to latents on a grid that is `config.downsampling` times smaller.

    Args:
        config: the architecture; 46,752,256 parameters as published.
    Source: published IBQ tokenizer configuration.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = conv3(config.in_channels, config.base_channels)
        self.down = nn.ModuleList()
        for number, inputs in enumerate((config.base_channels, *channels[:-1])):
            level = Level(config, number, inputs, config.num_res_blocks)
            level.downsample = Downsample(channels[number]) if number < len(channels) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = Middle(channels[-1], config)
        self.norm_out = normalisation(channels[-1])
        self.conv_out = conv3(channels[-1], config.encoder_channels)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C_latent h w"]:
        """Latents before the 1 × 1 convolution to the code dimension; H and W must be multiples of the downsampling."""
        x = self.conv_in(images)
        for level in self.down:
            x = level.downsample(level(x))
        return self.conv_out(normalise(self.norm_out, self.mid(x), swish=True)[0])


class Decoder(nn.Module):
    """Latents to images; the output is not clamped, so values may leave [−1, 1].

    `up` counts levels as the encoder's `down` does: up[0] works at full resolution and runs last.

    Args:
        config: the architecture; 59,903,875 parameters as published.
    Source: published IBQ tokenizer configuration.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = conv3(config.latent_channels, channels[-1])
        self.mid = Middle(channels[-1], config)
        self.up = nn.ModuleList()
        # Built in the encoder's order, run from the last to the first.
        for number, inputs in enumerate((*channels[1:], channels[-1])):
            level = Level(config, number, inputs, config.num_res_blocks + 1)
            level.upsample = Upsample(channels[number]) if number else nn.Identity()
            self.up.append(level)
        self.norm_out = normalisation(channels[0])
        self.conv_out = conv3(channels[0], config.out_channels)

    def forward(self, latents: Float[Tensor, "B C_latent h w"]) -> Float[Tensor, "B C H W"]:
        """Images from latents of `latent_channels` channels, any grid size."""
        x = self.mid(self.conv_in(latents))
        for number in reversed(range(len(self.up))):
            x = self.up[number].upsample(self.up[number](x))
        return self.conv_out(normalise(self.norm_out, x, swish=True)[0])

    @property
    def last_layer(self) -> Float[Tensor, "C_out C 3 3"]:
        """Weight of the last convolution, where adaptive loss weights compare gradients."""
        return self.conv_out.weight


register_design("vqgan", AutoencoderConfig, Encoder, Decoder)


def normalisation(channels: int) -> nn.GroupNorm:
    """Group normalisation as all designs have it: 32 groups, ε = 10⁻⁶, a learned scale and shift per channel."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPSILON)


def conv3(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    """A 3 × 3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def find_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Residual, attention and transformer blocks in the modules' order; their activations may be computed again."""
    blocks = (ResidualBlock, AttentionBlock, TransformerBlock)
    return (module for module in network.modules() if isinstance(module, blocks))
