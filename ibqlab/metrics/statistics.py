"""Distances between sets of features: Fréchet, kernel, class score, precision and recall.

Means and covariances are gathered batch by batch in float64, so any number of images fits in memory; KID, precision and
recall have to keep the features themselves (n × 2048 float32: 410 MB for 50,000 images). The last step is
torch-fidelity's in each case, in float64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ibqlab.base.checks import require, whole_number
from ibqlab.base.processes import sum_over_processes
from ibqlab.metrics.weights import import_metric_package
from ibqlab.quantizers.vectors import to_vectors

PR_ROWS = 2_000
"""Rows of the table of distances that are held at a time."""
SEEDS = 2**32 - 1
"""Largest seed that NumPy's older generator takes, which torch-fidelity uses."""
SUBSETS = 10**6
"""Most pairs of subsets; published: 100."""


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """A set of images in feature space: mean and covariance, which the Fréchet distance needs, and more on demand."""

    mean: Float[np.ndarray, " D"]
    """float64."""
    covariance: Float[np.ndarray, "D D"]
    """float64, divided by count − 1."""
    count: int | None
    """Images; None when a published file does not tell."""
    features: Float[Tensor, "N D"] | None = None
    """The features themselves, float32, in the order of the images, on the CPU; None unless a metric needs them."""
    logits: Float[Tensor, "N C"] | None = None
    """Likewise."""


class RunningStatistics:
    """Mean and covariance of a stream, by pairwise updates that lose nothing to cancellation (Chan et al. 1979).

    Args:
        dimension: D, numbers per feature.
        device: where the sums live.
    """

    def __init__(self, dimension: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)

    def update(self, features: Float[Tensor, "B D"]) -> None:
        """Add a batch.

        Raises:
            ValueError: NaN or infinity among the features.
        """
        _check_finite(features)
        batch = features.to(self.mean.device, torch.float64)
        total = self.count + len(batch)
        # Sums about the batch's own mean, then the step between both means: no difference of two large sums.
        centred = batch - batch.mean(0)
        step = batch.mean(0) - self.mean
        self.scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(batch) / total)
        self.mean += step * (len(batch) / total)
        self.count = total

    def result(self) -> FeatureStatistics:
        """Over all processes; every process must call it.

        Raises:
            ValueError: fewer than 2 images.
        """
        counts = sum_over_processes(torch.tensor(float(self.count), dtype=torch.float64, device=self.mean.device))
        total = round(counts.item())
        require(total >= 2, f"a covariance needs at least 2 images; got {total}")
        mean = sum_over_processes(self.mean * (self.count / total))
        step = self.mean - mean
        scatter = sum_over_processes(self.scatter + self.count * torch.outer(step, step))
        covariance = (scatter / (total - 1)).cpu().numpy()
        return FeatureStatistics(mean=mean.cpu().numpy(), covariance=covariance, count=total)


class Score(NamedTuple):
    """A value that is a mean over splits or subsets."""

    mean: float
    deviation: float
    """Standard deviation over the splits or subsets."""
    parts: int
    """How many there were."""


