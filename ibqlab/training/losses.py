"""The tokenizer's training loss, term by term."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ibqlab.tokenizer import Tokenizer, TokenizerOutput
from ibqlab.training.config import LossConfig

IMAGES = "the batch of images"
"""How `name_first_nonfinite` names its first link."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


def tokenizer_loss(
    config: LossConfig, images: Float[Tensor, "B 3 H W"], out: TokenizerOutput
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Weighted sum of reconstruction and quantizer losses (the first two terms of IBQ eq. 8), with its parts.

    Args:
        config: weights.
        images: the batch, in [−1, 1].
        out: what the tokenizer made of it.
    Returns:
        The loss, and its parts by the name they have in metrics.jsonl, unweighted.
    """
    l1 = F.l1_loss(out.reconstruction.float(), images)
    total = config.reconstruction_weight * l1 + out.quantizer.loss
    parts = {"l1": l1, "quantizer_loss": out.quantizer.loss}
    return total, parts | {f"term_{name}": term for name, term in out.quantizer.terms.items()}


def name_first_nonfinite(
    images: Float[Tensor, "B 3 H W"], tokenizer: Tokenizer, out: TokenizerOutput, parts: dict[str, Float[Tensor, ""]]
) -> str:
    """The first tensor on the way from images to loss that holds NaN or infinity, for an error message.

    Args:
        images: the batch.
        tokenizer: whose learned weights come next; a codebook of moving averages comes after the features it follows.
        out: what the tokenizer made of the images.
        parts: the loss term by term.
    """
    chain = {
        IMAGES: images,
        **{f"the weight {name!r}": weight for name, weight in tokenizer.named_parameters()},
        "the encoder's features": out.features,
        "the codebook": tokenizer.quantizer.codebook,
        "the quantized features": out.quantizer.quantized,
        "the reconstruction": out.reconstruction,
        **{f"the loss term {name!r}": term for name, term in parts.items()},
    }
    found = next((name for name, value in chain.items() if not torch.isfinite(value).all()), None)
    return found or "the sum of the losses, here or on another process,"
