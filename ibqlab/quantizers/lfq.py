"""LFQ: the sign of every channel is a bit of the index, so there is no codebook to look up, to learn or to collapse.

What is unusual: the entropy penalty, published as a softmax over all K = 2^D sign vectors, is computed without that
softmax. Its logits are sums over channels, so each token's distribution is a product of D independent bits: the token's
entropy is a sum of D binary entropies, and the mean distribution one product of two N × 2^(D/2) tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import check_numbers, require, whole_number
from ibqlab.base.processes import average_over_processes
from ibqlab.quantizers.base import Assignment, Quantizer, register_quantizer
from ibqlab.quantizers.codebooks import SignGrid, bit_values
from ibqlab.quantizers.estimators import straight_through
from ibqlab.quantizers.indices import check_range, to_indices
from ibqlab.quantizers.products import multiply
from ibqlab.quantizers.terms import EntropyPenaltyConfig


@dataclass(frozen=True, kw_only=True)
class LookupFreeQuantizerConfig(EntropyPenaltyConfig):
    """LFQ as published by Open-MAGVIT2."""

    codebook_size: int = 1024
    """K, codes, a power of two. Published: 262,144 and 16,384."""
    code_dim: int = 0
    """D, bits per code, always log2 K: 0 fills it in. Published: 18 and 14."""
    codebook_init: str = "grid"
    """Always "grid": the codes are all vectors of ±1 and never move."""
    commitment_weight: float = 0.25
    """Weight of mean‖z − sg(q)‖² in the loss, ≥ 0. Published: 0.25."""
    entropy_weight: float = 0.1
    """Weight of the entropy penalty in the loss, ≥ 0; 0 leaves it out. Published: 0.1."""

    def __post_init__(self):
        check_numbers(self)
        name, size = self.config_name or "lfq", self.codebook_size
        bits = max(1, size.bit_length() - 1)
        require(
            size < 2 or size == 2**bits,
            f"codebook_size must be a power of two for {name}, whose codes are all vectors of ±1; got {size}. "
            f"Use {2**bits} or {2 ** (bits + 1)}",
        )
        if self.code_dim == 0:
            object.__setattr__(self, "code_dim", bits)
        super().__post_init__()
        require(
            self.code_dim == bits,
            f"code_dim must be log2(codebook_size) for {name}, {bits} for {size} codes; got {self.code_dim}. "
            f"Use code_dim={bits}, or leave it out",
        )
        require(
            self.codebook_init == "grid",
            f"codebook_init does not apply to {name}, whose codes are fixed; got {self.codebook_init!r}. "
            "Leave it out, or use 'grid'",
        )
        require(self.commitment_weight >= 0, f"commitment_weight must be ≥ 0, got {self.commitment_weight}")

    @classmethod
    def sized(cls, codes: int, dim: int) -> dict[str, int]:
        """All 2^D sign vectors."""
        return {"codebook_size": 2**dim, "code_dim": dim}

    def loss_weights(self) -> dict[str, float]:
        """Commitment and entropy penalty (two terms)."""
        return {"commitment": self.commitment_weight} | super().loss_weights()


@register_quantizer("lfq", LookupFreeQuantizerConfig)
class LookupFreeQuantizer(Quantizer):
    """Lookup-Free Quantization.

        q_i = +1 if z_i > 0 else −1,   k = Σ_i 1[z_i > 0] 2^i,   z_q = z + sg(q − z)
        loss = β mean‖z − sg(q)‖² + w (H̄ − Ĥ)

    H̄ and Ĥ are those of `sign_entropies`. As published, all three terms are 0 in evaluation, and 0 itself becomes −1.
    Source: MAGVIT-v2 (Yu et al., 2024), §3.1; published Open-MAGVIT2 code, LFQ.
    """

    looks_up = False

    def __init__(self, config: LookupFreeQuantizerConfig):
        super().__init__(config, SignGrid(config.code_dim))

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The bits that are set."""
        return ((features > 0) * bit_values(self.config.code_dim, features.device)).sum(1)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """The sign of every channel; the codebook is not looked at. Cost of the penalty: see `sign_entropies`."""
        codes = torch.where(features > 0, 1.0, -1.0).to(features.dtype)
        quantized = straight_through(features, codes) if self.training else codes
        return Assignment(quantized, self.choose(features, codebook), self.terms(features, codes))

    def terms(self, features: Float[Tensor, "N D"], codes: Float[Tensor, "N D"]) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss, all 0 in evaluation."""
        config = self.config
        if not self.training:
            return dict.fromkeys(self.loss_weights(), features.new_zeros(()))
        terms = {"commitment": F.mse_loss(features, codes)}
        if config.entropy_weight > 0:
            sample, average = sign_entropies(
                features,
                config.entropy_temperature,
                config.entropy_epsilon,
                over_processes=config.entropy_over_processes,
                matmul=config.matmul,
            )
            terms |= {"sample_entropy": sample, "average_entropy": average}
        return terms

    def look_up(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B h w D"]:
        """Sign vectors from the bits of their indices."""
        return self.codes.signs(indices.to(self.codes.like.device))


def sign_entropies(
    features: Float[Tensor, "N D"],
    temperature: float = 0.01,
    epsilon: float = 1e-5,
    *,
    over_processes: bool = False,
    matmul: str = "float32",
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Entropies of the softmax over all sign vectors, without that softmax.

        p_n = softmax_c(2 z_n·c / τ),   H̄ = mean_n −Σ_c p_n(c) ln p_n(c),   Ĥ = −Σ_c p̄(c) ln(p̄(c) + ε),   p̄ = mean_n p_n

    With c_i = ±1 the softmax factorises over channels, p_n(c) = Π_i σ(4 z_ni c_i / τ). So H̄ sums D binary entropies,
    and p̄ is the product of the tables of the lower and the upper half of the bits.

    Args:
        features: z, any scale, float32 or float64.
        temperature: τ > 0.
        epsilon: ε ≥ 0.
        over_processes: take p̄ over the tokens of all processes of a distributed job, which must all call this with as
            many tokens each. The gradient is then that of the mean of the processes' losses.
        matmul: what is promised about the tables' product in float32 on CUDA, one of `products.MATMULS`.
    Returns:
        H̄, nats, 0 to D·ln 2: near 0 where features are far from 0. Ĥ, nats, 0 to D·ln 2: large where the tokens that
        p̄ is taken over are spread evenly over the codes.
    Cost: O(N·K) operations, O(N·√K + K) memory.
    Source: published Open-MAGVIT2 code; the factorisation is exact.
    """
    logits = features * (4 / temperature)  # (N, D), one per bit; the softmax over codes would be (N, K)
    certainty = logits.abs()
    # Binary entropy, bit by bit: ln(1 + e^−a) + a σ(−a) for a = |logit|: no difference of large
    # numbers, and smooth through 0.
    sample = (F.softplus(-certainty) + certainty * torch.sigmoid(-certainty)).sum(1).mean()
    mean = mean_distribution(*bit_tables(logits), over_processes, matmul)
    # Without ε a code of probability 0 must give 0, not 0 · ∞.
    average = -(mean * (mean + epsilon).clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
    return sample, average


def bit_tables(logits: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N L"], Float[Tensor, "N U"]]:
    """Probabilities of all values of the lower half of the bits and of the upper half, about √K columns each.

    A code's probability is the product of its two halves': p(u 2^(D/2) + l) = lower_l upper_u.
    """
    half = logits.shape[1] // 2
    return _bit_table(logits[:, :half]), _bit_table(logits[:, half:])


def mean_distribution(
    lower: Float[Tensor, "N L"], upper: Float[Tensor, "N U"], over_processes: bool, matmul: str
) -> Float[Tensor, "U L"]:
    """p̄, the mean of all tokens' distributions: K numbers, one row per value of the upper bits.

    Args:
        lower, upper: as `bit_tables` gives them.
        over_processes, matmul: as in `sign_entropies`.
    """
    mean = multiply(upper.T, lower, matmul) / len(lower)
    if over_processes:
        # The value of all processes with the gradient of this one's tokens; data-parallel training averages those.
        mean = mean + average_over_processes(mean.detach().clone()) - mean.detach()
    return mean


def _bit_table(logits: Float[Tensor, "N bits"]) -> Float[Tensor, "N combinations"]:
    """Probability of every combination of independent bits, each token's row indexed by the combination."""
    # Doubles with every bit: the new half has this bit set, so the first bit stays the least significant one. In
    # logarithms, because a product of many small chances leaves the range of float32.
    table = logits.new_zeros(len(logits), 1)
    for logit in logits[:, :, None].unbind(1):
        table = torch.cat([table + F.logsigmoid(-logit), table + F.logsigmoid(logit)], dim=1)
    return table.exp()


def factorize_indices(
    indices: Int[Tensor, "*grid"], bits: Sequence[int] = (6, 12), *, codebook_size: int | None = None
) -> tuple[Int[Tensor, "*grid"], ...]:
    """Split indices into smaller ones, as Open-MAGVIT2's transformer predicts them: the first channels, then the rest.

    Args:
        indices: of LFQ codes, 0 to 2^(sum of bits) − 1, any shape.
        bits: channels in each part. Published: 6 and 12 of 18.
        codebook_size: K; given, the bits must sum to log2 K.
    Returns:
        One int64 tensor of indices per part, 0 to 2^bits − 1, the part's first channel as its least significant bit.
    Raises:
        ValueError: bits that do not sum to log2 K, or indices out of range.
    """
    total = _check_bits(bits)
    require(
        codebook_size in (None, 2**total),
        f"bits must sum to log2(codebook_size); got {tuple(bits)}, which address {2**total} codes, not {codebook_size}",
    )
    indices = to_indices(indices)
    check_range("indices", indices, 2**total, f" for bits {tuple(bits)}, which must sum to log2(codebook_size)")
    parts = []
    for count in bits:
        parts.append(indices % 2**count)
        indices = indices // 2**count
    return tuple(parts)


def join_indices(parts: Sequence[Int[Tensor, "*grid"]], bits: Sequence[int] = (6, 12)) -> Int[Tensor, "*grid"]:
    """The indices that `factorize_indices` split: Σ part · 2^(bits before it), int64.

    Args:
        parts: one tensor of indices per part, all of one shape.
        bits: channels in each part. Published: 6 and 12.
    Raises:
        ValueError: another number of parts than of bits, different shapes, or a part out of range.
    """
    _check_bits(bits)
    count = len(parts) if hasattr(parts, "__len__") else 0
    require(count == len(bits), f"bits {tuple(bits)} ask for {len(bits)} parts, got {count}")
    parts = [to_indices(part, f"part {number}") for number, part in enumerate(parts)]
    shapes = [tuple(part.shape) for part in parts]
    require(len(set(shapes)) == 1, f"parts must have one shape, got {', '.join(map(str, shapes))}")
    joined, worth = torch.zeros_like(parts[0], dtype=torch.int64), 1
    for number, (part, count) in enumerate(zip(parts, bits, strict=True)):
        check_range(f"part {number}", part, 2**count, f" for bits {tuple(bits)}")
        joined += part * worth
        worth *= 2**count
    return joined


def _check_bits(bits: Sequence[int]) -> int:
    """Their sum; raises unless each part has a bit and all fit an int64."""
    remedy = f", of bits {bits!r:.60}. Use numbers that sum to at most 62, such as (6, 12)"
    require(
        isinstance(bits, list | tuple) and len(bits) > 0, f"bits must be a list or tuple of numbers; got {bits!r:.60}"
    )
    total = sum(whole_number(f"bits[{part}]", count, 1, hint=remedy) for part, count in enumerate(bits))
    require(total < 63, f"bits must be numbers that sum to at most 62, such as (6, 12); got {bits!r:.60}")
    return total
