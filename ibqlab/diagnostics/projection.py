"""One map for codes and encoder features, through training.

Maps fitted separately cannot be compared: what moved may be the map. Here codes of every snapshot and the features are
fitted together, once, so that a slider over snapshots moves points within a fixed space. A map bends distances; read
it beside the numbers of `code_feature_distances`.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.diagnostics.geometry import exact_neighbours

PROJECTION_METHODS = ("umap", "pca")
_UMAP_EPOCHS = 200
_UMAP_SMALLEST = 5


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Positions of codes and features in one jointly fitted plane, one frame per snapshot."""

    codes: tuple[np.ndarray, ...]
    """Per frame, float32 (kept codes, 2): positions of the codes that were kept."""
    features: tuple[np.ndarray, ...]
    """Per frame, float32 (kept features, 2): positions of the features that were kept."""
    code_ids: tuple[np.ndarray, ...]
    """Per frame, int64: which rows of that frame's codebook were kept; the same ones in all frames of equal K."""
    feature_ids: tuple[np.ndarray, ...]
    """Per frame, int64: which rows of that frame's features were kept; the same ones in all frames of equal length."""
    codebook_sizes: tuple[int, ...]
    """Per frame, K before thinning."""
    method: str
    """"umap" or "pca"."""
    neighbours: int | None
    """Neighbours per point that UMAP used, the point itself included; None for PCA."""
    explained_variance: tuple[float, float] | None
    """Share of the variance along each axis, 0 to 1, for PCA; None for UMAP, whose axes have no meaning."""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Lowest and highest x, lowest and highest y over all frames: axes that do not jump with the slider."""
        points = np.concatenate([*self.codes, *self.features])
        (left, bottom), (right, top) = points.min(0), points.max(0)
        return float(left), float(right), float(bottom), float(top)


def project_codes(
    codes: Sequence[Float[np.ndarray, "_ D"] | Float[Tensor, "_ D"]],
    features: Sequence[Float[np.ndarray, "_ D"] | Float[Tensor, "_ D"]]
    | Float[np.ndarray, "M D"]
    | Float[Tensor, "M D"],
    method: str = "umap",
    *,
    max_points: int = 5000,
    seed: int = 0,
    neighbours: int = 15,
) -> Projection:
    """Codes of one or more snapshots and encoder features, laid out together in two dimensions.

    "pca" keeps global distances and takes no time; "umap" keeps neighbourhoods and shows whether codes sit among the
    features or apart from them. Only nearness means something in a UMAP: neither axes nor the size of a gap do.

    Args:
        codes: codebooks (K_i, D), one per snapshot, oldest first.
        features: encoder outputs (M_i, D), one array per snapshot, or one array that serves all of them.
        method: "umap" or "pca".
        max_points: most points in the fit, all frames together. Beyond it codes and features are thinned at random,
            each to half of the points unless one needs less; equal rows (codes that no step has moved) count once in
            the fit but fully here.
        seed: of the thinning and of UMAP; equal seeds give equal maps.
        neighbours: UMAP's neighbourhood, the point itself included, at least 2. Few points make do with fewer.
    Returns:
        Positions per frame with the rows that were kept.
    Raises:
        ValueError: unknown method, no snapshot, arrays that do not fit together, NaN or infinity, or too few distinct
            points for UMAP.
        ImportError: UMAP is not installed.
    Cost: for "umap" O(P²·D) for exact neighbours of P points, then O(P); 5,000 points take under 15 s on two cores with
        the first call's compilation, about 3 s afterwards. Memory O(P·D).
    Source: McInnes et al. 2018, UMAP; the paper's figure 2 shows codes and features separately fitted by t-SNE.
    """
    _check_settings(method, max_points, neighbours)
    code_frames = _as_frames(codes, "codes")
    feature_frames = _feature_frames(features, len(code_frames))
    _check_one_dimension(code_frames, feature_frames)
    # A single array of features is fitted once however many frames show it.
    shared = len(feature_frames) == 1 and len(code_frames) > 1
    code_ids, feature_ids = _thin(code_frames, feature_frames, max_points, seed)
    kept = [frame[ids] for frame, ids in zip(code_frames + feature_frames, code_ids + feature_ids, strict=True)]
    # A code that never moved would be its own copy in every frame, and all its neighbours would be itself.
    distinct, inverse = np.unique(np.concatenate(kept), axis=0, return_inverse=True)
    used, explained = None, None
    if method == "pca":
        plane, explained = _fit_pca(distinct, np.bincount(inverse.reshape(-1)))
    else:
        plane, used = _fit_umap(distinct, neighbours, seed)
    positions = np.split(plane[inverse.reshape(-1)], np.cumsum([len(part) for part in kept])[:-1])
    repeat = len(code_frames) if shared else 1
    return Projection(
        codes=tuple(positions[: len(code_frames)]),
        features=tuple(positions[len(code_frames) :]) * repeat,
        code_ids=tuple(code_ids),
        feature_ids=tuple(feature_ids) * repeat,
        codebook_sizes=tuple(len(frame) for frame in code_frames),
        method=method,
        neighbours=used,
        explained_variance=explained,
    )


def _check_settings(method: str, max_points: int, neighbours: int) -> None:
    """Refuse settings that cannot give a map."""
    if method not in PROJECTION_METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, PROJECTION_METHODS))}; got {method!r}")
    if max_points < 10:
        raise ValueError(f"max_points must be at least 10; got {max_points}")
    if neighbours < 2:
        raise ValueError(f"neighbours must be at least 2 (a point and its nearest); got {neighbours}")


def _as_frames(arrays: Sequence[np.ndarray | Tensor], name: str) -> list[np.ndarray]:
    """Arrays as float32 on the CPU, each checked to be finite vectors."""
    if not isinstance(arrays, Sequence) or len(arrays) == 0:
        raise ValueError(f"{name} must be a list with one array (rows, D) per snapshot; got {_describe(arrays)}")
    frames = [torch.as_tensor(array).detach().float().cpu().numpy() for array in arrays]
    for number, frame in enumerate(frames):
        if frame.ndim != 2 or frame.size == 0:
            raise ValueError(f"{name}[{number}] must be (rows, D) with at least one row; got shape {frame.shape}")
        broken = int((~np.isfinite(frame)).any(1).sum())
        if broken:
            raise ValueError(
                f"{name}[{number}] must be finite; {broken:,} of {len(frame):,} rows hold NaN or infinity: the run has "
                "diverged there, project the snapshots before it"
            )
    return frames


def _feature_frames(features: Sequence[np.ndarray | Tensor] | np.ndarray | Tensor, snapshots: int) -> list[np.ndarray]:
    """Features per snapshot, or the single array that serves all."""
    if isinstance(features, np.ndarray | Tensor):
        return _as_frames([features], "features")
    frames = _as_frames(features, "features")
    if len(frames) != snapshots:
        raise ValueError(
            f"features must be one array, or one per snapshot of codes; got {len(frames)} for {snapshots} snapshots"
        )
    return frames


def _check_one_dimension(code_frames: list[np.ndarray], feature_frames: list[np.ndarray]) -> None:
    """All vectors of one map have the same length."""
    dimensions = {frame.shape[1] for frame in code_frames + feature_frames}
    if len(dimensions) > 1:
        raise ValueError(
            f"codes and features of one map must share one dimension D; got {sorted(dimensions)}: "
            "project runs with different code_dim separately"
        )


def _describe(value: object) -> str:
    """A value in an error message: its type, and its shape if it has one."""
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else repr(value)


def _thin(
    code_frames: list[np.ndarray], feature_frames: list[np.ndarray], max_points: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows to keep per frame: half of the points for each kind, more where the other needs less."""
    codes, features = (sum(map(len, frames)) for frames in (code_frames, feature_frames))
    half = max_points // 2
    code_budget = max(half, max_points - features)
    feature_budget = max(half, max_points - codes)
    return _sample(code_frames, code_budget, (seed, 0)), _sample(feature_frames, feature_budget, (seed, 1))


