"""The plane that codes and features of a lab are drawn in, the same for all methods and steps."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ibqlab.base.codebook_parts import with_codebook
from ibqlab.diagnostics.lab import LabResult


@dataclass(frozen=True, kw_only=True)
class LabPlane:
    """The plane that all panels and frames are drawn in."""

    middle: Float[np.ndarray, "D"]
    axes: Float[np.ndarray, "D axes"]
    """One or two directions."""
    bounds: tuple[float, float, float, float]
    shares: tuple[float, float]
    """Of the features' variance along each axis; NaN where the plane is the world itself."""

    @classmethod
    def of(cls, result: LabResult) -> "LabPlane":
        """That of the features of all methods and steps."""
        snapshots = [snapshot for run in result.runs.values() for snapshot in run.snapshots.values()]
        every = max(1, sum(len(snapshot["features"]) for snapshot in snapshots) // 200_000)
        features = np.concatenate([snapshot["features"][::every] for snapshot in snapshots]).astype(np.float64)
        if result.dim <= 2:
            middle, axes, shares = np.zeros(result.dim), np.eye(result.dim), (np.nan, np.nan)
        else:
            middle = features.mean(0)
            values, vectors = np.linalg.eigh(np.cov(features.T))
            axes = vectors[:, ::-1][:, :2]
            # An eigenvector's sign is arbitrary and would differ between machines.
            axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], axis=0))
            shares = tuple(values[::-1][:2].clip(0) / max(values.sum(), np.finfo(float).tiny))
        plane = cls(middle=middle, axes=axes, bounds=(0.0, 0.0, 0.0, 0.0), shares=shares)
        codes = [plane.place(_every_so_many(with_codebook(snapshot)["codebook"])) for snapshot in snapshots]
        return cls(
            middle=middle, axes=axes, bounds=_bounds(plane.place(features), np.concatenate(codes)), shares=shares
        )

    def place(self, vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N 2"]:
        """Positions of vectors."""
        positions = (vectors - self.middle) @ self.axes
        return np.pad(positions, ((0, 0), (0, 2 - positions.shape[1])))


def _every_so_many(codebook: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "M D"]:
    """About 512 of its codes."""
    return codebook[:: max(1, len(codebook) // 512)]


def _bounds(features: Float[np.ndarray, "N 2"], codes: Float[np.ndarray, "M 2"]) -> tuple[float, float, float, float]:
    """A square that holds all features, and the codes unless a few of them lie far outside."""
    low, high = features.min(0), features.max(0)
    reach = 0.3 * (high - low).max()
    low = np.minimum(low, np.maximum(np.quantile(codes, 0.005, axis=0), low - reach))
    high = np.maximum(high, np.minimum(np.quantile(codes, 0.995, axis=0), high + reach))
    middle, half = (low + high) / 2, 0.53 * max((high - low).max(), 1e-6)
    return tuple(float(end) for axis in (0, 1) for end in (middle[axis] - half, middle[axis] + half))
