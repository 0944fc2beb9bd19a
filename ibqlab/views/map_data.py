"""A run's codes and features in one plane, at every snapshot, with what a map may colour them by.

`map_run_codes` fits the plane once over all snapshots and stores it; a view then moves points, never the map.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from ibqlab.base.checks import whole_number
from ibqlab.diagnostics.projection import Projection
from ibqlab.plots.histogram import TOKENS_PER_CODE, has_enough_tokens
from ibqlab.views.map_fit import (
    DEAD_CODES,
    FACT_POINTS,
    FACTS,
    FIT_POINTS,
    METHODS,
    NEIGHBOURS,
    effective_rank,
    fit_map,
)
from ibqlab.views.subject import Subject, ViewError

__all__ = ["FACTS", "METHODS", "MapData", "describe_frame", "effective_rank", "map_run_codes"]


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
    """Of each code in the snapshot's tokens, which `counted` names."""
    idle: Int[np.ndarray, "F C"]
    """Steps since the code's last hit in training; `NEVER` (−1), or `NOT_STORED` (−2)."""
    norms: Float[np.ndarray, "F C"]
    """Norm of the code vector, in the features' units."""
    drift: Float[np.ndarray, "F C"]
    """How far the code has moved since the snapshot before, likewise; 0 at the first."""
    reach: Float[np.ndarray, "F C"]
    """Norm of each code's gradient in the snapshot's step; NaN where none was stored."""
    assignments: Int[np.ndarray, "F M"]
    """Code of each feature; −1 where it was not stored."""
    tokens: Int[np.ndarray, "F"]
    """Tokens that the hits were counted in."""
    codebook_size: int
    """K, of which C are shown."""
    feature_total: int
    """Features that the snapshots hold, of which M are shown."""
    explained: tuple[float, float] | None
    """Share of the variance of all points shown, over all snapshots, along each axis, by PCA."""
    facts: Float[np.ndarray, "F 6"]
    """Per snapshot the columns of `FACTS`."""
    left_out: tuple[int, int] = (0, 0)
    """Snapshots that the map leaves out: for NaN or infinity, and for another codebook size or dimension."""
    counted: str = "validation tokens"
    """What the hits are counted in."""

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

    def can_call_dead(self, frame: int) -> bool:
        """Whether the snapshot's tokens are enough to call a code without a hit dead."""
        return has_enough_tokens(int(self.tokens[frame]), self.codebook_size)

    def in_use(self, frame: int) -> int:
        """Codes with a hit; all of them are shown."""
        return int((self.hits[frame] > 0).sum())


def map_run_codes(
    subject: Subject,
    method: str = "pca",
    *,
    max_points: int = FIT_POINTS,
    dead_codes: int | None = DEAD_CODES,
    progress: bool = False,
) -> MapData:
    """The map of a run, computed once and stored in its folder.

    Args:
        subject: a run whose snapshots hold codebook and features.
        method: "pca" (distances, seconds) or "umap" (neighbourhoods; half a minute the first time, more for many
            codes).
        max_points: most points in the fit; all others are placed in it.
        dead_codes: codes shown that no snapshot has in use, at most; None: all. Codes in use are always shown.
        progress: show a line while it is computed.
    Raises:
        ViewError: no snapshot, or none with codebook and features.
        ValueError: a method that there is not, or a negative number of codes.
    """
    subject.require_run()
    dead_codes = None if dead_codes is None else whole_number("dead_codes", dead_codes, 0, hint=" (None shows all)")
    if not subject.steps:
        raise ViewError(f"{subject.name} has no snapshot yet; the first comes with its first validation")

    def build() -> dict[str, np.ndarray]:
        return fit_map(subject, method, max_points=max_points, dead_codes=dead_codes, progress=progress)

    depends = {"method": method, "max_points": max_points, "dead_codes": dead_codes}
    arrays = subject.store.get("map", build, snapshots=subject.snapshot_marks(), version=3, **depends)
    names = ("code_ids", "codes", "features", "hits", "idle", "norms", "drift", "reach", "assignments", "tokens")
    return MapData(
        name=subject.name,
        steps=tuple(map(int, arrays["steps"])),
        method=method,
        codebook_size=int(arrays["codebook_size"]),
        feature_total=int(arrays["feature_total"]),
        explained=tuple(map(float, arrays["explained"])) or None,
        left_out=tuple(map(int, arrays["left_out"])),
        counted=subject.counted,
        facts=arrays["facts"],
        **{name: arrays[name] for name in names},
    )


def describe_frame(data: MapData, frame: int) -> str:
    """What a flat map cannot show, in sentences, for one snapshot."""
    trusted, among, to_feature, to_code, code_rank, feature_rank = map(float, data.facts[frame])
    codes, features = len(data.code_ids), data.features.shape[1]
    plane = "PCA" if data.method == "pca" else "UMAP"
    shares = ""
    if data.explained:
        first, second = (100 * share for share in data.explained)
        shares = f" ({first:.0f} % and {second:.0f} % of the variance of the points shown)"
    in_use, tokens = data.in_use(frame), int(data.tokens[frame])
    few = ""
    if not data.can_call_dead(frame):
        few = f" {tokens:,} tokens are too few to call the other codes dead; {TOKENS_PER_CODE}·K are enough."
    broken, others = data.left_out
    left_out = ""
    if broken:
        left_out = f" {_snapshots(broken)} left out: {'it holds' if broken == 1 else 'they hold'} NaN or infinity."
    if others:
        left_out += f" {_snapshots(others)} left out: of another codebook size or dimension."
    sample = ""
    if max(codes, features) > FACT_POINTS:
        some = f"{min(codes, FACT_POINTS):,} codes and {min(features, FACT_POINTS):,} features"
        sample = f" These numbers of the full space and of trust are measured on a sample of {some}."
    return (
        f"{plane} over {len(data.steps)} snapshot{'' if len(data.steps) == 1 else 's'}{shares}: {codes:,} of "
        f"{data.codebook_size:,} codes and {features:,} of {data.feature_total:,} features shown; "
        f"{in_use:,} code{'' if in_use == 1 else 's'} in use in {tokens:,} {data.counted}.{few}{left_out} "
        f"In the full space: a code lies {to_feature:.3g} from its nearest feature, a feature "
        f"{to_code:.3g} from its nearest code; {100 * among:.0f} % of a code's {NEIGHBOURS} nearest points are codes; "
        f"effective rank {code_rank:.1f} of codes, {feature_rank:.1f} of features. Trustworthiness of the plane: "
        f"{trusted:.2f} of 1.{sample}"
    )


def _snapshots(count: int) -> str:
    return f"{count:,} snapshot{' is' if count == 1 else 's are'}"
