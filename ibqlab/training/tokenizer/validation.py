"""Validation: reconstruction and usage on held-out images, usage alone, and the snapshot behind figures."""

from collections.abc import Iterable, Iterator
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
from ibqlab.diagnostics.usage import count_indices, perplexity
from ibqlab.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Result of `validate`."""

    l1: float
    """Mean |x − x̂| on the [−1, 1] scale."""
    psnr: float
    """Mean over images of 10·log10(4 / mean (x − x̂)²), dB, with x̂ clamped to [−1, 1]."""
    counts: Int[Tensor, " K"]
    """Hits per code."""
    images: int
    """How many images were seen, unreadable ones left out."""
    broken: list[str]
    """Unreadable files that this process met."""

    def row(self) -> dict[str, Any]:
        """The numbers as a row of metrics."""
        return {"validation_l1": self.l1, "validation_psnr": self.psnr, **usage_row(self.counts, self.images)}


def usage_row(counts: Int[Tensor, " K"], images: int) -> dict[str, Any]:
    """Hits per code on validation images as the columns of a row of metrics."""
    return {
        "validation_usage": int((counts > 0).sum()) / len(counts),
        "validation_perplexity": perplexity(counts),
        "validation_tokens": int(counts.sum()),
        "validation_images": images,
    }


@torch.no_grad()
def validate(tokenizer: Tokenizer, batches: Iterable[Batch], device: torch.device) -> Validation:
    """Reconstruct validation images in eval mode, in the weights' own precision, and count the codes they use.

    Args:
        tokenizer: evaluated as it is.
        batches: this process's share of the images, from `validation_batches`.
        device: where the tokenizer is.
    """
    size = tokenizer.quantizer.config.codebook_size
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = tokenizer.training
    broken: list[str] = []
    tokenizer.eval()
    for pictures in _pictures(tokenizer, batches, device, broken):
        out = tokenizer(pictures)
        error = out.reconstruction.float().clamp(-1, 1) - pictures
        squares = error.double().square().flatten(1).mean(1)
        sums += torch.stack(
            [
                error.double().abs().flatten(1).mean(1).sum(),
                (10 * torch.log10(4 / squares.clamp_min(1e-12))).sum(),
                squares.new_tensor(len(pictures)),
            ]
        )
        counts += count_indices(out.quantizer.indices, size)
    tokenizer.train(was_training)
    l1, psnr, seen = sum_over_processes(sums).tolist()
    counts = sum_over_processes(counts)
    require_images(int(seen), broken)
    return Validation(l1=l1 / seen, psnr=psnr / seen, counts=counts, images=int(seen), broken=broken)


def _pictures(
    tokenizer: Tokenizer, batches: Iterable[Batch], device: torch.device, broken: list[str]
) -> Iterator[Tensor]:
    """Batches in the model's range and precision; unreadable files are left out, their names added to `broken`."""
    for batch in batches:
        broken += batch.broken
        if len(batch.images):
            yield to_model_range(batch.images.to(device, non_blocking=True)).to(tokenizer.decoder.last_layer.dtype)


@torch.no_grad()
def probe_usage(
    tokenizer: Tokenizer, batches: Iterable[Batch], device: torch.device
) -> tuple[dict[str, Any], list[str]]:
    """Usage on validation images and nothing else: the counts of `validate` without a decoder's pass.

    Args:
        tokenizer: as it is, in eval mode.
        batches: as for `validate`.
        device: where the tokenizer is.
    Returns:
        The columns of a row of metrics, and unreadable files that this process met.
    Cost: one pass of the encoder over the images, about a third of `validate`.
    """
    size = tokenizer.quantizer.config.codebook_size
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    seen = torch.zeros((), dtype=torch.int64, device=device)
    was_training = tokenizer.training
    broken: list[str] = []
    tokenizer.eval()
    for pictures in _pictures(tokenizer, batches, device, broken):
        features = tokenizer.quant_conv(tokenizer.encoder(pictures))
        # Features that overflow have no code; the next step stops the run and names what went wrong.
        if torch.isfinite(features).all():
            counts += count_indices(tokenizer.quantizer.encode(features), size)
        seen += len(pictures)
    tokenizer.train(was_training)
    counts, images = sum_over_processes(counts), int(sum_over_processes(seen))
    require_images(images, broken)
    return usage_row(counts, images), broken


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
    """The arrays of a snapshot: codebook, a fixed sample of features with their codes, hits, reconstructions.

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
    codebook = tokenizer.quantizer.codebook
    weight = tokenizer.decoder.last_layer
    out = tokenizer(to_model_range(pictures.to(weight.device)).to(weight.dtype))
    tokenizer.train(was_training)
    tokens = out.features.float().permute(0, 2, 3, 1).flatten(0, 2)[:features]
    rebuilt = to_uint8(out.reconstruction[:images].float())
    return {
        "codebook": codebook.detach().float().cpu().numpy(),
        "features": tokens.cpu().numpy(),
        "assignments": out.quantizer.indices.flatten()[:features].cpu().numpy(),
        "counts": counts.cpu().numpy(),
        "last_hit": last_hit.cpu().numpy(),
        "images": pictures[:images].permute(0, 2, 3, 1).cpu().numpy(),
        "reconstructions": rebuilt.permute(0, 2, 3, 1).cpu().numpy(),
    }
