"""What explains a collapse: where a run stands in the band in which a softmax teaches, and who moves away from whom.

    logit_scale_band   reach and softmax perplexity if z·C were larger or smaller
    measure_drift      how far features and codes move per step, dead codes apart from living ones

Both need nothing but a run's snapshots, so they work on every run that has some. How long codes live is in `lifetimes`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ibqlab.diagnostics.geometry import gradient_reach, softmax_perplexity
from ibqlab.quantizers.index_backprop import index_backprop

SCALES = tuple(float(scale) for scale in np.logspace(-2, 2, 17))
"""Factors on z·C that are tried, four per decade; 1 is the run itself."""
_PAIRS = 1 << 21
"""Tokens × codes of one scale, at most: 128 tokens of 16,384 codes."""
_LEAST_TOKENS = 16
_MOST_TOKENS = 512


class BandPoint(NamedTuple):
    """One scale of the logits."""

    scale: float
    """Factor on z·C."""
    softmax_perplexity: float
    """Codes per token in softmax(scale · z·C), 1 to K."""
    gradient_reach: float
    """Share of codes whose gradient exceeds 10⁻³ of the largest."""
    tokens: int
    """On which both were measured."""


def logit_scale_band(
    features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"], scales: Sequence[float] = SCALES
) -> list[BandPoint]:
    """Whom index backpropagation would teach if the logits were larger or smaller.

    At small scales the softmax is flat: all codes get the same push, and none is singled out. At large ones it has
    decided: only the chosen code learns, as under VQ. IBQ works in the band between, and a run leaves it when features
    or codes change their length. The gradient is that of mean‖z_q − z‖², the part of IBQ's loss that reaches all codes
    and needs no decoder, with z·C multiplied by the scale inside the softmax alone.

    Args:
        features: encoder outputs; of more than 512 a part, evenly spread, is taken, of large codebooks a smaller one.
        codebook: code vectors of the same dimension.
        scales: factors, > 0.
    Returns:
        One point per scale.
    Raises:
        ValueError: dimensions that differ, no vectors, or NaN or infinity among them.
    Cost: 12·N·K·D operations per scale.
    Source: IBQ eqs. 3–7 and 9.
    """
    features, codebook = (torch.as_tensor(x).detach().float() for x in (features, codebook))
    most = min(_MOST_TOKENS, max(_LEAST_TOKENS, _PAIRS // max(1, len(codebook))))
    features = features[:: -(-len(features) // most) or 1]
    points = []
    for scale in scales:
        perplexity = float(softmax_perplexity(features * scale, codebook).mean())
        codes = codebook.clone().requires_grad_()
        with torch.enable_grad():
            quantized = index_backprop(features * scale, codes, None).quantized
            F.mse_loss(quantized, features).backward()
        points.append(BandPoint(scale, perplexity, gradient_reach(codes.grad), len(features)))
    return points


class Drift(NamedTuple):
    """How far things moved between two snapshots, per training step, as L2 distances."""

    step: int
    """Of the later snapshot."""
    since: int
    """Of the earlier one."""
    features: float
    """Mean over the features of fixed images: the encoder's drift; NaN where these are not in both snapshots."""
    living_codes: float
    """Mean over the codes that the later snapshot counts hits of; NaN where there is none."""
    dead_codes: float
    """Mean over the others; likewise. Far below the features' drift: they are left behind."""


def measure_drift(snapshots: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Drift]:
    """Encoder drift against code drift, between each two snapshots that follow each other.

    A code that no gradient reaches stays where it is while the encoder moves on; that gap is what kills it. A distance
    between two states is no path: what goes forth and back counts as nothing.

    Args:
        snapshots: step and arrays (codebook, counts, and features of the same images where there are any) in ascending
            order; two are held at a time. Those without a codebook are passed over.
    Returns:
        One entry per pair; [] for fewer than two.
    Source: "Beyond Stationarity" (arXiv 2602.18896) holds the encoder's drift to be the cause of collapse.
    """
    drifts: list[Drift] = []
    before: tuple[int, Mapping[str, Any]] | None = None
    for step, arrays in snapshots:
        if "codebook" not in arrays:
            continue
        if before is not None and step > before[0]:
            since, earlier = before
            codes, features = (_moved(name, earlier, arrays) / (step - since) for name in ("codebook", "features"))
            if len(codes):
                alive = np.asarray(arrays["counts"]) > 0
                drifts.append(Drift(step, since, *map(_mean, (features, codes[alive], codes[~alive]))))
        before = step, arrays
    return drifts


def _moved(name: str, earlier: Mapping[str, Any], later: Mapping[str, Any]) -> Float[np.ndarray, " N"]:
    """How far each row of an array moved; no rows where it is missing in one state or has another shape there."""
    states = [np.asarray(arrays.get(name, ()), float) for arrays in (earlier, later)]
    if states[0].shape != states[1].shape or states[0].ndim != 2:
        return np.empty(0)
    return np.linalg.norm(states[1] - states[0], axis=1)


def _mean(values: Float[np.ndarray, "N"]) -> float:
    """The mean; NaN of nothing."""
    return float(values.mean()) if len(values) else float("nan")
