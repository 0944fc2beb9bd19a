"""UMAP on exact neighbours, the same on every machine, and places for points that come later."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float

from ibqlab.diagnostics.geometry import exact_neighbours

_EPOCHS = 200
_SMALLEST = 5
_FARTHEST_NORM = 1e6
"""Median norms: UMAP sees no point beyond."""


def fit_umap(points: Float[np.ndarray, "P D"], neighbours: int, seed: int) -> tuple[Float[np.ndarray, "P 2"], int]:
    """Positions by UMAP on exact neighbours, and the neighbours used."""
    if len(points) < _SMALLEST:
        raise ValueError(
            f"UMAP needs at least {_SMALLEST} distinct points; got {len(points)} (codes and features together, "
            "equal rows counted once): pass method='pca'"
        )
    points = _within_reach(points)
    # UMAP refuses a neighbourhood that holds every point.
    neighbours = min(neighbours, len(points) - 1)
    knn = exact_neighbours(torch.from_numpy(points), neighbours)
    with _threads_kept(), warnings.catch_warnings():
        # It warns that new points cannot be placed later, and of points far from all others; neither matters here.
        warnings.simplefilter("ignore")
        mapper = _import_umap().UMAP(
            n_neighbors=neighbours,
            n_epochs=_EPOCHS,
            # The spectral start needs more points than this to have eigenvectors to start from.
            init="spectral" if len(points) > 4 * _SMALLEST else "random",
            precomputed_knn=knn,
            force_approximation_algorithm=True,
            random_state=seed,
            n_jobs=1,
        )
        return mapper.fit_transform(points).astype(np.float32), neighbours


def place_in_umap(
    points: Float[np.ndarray, "R D"],
    *,
    fitted: Float[np.ndarray, "P D"],
    plane: Float[np.ndarray, "P 2"],
    neighbours: int,
) -> Float[np.ndarray, "R 2"]:
    """Positions for further points in a finished UMAP: the mean of their neighbours', weighted by nearness.

    Weights are 1 / distance², so that a point which equals a fitted one gets its position.
    """
    if not len(points):
        return np.empty((0, 2), np.float32)
    both = torch.from_numpy(_within_reach(np.concatenate([fitted, points])))
    fitted_rows, point_rows = both[: len(fitted)], both[len(fitted) :]
    parts = []
    for rows in point_rows.split(max(1, 2**22 // len(fitted))):
        # (R, P) distances of one block; only the nearest few are kept.
        nearest = torch.cdist(rows, fitted_rows).topk(neighbours, largest=False).indices
        # cdist rounds; the distances that weigh are exact.
        gaps, order = torch.linalg.vector_norm(fitted_rows[nearest] - rows[:, None], dim=2).sort(dim=1)
        nearest = nearest.gather(1, order)
        weights = (gaps / gaps[:, :1].clamp_min(1e-6)).clamp_min(1e-6) ** -2.0
        places = torch.from_numpy(plane)[nearest]
        parts.append((weights[..., None] * places).sum(1) / weights.sum(1, keepdim=True))
    return torch.cat(parts).numpy()


def _within_reach(points: Float[np.ndarray, "P D"]) -> Float[np.ndarray, "P D"]:
    """Points in units of their median norm, those beyond a million of them brought nearer along their direction.

    Neighbourhoods need no scale, and squares of 10¹⁹ overflow float32.
    """
    wide = points.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = np.median(norms) or norms.max() or 1.0
    if unit * 1e-12 < 1 < unit * 1e12 and norms.max() <= _FARTHEST_NORM * unit:
        return points
    return (wide / np.maximum(unit, norms / _FARTHEST_NORM)).astype(np.float32)


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Give torch back its number of threads: numba sets it for the whole process, and a run trained afterwards would
    differ in the last bits from one trained before."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _import_umap() -> ModuleType:
    """umap-learn, imported late: it compiles for seconds and training machines do without it.

    It keeps the machine code of some functions on disk and compiles three more in every process. Asking numba to keep
    these as well takes about eight seconds off each later process's first map and changes no result.
    """
    try:
        import umap  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "method='umap' needs umap-learn, which is not installed: pip install umap-learn, or pass method='pca'"
        ) from error
    for module, name in (
        (umap.umap_, "smooth_knn_dist"),
        (umap.umap_, "compute_membership_strengths"),
        (umap.layouts, "_nb_optimize_layout_euclidean_single_epoch"),
    ):
        function = getattr(module, name, None)
        # Another version may name them otherwise; then it is only slower.
        if hasattr(function, "enable_caching"):
            function.enable_caching()
    return umap
