"""The quantizers' computations as the benchmark measures them: ours, and written out with N × K matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from published_form import published_index_backprop
from torch import Tensor
from torch.nn import functional as F

from ibqlab.quantizers import index_backprop, mixture_of_codes, nearest_code
from ibqlab.quantizers.lfq import sign_entropies

OURS, WRITTEN_OUT = "ibqlab", "written out"


def two_entropies(sample: Tensor, average: Tensor) -> Tensor:
    """The penalty with its published weight."""
    return 0.05 * (sample - average)


def ibq_ours(features: Tensor, codebook: Tensor, pull: Tensor, matmul: str = "float32") -> Tensor:
    """A loss through the quantized features and both entropies."""
    out = index_backprop(features, codebook, matmul=matmul)
    return (out.quantized * pull).sum() + two_entropies(out.sample_entropy, out.average_entropy)


def ibq_written_out(features: Tensor, codebook: Tensor, pull: Tensor) -> Tensor:
    """The same with N × K matrices."""
    quantized, _, sample, average = published_index_backprop(features, codebook)
    return (quantized * pull).sum() + two_entropies(sample, average)


def plain_ours(features: Tensor, codebook: Tensor, pull: Tensor, matmul: str = "float32") -> Tensor:
    """Index backpropagation without entropies."""
    return (index_backprop(features, codebook, None, matmul=matmul).quantized * pull).sum()


def plain_written_out(features: Tensor, codebook: Tensor, pull: Tensor) -> Tensor:
    """The same with N × K matrices."""
    soft = (features @ codebook.T).softmax(1)
    hard = F.one_hot(soft.argmax(1), len(codebook)).to(soft.dtype)
    return (((hard - soft.detach() + soft) @ codebook) * pull).sum()


def soft_ours(features: Tensor, codebook: Tensor, pull: Tensor, matmul: str = "float32") -> Tensor:
    """Soft VQ's training value at its first temperature."""
    return (mixture_of_codes(features, codebook, 0.9, matmul=matmul) * pull).sum()


def soft_written_out(features: Tensor, codebook: Tensor, pull: Tensor) -> Tensor:
    """The same with N × K matrices."""
    return (((features @ codebook.T / 0.9).softmax(1) @ codebook) * pull).sum()


def search_ours(metric: str, features: Tensor, codebook: Tensor, pull: Tensor, matmul: str = "float32") -> Tensor:
    """Indices alone."""
    return nearest_code(features, codebook, metric, matmul=matmul)


def search_written_out(metric: str, features: Tensor, codebook: Tensor, pull: Tensor) -> Tensor:
    """Indices from the whole matrix of distances, as the published VectorQuantizer2 has it."""
    if metric == "cosine":
        features, codebook = F.normalize(features, dim=1), F.normalize(codebook, dim=1)
    squares = features.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return (squares - 2 * torch.einsum("nd,kd->nk", features, codebook)).argmin(1)


def bits_ours(features: Tensor, codebook: Tensor, pull: Tensor, matmul: str = "float32") -> Tensor:
    """LFQ's entropy penalty over all sign vectors."""
    return two_entropies(*sign_entropies(features[:, : len(codebook).bit_length() - 1], matmul=matmul))


def bits_written_out(features: Tensor, codebook: Tensor, pull: Tensor) -> Tensor:
    """The same from the distances to every sign vector, as published."""
    bits = len(codebook).bit_length() - 1
    numbers = torch.arange(len(codebook), device=features.device)[:, None] >> torch.arange(bits, device=features.device)
    logits = 2 * features[:, :bits] @ (numbers % 2 * 2.0 - 1).to(features.dtype).T / 0.01
    p, log_p = logits.softmax(1), (logits + 1e-5).log_softmax(1)
    mean = p.mean(0)
    return two_entropies(-(p * log_p).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum())


@dataclass(frozen=True, kw_only=True)
class Method:
    """A computation in both forms, and what cannot be saved of it."""

    forms: dict[str, Callable[..., Tensor]]
    """By name: from features, codebook and a pull on the quantized features to a loss, or to indices. Ours takes what
    is promised about products, too, `matmul`."""
    products: str = ""
    """Which of the products scores, gains, to_features, to_codes the floor holds; empty: no floor."""
    largest: int = 2**20
    """K above which it is not measured."""


METHODS = {
    "index_backprop": Method(forms={OURS: ibq_ours, WRITTEN_OUT: ibq_written_out}, products="ssgfc"),
    "index_backprop without entropies": Method(
        forms={OURS: plain_ours, WRITTEN_OUT: plain_written_out}, products="ssgfc"
    ),
    "soft_vq": Method(forms={OURS: soft_ours, WRITTEN_OUT: soft_written_out}, products="sfgfcc"),
    "nearest code, l2": Method(
        forms={OURS: partial(search_ours, "l2"), WRITTEN_OUT: partial(search_written_out, "l2")}, products="s"
    ),
    "nearest code, cosine": Method(
        forms={OURS: partial(search_ours, "cosine"), WRITTEN_OUT: partial(search_written_out, "cosine")}, products="s"
    ),
    "lfq entropies": Method(forms={OURS: bits_ours, WRITTEN_OUT: bits_written_out}, largest=2**18),
}
"""What is measured, by name."""
