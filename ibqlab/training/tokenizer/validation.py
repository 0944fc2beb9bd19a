"""Validation: reconstruction and usage on held-out images, usage alone, and the snapshot behind figures."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.base.processes import sum_over_processes
from ibqlab.data import Batch, to_model_range, to_uint8
from ibqlab.data.broken import name_a_few
from ibqlab.diagnostics.usage import count_indices, perplexity, usage_by_age
from ibqlab.quantizers.codebooks import as_compared
from ibqlab.quantizers.composite import codebook_arrays
from ibqlab.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Result of `validate`."""

    l1: float | None
    """Mean |x − x̂| on the [−1, 1] scale; None where nothing was reconstructed."""
    psnr: float | None
    """Mean over images of 10·log10(4 / mean (x − x̂)²), dB, with x̂ clamped to [−1, 1]; likewise."""
    counts: Int[Tensor, " K"]
    """Hits per code."""
    images: int
    """How many images were seen, unreadable ones left out."""
    broken: list[str]
    """Unreadable files that this process met."""

    def row(self, old_codes: int = 0) -> dict[str, Any]:
        """The numbers as a row of metrics; those of the codes are None where no token could be counted.

        Args:
            old_codes: of a codebook that was grown, the codes before, whose usage then stands apart; 0: of no other.
        """
        quality = {} if self.l1 is None else {"validation_l1": self.l1, "validation_psnr": self.psnr}
        tokens = int(self.counts.sum())
        return quality | {
            "validation_usage": int((self.counts > 0).sum()) / len(self.counts) if tokens else None,
            "validation_perplexity": perplexity(self.counts) if tokens else None,
            "validation_tokens": tokens or None,
            "validation_images": self.images,
            **{f"validation_{key}": value for key, value in usage_by_age(self.counts, old_codes).items()},
        }


@torch.no_grad()
def validate(
    tokenizer: Tokenizer, batches: Iterable[Batch], device: torch.device, *, reconstruct: bool = True
) -> Validation:
    """Reconstruct validation images in eval mode, in the weights' own precision, and count the codes they use.

    Args:
        tokenizer: evaluated as it is.
        batches: this process's share of the images, from `validation_batches`; unreadable ones are left out.
        device: where the tokenizer is.
        reconstruct: False: count the codes alone, without a decoder's pass.
    Cost: one pass of the tokenizer over the images; a third of it without reconstructions.
    """
    size = tokenizer.quantizer.config.codebook_size
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of |x − x̂|, of dB, of images
    was_training = tokenizer.training
    broken: list[str] = []
    tokenizer.eval()
    for batch in batches:
        broken += batch.broken
        if not len(batch.images):
            continue
        pictures = to_model_range(batch.images.to(device, non_blocking=True)).to(tokenizer.decoder.last_layer.dtype)
        sums[2] += len(pictures)
        if reconstruct:
            out = tokenizer(pictures)
            sums[:2] += _sum_errors(pictures, out.reconstruction)
            counts += count_indices(out.quantizer.indices, size)
            continue
        features = tokenizer.quant_conv(tokenizer.encoder(pictures))
        # Features that overflow have no code; the next step stops the run and names what went wrong.
        if torch.isfinite(features).all():
            counts += count_indices(tokenizer.quantizer.encode(features), size)
    tokenizer.train(was_training)
    l1, psnr, images = sum_over_processes(sums).tolist()
    counts = sum_over_processes(counts)
    require_images(int(images), broken)
    l1, psnr = (l1 / images, psnr / images) if reconstruct else (None, None)
    return Validation(l1=l1, psnr=psnr, counts=counts, images=int(images), broken=broken)


def _sum_errors(pictures: Tensor, reconstruction: Tensor) -> Tensor:
    """Sums over images of mean |x − x̂| and of the PSNR."""
    error = reconstruction.float().clamp(-1, 1) - pictures
    squares = error.double().square().flatten(1).mean(1)  # (B,)
    decibels = 10 * torch.log10(4 / squares.clamp_min(1e-12))
    return torch.stack([error.double().abs().flatten(1).mean(1).sum(), decibels.sum()])


def require_images(seen: int, broken: list[str]) -> None:
    """Refuse a validation without a single readable image.

    Args:
        seen: images over all processes.
        broken: names of the unreadable ones.
    """
    require(
        seen > 0,
        f"a validation needs at least one readable image; of those chosen none is: {name_a_few(broken)}. Replace the "
        "files, leave them out with data.exclude, or name other images in data.validation_source",
    )


@torch.no_grad()
def take_snapshot(
    tokenizer: Tokenizer,
    pictures: UInt8[Tensor, "B 3 H W"],
    *,
    counts: Int[Tensor, " K"],
    last_hit: Int[Tensor, " K"],
    features: int,
    images: int,
) -> dict[str, np.ndarray]:
    """The arrays of a snapshot: codebook (of many combinations its parts'), a fixed sample of features with their
    codes, hits, reconstructions.

    Args:
        tokenizer: the model as it is.
        pictures: (B, 3, H, W) uint8, the same validation images at every snapshot.
        counts: (K,) hits per code in this step's validation.
        last_hit: (K,) training step of each code's last hit, −1 if never.
        features: how many tokens' features to keep.
        images: how many images to keep.
    """
    was_training = tokenizer.training
    tokenizer.eval()
    codebook = codebook_arrays(tokenizer.quantizer)
    weight = tokenizer.decoder.last_layer
    out = tokenizer(to_model_range(pictures.to(weight.device)).to(weight.dtype))
    tokenizer.train(was_training)
    tokens = as_compared(tokenizer.quantizer, out.features.float()).permute(0, 2, 3, 1).flatten(0, 2)[:features]
    rebuilt = to_uint8(out.reconstruction[:images].float())
    return {
        **codebook,
        "features": tokens.cpu().numpy(),
        "assignments": out.quantizer.indices.flatten()[:features].cpu().numpy(),
        "counts": counts.cpu().numpy(),
        "last_hit": last_hit.cpu().numpy(),
        "images": pictures[:images].permute(0, 2, 3, 1).cpu().numpy(),
        "reconstructions": rebuilt.permute(0, 2, 3, 1).cpu().numpy(),
    }
