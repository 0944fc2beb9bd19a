"""The whole tokenizer: image → encoder → quantizer → decoder → image.

tok = Tokenizer.from_config(TokenizerConfig())
indices = tok.encode(picture).indices          # (1, h, w)
again = tok.decode_indices(indices)            # (1, 3, H, W), nominally in [−1, 1]
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.quantizers import IndexBackpropQuantizerConfig, QuantizerConfig, QuantizerOutput, make_quantizer
from ibqlab.tokenizer.autoencoder_config import AutoencoderConfig
from ibqlab.tokenizer.designs import AsDesign, find_design
from ibqlab.tokenizer.image_input import Images, ValueRange, prepare_images

Indices = Tensor | np.ndarray | Sequence
"""What `Tokenizer.decode_indices` takes: whole numbers on a (B, h, w) grid."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """An autoencoder and the quantizer between its halves. The defaults are the published 16,384-code tokenizer."""

    autoencoder: Annotated[AutoencoderConfig, AsDesign] = field(default_factory=AutoencoderConfig)
    """Encoder and decoder; settings of another design are an instance of that design's class."""

    quantizer: QuantizerConfig = field(
        default_factory=lambda: IndexBackpropQuantizerConfig(codebook_size=16384, code_dim=256)
    )
    """Any registered quantizer's config. Paper: IBQ with 1,024 to 262,144 codes of dimension 256."""

    def __post_init__(self) -> None:
        latent_channels, code_dim = self.autoencoder.latent_channels, self.quantizer.code_dim
        design = self.autoencoder.design
        require(
            find_design(design).convolutions or latent_channels == code_dim,
            f'autoencoder.latent_channels must equal quantizer.code_dim in the design "{design}", which has no '
            f"convolution between the two; got {latent_channels} and {code_dim}. "
            f"Use autoencoder.latent_channels={code_dim}.",
        )

    @property
    def has_grid(self) -> bool:
        """Whether tokens lie over the image, so that token (r, c) stands for what is there. False: TiTok's T tokens."""
        return find_design(self.autoencoder.design).grid


class TokenizerOutput(NamedTuple):
    """What a pass through the whole tokenizer gives."""

    reconstruction: Float[Tensor, "B C H W"]
    """The decoder's image, not clamped."""

    quantizer: QuantizerOutput
    """Quantized latents, indices and the quantizer's losses."""

    features: Float[Tensor, "B D h w"]
    """What the quantizer was given: encoder output, after the 1 × 1 convolution where the design has one."""