class PrecisionRecall(NamedTuple):
    """Two shares, 0 to 1."""

    precision: float
    """Of the samples, inside the manifold of the reference: how good they are."""
    recall: float
    """Of the reference, inside the manifold of the samples: how much of it they cover."""


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Fréchet distance of two normal distributions, ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½); symmetric.

    FID is this on Inception's features and nothing else. 0: equal moments. Biased upward by few images.

    Args:
        a, b: statistics of the same features.
    Returns:
        ≥ 0 up to rounding. The trace of the root comes from the eigenvalues of Σ₁Σ₂, which also holds for singular
        covariances; the published code takes a matrix root and agrees to 1e-7 where that root exists.
    Raises:
        ValueError: different dimensions, or not finite.
    Cost: O(D³), about 20 s on one core for D = 2048.
    Source: Heusel et al. 2017; Dowson and Landau 1982.
    """
    require(
        a.mean.shape == b.mean.shape,
        f"both statistics must have one feature dimension; got {a.mean.size} and {b.mean.size}: were they made by the "
        "same feature extractor?",
    )
    for statistics in (a, b):
        for array in (statistics.mean, statistics.covariance):
            _check_finite(torch.as_tensor(array, device="cpu"))
    fid = import_metric_package("torch_fidelity.metric_fid")
    moments = [
        {"mu": np.asarray(side.mean, np.float64), "sigma": np.asarray(side.covariance, np.float64)} for side in (a, b)
    ]
    return fid.fid_statistics_to_metric(*moments, verbose=False)[fid.KEY_METRIC_FID]


def inception_score(
    logits: Float[Tensor, "N C"] | Float[np.ndarray, "N C"], *, splits: int = 10, split_size: int = 0, seed: int = 2020
) -> Score:
    """exp of the mean KL(p(y|x) ‖ p(y)), mean over splits: sharp and varied classes score high, 1 to C.

    Args:
        logits: of a classifier, one row per image.
        splits: equal splits after a shuffle (torch-fidelity).
        split_size: above 0: consecutive splits of that many rows in the given order, the last one shorter (ADM);
            `splits` and `seed` then mean nothing. Samples that are sorted by class score low: shuffle them first.
        seed: of the shuffle.
    Raises:
        ValueError: fewer images than splits, or not finite.
    Source: Salimans et al. 2016; guided-diffusion's evaluator; torch-fidelity.
    """
    split_size = whole_number("split_size", split_size, 0)
    splits, seed = whole_number("splits", splits, 1), whole_number("seed", seed, 0, SEEDS)
    isc = import_metric_package("torch_fidelity.metric_isc")
    rows = _matrix("logits", logits, least=1 if split_size else splits)
    if not split_size:
        score = isc.isc_features_to_metric(rows, splits=splits, shuffle=True, rng_seed=seed)
        return Score(score[isc.KEY_METRIC_ISC_MEAN], score[isc.KEY_METRIC_ISC_STD], splits)
    scores = [
        isc.isc_features_to_metric(split_rows, splits=1, shuffle=False)[isc.KEY_METRIC_ISC_MEAN]
        for split_rows in rows.split(split_size)
    ]
    return Score(float(np.mean(scores)), float(np.std(scores)), len(scores))


def kernel_distance(
    samples: Float[Tensor, "N D"] | Float[np.ndarray, "N D"],
    reference: Float[Tensor, "M D"] | Float[np.ndarray, "M D"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> Score:
    """Squared maximum mean discrepancy with the kernel (x·y/D + 1)³, unbiased, mean over random subsets.

    KID is this on Inception's features. Around 0, also slightly below: same distribution. No bias from few images.

    Args:
        samples, reference: features, at least `subset_size` rows each.
        subsets: how many pairs of subsets.
        subset_size: rows of each, drawn without replacement.
        seed: of the draws, which are torch-fidelity's.
    Raises:
        ValueError: fewer images than a subset holds, different dimensions, or not finite.
    Source: Bińkowski et al. 2018; torch-fidelity, here in float64.
    """
    subsets = whole_number("subsets", subsets, 1, SUBSETS)
    subset_size, seed = whole_number("subset_size", subset_size, 2), whole_number("seed", seed, 0, SEEDS)
    kid = import_metric_package("torch_fidelity.metric_kid")
    score = kid.kid_features_to_metric(
        *_two_matrices(samples, reference, least=subset_size),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=seed,
        verbose=False,
    )
    return Score(score[kid.KEY_METRIC_KID_MEAN], score[kid.KEY_METRIC_KID_STD], subsets)


def precision_recall(
    samples: Float[Tensor, "N D"] | Float[np.ndarray, "N D"],
    reference: Float[Tensor, "M D"] | Float[np.ndarray, "M D"],
    *,
    neighbours: int = 3,
) -> PrecisionRecall:
    """Improved precision and recall: shares inside the other set's manifold.

    A set's manifold: balls around its features, each with the distance to its k-th nearest other feature as radius.

    Args:
        samples, reference: features, at least k + 1 rows each.
        neighbours: k. Published: 3.
    Raises:
        ValueError: too few images, different dimensions, or not finite.
    Cost: O((N + M)²·D) operations, O(2,000 · (N + M)) memory beside the features in float64.
    Source: Kynkäänniemi et al. 2019. The published evaluator takes distances in float16 where they fit, ours float64.
    """
    neighbours = whole_number("neighbours", neighbours, 1)
    prc = import_metric_package("torch_fidelity.metric_prc")
    score = prc.prc_features_to_metric(
        *_two_matrices(samples, reference, least=neighbours + 1),
        prc_neighborhood=neighbours,
        prc_batch_size=PR_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return PrecisionRecall(score[prc.KEY_METRIC_PRECISION], score[prc.KEY_METRIC_RECALL])


def _two_matrices(samples: Tensor | np.ndarray, reference: Tensor | np.ndarray, least: int) -> tuple[Tensor, Tensor]:
    a, b = _matrix("samples", samples, least), _matrix("reference", reference, least)
    require(
        a.shape[1] == b.shape[1],
        f"samples and reference must have one feature dimension; got {a.shape[1]} and {b.shape[1]}",
    )
    return a, b


def _matrix(name: str, values: Tensor | np.ndarray, least: int) -> Float[Tensor, "N D"]:
    rows = to_vectors(values, name)
    require(
        len(rows) >= least, f"{name} must be (N, D) with at least {least} rows, one per image; got {tuple(rows.shape)}"
    )
    _check_finite(rows)
    return rows.detach().cpu().double()


def _check_finite(values: Tensor) -> None:
    require(
        bool(torch.isfinite(values).all()),
        "features must be finite; got NaN or infinity. Look at the images and the weights of the extractor",
    )
