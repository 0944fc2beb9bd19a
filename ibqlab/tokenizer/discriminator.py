"""PatchGAN: a small convolutional network that calls every patch of an image real or made up.

Submodule names are the published ones (`main.0` … `main.11` for three layers), so published weights load as they are.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.base.checks import require

WIDEST = 8
"""The widest layer has this many times base_channels."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Width and depth of the discriminator. The defaults are the published configuration."""

    base_channels: int = 64
    """Channels of the first layer, ≥ 1. Published: 64."""
    num_layers: int = 3
    """Layers that halve the image, ≥ 1; one layer at stride 1 follows them. Published: 3."""

    def __post_init__(self):
        require(self.base_channels >= 1, f"base_channels must be at least 1, got {self.base_channels}; published: 64")
        require(self.num_layers >= 1, f"num_layers must be at least 1, got {self.num_layers}; published: 3")

    @property
    def smallest_image(self) -> int:
        """Height or width, in pixels, below which no patch is left."""
        # Two 4 × 4 convolutions at stride 1 take a pixel each; every layer before them halves.
        return 3 * 2**self.num_layers


class PatchDiscriminator(nn.Module):
    """Images to one logit per patch, high where the patch looks real; 256 × 256 pixels give 30 × 30 logits.

    In training mode every call moves the running statistics of the batch norms, and the batch's own are used.
    Weights start as published: convolutions N(0, 0.02), norms N(1, 0.02), their shifts 0, biases PyTorch's default.

    Args:
        config: the architecture; 2,765,633 parameters as published.
        in_channels: of an image.
    Source: pix2pix (Isola et al., 2017); published NLayerDiscriminator.
    """

    def __init__(self, config: DiscriminatorConfig, in_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        widths = [config.base_channels * min(2**layer, WIDEST) for layer in range(config.num_layers + 1)]
        layers: list[nn.Module] = [_conv(in_channels, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for layer in range(1, config.num_layers + 1):
            stride = 2 if layer < config.num_layers else 1
            layers += [
                _conv(widths[layer - 1], widths[layer], stride=stride, bias=False),
                nn.BatchNorm2d(widths[layer]),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, _conv(widths[-1], 1, stride=1))
        self.apply(_start)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 h w"]:
        """One logit per patch."""
        return self.main(images)

    def check_size(self, height: int, width: int) -> None:
        """Refuse an image size, in pixels, that leaves no patch to judge.

        Raises:
            ValueError: too small.
        """
        smallest = self.config.smallest_image
        if min(height, width) < smallest:
            raise ValueError(
                f"the discriminator's {self.config.num_layers} layers need images of at least {smallest} × {smallest} "
                f"pixels, got {height} × {width}; lower loss.discriminator.num_layers"
            )


def _conv(in_channels: int, out_channels: int, *, stride: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=bias)


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
