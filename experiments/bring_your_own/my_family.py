"""Checkpoints of a model of your own, opened by everything here: its names, its settings, its encoder and decoder.

ibqlab inspect mine.pt --plugin experiments/bring_your_own/my_family.py

The model is `torch.nn.Sequential` twice around a parameter `codebook` (K, D), saved as `model.state_dict()`:

    encoder.0 (4 × 4 convolution, stride 2), encoder.2 (3 × 3)
    decoder.0 (4 × 4 convolution, transposed, stride 2), decoder.2 (3 × 3)
"""

from dataclasses import dataclass

from torch import nn

from ibqlab.pretrained import Facts, Family, register_family
from ibqlab.quantizers import quantizer_config
from ibqlab.tokenizer import TokenizerConfig, register_design


@dataclass(frozen=True, kw_only=True)
class SmallConfig:
    """Settings of the two networks."""

    design: str = "my_vqvae"
    width: int = 32
    """Channels inside."""
    latent_channels: int = 16
    """D, numbers per code."""
    in_channels: int = 3
    out_channels: int = 3
    resolution: int = 32
    """Pixels along one side of the training images."""
    downsampling: int = 2
    """Pixels per token along one side."""

    @property
    def encoder_channels(self) -> int:
        """Channels that the encoder gives."""
        return self.latent_channels

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens."""
        if height % 2 or width % 2:
            raise ValueError(f"image height and width must be even; got {height} × {width} pixels. Crop the image")
        return height // 2, width // 2


class SmallEncoder(nn.Sequential):
    """Images (B, 3, H, W) → features (B, D, H/2, W/2)."""

    def __init__(self, config: SmallConfig) -> None:
        last = nn.Conv2d(config.width, config.latent_channels, 3, 1, 1)
        super().__init__(nn.Conv2d(config.in_channels, config.width, 4, 2, 1), nn.ReLU(), last)


class SmallDecoder(nn.Sequential):
    """Codes (B, D, h, w) → images (B, 3, 2h, 2w)."""

    def __init__(self, config: SmallConfig) -> None:
        last = nn.Conv2d(config.width, config.out_channels, 3, 1, 1)
        super().__init__(nn.ConvTranspose2d(config.latent_channels, config.width, 4, 2, 1), nn.ReLU(), last)

    @property
    def last_layer(self) -> nn.Parameter:
        """Where an adversarial loss compares gradients."""
        return self[2].weight


register_design("my_vqvae", SmallConfig, SmallEncoder, SmallDecoder, convolutions=False)


@register_family("my_vqvae")
class SmallFamily(Family):
    """One parameter is called otherwise here than there."""

    title = "a VQ-VAE of mine"
    marks = (r"codebook$", r"encoder\.0\.weight$", r"decoder\.0\.weight$")
    names = ((r"^codebook$", "quantizer.codes.weight"),)

    def infer(self, shapes: dict[str, tuple[int, ...]], facts: Facts) -> TokenizerConfig:
        """Everything is told by two shapes."""
        size, dim = shapes["quantizer.codes.weight"]
        width = shapes["encoder.0.weight"][0]
        return TokenizerConfig(
            autoencoder=SmallConfig(width=width, latent_channels=dim),
            quantizer=quantizer_config({"name": "vq", "codebook_size": size, "code_dim": dim}),
        )
