"""One plane for a run's codes and features, fitted once over all snapshots and filled one snapshot after another.

The plane is fitted on a few thousand points; every other point is placed in it afterwards: by PCA exactly, by UMAP
among its nearest neighbours. Snapshots are read three times and never held together, so memory grows with what is
shown and not with what the snapshots hold.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ibqlab.base.progress import CountingLine, notice
from ibqlab.diagnostics.geometry import code_feature_distances, exact_neighbours
from ibqlab.diagnostics.projection import fit_pca
from ibqlab.diagnostics.umap_fit import fit_umap, place_in_umap
from ibqlab.views.snapshot_arrays import NEVER, NOT_STORED
from ibqlab.views.subject import Subject, ViewError

FIT_POINTS = 5000
"""Points that the plane is fitted on, at most, all snapshots together; all others are placed in it."""
DEAD_CODES = 20_000
"""Codes without a hit that a map shows, at most, unless it is told."""
FEATURES = 50_000
"""Features that a map shows, at most."""
FACT_POINTS = 2000
"""Codes and features, each, that the map's honesty is measured on, at most."""
NEIGHBOURS = 10
"""Of a point, that trustworthiness and the share of codes look at."""
METHODS = ("pca", "umap")
FACTS = ("trustworthiness", "codes_among_neighbours", "to_feature", "to_code", "code_rank", "feature_rank")
"""Of a snapshot, measured in the full space: how much of the plane's neighbourhoods is true (0 to 1); share of a code's
nearest points that are codes; mean distance of a code to the nearest feature, and of a feature to the nearest code;
effective ranks of codes and features (the exponential of their spectra's entropy, 1 to D)."""
_UMAP_NEIGHBOURS = 15
_BLOCK = 2**15
"""Vectors that are placed at once: float64 copies of a whole codebook would not fit in memory."""

Arrays = dict[str, np.ndarray]
Place = Callable[[np.ndarray], np.ndarray]


class _Shown(NamedTuple):
    """What a map shows of every snapshot."""

    codes: Int[np.ndarray, "C"]
    features: Int[np.ndarray, "M"]
    anywhere: Int[np.ndarray, "K"]
    """Hits of each code in all snapshots together."""


