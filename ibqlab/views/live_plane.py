"""A run's codes and features in a plane that stays while snapshots are added, for views of a training in progress.

`map_data` fits one plane over all snapshots, which is best to look back with; fitted again at every new one it would
turn under the eye. Here the plane is PCA of the first snapshot, and later ones are placed in it. What is lost is
measured at each: the share of its variance that its own best plane would show and this one does too. Where that falls
below `LEAST_SHARE` a new plane is fitted, and said to be new.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from ibqlab.diagnostics.projection import Projection
from ibqlab.views.subject import ViewError

SHOWN = 2500
"""Codes and features, each, at most; codes in use come on top."""
LEAST_SHARE = 0.5
"""Of the variance of a snapshot's own best plane, below which the plane is fitted again."""
_KEPT = 40
"""Snapshots whose places are kept, for the map's axes."""


@dataclass
class LivePlane:
    """The plane of one run, and the snapshots placed in it."""

    steps: list[int] = field(default_factory=list)
    """Of the snapshots in it, ascending."""
    fitted_at: int = -1
    """Step of the snapshot that it is fitted to; −1 before the first."""
    share: float = 1.0
    """Of the last snapshot: variance shown, as a part of what its own best plane would show."""
    most_hits: int = 2
    """Of a code in any of the snapshots, for one scale of colours."""
    _codes: list[np.ndarray] = field(default_factory=list)
    _ids: list[np.ndarray] = field(default_factory=list)
    _features: list[np.ndarray] = field(default_factory=list)
    _rows: np.ndarray | None = None
    _spread: tuple[float, float] = (0.0, 0.0)
    _size: int = 0
    _middle: np.ndarray | None = None
    _axes: np.ndarray | None = None

    def add(self, step: int, shot: dict[str, np.ndarray]) -> None:
        """Place a snapshot; one that is there already, or older than the last, is left out.

        Args:
            step: of the snapshot.
            shot: its arrays; needs codebook (K, D), features (M, D) and counts (K,).
        Raises:
            ViewError: it lacks them, or holds NaN.
        """
        if self.steps and step <= self.steps[-1]:
            return
        if not {"codebook", "features", "counts"} <= set(shot):
            raise ViewError("no map: the run's snapshots hold no codebook and features, which a map is made of")
        codebook, features, counts = shot["codebook"], shot["features"], np.asarray(shot["counts"])
        if not (np.isfinite(codebook).all() and np.isfinite(features).all()):
            raise ViewError(f"no map of step {step:,}: its snapshot holds NaN, the run has diverged")
        if self._axes is not None and (len(codebook), codebook.shape[1]) != (self._size, len(self._middle)):
            self._forget()  # the run went on with another codebook
        ids = np.union1d(_draw(len(codebook), SHOWN), np.flatnonzero(counts))
        rows = _draw(len(features), SHOWN)
        vectors = np.concatenate([codebook[ids], features[rows]]).astype(np.float64)
        own_middle, own_axes, best, total = _fit(vectors)
        if self._axes is not None:
            spread = ((vectors - own_middle) @ self._axes).var(0)
            self.share = float(spread.sum() / best.sum()) if best.sum() > 0 else 1.0
        if self._axes is None or self.share < LEAST_SHARE:
            self._forget()
            self._middle, self._axes, self.fitted_at, self.share, spread = own_middle, own_axes, step, 1.0, best
        self._size, self._rows = len(codebook), rows
        self._spread = tuple(float(part / total) if total > 0 else 0.0 for part in spread)
        places = ((vectors - self._middle) @ self._axes).astype(np.float32)
        self.steps.append(step)
        self._codes.append(places[: len(ids)])
        self._ids.append(ids)
        self._features.append(places[len(ids) :])
        self.most_hits = max(self.most_hits, int(counts.max()))
        if len(self.steps) > _KEPT:
            for kept in (self.steps, self._codes, self._ids, self._features):
                del kept[1]

    @property
    def projection(self) -> Projection:
        """As the figures of `ibqlab.plots` take it; its last frame is the last snapshot."""
        frames = len(self.steps)
        features = [places[: min(map(len, self._features))] for places in self._features]
        return Projection(
            codes=tuple(self._codes),
            features=tuple(features),
            code_ids=tuple(self._ids),
            feature_ids=(self._rows[: len(features[0])],) * frames,
            codebook_sizes=(self._size,) * frames,
            feature_totals=(len(self._rows),) * frames,
            placed=0,
            method="pca",
            neighbours=None,
            explained_variance=self._spread,
        )

    def describe(self) -> str:
        """How far the plane can be trusted, in a sentence."""
        if len(self.steps) == 1:
            return f"The plane is fitted to the snapshot of step {self.fitted_at:,}; later ones will be placed in it."
        return (
            f"The plane is that of step {self.fitted_at:,}, so what moves is a code or a feature. It shows "
            f"{100 * self.share:.0f} % of what a plane fitted to step {self.steps[-1]:,} would; below "
            f"{100 * LEAST_SHARE:.0f} % it is fitted again."
        )

    def _forget(self) -> None:
        for kept in (self.steps, self._codes, self._ids, self._features):
            kept.clear()


def _draw(number: int, most: int) -> Int[np.ndarray, "R"]:
    """Sorted rows, the same at every call."""
    return np.sort(np.random.default_rng(0).permutation(number)[:most])


def _fit(vectors: Float[np.ndarray, "P D"]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Middle, the two widest directions (D, 2), the variance along each, and the variance of all."""
    middle = vectors.mean(0)
    centred = vectors - middle
    values, directions = np.linalg.eigh(centred.T @ centred / len(vectors))
    axes = directions[:, ::-1][:, :2]
    # An eigenvector's sign is arbitrary: the largest loading is positive.
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], axis=0))
    missing = 2 - axes.shape[1]
    best = np.pad(values[::-1].clip(0)[:2], (0, missing))
    return middle, np.pad(axes, ((0, 0), (0, missing))), best, float(values.clip(0).sum())
