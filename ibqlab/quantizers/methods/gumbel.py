"""Gumbel-softmax VQ: a linear layer scores all codes, training samples one of them, and the gradient is a softmax's.

What is unusual: scores, noise and shares are N × K, and here they exist one block of rows at a time. The backward pass
draws the forward pass's noise again from the stored state of the random numbers.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ibqlab.base.checks import require
from ibqlab.quantizers import blocks
from ibqlab.quantizers.base import Assignment, Quantizer, QuantizerConfig, register_quantizer
from ibqlab.quantizers.compiling import never_compiled
from ibqlab.quantizers.estimators import nearest_code

PRIOR_EPSILON = 1e-10
"""Inside the logarithm of the published KL term."""


@dataclass(frozen=True, kw_only=True)
class GumbelQuantizerConfig(QuantizerConfig):
    """Gumbel-softmax VQ as published by taming-transformers."""

    codebook_init: str = "normal"
    """As in every quantizer; the published codes start at N(0, 1)."""
    kl_weight: float = 5e-4
    """Weight of KL(q ‖ uniform) in the loss, ≥ 0. Published: 5e-4 (class), 1e-8 (vqgan_gumbel_f8)."""
    temperature_start: float = 0.9
    """T at the start of training, > 0. Published: 0.9 (vqgan_gumbel_f8)."""
    temperature_end: float = 1e-6
    """T at the end of training, > 0 and at most the start's. Published: 1e-6; DALL-E ends at 1/16."""
    straight_through: bool = True
    """Give the decoder the sampled code in training; False: the mixture yᵀC of all codes, which becomes one as T falls.
    Evaluation always gives a code. Published: True."""

    def __post_init__(self):
        super().__post_init__()
        require(self.kl_weight >= 0, f"kl_weight must be ≥ 0, got {self.kl_weight}")
        require(
            0 < self.temperature_end <= self.temperature_start,
            f"temperatures must satisfy 0 < temperature_end ≤ temperature_start, "
            f"got end {self.temperature_end} and start {self.temperature_start}",
        )

    def loss_weights(self) -> dict[str, float]:
        """The distance to even use."""
        return {"kl": self.kl_weight}


