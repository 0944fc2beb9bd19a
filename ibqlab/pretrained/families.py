"""Whose checkpoint is it? Tokenizers of other papers told apart from IBQ's, or the user asked.

VQGAN's tokenizers (taming-transformers, latent-diffusion) and IBQ's have the same names and shapes. What differs: IBQ's
code writes averaged weights (`model_ema.…`) beside the others, VQGAN's never did; VQGAN's Lightning was older than 2;
and VQ starts its codes within ±1/K, where codes that nothing chose stay for ever, while IBQ's start at N(0, 1). A file
that shows neither is not opened until somebody says what it is.
"""

from collections.abc import Mapping

from torch import Tensor

from ibqlab.pretrained.tensor_files import CheckpointError, TensorFile
from ibqlab.pretrained.tokenizer_architecture import CODEBOOK

OTHERS: dict[str, tuple[str, ...]] = {
    "a tokenizer of LlamaGen": ("encoder.conv_blocks.", "quantize.codebook_used"),
    "a VQModel of the diffusers library": ("encoder.down_blocks.",),
    "a tokenizer of VQGAN-LC": ("codebook_projection.",),
    "a tokenizer of SimVQ": ("quantize.embedding_proj.",),
    "a VQGAN with Gumbel quantization (taming-transformers)": ("quantize.embed.weight", "quantize.proj."),
    "a tokenizer of MaskBit": ("quantize.bits_to_indices",),
    "a VQGAN+ (MaskBit)": ("encoder.down.0.res_blocks.",),
    "a MaskGIT-VQGAN (1d-tokenizer)": ("encoder.mid.0.",),
    "a tokenizer of TiTok (1d-tokenizer)": ("latent_tokens",),
    "a tokenizer of VAR": ("quantize.quant_resi.", "quantize.ema_vocab_hit_SV"),
    "a VQGAN with moving averages (taming-transformers)": ("quantize.embedding.embed_avg",),
    "a generator of taming-transformers": ("transformer.pos_emb", "pos_emb"),
    "a diffusion model (latent-diffusion)": ("model.diffusion_model.",),
}
"""Families that are not read here, and beginnings of names that only they have; the first that fits is named."""
NEEDED = {
    "an autoencoder without codes (latent-diffusion's AutoencoderKL)": "quantize.",
    "an autoencoder without attention in its middle (latent-diffusion, attn_type none)": "encoder.mid.attn_1.",
}
"""Families that lack what a VQGAN of ours has, and the beginning of the names that they lack."""
VQGAN = "taming-transformers and latent-diffusion"
CODES_LOOKED_AT = 4096
LEAST_DIMENSION = 4
"""Codes of fewer numbers may lie within ±1/K by chance."""


def refuse_other_families(names: Mapping[str, object]) -> None:
    """Raise CheckpointError, with the family's name and what to type, for a file of a family that is not read here."""
    families = [family for family, starts in OTHERS.items() if any(name.startswith(starts) for name in names)]
    if not families and "encoder.conv_in.weight" in names and "post_quant_conv.weight" in names:
        families = [family for family, start in NEEDED.items() if not any(name.startswith(start) for name in names)]
    if families:
        raise CheckpointError(
            f"this is {families[0]}, whose parts ibqlab does not have; it reads tokenizers and generators of IBQ and "
            f"Open-MAGVIT2 (list them: ibqlab download), and VQGAN's tokenizers with quantizer='vq'. Open this one "
            "with its authors' code"
        )


def check_quantizer_is_told(file: TensorFile, tensors: Mapping[str, Tensor], quantizer: str | None) -> str | None:
    """The quantizer to open a published file with, asked for where the file does not tell.

    Args:
        file: the file.
        tensors: those of the tokenizer in it, by published name.
        quantizer: what the user said.
    Returns:
        What the user said, or the file itself; None where the names tell.
    Raises:
        CheckpointError: a file that IBQ's code or VQGAN's may have written; the message says what to type.
    """
    codebook = tensors.get(CODEBOOK)
    if quantizer is not None or codebook is None or any(name.startswith("encoder.mid_block.") for name in tensors):
        return quantizer
    if file.quantizer is not None:
        return file.quantizer
    near_zero = codes_within_start_of_vq(codebook)
    generator = any(name.startswith("transformer.class_emb.") for name in file.tensors)
    averaged = any(name.startswith("model_ema.") for name in tensors)
    if near_zero:
        finding = f"{near_zero:,} of its codes lie within ±1/K, where VQ starts and IBQ does not, so it is likely VQ"
    elif file.lightning and int(file.lightning.split(".")[0]) < 2:
        finding = f"it was written by Lightning {file.lightning}, older than IBQ's code, so it is likely a VQGAN"
    elif averaged or generator:
        return None
    else:
        finding = "it has no averaged weights (model_ema.…), which files of IBQ have, so nothing in it tells which"
    raise CheckpointError(
        f"names and shapes are those of a tokenizer of IBQ and of a VQGAN ({VQGAN}) alike; {finding}. Say what it is: "
        "quantizer='vq' for a VQGAN or quantizer='ibq' for IBQ (--quantizer vq or --quantizer ibq)"
    )


def codes_within_start_of_vq(codebook: Tensor) -> int:
    """How many codes, of those looked at, still lie within ±1/K in every number, which N(0, 1) never gives.

    At most `CODES_LOOKED_AT` are, evenly spread, because a codebook that is mapped costs memory where it is read.
    """
    size, dim = codebook.shape if codebook.ndim == 2 else (0, 0)
    if dim < LEAST_DIMENSION or size < LEAST_DIMENSION or codebook.is_meta:
        return 0
    sample = codebook[:: -(-size // CODES_LOOKED_AT)].float()
    return int((sample.abs().amax(1) <= 1 / size).sum())