def _sample(frames: list[np.ndarray], budget: int, seed: tuple[int, int]) -> list[np.ndarray]:
    """Sorted random rows of each frame, in proportion to its length; frames of equal length keep the same rows."""
    total = sum(map(len, frames))
    kept = {}
    for rows in {len(frame) for frame in frames}:
        share = rows if total <= budget else max(1, rows * budget // total)
        kept[rows] = np.sort(np.random.default_rng((*seed, rows)).permutation(rows)[:share])
    return [kept[len(frame)] for frame in frames]


def _fit_pca(
    points: Float[np.ndarray, "P D"], weights: Int[np.ndarray, "P"]
) -> tuple[Float[np.ndarray, "P 2"], tuple[float, float]]:
    """Positions along the two widest directions, and the share of the variance along each.

    Weights give back the copies that the caller merged. Each axis points where its largest loading is positive, since
    an eigenvector's sign is arbitrary and would differ between machines.
    """
    centred = points.astype(np.float64) - np.average(points, axis=0, weights=weights)
    values, vectors = np.linalg.eigh((centred * weights[:, None]).T @ centred / weights.sum())
    values, axes = values[::-1].clip(0), vectors[:, ::-1][:, :2]
    signs = np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], axis=0))
    plane = centred @ (axes * signs)
    missing = 2 - plane.shape[1]
    plane = np.pad(plane, ((0, 0), (0, missing)))
    shares = np.pad(values[:2], (0, missing)) / max(values.sum(), np.finfo(np.float64).tiny)
    return plane.astype(np.float32), (float(shares[0]), float(shares[1]))


def _fit_umap(points: Float[np.ndarray, "P D"], neighbours: int, seed: int) -> tuple[Float[np.ndarray, "P 2"], int]:
    """Positions by UMAP on exact neighbours, and the neighbours used."""
    if len(points) < _UMAP_SMALLEST:
        raise ValueError(
            f"UMAP needs at least {_UMAP_SMALLEST} distinct points; got {len(points)} (codes and features together, "
            "equal rows counted once): pass method='pca'"
        )
    # UMAP refuses a neighbourhood that holds every point.
    neighbours = min(neighbours, len(points) - 1)
    knn = exact_neighbours(torch.from_numpy(points), neighbours)
    with _threads_kept(), warnings.catch_warnings():
        # It warns that new points cannot be placed later, and of points far from all others; neither matters here.
        warnings.simplefilter("ignore")
        mapper = _import_umap().UMAP(
            n_neighbors=neighbours,
            n_epochs=_UMAP_EPOCHS,
            # The spectral start needs more points than this to have eigenvectors to start from.
            init="spectral" if len(points) > 4 * _UMAP_SMALLEST else "random",
            precomputed_knn=knn,
            force_approximation_algorithm=True,
            random_state=seed,
            n_jobs=1,
        )
        return mapper.fit_transform(points).astype(np.float32), neighbours


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