class Tokenizer(nn.Module):
    """A published tokenizer around any quantizer: encoder, 1 × 1 to code_dim, quantizer, 1 × 1 back, decoder.

    Designs other than "vqgan" have neither 1 × 1 convolution: `quant_conv` and `post_quant_conv` are then identities.

    Args:
        config: the architecture. Weights start at PyTorch's defaults, as published.
    Source: IBQ §3.1; published IBQ and Open-MAGVIT2 tokenizer configurations.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        autoencoder, code_dim = config.autoencoder, config.quantizer.code_dim
        self.config = config
        self.downsampling = autoencoder.downsampling
        design = find_design(autoencoder.design)
        converts = design.convolutions
        self.encoder = design.encoder(autoencoder)
        self.quant_conv = nn.Conv2d(autoencoder.encoder_channels, code_dim, 1) if converts else nn.Identity()
        self.quantizer = make_quantizer(config.quantizer)
        self.post_quant_conv = nn.Conv2d(code_dim, autoencoder.latent_channels, 1) if converts else nn.Identity()
        self.decoder = design.decoder(autoencoder)

    @classmethod
    def from_config(cls, config: TokenizerConfig) -> "Tokenizer":
        """A tokenizer with fresh weights, drawn from torch's global random state."""
        return cls(config)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with every weight: which tokens mean what.

        Stored tokens, generators and samples name the tokenizer that they belong to by it. It is that of the weights as
        they are: averaged weights have another one than weights as trained.
        """
        return fingerprint_weights(self, self.config.quantizer.config_name)

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for an image of that size.

        Args:
            height: of the image, in pixels; of most designs a multiple of `downsampling`.
            width: likewise.
        Returns:
            (h, w), in tokens; (1, T) of a tokenizer without a grid.
        Raises:
            ValueError: no size for this tokenizer; the message gives the nearest that are.
        """
        return self.config.autoencoder.latent_grid(height, width)

    def encode(self, images: Images, *, value_range: ValueRange | None = None) -> QuantizerOutput:
        """Images to codes.

        In training mode quantizers that keep their codebook themselves update it here too: call `eval()` to only look.

        Args:
            images: (B, 3, H, W) float in [−1, 1], or anything else that `prepare_images` takes; H and W multiples of
                `downsampling`. They are moved to the tokenizer's device.
            value_range: of float images, (−1, 1) or (0, 1); needed where no value is below 0, which fits both.
        Returns:
            Quantized latents (B, D, h, w), indices (B, h, w) and the quantizer's losses.
        Raises:
            ValueError: wrong shape, type, range or size, or NaN.
        """
        return self.quantizer(self._features(self._prepared(images, value_range)))

    @torch.no_grad()
    def encode_indices(self, images: Images, *, value_range: ValueRange | None = None) -> Int[Tensor, "B h w"]:
        """Images to token indices and nothing else: no losses, no quantized vectors, no change of the codebook.

        What `decode_indices` takes back. Dropout, where the config has any, is off in eval mode only.

        Args: as in `encode`.
        Returns:
            (B, h, w) int64, 0 to K − 1; `encode(images).indices` in eval mode.
        Raises:
            ValueError: as in `encode`, or features that hold NaN or infinity.
        """
        return self.quantizer.encode(self._features(self._prepared(images, value_range)))

    def decode(self, quantized: Float[Tensor, "B D h w"]) -> Float[Tensor, "B C H W"]:
        """Images from code vectors.

        Args:
            quantized: code vectors on a grid of any size.
        Returns:
            Images, nominally in [−1, 1] and not clamped; `ibqlab.data.to_uint8` makes pictures of them.
        Raises:
            ValueError: not four dimensions, or another code dimension.
        """
        code_dim = self.config.quantizer.code_dim
        if quantized.ndim != 4 or quantized.shape[1] != code_dim:
            raise ValueError(
                f"quantized must be (B, D, h, w) with D = {code_dim}; got {tuple(quantized.shape)}. "
                "For indices (B, h, w) use decode_indices."
            )
        # Quantizers give float32 whatever the weights are.
        return self.decoder(self.post_quant_conv(quantized.to(self._weight.dtype)))

    def decode_indices(self, indices: Indices) -> Float[Tensor, "B C H W"]:
        """Images from token indices, 0 to K − 1; not clamped.

        Args:
            indices: (B, h, w) whole numbers: a tensor of any integer type on any device, a NumPy array as token stores
                hold them, or lists.
        Raises:
            ValueError: not whole numbers on a (B, h, w) grid, or an index that is no code.
        """
        return self.decode(self.quantizer.decode(indices))

    def forward(self, images: Float[Tensor, "B C H W"]) -> TokenizerOutput:
        """Reconstruct images; what training calls. The range of the values is not checked, because that costs a pass.

        In eval mode the reconstruction equals decode(encode(images).quantized).

        Args:
            images: in [−1, 1], on the tokenizer's device, of any floating type; H and W multiples of `downsampling`.
        Returns:
            Reconstruction, quantizer output and features; reconstruction and features in the type of the weights.
        Raises:
            ValueError: the downsampling does not divide H or W.
        """
        features = self._features(images)
        quantizer = self.quantizer(features)
        return TokenizerOutput(self.decode(quantizer.quantized), quantizer, features)

    def _prepared(self, images: Images, value_range: ValueRange | None) -> Float[Tensor, "B C H W"]:
        """Images in [−1, 1] on the device of the weights."""
        return prepare_images(images, self.config.autoencoder.in_channels, value_range).to(self._weight.device)

    def _features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        self.latent_grid(*images.shape[-2:])
        return self.quant_conv(self.encoder(images.to(self._weight.dtype)))

    @property
    def _weight(self) -> Tensor:
        """The first weight, which tells device and type of all."""
        return next(self.encoder.parameters())


def fingerprint_weights(module: nn.Module, kind: str) -> str:
    """Sixteen hexadecimal digits of a module's weights and buffers, with their names, types and shapes.

    Args:
        module: on any device.
        kind: what it is, where that is not in its weights.
    """
    digest = hashlib.sha256(kind.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # As bytes, because NumPy has no bfloat16.
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
