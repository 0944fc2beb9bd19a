"""The whole tokenizer: image → encoder → quantizer → decoder → image.

tok = Tokenizer.from_config(TokenizerConfig())
indices = tok.encode(picture).indices          # (1, h, w)
again = tok.decode_indices(indices)            # (1, 3, H, W), nominally in [−1, 1]
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.data.pixels import to_model_range
from ibqlab.quantizers import IndexBackpropQuantizerConfig, QuantizerConfig, QuantizerOutput, make_quantizer
from ibqlab.tokenizer.autoencoder import AutoencoderConfig, Decoder, Encoder
from ibqlab.tokenizer.magvit2 import Magvit2Decoder, Magvit2Encoder

Images = Tensor | np.ndarray | Image.Image | Sequence[Image.Image]
"""What `Tokenizer.encode` takes; see `prepare_images`."""

ValueRange = tuple[float, float]
"""Lowest and highest value of float images."""
Indices = Tensor | np.ndarray | Sequence
"""What `Tokenizer.decode_indices` takes: whole numbers on a (B, h, w) grid."""
RANGE_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """An autoencoder and the quantizer between its halves. The defaults are the published 16,384-code tokenizer."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Encoder and decoder."""

    quantizer: QuantizerConfig = field(
        default_factory=lambda: IndexBackpropQuantizerConfig(codebook_size=16384, code_dim=256)
    )
    """Any registered quantizer's config. Paper: IBQ with 1,024 to 262,144 codes of dimension 256."""

    def __post_init__(self) -> None:
        latent_channels, code_dim = self.autoencoder.latent_channels, self.quantizer.code_dim
        require(
            self.autoencoder.design != "magvit2" or latent_channels == code_dim,
            'autoencoder.latent_channels must equal quantizer.code_dim in the design "magvit2", which has no '
            f"convolution between the two; got {latent_channels} and {code_dim}. "
            f"Use autoencoder.latent_channels={code_dim}.",
        )


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

    The design "magvit2" has neither 1 × 1 convolution: `quant_conv` and `post_quant_conv` are then identities.

    Args:
        config: the architecture. Weights start at PyTorch's defaults, as published.
    Source: IBQ §3.1; published IBQ and Open-MAGVIT2 tokenizer configurations.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        autoencoder, code_dim = config.autoencoder, config.quantizer.code_dim
        self.config = config
        self.downsampling = autoencoder.downsampling
        vqgan = autoencoder.design == "vqgan"
        self.encoder = Encoder(autoencoder) if vqgan else Magvit2Encoder(autoencoder)
        self.quant_conv = nn.Conv2d(autoencoder.encoder_channels, code_dim, 1) if vqgan else nn.Identity()
        self.quantizer = make_quantizer(config.quantizer)
        self.post_quant_conv = nn.Conv2d(code_dim, autoencoder.latent_channels, 1) if vqgan else nn.Identity()
        self.decoder = Decoder(autoencoder) if vqgan else Magvit2Decoder(autoencoder)

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
            height: of the image, in pixels, a multiple of `downsampling`.
            width: likewise.
        Returns:
            (h, w), in tokens.
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

        Args:
            images: as in `encode`.
            value_range: as in `encode`.
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
        return self.encoder.conv_in.weight