def fit_map(
    subject: Subject, method: str, *, max_points: int, dead_codes: int | None, progress: bool = True
) -> dict[str, np.ndarray]:
    """The arrays of a map, as `MapData` holds them.

    Args:
        subject: a run with snapshots.
        method: "pca" or "umap".
        max_points: most points in the fit.
        dead_codes: codes shown that no snapshot has in use, at most; None: all.
        progress: show a line on the way.
    Raises:
        ViewError: no snapshot holds codebook and features, or all hold NaN.
        ValueError: a method that there is not.
    Cost: three readings of the snapshots; for UMAP half a minute and O(points · max_points) for placing.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}; got {method!r:.60}")
    steps, shots, left_out = _survey(subject)
    anywhere = sum(shot["counts"] for shot in shots)
    least = min(shot["features"] for shot in shots)
    shown = _Shown(_shown_codes(anywhere, dead_codes), _draw(least, FEATURES), anywhere)
    place = _fit_plane(subject, steps, shown, method, max_points)
    frames: list[Arrays] = []
    before: Arrays = {}
    spread = _Spread()
    with CountingLine(f"map of {subject.name}", len(steps), "snapshots", progress) as line:
        for step in steps:
            frame, before = _frame(step, subject.snapshot(step), shown, place, before)
            for points in ("codes", "features"):
                spread.add(before[points], frame[points])
            frames.append(frame)
            line.advance()
    stacked = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
    return stacked | {
        "steps": np.array(steps),
        "code_ids": shown.codes,
        "codebook_size": np.array(len(anywhere)),
        "feature_total": np.array(least),
        "explained": spread.shares if method == "pca" else np.zeros(0),
        "left_out": np.array(left_out),
    }


def _survey(subject: Subject) -> tuple[list[int], list[dict[str, Any]], tuple[int, int]]:
    """Steps that a map can show, with their hits; and how many were left out for NaN, and for another codebook.

    A codebook is another one where its size or its dimension is.
    """
    complete, broken, shots = 0, 0, {}
    for step in subject.steps:
        shot = subject.snapshot(step)
        if not {"codebook", "features", "counts"} <= set(shot):
            continue
        complete += 1
        if not (np.isfinite(shot["codebook"]).all() and np.isfinite(shot["features"]).all()):
            broken += 1
            continue
        shots[step] = {"counts": shot["counts"], "features": len(shot["features"]), "shape": shot["codebook"].shape}
    if not shots:
        why = "hold NaN or infinity: the run has diverged"
        if not complete:
            why = "hold no codebook and features, or no counts of hits, which a map is made of"
        raise ViewError(f"no map of {subject.name}: its snapshots {why}")
    # Runs that go on with another codebook have no common points; the latest one is shown.
    shape = shots[max(shots)]["shape"]
    steps = [step for step in sorted(shots) if shots[step]["shape"] == shape]
    return steps, [shots[step] for step in steps], (broken, len(shots) - len(steps))


def _draw(total: int, most: int) -> np.ndarray:
    """Sorted random rows, the same at every snapshot."""
    return np.sort(np.random.default_rng(0).permutation(total)[:most])


def _shown_codes(anywhere: np.ndarray, dead_codes: int | None) -> np.ndarray:
    """All codes that any snapshot has in use, and dead ones as far as there is room."""
    dead = np.flatnonzero(anywhere == 0)
    if dead_codes is not None:
        dead = dead[_draw(len(dead), dead_codes)]
    return np.union1d(np.flatnonzero(anywhere), dead)


def _fit_plane(subject: Subject, steps: list[int], shown: _Shown, method: str, max_points: int) -> Place:
    """What gives any vector its place.

    Half of the points are codes and half features, more where the other has fewer; of the codes at most a quarter are
    dead where there are others.
    """
    in_use, dead, rows = np.flatnonzero(shown.anywhere), np.flatnonzero(shown.anywhere == 0), shown.features
    each = max(2, max_points // len(steps))
    code_room = max(each // 2, each - len(rows))
    live = in_use[_draw(len(in_use), max(code_room - min(len(dead), code_room // 4), 1))]
    codes = np.union1d(live, dead[_draw(len(dead), code_room - len(live))])
    features = rows[_draw(len(rows), max(each - len(codes), 1))]
    vectors = []
    for step in steps:
        shot = subject.snapshot(step)
        vectors += [shot["codebook"][codes], shot["features"][features]]
    # A code that never moved would be its own copy in every snapshot, and all its neighbours would be itself.
    distinct, copies = np.unique(np.concatenate(vectors).astype(np.float32), axis=0, return_counts=True)
    if method == "pca":
        _, place, _ = fit_pca(distinct, copies)
        return partial(_place_blocks, place)
    notice(f"map of {subject.name}: fitting UMAP over {len(steps)} snapshots, once")
    plane, neighbours = fit_umap(distinct, _UMAP_NEIGHBOURS, 0)
    place = partial(place_in_umap, fitted=distinct, plane=plane, neighbours=neighbours)
    return partial(_place_blocks, place)


def _place_blocks(place: Place, vectors: np.ndarray) -> np.ndarray:
    """Places of many vectors, some after others."""
    blocks = [place(vectors[start : start + _BLOCK]) for start in range(0, len(vectors), _BLOCK)]
    return np.concatenate(blocks) if blocks else np.empty((0, 2), np.float32)


def _place_codes(book: np.ndarray, before: Arrays, place: Place) -> np.ndarray:
    """Places of the codes; those that have not moved since the snapshot before keep theirs."""
    if not before:
        return place(book)
    moved = (book != before["codes"]).any(1)
    codes = before["places"].copy()
    codes[moved] = place(book[moved])
    return codes


class _Spread:
    """Variance of all points that are shown, in the full space and along the plane's axes, over all snapshots.

    The fit's own shares are of a few thousand sampled points, among which codes that never moved count once.
    """

    def __init__(self) -> None:
        self._middle: np.ndarray | None = None
        self._count, self._squares = 0, 0.0
        self._sums: np.ndarray = np.zeros(0)
        self._plane_sums, self._plane_squares = np.zeros(2), np.zeros(2)

    def add(self, vectors: np.ndarray, places: np.ndarray) -> None:
        """Points and their places, block by block in float64."""
        for start in range(0, len(vectors), _BLOCK):
            rows = vectors[start : start + _BLOCK].astype(np.float64)
            if self._middle is None:
                self._middle, self._sums = rows.mean(0), np.zeros(rows.shape[1])
            rows -= self._middle  # else squares of large means swallow small variances
            plane = places[start : start + _BLOCK].astype(np.float64)
            self._count += len(rows)
            self._sums += rows.sum(0)
            self._squares += float(np.square(rows).sum())
            self._plane_sums += plane.sum(0)
            self._plane_squares += np.square(plane).sum(0)

    @property
    def shares(self) -> Float[np.ndarray, "2"]:
        """Of the variance along both axes; 0 where all points are one."""
        total = self._squares - np.square(self._sums).sum() / self._count
        plane = self._plane_squares - np.square(self._plane_sums) / self._count
        return (plane / total).clip(0, 1) if total > 0 else np.zeros(2)


def _frame(step: int, shot: Arrays, shown: _Shown, place: Place, before: Arrays) -> tuple[Arrays, Arrays]:
    """What a map holds of one snapshot; and its vectors with the codes' places, from which the next one goes on."""
    ids, rows = shown.codes, shown.features
    book, features = shot["codebook"][ids].astype(np.float32), shot["features"][rows].astype(np.float32)
    codes, places = _place_codes(book, before, place), place(features)
    drift = np.linalg.norm(book - before["codes"], axis=1) if before else np.zeros(len(ids))
    reach = shot["gradient_norm"][ids] if "gradient_norm" in shot else np.full(len(ids), np.nan)
    assignments = shot["assignments"][rows] if "assignments" in shot else np.full(len(rows), -1)
    arrays = {
        "codes": codes.astype(np.float32),
        "features": places.astype(np.float32),
        "hits": shot["counts"][ids].astype(np.int32),
        "idle": _idle(step, shot, ids).astype(np.int32),
        "norms": np.linalg.norm(book, axis=1).astype(np.float32),
        "drift": drift.astype(np.float32),
        "reach": reach.astype(np.float32),
        "assignments": assignments.astype(np.int32),
        "tokens": np.array(int(shot["counts"].sum())),
        "facts": measure_facts(book, features, codes, places),
    }
    return arrays, {"codes": book, "features": features, "places": codes}


def _idle(step: int, shot: Arrays, ids: np.ndarray) -> np.ndarray:
    """Steps since the last hit of some codes, `NEVER`, or `NOT_STORED`."""
    if "last_hit" not in shot:
        return np.full(len(ids), NOT_STORED)
    last = shot["last_hit"][ids]
    return np.where(last < 0, NEVER, np.maximum(step - last, 0))


def measure_facts(
    codes: np.ndarray, features: np.ndarray, code_places: np.ndarray, feature_places: np.ndarray
) -> np.ndarray:
    """One row of `FACTS`, on a sample of codes and features."""
    from sklearn.manifold import trustworthiness  # noqa: PLC0415 - a second to import, and read maps need it not

    c, f = _draw(len(codes), FACT_POINTS), _draw(len(features), FACT_POINTS)
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
