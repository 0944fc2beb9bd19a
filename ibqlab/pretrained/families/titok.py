"""TiTok: two vision transformers around a row of tokens, with MaskGIT's decoder behind them in the older files.

What names and shapes do not tell: the number of attention heads, by width in a table; and whether tokens and codes are
unit vectors, which config.json says. A bare file tells it by its layout: of the published ones those that predict pixel
codes (L-32, B-64, S-128) have unit vectors, and those that predict pixels have not.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ibqlab.pretrained.family import Facts, Family, refuse_shapes, register_family
from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.pretrained.tokenizer_architecture import (
    CODEBOOK,
    RESOLUTION,
    Shapes,
    codebook_config,
    count_numbered,
    tensor_shape,
)
from ibqlab.tokenizer import AutoencoderConfig, TitokConfig, TokenizerConfig

HEADS = {512: 8, 768: 12, 1024: 16}
"""Attention heads of the published transformers S, B and L by width."""
PIXEL_DECODER = "decoder.pixel_decoder."
LAST_LOGITS = "decoder.ffn.2.weight"
"""Present where the decoder predicts pixel codes; such files were trained with mixed latents (is_legacy)."""


@register_family("titok")
class Titok(Family):
    """A bare state dict (.bin), or a folder of config.json and model.safetensors."""

    title = "a tokenizer of TiTok"
    protocol = "titok"
    marks = (r"latent_tokens$", r"encoder\.latent_token_positional_embedding$", r"decoder\.mask_token$")
    names = (
        (r"^latent_tokens$", "encoder.latent_tokens"),
        (r"^pixel_quantize\.embedding\.weight$", "decoder.pixel_codebook"),
        (r"^pixel_decoder\.", PIXEL_DECODER),
        (r"\.upsample_conv\.", ".upsample.conv."),
        (r"\.attn\.in_proj_", ".attn.in_proj."),
        (r"\.mlp\.c_fc\.", ".mlp.0."),
        (r"\.mlp\.c_proj\.", ".mlp.2."),
        (r"^quantize\.embedding\.", "quantizer.codes."),
    )
    beside: ClassVar = {"quantize.embed_prob": "bookkeeping"}

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """β weighs the commitment (legacy False of the quantizer, whatever is_legacy says of the latents)."""
        settings = _published_settings(facts.settings)
        self._refuse_variants(shapes, settings)
        legacy = LAST_LOGITS in shapes
        for name, actual in (("is_legacy", legacy), ("finetune_decoder", legacy)):
            if settings.get(name, actual) is not actual:
                raise refuse_shapes(self.title, f"config.json says {name}: {settings[name]!r:.20}")
        unit_vectors = settings.get("use_l2_norm", legacy)
        if not isinstance(unit_vectors, bool):
            raise CheckpointError(f"config.json: use_l2_norm must be true or false; got {unit_vectors!r:.40}")
        heads = _heads(shapes, facts.num_heads)
        try:
            quantizer = codebook_config(shapes, "vq", unit_vectors=unit_vectors, beta_on="encoder")
            return TokenizerConfig(autoencoder=_autoencoder(shapes, *heads), quantizer=quantizer)
        except ValueError as error:
            raise refuse_shapes(self.title, str(error)) from None

    def remark(self, config: TokenizerConfig, settings: Mapping[str, Any]) -> str:
        """Whether unit vectors were told by the layout alone."""
        if "use_l2_norm" in _published_settings(settings):
            return ""
        kind = "unit vectors" if config.quantizer.unit_vectors else "vectors of any length"
        return f"{kind}, as published for this layout; no config.json beside it says use_l2_norm"

    def _refuse_variants(self, shapes: Shapes, settings: Mapping[str, Any]) -> None:
        """Raise CheckpointError for models of the same authors that are no tokenizer of images, or lack a part."""
        if CODEBOOK not in shapes or settings.get("quantize_mode", "vq") != "vq":
            raise CheckpointError(
                "this is a TiTok without codes (quantize_mode vae), whose tokens are vectors of any value, so that no "
                "codebook stands in it. Give one of the published files with codes (ibqlab download)"
            )
        if any(key.startswith("decoder.text_guidance") for key in shapes):
            raise CheckpointError(
                "this is a TA-TiTok, whose decoder reads a text beside the tokens; ibqlab reads TiTok's tokenizers "
                "alone. Open it with its authors' code"
            )
        if LAST_LOGITS in shapes and not any(key.startswith(PIXEL_DECODER) for key in shapes):
            raise CheckpointError(
                "this TiTok predicts codes of the MaskGIT tokenizer and holds no decoder of them (pixel_decoder.…): it "
                "is of the first stage of training. Give the file of the second, finetune_decoder"
            )


def _published_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the tokenizer; empty without one."""
    for name in ("model", "vq_model"):
        settings = settings.get(name, {})
        if not isinstance(settings, Mapping):
            raise CheckpointError(f"config.json: {name} must hold settings; got {type(settings).__name__}")
    return settings