def fingerprint_weights(module: nn.Module, kind: str) -> str:
    """Sixteen hexadecimal digits of a module's weights and buffers, with their names, types and shapes.

    Args:
        module: on any device.
        kind: what it is, where that is not in its weights.
    """
    digest = hashlib.sha256(kind.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def prepare_images(
    images: Images, channels: int = 3, value_range: ValueRange | None = None
) -> Float[Tensor, "B C H W"]:
    """Pictures of any usual kind as a float tensor in [−1, 1].

    Args:
        images: one of
            a PIL image, or a list of them of equal size (converted to RGB);
            a uint8 array (H, W, 3) or (B, H, W, 3), as NumPy and matplotlib hold pictures;
            a uint8 tensor (B, 3, H, W), 0 to 255;
            a float tensor (B, 3, H, W) within [−1, 1], which is returned as it is, or within `value_range`.
        channels: that the model takes; pictures have 3.
        value_range: lowest and highest value that a float tensor may have, such as (0, 1). Unless given it is (−1, 1),
            and a tensor without a value below 0 is asked about, because it fits (0, 1) as well.
    Returns:
        (B, C, H, W), float32 unless a float tensor of another type came in.
    Raises:
        ValueError: another shape or type, values outside the range by more than 0.001 of its half, or NaN; a range that
            is not told and cannot be seen; the message says what to type.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)):
        images = _stack_pictures(images)
    if isinstance(images, np.ndarray):
        images = _array_to_tensor(images)
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a tensor, a uint8 array, or PIL images; got {type(images).__name__}.")
    _check_shape(images, channels)
    if images.dtype == torch.uint8:
        require(value_range is None, "value_range is of float images; uint8 is 0 to 255. Leave value_range out.")
        return to_model_range(images)
    return _in_model_range(images, value_range)


def _stack_pictures(pictures: Sequence[Image.Image]) -> np.ndarray:
    kinds = {type(picture).__name__ for picture in pictures if not isinstance(picture, Image.Image)}
    if kinds or not pictures:
        arrived = f"a list with {', '.join(sorted(kinds))}" if kinds else "an empty list"
        raise ValueError(f"a list of images must hold PIL images; got {arrived}. Use torch.stack(…) for tensors.")
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(
            f"images of one batch must have one size; got (width, height) {', '.join(map(str, sizes[:4]))}. "
            "Resize them, or encode them one by one."
        )
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def _array_to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(
            f"an array of images must be uint8, 0 to 255; got {array.dtype}. For floats in [−1, 1] use "
            "torch.from_numpy(images).permute(0, 3, 1, 2)."
        )
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(
            f"an array of images must be (H, W, 3) or (B, H, W, 3); got {array.shape}. "
            "Use np.moveaxis(images, -3, -1) if channels come first."
        )
    return torch.from_numpy(np.array(array[None] if array.ndim == 3 else array)).permute(0, 3, 1, 2)


def _check_shape(images: Tensor, channels: int) -> None:
    if images.ndim == 4 and images.shape[1] == channels and images.numel():
        return
    if images.ndim == 3 and images.shape[0] == channels:
        remedy = "Use images[None] for a single image."
    elif images.ndim == 4 and images.shape[-1] == channels:
        remedy = "Use images.permute(0, 3, 1, 2), because channels come second."
    else:
        remedy = f"Give at least one image, with {channels} channels."
    raise ValueError(f"images must be (B, {channels}, H, W); got {tuple(images.shape)}. {remedy}")


def _in_model_range(images: Tensor, value_range: ValueRange | None) -> Tensor:
    """Float images in [−1, 1], checked."""
    if not images.is_floating_point():
        raise ValueError(
            f"images must be uint8 (0 to 255) or float (−1 to 1); got {images.dtype}. Use images.to(torch.uint8)."
        )
    low, high = (bound.item() for bound in images.detach().aminmax())
    if np.isnan(low):
        raise ValueError("images must be numbers; got NaN. Find it with torch.isnan(images).nonzero().")
    first, last = _checked_range(value_range or (-1, 1))
    slack = RANGE_TOLERANCE * (last - first) / 2
    if low < first - slack or high > last + slack:
        raise ValueError(
            f"float images must lie in [{first:g}, {last:g}]; got {low:.4g} to {high:.4g}. ".replace("-", "−", 1)
            + "Use value_range=(0, 255) or value_range=(0, 1) for values in such a range."
        )
    if value_range is None and low >= 0:
        raise ValueError(
            f"float images without a value below 0 (got {low:.4g} to {high:.4g}) fit both [0, 1] and [−1, 1]; say "
            "which: value_range=(0, 1), or value_range=(-1, 1) for bright images in [−1, 1]."
        )
    if (first, last) == (-1, 1):
        return images
    return (images - first) * (2 / (last - first)) - 1


def _checked_range(value_range: ValueRange) -> ValueRange:
    pair = tuple(value_range)
    require(
        len(pair) == 2 and bool(np.isfinite(pair).all()) and pair[0] < pair[1],
        f"value_range must be two numbers, the lower first, such as (0, 1); got {value_range}.",
    )
    return pair


def _near_sizes(size: int, factor: int) -> str:
    below = size // factor * factor
    if size == below and size:
        return f"{size}"
    return f"{below} or {below + factor}" if below else f"{factor}"
