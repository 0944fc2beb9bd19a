"""Where codes and encoder features lie, and which codes learn: distances, norms, and how far a gradient reaches.

Every function computes in float32 whatever the input type – in float64 where numbers are so large that their squares
overflow – and in blocks, so that N × K is never held whole. Neither autocast nor TF32 changes a result.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.base.checks import finite_number, whole_number
from ibqlab.quantizers.blocks import full_precision
from ibqlab.quantizers.vectors import to_vectors

_BLOCK_ELEMENTS = 1 << 24
"""Entries of one block of rows × points, 64 MiB in float32."""
_LARGE = 1e15
"""Numbers up to which sums of products stay within float32, whatever the dimension."""


@dataclass(frozen=True, kw_only=True)
class CodeFeatureDistances:
    """The two one-sided gaps between codebook and features; they fail in different ways.

    A large `code_to_feature` with a small `feature_to_code`: most codes were left behind while a few serve all
    features (collapse). A large `feature_to_code`: the codes do not cover the features (poor reconstruction).
    """

    feature_to_code: float
    """Mean L2 distance from a feature to its nearest code, in the units of the features."""
    code_to_feature: float
    """Mean L2 distance from a code to its nearest feature, in the units of the features."""


@dataclass(frozen=True, kw_only=True)
class NormStatistics:
    """Mean and population standard deviation of the L2 norms of a set of vectors."""

    mean: float
    """Mean norm, in the units of the vectors."""
    std: float
    """Population standard deviation of the norms; 0 for a single vector."""


@dataclass(frozen=True, kw_only=True)
class WinnerMargins:
    """By how much the winning code of each token wins, in two units; means over tokens.

    Small margins: a little noise changes the code, and codes share their tokens. Large ones: the choice is settled, and
    under a softmax only the chosen code learns.
    """

    distance: float
    """1 − d₁/d₂ of the distances to the nearest and the second nearest code, 0 (a tie) to 1."""
    logit: float
    """Gap of the two largest z·C, nats: the softmax prefers the first by a factor of e^gap."""


class ProbeMeasures(NamedTuple):
    """All of these measures of one set of tokens; means over tokens, but `code_to_feature_distance` over codes."""

    softmax_perplexity: float
    feature_to_code_distance: float
    code_to_feature_distance: float
    winner_margin: float
    logit_margin: float


@torch.no_grad()
def winner_margins(features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> WinnerMargins:
    """The lead of the nearest code over the second nearest, and that of the largest dot product.

    Args:
        features: encoder outputs, N at least 1.
        codebook: at least two codes.
    Returns:
        Both margins. Where both distances are 0 the first is 0: a tie.
    Raises:
        ValueError: fewer than two codes, no features, dimensions that differ, or NaN or infinity among the vectors.
    Cost: O(N·K·D) operations, O(2²⁴) entries of memory.
    """
    features, codes = _alike(features, codebook, "features", "codebook")
    if len(codes) < 2 or not len(features):
        raise ValueError(f"margins need a feature and two codes; got {len(features)} features and {len(codes)} codes")
    halves = codes.square().sum(1) / 2
    shares, gaps = [], []
    with full_precision(codes.device):
        for block in features.split(_rows(len(codes))):
            logits = block @ codes.T  # (R, K), never (N, K)
            # Maxima alone take a twentieth of the time of topk. Two equal ones have no gap.
            is_largest = logits == (largest := logits.amax(1, keepdim=True))
            second = logits.masked_fill(is_largest, -torch.inf).amax(1)
            gaps.append(torch.where(is_largest.sum(1) > 1, 0.0, largest[:, 0] - second))
            two = codes[logits.sub_(halves).topk(2, dim=1).indices]  # (R, 2, D): ‖z − c‖² = ‖z‖² − 2 (z·c − ‖c‖²/2)
            near, far = torch.linalg.vector_norm(block[:, None] - two, dim=2).sort(1).values.unbind(1)
            # NaN stays, to be refused below.
            shares.append(torch.where(far == 0, 0.0, 1 - near / far))
    distance = _finite(torch.cat(shares), "features and codebook").clamp(0, 1)
    return WinnerMargins(distance=float(distance.mean()), logit=float(torch.cat(gaps).mean()))


@torch.no_grad()
def nearest_distances(queries: Float[Tensor, "N D"], points: Float[Tensor, "M D"]) -> Float[Tensor, "N"]:
    """How far each query is from its nearest point.

    d_n = min_m ‖q_n − p_m‖. The nearest point is found with ‖p‖² − 2 q·p, and the distance to it is then computed
    from the difference, because the expanded form loses small distances to rounding.

    Args:
        queries: any scale.
        points: at least one, of the same dimension.
    Returns:
        L2 distance per query, ≥ 0, float32.
    Raises:
        ValueError: no points, dimensions that differ, or NaN or infinity among the vectors.
    Cost: O(N·M·D) operations, O(2²⁴) entries of memory.
    """
    queries, points = _alike(queries, points, "queries", "points")
    if len(points) == 0:
        raise ValueError("points must hold at least one vector; got none")
    # The origin changes no distance; near it the expanded form rounds least.
    origin = points.mean(0)
    points = points - origin
    squares = points.square().sum(1)
    distances = []
    with full_precision(points.device):
        for rows in queries.split(_rows(len(points))):
            block = rows - origin  # (R, D); the queries may be a whole codebook
            nearest = (squares - 2 * block @ points.T).argmin(1)  # (R, M) scores, never (N, M)
            distances.append(torch.linalg.vector_norm(block - points[nearest], dim=1))
    return _finite(torch.cat(distances), "queries and points").float()


def code_feature_distances(codebook: Float[Tensor, "K D"], features: Float[Tensor, "N D"]) -> CodeFeatureDistances:
    """The gap between codebook and features, seen from both sides.

    mean_n min_k ‖z_n − c_k‖ and mean_k min_n ‖c_k − z_n‖. Compare with the norms of `norm_statistics`: a gap far above
    the spread of the features means that the two live in different places.

    Args:
        codebook: code vectors.
        features: encoder outputs, N at least 1; a few thousand are enough.
    Returns:
        Both means, in the units of the features.
    Raises:
        ValueError: no features, dimensions that differ, or NaN or infinity among the vectors.
    Cost: O(N·K·D) operations, twice.
    """
    return CodeFeatureDistances(
        feature_to_code=float(nearest_distances(features, codebook).mean()),
        code_to_feature=float(nearest_distances(codebook, features).mean()),
    )


@torch.no_grad()
def norm_statistics(x: Float[Tensor, "N D"]) -> NormStatistics:
    """How long the vectors are: mean and spread of ‖x_n‖.

    Codes much longer or shorter than features tell of a bad start or of drift; under IBQ the product of both norms
    sets how sharp the softmax over codes is.

    Args:
        x: codes or features, N at least 1.
    Returns:
        Mean and population standard deviation, in the units of x.
    Raises:
        ValueError: no vectors, or NaN or infinity among them.
    """
    x = _without_overflow(to_vectors(x, "x"))[0]
    if len(x) == 0:
        raise ValueError("norm_statistics needs at least one vector; got none")
    norms = _finite(torch.linalg.vector_norm(x, dim=1), "vectors")
    return NormStatistics(mean=float(norms.mean()), std=float(norms.std(correction=0)))


@torch.no_grad()
def softmax_perplexity(features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Float[Tensor, "N"]:
    """Over how many codes a token spreads its gradient when the index is backpropagated.

    exp(−Σ_k p_nk ln p_nk) with p_n = softmax(z_n Cᵀ) (eqs. 3–5). Near 1, only the chosen code learns and IBQ acts like
    VQ; near K, every code gets nearly the same push and none is singled out. IBQ works in the band between.

    Args:
        features: encoder outputs, any scale.
        codebook: code vectors of the same dimension.
    Returns:
        Perplexity per token, in codes, 1 to K, float32.
    Raises:
        ValueError: the dimensions differ, or NaN or infinity is among the vectors.
    Cost: O(N·K·D) operations, O(2²⁴) entries of memory.
    Source: IBQ §3.2.
    """
    features, codes = _alike(features, codebook, "features", "codebook")
    if len(codes) == 0:
        raise ValueError("codebook must hold at least one code; got none")
    # An infinite code may have probability 0 and leave no trace in the result.
    _finite(torch.linalg.vector_norm(codes, dim=1), "features and codebook")
    with full_precision(codes.device):
        # (R, K) logits of one block of tokens, never (N, K).
        blocks = [_softmax_entropy(block @ codes.T).exp() for block in features.split(_rows(len(codes)))]
    return _finite(torch.cat(blocks), "features and codebook").float()


@torch.no_grad()
def measure_probe(features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> ProbeMeasures:
    """Distances, softmax perplexity and margins, as the functions for each give them up to rounding.

    Each of those multiplies all tokens by all codes, which is most of what a logged row costs; here that is done once.

    Args:
        features: encoder outputs, N at least 1; a few hundred.
        codebook: at least two codes.
    Raises:
        ValueError: fewer than two codes, no features, dimensions that differ, or NaN or infinity among the vectors.
    Cost: O(N·K·D) operations once, O(2²⁴) entries of memory.
    """
    features, codes = _alike(features, codebook, "features", "codebook")
    if len(codes) < 2 or not len(features):
        raise ValueError(f"a probe needs a feature and two codes; got {len(features)} features and {len(codes)} codes")
    # Around the codes' mean the expanded form of distances rounds least.
    origin = codes.mean(0)
    centred = codes - origin
    halves = centred.square().sum(1) / 2  # (K,)
    nearest, entropies, gaps, shares = halves.new_full((len(codes),), torch.inf), [], [], []
    which = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
    to_codes = []
    with full_precision(codes.device):
        shift = centred @ origin  # (K,): z·c = (z − o)·(c − o) + o·(c − o) + what is the same for all codes of a token
        for first, block in zip(
            range(0, len(features), _rows(len(codes))), features.split(_rows(len(codes))), strict=True
        ):
            products = (block - origin) @ centred.T  # (R, K), never (N, K)
            # The nearest feature of each code, among the blocks so far.
            lengths = (block - origin).square().sum(1, keepdim=True) / 2
            scores, rows = (lengths - products).min(0)
            which = torch.where(scores < nearest, rows + first, which)
            nearest = torch.minimum(nearest, scores)
            two = (products - halves).topk(2, dim=1).indices  # (R, 2): ‖z − c‖² = ‖z‖² − 2 (z·c − ‖c‖²/2)
            near, far = torch.linalg.vector_norm(block[:, None] - codes[two], dim=2).sort(1).values.unbind(1)
            to_codes.append(near)
            shares.append(torch.where(far == 0, 0.0, 1 - near / far))
            logits = products.add_(shift)
            top = logits.topk(2, dim=1).values  # equal ones have no gap
            gaps.append(top[:, 0] - top[:, 1])
            logits.sub_(top[:, :1])
            weights = logits.exp()
            total = weights.sum(1)
            entropies.append(total.log() - weights.mul_(logits).sum(1) / total)
    to_features = torch.linalg.vector_norm(codes - features[which], dim=1)
    tokens = [_finite(torch.cat(values), "features and codebook") for values in (to_codes, entropies, shares, gaps)]
    distances, entropies, shares, gaps = tokens
    return ProbeMeasures(
        feature_to_code_distance=float(distances.mean()),
        code_to_feature_distance=float(_finite(to_features, "features and codebook").mean()),
        softmax_perplexity=float(entropies.clamp_min(0).exp().mean()),
        winner_margin=float(shares.clamp(0, 1).mean()),
        logit_margin=float(gaps.mean()),
    )


@torch.no_grad()
def exact_neighbours(points: Float[Tensor, "N D"], k: int) -> tuple[Int[np.ndarray, "N k"], Float[np.ndarray, "N k"]]:
    """The k nearest points of each point, itself first, without approximation.

    UMAP's own search spends most of a minute compiling before the first answer; for the tens of thousands of points of
    a map the exact search is faster and gives the same result on every machine.

    Args:
        points: distinct or not, any scale.
        k: neighbours per point with the point itself, 1 to N.
    Returns:
        Indices (int32) and L2 distances (float32), nearest first; column 0 is the point itself at distance 0.
    Raises:
        ValueError: k outside 1 to N.
    Cost: O(N²·D) operations, O(2²⁴) entries of memory.
    """
    (points,) = _without_overflow(to_vectors(points, "points"))
    k = whole_number("k", k, least=1)
    if k > len(points):
        raise ValueError(f"k must lie in 1 to {len(points)}, the number of points; got {k}")
    points = points - points.mean(0)
    squares = points.square().sum(1)
    indices, distances = [], []
    for rows in torch.arange(len(points), device=points.device).split(_rows(len(points))):
        with full_precision(points.device):
            scores = squares - 2 * points[rows] @ points.T  # (R, N); ‖p‖² of the row itself changes no order
        # A duplicate, or rounding, must not push a point out of its own first place.
        scores[torch.arange(len(rows)), rows] = -torch.inf
        nearest = scores.topk(k, largest=False).indices
        gaps = torch.linalg.vector_norm(points[nearest] - points[rows, None], dim=2)  # (R, k)
        # Exact distances may order near-ties otherwise than the scores did; the sort keeps the point itself first.
        gaps, order = gaps.sort(dim=1, stable=True)
        indices.append(nearest.gather(1, order))
        distances.append(gaps)
    return torch.cat(indices).cpu().numpy().astype(np.int32), torch.cat(distances).float().cpu().numpy()


@torch.no_grad()
def gradient_reach(gradient: Float[Tensor, "K D"] | None, threshold: float = 1e-3) -> float:
    """Share of codes that a training step moves noticeably.

    |{k : ‖g_k‖ > threshold · max_j ‖g_j‖}| / K. VQ reaches only the codes its tokens chose; index backpropagation can
    reach all, but with a sharp softmax it reaches hardly more than VQ. A code that nothing reaches stays where it is
    while the features move away: that is how codes die.

    Args:
        gradient: gradient of the loss with respect to the codebook after `backward`, any scale or float type. None
            where the codebook is no parameter or got no gradient (moving averages, frozen codes).
        threshold: share of the largest norm above which a code counts as reached, 0 to 1.
    Returns:
        Share of codes, 0 to 1; 0.0 without gradient; nan for a gradient with NaN or infinity, which is no error
        here because mixed precision skips such steps by itself.
    Raises:
        ValueError: threshold outside [0, 1), or no gradient of a codebook.
    Cost: O(K·D) operations and memory, one wait for the device.
    """
    if not 0 <= (threshold := finite_number("threshold", threshold)) < 1:
        raise ValueError(f"threshold must lie in [0, 1): a share of the largest gradient norm; got {threshold}")
    if gradient is None:
        return 0.0
    gradient = to_vectors(gradient, "gradient")
    if not len(gradient):
        raise ValueError("gradient must have one row per code; got none")
    # Squares of float32 gradients below 1e-23 vanish; dividing by the largest entry first keeps them.
    widest = torch.promote_types(gradient.dtype, torch.float32)
    largest = float(torch.linalg.vector_norm(gradient, ord=math.inf, dtype=widest))
    if not math.isfinite(largest):
        return math.nan
    if largest == 0:
        return 0.0
    norms = torch.linalg.vector_norm(gradient.to(widest) / largest, dim=1)
    return float((norms > threshold * norms.max()).float().mean())


def _softmax_entropy(logits: Float[Tensor, "rows K"]) -> Float[Tensor, "rows"]:
    """Entropy in nats of softmax(logits): logsumexp − Σ p · logit, stable for any size of the logits."""
    logits = logits - logits.amax(1, keepdim=True)
    entropy = logits.logsumexp(1) - (logits.softmax(1) * logits).sum(1)
    return entropy.clamp_min(0)


def _rows(columns: int) -> int:
    """Rows of a block with so many columns, at least one."""
    return max(1, _BLOCK_ELEMENTS // max(1, columns))


def _finite(result: Float[Tensor, "N"], inputs: str) -> Float[Tensor, "N"]:
    """A result per vector, refused where NaN or infinity went in: it is in the result then, which is smaller."""
    broken = int((~torch.isfinite(result)).sum())
    if broken:
        raise ValueError(
            f"{inputs} must be finite; NaN or infinity among them reaches {broken:,} of {len(result):,} results: the "
            "run has diverged there, take a snapshot before it"
        )
    return result


def _alike(first: Any, second: Any, first_name: str, second_name: str) -> list[Tensor]:
    """Two lists of vectors of one length on one device, in a type in which their squares do not overflow."""
    first, second = to_vectors(first, first_name), to_vectors(second, second_name)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{first_name} and {second_name} must be (rows, D) with the same dimension D; got {tuple(first.shape)} and "
            f"{tuple(second.shape)}: set code_dim to the encoder's output channels"
        )
    if first.device != second.device:
        raise ValueError(
            f"{first_name} and {second_name} must be on one device; got {first.device} and {second.device}. Move one "
            "with .to(device)"
        )
    return _without_overflow(first, second)


def _without_overflow(*vectors: Tensor) -> list[Tensor]:
    """In float32; in float64 where numbers are so large that their products overflow float32."""
    # Both ends rather than absolute values: no second copy of a codebook at every logged step.
    ends = (torch.stack(v.aminmax()).abs().max() for v in vectors if v.numel())
    largest = max(map(float, ends), default=0.0)
    # Not for NaN and infinity, which no type mends.
    wide = _LARGE < largest < math.inf
    return [vector.double() if wide else vector.float() for vector in vectors]