def _heads(shapes: Shapes, num_heads: Any) -> tuple[int, int]:
    """Attention heads of encoder and decoder: as the user says, one number or two; else by the published widths."""
    if num_heads is not None:
        both = tuple(num_heads) if isinstance(num_heads, tuple | list) else (num_heads, num_heads)
        if len(both) == 2 and all(type(heads) is int and heads >= 1 for heads in both):
            return both
        raise ValueError(
            f"num_heads of TiTok must be a whole number, or two, (encoder, decoder); got {num_heads!r:.60}. Type "
            "num_heads=(12, 16)"
        )
    widths = [tensor_shape(shapes, f"{part}.ln_pre.weight", 1)[0] for part in ("encoder", "decoder")]
    unknown = [width for width in widths if width not in HEADS]
    if unknown:
        published = ", ".join(f"{width} with {heads}" for width, heads in HEADS.items())
        raise CheckpointError(
            f"no shape tells the number of attention heads, and the width {unknown[0]} is none of the published ones "
            f"({published}); type num_heads=…, the numbers of encoder and decoder, such as (12, 16), or one number "
            "for both"
        )
    return HEADS[widths[0]], HEADS[widths[1]]


def _autoencoder(shapes: Shapes, encoder_heads: int, decoder_heads: int) -> TitokConfig:
    """Sizes of encoder and decoder."""
    width, in_channels, patch, _ = tensor_shape(shapes, "encoder.patch_embed.weight", 4)
    patches = math.isqrt(tensor_shape(shapes, "encoder.positional_embedding", 2)[0] - 1)
    pixels: dict[str, Any] = {"out_channels": in_channels}
    if LAST_LOGITS in shapes:
        decoder = _pixel_decoder(shapes)
        codes = tensor_shape(shapes, "decoder.pixel_codebook", 2)[0]
        pixels = {"pixel_codes": codes, "pixel_decoder": decoder, "out_channels": decoder.out_channels}
    return TitokConfig(
        resolution=patch * patches,
        patch=patch,
        tokens=tensor_shape(shapes, "encoder.latent_tokens", 2)[0],
        encoder_width=width,
        encoder_layers=count_numbered(shapes, r"encoder\.transformer"),
        encoder_heads=encoder_heads,
        decoder_width=tensor_shape(shapes, "decoder.decoder_embed.weight", 2)[0],
        decoder_layers=count_numbered(shapes, r"decoder\.transformer"),
        decoder_heads=decoder_heads,
        latent_channels=tensor_shape(shapes, "encoder.conv_out.weight", 4)[0],
        mixed_latents=LAST_LOGITS in shapes,
        in_channels=in_channels,
        **pixels,
    )


def _pixel_decoder(shapes: Shapes) -> AutoencoderConfig:
    """The decoder behind the pixel codes, the second half of a MaskGIT tokenizer."""
    levels = range(max(1, count_numbered(shapes, r"decoder\.pixel_decoder\.up")))
    channels = [tensor_shape(shapes, f"{PIXEL_DECODER}up.{level}.block.0.conv2.weight", 4)[0] for level in levels]
    base = math.gcd(*channels)  # the encoder, which is not in the file, would tell; the decoder is the same for any
    return AutoencoderConfig(
        design="maskgit",
        base_channels=base,
        channel_multipliers=tuple(width // base for width in channels),
        num_res_blocks=count_numbered(shapes, r"decoder\.pixel_decoder\.up\.[0-9]+\.block"),
        attention_resolutions=(),
        resolution=max(RESOLUTION, 2 ** (len(channels) - 1)),
        latent_channels=tensor_shape(shapes, f"{PIXEL_DECODER}conv_in.weight", 4)[1],
        out_channels=tensor_shape(shapes, f"{PIXEL_DECODER}conv_out.weight", 4)[0],
    )
