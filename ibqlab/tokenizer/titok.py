"""TiTok's encoder and decoder: an image as T tokens of which none belongs to a place in it.

What is unusual: T learned query tokens run through a transformer together with the image's patches, and they alone are
kept. The decoder gets them beside one copy of a mask token per patch and draws the image there. So token t can change
pixels anywhere, the features are (B, D, 1, T), and the image size is fixed. Shape letters: B images · C channels ·
H W image · g² patches · T tokens · W width of a transformer · D code dimension.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.tokenizer.designs import register_design
from ibqlab.tokenizer.maskgit import MaskgitDecoder
from ibqlab.tokenizer.titok_config import TitokConfig
from ibqlab.tokenizer.vision_transformer import NORM_EPSILON, TransformerBlock

START_SPREAD = 0.02
"""Standard deviation of linear layers and convolutions at the start, as published."""


class TitokEncoder(nn.Module):
    """Images to T latent tokens.

    Args:
        config: the architecture.
    Source: fact sheet of the published systems §5.2; TiTok §3.2.
    """

    def __init__(self, config: TitokConfig) -> None:
        super().__init__()
        width = config.encoder_width
        self.config = config
        self.class_embedding = learned(1, width)
        self.positional_embedding = learned(config.patches**2 + 1, width)
        self.latent_tokens = learned(config.tokens, width)
        self.latent_token_positional_embedding = learned(config.tokens, width)
        self.patch_embed = nn.Conv2d(config.in_channels, width, config.patch, stride=config.patch)
        self.ln_pre = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.transformer = nn.ModuleList(
            TransformerBlock(width, config.encoder_heads) for _ in range(config.encoder_layers)
        )
        self.ln_post = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.conv_out = nn.Conv2d(width, config.encoder_channels, 1)
        start_as_published(self)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D 1 T"]:
        """Latents as the quantizer takes them; H and W must be the resolution."""
        batch = len(images)
        patches = self.patch_embed((images + 1) / 2)  # published for images in [0, 1]
        patches = patches.flatten(2).transpose(1, 2)  # (B, g², W)
        queries = (self.latent_tokens + self.latent_token_positional_embedding).expand(batch, -1, -1)
        x = torch.cat([with_class(self, patches), queries], 1)  # (B, 1 + g² + T, W)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        latents = self.ln_post(x[:, -self.config.tokens :])  # (B, T, W)
        if self.config.mixed_latents:
            # As published: the numbers of T·W are read as W·T in memory order, not transposed.
            latents = latents.reshape(batch, -1, 1, self.config.tokens)
        else:
            latents = latents.transpose(1, 2).unsqueeze(2)
        return self.conv_out(latents)


class TitokDecoder(nn.Module):
    """T latent tokens to an image; the output is not clamped, so values may leave [−1, 1].

    Args:
        config: the architecture. With pixel_codes the last layers predict a distribution over pixel codes at each
            patch, and a convolutional decoder draws the image of the codes' mean under it.
    Source: fact sheet of the published systems §5.2; TiTok §3.2–3.3.
    """

    def __init__(self, config: TitokConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.config = config
        self.class_embedding = learned(1, width)
        self.positional_embedding = learned(config.patches**2 + 1, width)
        self.mask_token = learned(1, 1, width)
        self.latent_token_positional_embedding = learned(config.tokens, width)
        self.decoder_embed = nn.Linear(config.latent_channels, width)
        self.ln_pre = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.transformer = nn.ModuleList(
            TransformerBlock(width, config.decoder_heads) for _ in range(config.decoder_layers)
        )
        self.ln_post = nn.LayerNorm(width, eps=NORM_EPSILON)
        if config.pixel_codes:
            self.ffn = nn.Sequential(
                nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, config.pixel_codes, 1)
            )
        else:
            self.ffn = nn.Sequential(nn.Conv2d(width, config.patch**2 * config.out_channels, 1))
            self.conv_out = nn.Conv2d(config.out_channels, config.out_channels, 3, padding=1)
        start_as_published(self)
        if config.pixel_codes:
            self.pixel_codebook = nn.Parameter(torch.empty(config.pixel_codes, config.pixel_decoder.latent_channels))
            nn.init.uniform_(self.pixel_codebook, -1 / config.pixel_codes, 1 / config.pixel_codes)
            self.pixel_decoder = MaskgitDecoder(config.pixel_decoder)

    def forward(self, latents: Float[Tensor, "B D 1 T"]) -> Float[Tensor, "B C H W"]:
        """Images from T code vectors.

        Raises:
            ValueError: another number of tokens than T, or tokens on a grid.
        """
        predictions = self.predict(latents)
        if self.config.pixel_codes:
            # The mean code of each patch: softmax over K, then Σ_k p_k c_k, (B, D_pixel, g, g).
            pixel_latents = torch.einsum("bkhw,kd->bdhw", predictions.softmax(1), self.pixel_codebook)
            return self.pixel_decoder(pixel_latents)
        return 2 * self.conv_out(self._place_pixels(predictions)) - 1  # published for images in [0, 1]

    def predict(self, latents: Float[Tensor, "B D 1 T"]) -> Float[Tensor, "B K g g"]:
        """What the transformer says of each patch: logits of the pixel codes, or the patch's pixels as channels.

        Raises:
            ValueError: as in `forward`.
        """
        tokens, patches = self.config.tokens, self.config.patches
        require(
            tuple(latents.shape[2:]) == (1, tokens),
            f"TiTok decodes {tokens} tokens of an image in one row, (B, 1, {tokens}); got {tuple(latents.shape[2:])} "
            f"for each image. Use indices.view(B, 1, {tokens}).",
        )
        embedded = self.decoder_embed(latents.flatten(2).transpose(1, 2))  # (B, T, W)
        masks = self.mask_token.expand(len(latents), patches**2, -1)
        x = torch.cat([with_class(self, masks), embedded + self.latent_token_positional_embedding], 1)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        drawn = self.ln_post(x[:, 1 : patches**2 + 1])  # (B, g², W): neither the class token nor the latents
        return self.ffn(drawn.transpose(1, 2).unflatten(2, (patches, patches)))

    def _place_pixels(self, predictions: Float[Tensor, "B P g g"]) -> Float[Tensor, "B C H W"]:
        """Channels of a patch, ordered (row, column, colour), at their pixels."""
        patch, patches, side = self.config.patch, self.config.patches, self.config.resolution
        pixels = predictions.view(len(predictions), patch, patch, -1, patches, patches)
        pixels = pixels.permute(0, 3, 4, 1, 5, 2)  # (B, C, g, row, g, column)
        return pixels.reshape(len(predictions), -1, side, side)

    @property
    def last_layer(self) -> Float[Tensor, "C_out C 3 3"]:
        """Weight of the last convolution, where adaptive loss weights compare gradients."""
        return self.pixel_decoder.last_layer if self.config.pixel_codes else self.conv_out.weight


register_design("titok", TitokConfig, TitokEncoder, TitokDecoder, convolutions=False, grid=False)


def learned(*shape: int) -> nn.Parameter:
    """A learned table of tokens, N(0, 1/W) at the start."""
    table = nn.Parameter(torch.empty(shape))
    nn.init.normal_(table, std=shape[-1] ** -0.5)
    return table


def with_class(network: TitokEncoder | TitokDecoder, patches: Float[Tensor, "B N W"]) -> Float[Tensor, "B N+1 W"]:
    """The class token in front of an image's patches, all with their positions."""
    first = network.class_embedding.expand(len(patches), 1, -1)
    return torch.cat([first, patches], 1) + network.positional_embedding


def start_as_published(network: nn.Module) -> None:
    """Weights of linear layers and convolutions N(0, 0.02²), biases 0; the published code cuts the tails off at ±2."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=START_SPREAD)
            nn.init.zeros_(layer.bias)