@register_quantizer("gumbel", GumbelQuantizerConfig, label="Gumbel")
class GumbelQuantizer(Quantizer):
    """A sampled code with the gradient of a softmax.

        l = W z + b,   g_k ~ Gumbel(0, 1),   y = softmax((l + g)/T),   k = argmax(l + g)
        z_q = (onehot(k) + y − sg(y))ᵀ C,   loss = w · mean_n Σ_k q_k ln(K q_k + 10⁻¹⁰),   q = softmax(l)

    T falls along half a cosine of the training progress. Evaluation takes argmax l; the published code samples in
    evaluation, too. The KL term is there in both, in evaluation as a number without a gradient. The choice depends on W
    and b, not on distances to codes, so features need not lie near codes. All codes' scores take gradient, and of the
    codes those that were sampled; all of them where `straight_through` is False.
    Source: Jang et al. (2017), eqs. 1–2 and §2.2, straight-through; published taming-transformers code, GumbelQuantize.
    """

    def __init__(self, config: GumbelQuantizerConfig):
        super().__init__(config)
        self.scores = nn.Linear(config.code_dim, config.codebook_size)

    @property
    def temperature(self) -> float:
        """T at the present `progress`."""
        start, end = self.config.temperature_start, self.config.temperature_end
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(self.progress, 0.0), 1.0)))

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The code with the largest score."""
        return nearest_code(*self._factors(features), "dot", matmul=self.config.matmul)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """A sampled code in training, the best one in evaluation."""
        if not self.training:
            indices = self.choose(features, codebook)
            return Assignment(F.embedding(indices, codebook), indices, {"kl": kl_to_even(*self._factors(features))})
        hard = self.config.straight_through
        quantized, indices, kl = sample_codes(*self._factors(features), codebook, self.temperature, hard=hard)
        return Assignment(quantized, indices, {"kl": kl})

    def _factors(self, features: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D1"], Float[Tensor, "K D1"]]:
        """Two factors whose product is W z + b: a column of ones beside the tokens, b beside W."""
        weight, bias = self.scores.weight.to(features.dtype), self.scores.bias.to(features.dtype)
        return F.pad(features, (0, 1), value=1.0), torch.cat([weight, bias[:, None]], dim=1)


@never_compiled
@torch.no_grad()
def kl_to_even(tokens: Float[Tensor, "N E"], weights: Float[Tensor, "K E"]) -> Float[Tensor, ""]:
    """mean_n Σ_k q_k ln(K q_k + 10⁻¹⁰) with q = softmax(tokens · weightsᵀ), without a gradient.

    Returns:
        KL(q ‖ uniform) in nats, 0 where all codes are equally likely, to ln K where one is certain.
    Cost: O(N·K·E) operations; memory two blocks of `blocks.BLOCK_BYTES`.
    """
    kl = tokens.new_zeros(())
    with blocks.full_precision(tokens.device):
        for rows, (scores, ratio) in blocks.score_blocks(len(tokens), len(weights), tokens, buffers=2):
            torch.mm(tokens[rows], weights.T, out=scores)
            kl += _kl_sum(torch.softmax(scores, 1, out=scores), ratio)
    return kl / len(tokens)


@never_compiled
def sample_codes(
    tokens: Float[Tensor, "N E"],
    weights: Float[Tensor, "K E"],
    codebook: Float[Tensor, "K D"],
    temperature: float,
    *,
    hard: bool = True,
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"], Float[Tensor, ""]]:
    """One code per token from softmax(tokens · weightsᵀ), with the Gumbel-softmax gradient.

    Args:
        tokens, weights: factors of the scores l.
        codebook: C, same type and device.
        temperature: T > 0 of the gradient, and of the mixture; the sample itself does not depend on it.
        hard: give the sampled codes, with the mixture's gradient; False: the mixtures themselves.
    Returns:
        The sampled codes or mixtures, the sampled indices, and mean_n Σ_k q_k ln(K q_k + 10⁻¹⁰).
    Cost: O(N·K·D) operations and N·K random numbers forward and again backward; memory O(N·D + K·D) plus three blocks
        of `blocks.BLOCK_BYTES`.
    """
    return _SampleCodes.apply(tokens, weights, codebook, temperature, hard)


class _SampleCodes(torch.autograd.Function):
    """With G = ∂z_q·Cᵀ: ∂l = y ⊙ (G − ⟨y, G⟩)/T + q ⊙ (r − ⟨q, r⟩)/N with r = ∂(q ln(Kq + ε))/∂q."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd calls it by position
        ctx: Any, tokens: Tensor, weights: Tensor, codebook: Tensor, temperature: float, hard: bool
    ) -> tuple:
        ctx.random_state = _random_state(tokens)
        size = len(codebook)
        indices = torch.empty(len(tokens), dtype=torch.int64, device=tokens.device)
        mixtures = None if hard else tokens.new_empty(len(tokens), codebook.shape[1])
        kl = tokens.new_zeros(())
        with blocks.full_precision(tokens.device):
            for rows, (scores, noisy) in blocks.score_blocks(len(tokens), size, tokens, buffers=2):
                torch.mm(tokens[rows], weights.T, out=scores)  # l, (R, K), one block, never (N, K)
                _gumbel_noise(noisy).add_(scores)
                top, indices[rows] = blocks.best_codes(noisy)
                if mixtures is not None:
                    torch.mm(_relaxed(noisy, top, temperature), codebook, out=mixtures[rows])
                kl += _kl_sum(torch.softmax(scores, 1, out=scores), noisy)
        ctx.save_for_backward(tokens, weights, codebook, indices)
        ctx.temperature, ctx.hard = temperature, hard
        ctx.mark_non_differentiable(indices)
        return codebook[indices] if mixtures is None else mixtures, indices, kl / len(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, codebook, indices = ctx.saved_tensors
        size, temperature = len(codebook), ctx.temperature
        grad_tokens, grad_weights = torch.empty_like(tokens), torch.zeros_like(weights)
        grad_codes = torch.zeros_like(codebook)
        if ctx.hard:
            grad_codes.index_add_(0, indices, grad)
        with blocks.full_precision(tokens.device), _random_numbers_from(ctx.random_state, tokens.device):
            for rows, (scores, noisy, change) in blocks.score_blocks(len(tokens), size, tokens, buffers=3):
                torch.mm(tokens[rows], weights.T, out=scores)
                _gumbel_noise(noisy).add_(scores)  # the forward pass's noise
                relaxed = _relaxed(noisy, blocks.best_codes(noisy)[0], temperature)  # y
                if not ctx.hard:
                    grad_codes.addmm_(relaxed.T, grad[rows])
                torch.mm(grad[rows], codebook.T, out=change)  # G
                blocks.softmax_backward(change, relaxed)
                change.mul_(1 / temperature)
                shares = torch.softmax(scores, 1, out=scores)  # q
                ratio = torch.mul(shares, size, out=noisy)
                slope = torch.log(ratio + PRIOR_EPSILON).add_(ratio / (ratio + PRIOR_EPSILON))  # r
                blocks.softmax_backward(slope, shares)
                change.add_(slope.mul_(grad_kl / len(tokens)))
                torch.mm(change, weights, out=grad_tokens[rows])
                grad_weights.addmm_(change.T, tokens[rows])
        return grad_tokens, grad_weights, grad_codes, None, None


def _relaxed(noisy: Float[Tensor, "R K"], top: Float[Tensor, "R 1"], temperature: float) -> Float[Tensor, "R K"]:
    """y = softmax((l + g)/T) in the memory of l + g, whose largest number per row is `top`."""
    # Relative to the best before it is divided: T may be 10⁻⁶, which would multiply the rounding of l.
    noisy.sub_(top).mul_(1 / temperature)
    return torch.softmax(noisy.clamp_(min=blocks.lowest_exponent(noisy.dtype)), 1, out=noisy)


def _kl_sum(shares: Float[Tensor, "R K"], buffer: Float[Tensor, "R K"]) -> Float[Tensor, ""]:
    """Σ_nk q ln(K q + 10⁻¹⁰); overwrites the buffer."""
    return torch.mul(shares, shares.shape[1], out=buffer).add_(PRIOR_EPSILON).log_().mul_(shares).sum()


def _gumbel_noise(buffer: Float[Tensor, "R K"]) -> Float[Tensor, "R K"]:
    """−ln E with E from the exponential distribution, into the buffer. E = 0 would be infinite noise."""
    return buffer.exponential_().clamp_min_(torch.finfo(buffer.dtype).tiny).log_().neg_()


def _random_state(like: Tensor) -> Tensor | None:
    """Where the random numbers of a tensor's device stand; None for tensors without contents."""
    if like.is_meta:
        return None
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


@contextmanager
def _random_numbers_from(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Inside the block random numbers go on from a stored state; afterwards they stand where they stood before."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
