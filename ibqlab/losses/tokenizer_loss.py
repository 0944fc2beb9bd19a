"""The tokenizer's training loss, term by term."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ibqlab.losses.gan_losses import adaptive_weight
from ibqlab.recipes.tokenizer_config import LossConfig
from ibqlab.tokenizer import Tokenizer, TokenizerOutput

IMAGES = "the batch of images"
"""How `name_first_nonfinite` names its first link."""
SUM = "the sum of the losses, here or on another process,"
"""And what it says where every link is finite."""


def tokenizer_loss(
    config: LossConfig,
    images: Float[Tensor, "B 3 H W"],
    out: TokenizerOutput,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    judge: Callable[[Tensor], Tensor] | None = None,
    last_layer: Tensor | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Weighted sum of reconstruction, perceptual, adversarial and quantizer losses (IBQ eq. 8), with its parts.

    Args:
        config: weights.
        images: the batch, in [−1, 1].
        out: what the tokenizer made of it.
        perceptual: LPIPS, from images and reconstructions to one value per image; None leaves it out.
        judge: the adversary's loss on reconstructions; None leaves it out.
        last_layer: weight of the decoder's last convolution, for `adaptive_weight`; read where the config asks for it.
    Returns:
        The loss, and its parts by the name they have in metrics.jsonl, unweighted.
    Source: published VQLPIPSWithDiscriminator.
    """
    rebuilt = out.reconstruction if out.reconstruction.dtype == torch.float64 else out.reconstruction.float()
    images = images.to(rebuilt.dtype)
    l1 = F.l1_loss(rebuilt, images)
    parts = {"l1": l1}
    likelihood = config.reconstruction_weight * l1
    if perceptual is not None:
        parts["perceptual"] = perceptual(images, rebuilt).mean()
        likelihood = likelihood + config.perceptual_weight * parts["perceptual"]
    total = likelihood + out.quantizer.loss
    if judge is not None:
        # Filled in on the device; a number that is copied to it would be waited for.
        weight = likelihood.new_full((), config.adversarial_weight)
        parts["adversarial"] = judge(rebuilt)
        if config.adaptive_weight:
            weight = weight * adaptive_weight(likelihood, parts["adversarial"], last_layer)
            parts["adversarial_weight"] = weight
        total = total + weight * parts["adversarial"]
    parts["quantizer_loss"] = out.quantizer.loss
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
    culprit = next((name for name, value in chain.items() if not torch.isfinite(value).all()), None)
    return culprit or SUM
