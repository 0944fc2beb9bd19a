"""What the lab recorded: rows as in metrics.jsonl and snapshots, in memory, of all methods side by side."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ibqlab.base.checks import require, require_choice
from ibqlab.base.codebook_parts import with_codebook
from ibqlab.quantizers import INITIALISATIONS, QuantizerConfig

SNAPSHOT_ARRAYS = ("codebook", "features", "assignments", "counts", "last_hit")
"""What a snapshot holds, as those of a training run; there are no images."""


@dataclass(frozen=True, kw_only=True)
class LabRun:
    """One method's run."""

    config: QuantizerConfig
    """Its quantizer's settings."""
    rows: tuple[dict[str, Any], ...]
    """As in metrics.jsonl: what the recorder reports, losses, quantization_error, and validations."""
    snapshots: Mapping[int, dict[str, np.ndarray]]
    """Step → codebook (K, D), features (M, D) of the same points at every step, their codes (M,), hits per code (K,)
    in the validation, and the step of each code's last hit (K,). Of many combinations the parts' codebooks stand in the
    codebook's place; `LabResult.snapshot` makes it of them."""
    seconds: float
    """It took, recording included."""


@dataclass(frozen=True, kw_only=True)
class LabFailure:
    """One method that did not reach its last step."""

    config: QuantizerConfig
    """Its quantizer's settings."""
    reason: str
    """What went wrong, in one line."""


@dataclass(frozen=True, kw_only=True)
class LabResult:
    """Runs of several methods over the same features."""

    runs: Mapping[str, LabRun]
    """Label → run that reached its last step, in the order given."""
    features: str
    """Where the features came from, in a few words."""
    steps: int
    """Of every run."""
    seed: int
    """Of every run."""
    folder: Path | None = None
    """Where the runs lie as run folders; None: in memory alone."""
    failures: Mapping[str, LabFailure] = field(default_factory=dict)
    """Label → what ended a method early; it is in no figure."""

    @property
    def snapshot_steps(self) -> list[int]:
        """Steps that have a snapshot, the same for all methods."""
        return sorted(next(iter(self.runs.values())).snapshots)

    @property
    def dim(self) -> int:
        """D, of features and codes."""
        return next(iter(self.runs.values())).config.code_dim

    @property
    def failed(self) -> str:
        """Which methods are in no figure, and why, in plain sentences; empty where all finished."""
        return " ".join(
            f"{label} failed and is not shown: {failure.reason.rstrip('.')}."
            for label, failure in self.failures.items()
        )

    @property
    def metrics(self) -> pd.DataFrame:
        """All rows of all methods, as the figures of several runs take them.

        Returns:
            The columns of metrics.jsonl, with method (the label), init (the codebook's start), codebook_size,
            code_dim, seed, and failed (which other methods failed, and why; mostly empty).
        """
        frames = [
            pd.DataFrame(list(run.rows)).assign(
                method=label,
                init=_start(run.config),
                codebook_size=run.config.codebook_size,
                code_dim=run.config.code_dim,
                seed=self.seed,
                failed=self.failed,
            )
            for label, run in self.runs.items()
        ]
        return pd.concat(frames, ignore_index=True)

    def snapshot(self, label: str, step: int = -1) -> dict[str, np.ndarray]:
        """The arrays of a method's snapshot.

        Args:
            label: of the method.
            step: one of `snapshot_steps`; −1 for the last one.
        Raises:
            ValueError: there is no such method or step; the message lists those there are.
        """
        require(label not in self.failures, f"{label} has no snapshots, because it failed")
        require_choice("method", label, self.runs)
        steps = self.snapshot_steps
        step = steps[-1] if step == -1 else step
        require(step in steps, f"there is no snapshot of step {step}; there are: {', '.join(map(str, steps))}")
        return with_codebook(self.runs[label].snapshots[step])

    def table(self) -> pd.DataFrame:
        """What became of each method.

        Returns:
            One row per method: method, quantizer, start, K, usage and perplexity of the last validation with its token
            count, the least usage of all validations, gradient_reach of the last step, quantization_error (mean squared
            difference of a feature's numbers from its code's, on validation features), error_share (the same as a share
            of the features' variance: 0 is perfect, 1 is what their mean alone would leave), seconds, failed (why a
            method failed; such methods come last, and their numbers are NaN).
        """
        failed = [self._facts(label, one.config) | {"failed": one.reason} for label, one in self.failures.items()]
        return pd.DataFrame([self._table_row(label, run) for label, run in self.runs.items()] + failed)

    def _facts(self, label: str, config: QuantizerConfig) -> dict[str, Any]:
        """What a method is, whatever became of it."""
        start, size = _start(config), config.codebook_size
        return {"method": label, "quantizer": config.config_name, "start": start, "codebook_size": size}

    def _table_row(self, label: str, run: LabRun) -> dict[str, Any]:
        validations = [row for row in run.rows if "validation_usage" in row]
        last, trained = validations[-1], [row for row in run.rows if "gradient_reach" in row]
        return self._facts(label, run.config) | {
            "usage": last["validation_usage"],
            "least_usage": min(row["validation_usage"] for row in validations),
            "perplexity": last["validation_perplexity"],
            "tokens": last["validation_tokens"],
            "gradient_reach": trained[-1]["gradient_reach"],
            "quantization_error": last["validation_quantization_error"],
            "error_share": error_share(run.snapshots[max(run.snapshots)]),
            "seconds": round(run.seconds, 2),
            "failed": "",
        }


def error_share(snapshot: Mapping[str, np.ndarray]) -> float:
    """Mean squared distance of a snapshot's features to their codes over their variance: what quantizing loses of them.

    Comparable between methods whose encoders learn features of different size.
    """
    snapshot = with_codebook(snapshot)
    features = snapshot["features"].astype(np.float64)
    codes = snapshot["codebook"].astype(np.float64)[snapshot["assignments"]]
    variance = features.var(0).sum()
    return float(np.square(features - codes).sum(1).mean() / variance) if variance > 0 else float("nan")


def _start(config: QuantizerConfig) -> str:
    """Where a codebook started, as figures write it."""
    return INITIALISATIONS.get(config.codebook_init, config.codebook_init)
