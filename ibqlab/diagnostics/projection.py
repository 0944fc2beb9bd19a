"""One map for codes and encoder features, through training.

Maps fitted separately cannot be compared: what moved may be the map. Here codes of every snapshot and the features are
fitted together, once, so that a slider over snapshots moves points within a fixed space. A map bends distances; read
it beside the numbers of `code_feature_distances`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.base.checks import whole_number
from ibqlab.diagnostics.umap_fit import fit_umap, place_in_umap
from ibqlab.quantizers.indices import indices_in_memory
from ibqlab.quantizers.vectors import to_vectors

PROJECTION_METHODS = ("umap", "pca")
_FARTHEST = 1e37
"""Positions are cut off here, well within float32."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Positions of codes and features in one jointly fitted plane, one frame per snapshot."""

    codes: tuple[np.ndarray, ...]
    """Per frame, float32 (kept codes, 2): positions of the codes that were kept, all codes in use among them where the
    counts were given."""
    features: tuple[np.ndarray, ...]
    """Per frame, float32 (kept features, 2): positions of the features that were kept."""
    code_ids: tuple[np.ndarray, ...]
    """Per frame, int64: which rows of that frame's codebook were kept: the same ones in all frames of equal K, and
    those that are in use there."""
    feature_ids: tuple[np.ndarray, ...]
    """Per frame, int64: which rows of that frame's features were kept; the same ones in all frames of equal length."""
    codebook_sizes: tuple[int, ...]
    """Per frame, K before thinning."""
    feature_totals: tuple[int, ...]
    """Per frame, how many features there were before thinning."""
    placed: int
    """Codes, all frames together, that were placed in the finished map since the fit had no room for them."""
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
    counts: Sequence[Int[np.ndarray, "_"] | Int[Tensor, "_"]] | None = None,
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
        counts: hits per code (K_i,), one array per snapshot. Every code with a hit is kept then, whatever `max_points`
            says, and only dead codes are thinned. None: all codes are thinned alike.
        max_points: most points in the fit, all frames together. Beyond it codes and features are thinned at random,
            each to half of the points unless one needs less; equal rows (codes that no step has moved) count once in
            the fit but fully here. Codes that codes in use leave no room for are placed in the finished map: by PCA
            exactly, by UMAP among their nearest neighbours.
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
    if method not in PROJECTION_METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, PROJECTION_METHODS))}; got {method!r:.60}")
    max_points = whole_number("max_points", max_points, 10)
    neighbours = whole_number("neighbours", neighbours, 2, hint=" (a point and its nearest)")
    seed = whole_number("seed", seed, 0)
    # A single array of features serves all snapshots; it is fitted once however many frames show it.
    shared = isinstance(features, np.ndarray | Tensor)
    code_frames = _as_frames(codes, "codes")
    feature_frames = _as_frames([features] if shared else features, "features")
    _check_together(code_frames, feature_frames, shared)
    live = None if counts is None else _live_codes(counts, code_frames)
    # Half of the points for codes and half for features, more where the other needs less.
    code_total, feature_total = (sum(map(len, frames)) for frames in (code_frames, feature_frames))
    half = max_points // 2
    code_budget, feature_budget = max(half, max_points - feature_total), max(half, max_points - code_total)
    fitted_ids = _sample_codes(code_frames, live, code_budget, (seed, 0))
    feature_ids = _sample(feature_frames, feature_budget, (seed, 1))
    # One matrix of all frames' codes, then of all features: the plane is fitted once, to all of them.
    vectors = [frame[ids] for frame, ids in zip(code_frames + feature_frames, fitted_ids + feature_ids, strict=True)]
    # A code that never moved would be its own copy in every frame, and all its neighbours would be itself.
    distinct, inverse = np.unique(np.concatenate(vectors), axis=0, return_inverse=True)
    used, explained = None, None
    if method == "pca":
        plane, position, explained = fit_pca(distinct, np.bincount(inverse.reshape(-1)))
    else:
        plane, used = fit_umap(distinct, neighbours, seed)
        position = partial(place_in_umap, fitted=distinct, plane=plane, neighbours=used)
    positions = np.split(plane[inverse.reshape(-1)], np.cumsum([len(rows) for rows in vectors])[:-1])
    code_positions, code_ids = positions[: len(code_frames)], fitted_ids
    if live is not None:
        sampled_ids = _sample(code_frames, code_budget, (seed, 0))
        code_ids = [np.union1d(ids, in_use) for ids, in_use in zip(sampled_ids, live, strict=True)]
        frames = zip(code_frames, code_ids, fitted_ids, code_positions, strict=True)
        code_positions = [_with_late_codes(*frame, position) for frame in frames]
    repeat = len(code_frames) if shared else 1
    return Projection(
        codes=tuple(code_positions),
        features=tuple(positions[len(code_frames) :]) * repeat,
        code_ids=tuple(code_ids),
        feature_ids=tuple(feature_ids) * repeat,
        codebook_sizes=tuple(len(frame) for frame in code_frames),
        feature_totals=tuple(len(frame) for frame in feature_frames) * repeat,
        placed=sum(map(len, code_ids)) - sum(map(len, fitted_ids)),
        method=method,
        neighbours=used,
        explained_variance=explained,
    )


