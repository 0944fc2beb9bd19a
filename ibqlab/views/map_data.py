"""A run's codes and features in one plane, at every snapshot, with what a map may colour them by.

`map_run_codes` fits the plane once over all snapshots and stores it; a view then moves points, never the map.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from ibqlab.base.progress import notice
from ibqlab.diagnostics.geometry import code_feature_distances, exact_neighbours
from ibqlab.diagnostics.projection import Projection, project_codes
from ibqlab.views.subject import Subject, ViewError

FIT_POINTS = 5000
"""Points that the plane is fitted on, at most, all snapshots together; further codes are placed in it."""
FACT_POINTS = 2000
"""Codes and features, each, that the map's honesty is measured on, at most."""
NEIGHBOURS = 10
"""Of a point, that trustworthiness and the share of codes look at."""
METHODS = ("pca", "umap")


@dataclass(frozen=True, kw_only=True)
class MapData:
    """F snapshots of C codes and M features in one plane."""

    name: str
    """Of the run."""
    steps: tuple[int, ...]
    """Training steps of the snapshots."""
    method: str
    """"pca" or "umap"."""
    code_ids: Int[np.ndarray, "C"]
    """Which codes are shown: all that any snapshot has in use, and dead ones as far as there is room."""
    codes: Float[np.ndarray, "F C 2"]
    """Their places."""
    features: Float[np.ndarray, "F M 2"]
    """Places of the same M features."""
    hits: Int[np.ndarray, "F C"]
    """Of each code in the snapshot's validation tokens."""
    idle: Int[np.ndarray, "F C"]
    """Steps since the code's last hit in training; −1: never hit."""
    norms: Float[np.ndarray, "F C"]
    """Norm of the code vector, in the features' units."""
    drift: Float[np.ndarray, "F C"]
    """How far the code has moved since the snapshot before, likewise; 0 at the first."""
    assignments: Int[np.ndarray, "F M"]
    """Code of each feature; −1 where it was not stored."""
    tokens: Int[np.ndarray, "F"]
    """Tokens that the hits were counted in."""
    codebook_size: int
    """K, of which C are shown."""
    feature_total: int
    """Features that the snapshots hold, of which M are shown."""
    explained: tuple[float, float] | None
    """Share of the variance along each axis, by PCA."""
    facts: Float[np.ndarray, "F 6"]
    """Per snapshot the columns of `FACTS`."""

    @cached_property
    def bounds(self) -> tuple[float, float, float, float]:
        """Least and largest x, least and largest y, over all snapshots."""
        points = np.concatenate([self.codes.reshape(-1, 2), self.features.reshape(-1, 2)])
        (left, bottom), (right, top) = points.min(0), points.max(0)
        return float(left), float(right), float(bottom), float(top)

    @property
    def projection(self) -> Projection:
        """The same as the figures of `ibqlab.plots` take it."""
        frames, features = len(self.steps), self.features.shape[1]
        return Projection(
            codes=tuple(self.codes),
            features=tuple(self.features),
            code_ids=(self.code_ids,) * frames,
            feature_ids=(np.arange(features),) * frames,
            codebook_sizes=(self.codebook_size,) * frames,
            feature_totals=(self.feature_total,) * frames,
            placed=0,
            method=self.method,
            neighbours=None,
            explained_variance=self.explained,
        )

    def counts(self, frame: int) -> Int[np.ndarray, "K"]:
        """Hits of the whole codebook; codes that are not shown have none."""
        counts = np.zeros(self.codebook_size, np.int64)
        counts[self.code_ids] = self.hits[frame]
        return counts

    def in_use(self, frame: int) -> int:
        """Codes with a hit; all of them are shown."""
        return int((self.hits[frame] > 0).sum())


FACTS = ("trustworthiness", "codes_among_neighbours", "to_feature", "to_code", "code_rank", "feature_rank")
"""Of a snapshot, measured in the full space: how much of the plane's neighbourhoods is true (0 to 1); share of a code's
nearest points that are codes; mean distance of a code to the nearest feature, and of a feature to the nearest code;
effective ranks of codes and features (the exponential of their spectra's entropy, 1 to D)."""


def map_run_codes(subject: Subject, method: str = "pca", *, max_points: int = FIT_POINTS) -> MapData:
    """The map of a run, computed once and stored in its folder.

    Args:
        subject: a run whose snapshots hold codebook and features.
        method: "pca" (distances, no time) or "umap" (neighbourhoods; half a minute the first time).
        max_points: most points in the fit.
    Raises:
        ViewError: no snapshot, or none with codebook and features.
        ValueError: NaN in them, or a method that there is not.
    """
    subject.require_run()
    steps = subject.steps
    if not steps:
        raise ViewError(f"{subject.name} has no snapshot yet; the first comes with its first validation")
    notice_long = method == "umap"

    def build() -> dict[str, np.ndarray]:
        if notice_long:
            notice(f"map of {subject.name}: fitting UMAP over {len(steps)} snapshots, once")
        return _fit(subject, steps, method, max_points)

    arrays = subject.store.get(
        "map", build, method=method, max_points=max_points, snapshots=subject.snapshot_marks(), version=1
    )
    explained = tuple(map(float, arrays["explained"])) if len(arrays["explained"]) else None
    names = ("code_ids", "codes", "features", "hits", "idle", "norms", "drift", "assignments", "tokens", "facts")
    return MapData(
        name=subject.name,
        steps=tuple(map(int, arrays["steps"])),
        method=method,
        codebook_size=int(arrays["codebook_size"]),
        feature_total=int(arrays["feature_total"]),
        explained=explained,
        **{name: arrays[name] for name in names},
    )