def _as_frames(arrays: Sequence[np.ndarray | Tensor], name: str) -> list[np.ndarray]:
    """Arrays as float32 on the CPU, each checked to be finite vectors."""
    if not isinstance(arrays, Sequence) or isinstance(arrays, str | bytes) or len(arrays) == 0:
        raise ValueError(f"{name} must be a list with one array (rows, D) per snapshot; got {_describe(arrays)}")
    frames = [
        to_vectors(array, f"{name}[{number}]").detach().float().cpu().numpy() for number, array in enumerate(arrays)
    ]
    for number, frame in enumerate(frames):
        if frame.size == 0:
            raise ValueError(f"{name}[{number}] must be (rows, D) with at least one row; got shape {frame.shape}")
        broken = int((~np.isfinite(frame)).any(1).sum())
        if broken:
            raise ValueError(
                f"{name}[{number}] must be finite; {broken:,} of {len(frame):,} rows hold NaN or infinity: the run has "
                "diverged there, project the snapshots before it"
            )
    return frames


def _check_together(code_frames: list[np.ndarray], feature_frames: list[np.ndarray], shared: bool) -> None:
    """Refuse frames that do not belong to one map."""
    if not shared and len(feature_frames) != len(code_frames):
        raise ValueError(
            f"features must be one array, or one per snapshot of codes; got {len(feature_frames)} for "
            f"{len(code_frames)} snapshots"
        )
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


def _live_codes(counts: Sequence[np.ndarray | Tensor], code_frames: list[np.ndarray]) -> list[Int[np.ndarray, "_"]]:
    """Per frame, the codes with a hit."""
    if not isinstance(counts, Sequence) or len(counts) != len(code_frames):
        raise ValueError(
            f"counts must be a list with one array (K,) per snapshot of codes, {len(code_frames)} here; got "
            f"{_describe(counts) if not isinstance(counts, Sequence) else len(counts)}: pass "
            "[snapshot['counts'] for snapshot in snapshots]"
        )
    hits = [indices_in_memory(array, f"counts[{number}]").cpu().numpy() for number, array in enumerate(counts)]
    for number, (array, frame) in enumerate(zip(hits, code_frames, strict=True)):
        if array.shape != (len(frame),):
            raise ValueError(
                f"counts[{number}] must hold hits per code, shape ({len(frame)},); got shape {array.shape}: pass "
                "count_indices(indices, codebook_size)"
            )
    return [np.flatnonzero(array > 0) for array in hits]


def _sample_codes(
    frames: list[np.ndarray], live: list[np.ndarray] | None, budget: int, seed: tuple[int, int]
) -> list[np.ndarray]:
    """Rows of each codebook to fit. Some are the same in all frames; codes in use fill the rest of the budget."""
    if live is None or sum(map(len, frames)) <= budget:
        return _sample(frames, budget, seed)
    in_use = sum(map(len, live))
    # What codes in use leave over, and no less than an eighth: dead codes are shown too.
    common = _sample(frames, max(budget - in_use, budget // 8), seed)
    left = budget - sum(map(len, common))
    chosen = []
    for rows, used in zip(common, live, strict=True):
        new_rows = np.setdiff1d(used, rows)
        share = len(new_rows) if in_use <= left else max(1, len(used) * left // in_use)
        order = np.random.default_rng((*seed, 1)).permutation(len(new_rows))
        chosen.append(np.union1d(rows, new_rows[np.sort(order[:share])]))
    return chosen


def _sample(frames: list[np.ndarray], budget: int, seed: tuple[int, int]) -> list[np.ndarray]:
    """Sorted random rows of each frame, in proportion to its length; frames of equal length keep the same rows."""
    total = sum(map(len, frames))
    rows_of = {}
    for length in {len(frame) for frame in frames}:
        share = length if total <= budget else max(1, length * budget // total)
        rows_of[length] = np.sort(np.random.default_rng((*seed, length)).permutation(length)[:share])
    return [rows_of[len(frame)] for frame in frames]


def fit_pca(
    points: Float[np.ndarray, "P D"], weights: Int[np.ndarray, "P"]
) -> tuple[Float[np.ndarray, "P 2"], Callable[[np.ndarray], np.ndarray], tuple[float, float]]:
    """Positions along the two widest directions, what gives any point its own, and the share of variance along each.

    Weights give back the copies that the caller merged. Each axis points where its largest loading is positive, since
    an eigenvector's sign is arbitrary and would differ between machines. All in float64: squares of 10¹⁹ overflow
    float32.
    """
    middle = np.average(points.astype(np.float64), axis=0, weights=weights)
    centred = points - middle
    values, vectors = np.linalg.eigh((centred * weights[:, None]).T @ centred / weights.sum())
    values, axes = values[::-1].clip(0), vectors[:, ::-1][:, :2]
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], axis=0))
    missing = 2 - axes.shape[1]

    def position(rows: Float[np.ndarray, "R D"]) -> Float[np.ndarray, "R 2"]:
        plane = ((rows - middle) @ axes).clip(-_FARTHEST, _FARTHEST)
        return np.pad(plane, ((0, 0), (0, missing))).astype(np.float32)

    shares = np.pad(values[:2], (0, missing)) / max(values.sum(), np.finfo(np.float64).tiny)
    return position(points), position, (float(shares[0]), float(shares[1]))


def _with_late_codes(
    codebook: Float[np.ndarray, "K D"],
    ids: Int[np.ndarray, "R"],
    fitted_ids: Int[np.ndarray, "F"],
    fitted: Float[np.ndarray, "F 2"],
    position: Callable[[np.ndarray], np.ndarray],
) -> Float[np.ndarray, "R 2"]:
    """Positions of all kept codes of a frame: those of the fit, and those placed in it afterwards."""
    late = np.setdiff1d(ids, fitted_ids)
    whole = np.empty((len(ids), 2), np.float32)
    whole[np.searchsorted(ids, fitted_ids)] = fitted
    whole[np.searchsorted(ids, late)] = position(codebook[late])
    return whole