def _fit(subject: Subject, steps: list[int], method: str, max_points: int) -> dict[str, np.ndarray]:
    shots = [subject.snapshot(step) for step in steps]
    usable = [number for number, shot in enumerate(shots) if {"codebook", "features"} <= set(shot) and _is_finite(shot)]
    if not usable:
        has = {"codebook", "features"} <= set(shots[-1])
        why = "hold NaN: the run has diverged" if has else "hold no codebook and features, which a map is made of"
        raise ViewError(f"no map of {subject.name}: its snapshots {why}")
    shots, steps = [shots[number] for number in usable], [steps[number] for number in usable]
    # Runs that go on with another codebook have no common points; the latest size is shown.
    size = len(shots[-1]["codebook"])
    same = [number for number, shot in enumerate(shots) if len(shot["codebook"]) == size]
    shots, steps = [shots[number] for number in same], [steps[number] for number in same]
    # Features are those of the same images at every snapshot; where a last batch was smaller, of those all have.
    least = min(len(shot["features"]) for shot in shots)
    anywhere = sum(shot["counts"].astype(np.int64) for shot in shots)
    plane = project_codes(
        [shot["codebook"] for shot in shots],
        [shot["features"][:least] for shot in shots],
        method=method,
        counts=[anywhere] * len(shots),
        max_points=max_points,
    )
    ids, rows = plane.code_ids[0], plane.feature_ids[0]
    books = [shot["codebook"][ids] for shot in shots]
    moved = [np.linalg.norm(after - before, axis=1) for before, after in pairwise(books)]
    last_hits = [shot.get("last_hit", np.full(size, -1))[ids] for shot in shots]
    return {
        "steps": np.array(steps),
        "code_ids": ids,
        "codes": np.stack(plane.codes).astype(np.float32),
        "features": np.stack(plane.features).astype(np.float32),
        "hits": np.stack([shot["counts"][ids] for shot in shots]),
        "idle": np.stack([np.where(last < 0, -1, step - last) for step, last in zip(steps, last_hits, strict=True)]),
        "norms": np.stack([np.linalg.norm(book, axis=1) for book in books]).astype(np.float32),
        "drift": np.stack([np.zeros(len(ids)), *moved]).astype(np.float32),
        "assignments": np.stack([shot.get("assignments", np.full(least, -1))[:least][rows] for shot in shots]),
        "tokens": np.array([int(shot["counts"].sum()) for shot in shots]),
        "codebook_size": np.array(size),
        "feature_total": np.array(least),
        "explained": np.array(plane.explained_variance or ()),
        "facts": np.stack(
            [
                _facts(book, shot["features"][:least][rows], plane.codes[number], plane.features[number])
                for number, (book, shot) in enumerate(zip(books, shots, strict=True))
            ]
        ),
    }


def _is_finite(shot: dict[str, np.ndarray]) -> bool:
    return bool(np.isfinite(shot["codebook"]).all() and np.isfinite(shot["features"]).all())


def _facts(codes: np.ndarray, features: np.ndarray, code_places: np.ndarray, feature_places: np.ndarray) -> np.ndarray:
    """One row of `FACTS`, on a sample of codes and features."""
    from sklearn.manifold import trustworthiness  # noqa: PLC0415 - a second to import, and read maps need it not

    draw = np.random.default_rng(0)
    c = np.sort(draw.permutation(len(codes))[:FACT_POINTS])
    f = np.sort(draw.permutation(len(features))[:FACT_POINTS])
    vectors = np.concatenate([codes[c], features[f]]).astype(np.float32)
    places = np.concatenate([code_places[c], feature_places[f]])
    near = min(NEIGHBOURS, (len(vectors) - 1) // 2)
    if near < 1:
        return np.full(len(FACTS), np.nan, np.float32)
    trusted = trustworthiness(vectors, places, n_neighbors=near)
    neighbours, _ = exact_neighbours(vectors, near + 1)
    among = float((neighbours[: len(c), 1:] < len(c)).mean())
    distances = code_feature_distances(vectors[: len(c)], vectors[len(c) :])
    ranks = effective_rank(codes[c]), effective_rank(features[f])
    return np.array([trusted, among, distances.code_to_feature, distances.feature_to_code, *ranks], np.float32)


def effective_rank(vectors: Float[np.ndarray, "N D"]) -> float:
    """exp of the entropy of the singular values' shares, of vectors around their mean: 1 on a line, D in a ball.

    Source: Roy & Vetterli 2007, The effective rank.
    """
    values = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False).astype(np.float64)
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def describe_frame(data: MapData, frame: int) -> str:
    """What a flat map cannot show, in sentences, for one snapshot."""
    trusted, among, to_feature, to_code, code_rank, feature_rank = map(float, data.facts[frame])
    codes, features = len(data.code_ids), data.features.shape[1]
    plane = "PCA" if data.method == "pca" else "UMAP"
    shares = ""
    if data.explained:
        shares = f" ({100 * data.explained[0]:.0f} % and {100 * data.explained[1]:.0f} % of the variance)"
    return (
        f"{plane} over {len(data.steps)} snapshots{shares}: {codes:,} of {data.codebook_size:,} codes and {features:,} "
        f"of {data.feature_total:,} features shown; {data.in_use(frame):,} codes in use in {int(data.tokens[frame]):,} "
        f"tokens. In the full space: a code lies {to_feature:.3g} from its nearest feature, a feature {to_code:.3g} "
        f"from its nearest code; {100 * among:.0f} % of a code's {NEIGHBOURS} nearest points are codes; effective rank "
        f"{code_rank:.1f} of codes, {feature_rank:.1f} of features. Trustworthiness of the plane: {trusted:.2f} of 1."
    )
