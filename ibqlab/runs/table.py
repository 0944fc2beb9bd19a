"""Where runs lie, and all of them in one table."""

import numbers
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibqlab.base.escaping import for_terminal
from ibqlab.runs.root import runs_root
from ibqlab.runs.run import Run

if TYPE_CHECKING:
    import pandas as pd

RUN_COLUMNS = (
    *("name", "path", "status", "kind", "quantizer", "codebook_size", "code_dim", "seed", "step", "loss", "usage"),
    *("usage_tokens", "validation_usage", "validation_tokens", "validation_psnr", "validation_loss", "losses"),
    *("duration_s", "problem", "config_hash"),
)

TEXTS = ("name", "path", "status", "kind", "quantizer", "losses", "problem", "config_hash")
"""Columns of text; the others hold numbers."""


def list_runs(folder: str | Path | None = None) -> "pd.DataFrame":
    """All runs below a folder.

    Args:
        folder: searched with all its sub-folders; the folder of all runs by default.
    Returns:
        One row per run, by name. Columns: name (path below the folder), path, status ("unreadable" if damaged), kind
        ("tokenizer" or "generator"), quantizer, codebook_size (codes), code_dim, seed, the last value of step, loss (a
        generator's in nats per token), usage (share of codes hit in the last usage_tokens tokens of training),
        validation_usage (in validation_tokens tokens), validation_psnr (dB), validation_loss (a generator's), losses
        (those it was trained with; what it lacks of LPIPS and GAN is named), then duration_s (seconds), problem (why a
        run is unreadable, in one line; it never hides the others) and config_hash. What is no number or text where one
        belongs is left out. No run, or no such folder: an empty frame with these columns.
    """
    import pandas as pd  # noqa: PLC0415 - keeps `ibqlab --help` quick

    folder = Path(folder) if folder is not None else runs_root()
    return pd.DataFrame([_table_row(path, folder) for path in _run_folders(folder)], columns=list(RUN_COLUMNS))


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, inner, files in os.walk(folder):
        if "config.yaml" in files and {"provenance.json", "metrics.jsonl"} & set(files):
            inner.clear()
            yield Path(path)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def _table_row(path: Path, folder: Path) -> dict[str, Any]:
    name = path.name if path == folder else path.relative_to(folder).as_posix()
    try:
        run = Run(path)
        quantizer = _inner(_inner(run.config, "tokenizer"), "quantizer")
        generator = _inner(run.config, "generator")
        facts = run.provenance
        row = {
            **_last_values(run.metrics),
            "name": name,
            "path": str(path),
            "status": run.status,
            "kind": "generator" if generator else "tokenizer",
            "quantizer": _text(quantizer.get("name")),
            "codebook_size": quantizer.get("codebook_size", generator.get("vocabulary_size")),
            "code_dim": quantizer.get("code_dim"),
            "seed": run.config.get("seed"),
            "losses": _text(facts.get("losses")),
            "duration_s": facts.get("duration_s"),
            "config_hash": run.config_hash,
        }
        return {column: value for column, value in row.items() if column in TEXTS or _is_number(value)}
    except Exception as error:  # one run's files, whatever they hold, must not hide the others
        problem = for_terminal(str(error) or type(error).__name__)
        return {"name": name, "path": str(path), "status": "unreadable", "problem": problem}


def _last_values(metrics: "pd.DataFrame") -> dict[str, Any]:
    """The last number of each of the table's columns that the metrics have."""
    last = {}
    for column in set(RUN_COLUMNS) & set(metrics.columns):
        values = [value for value in metrics[column] if _is_number(value)]
        last |= {column: values[-1]} if values else {}
    return last


def _is_number(value: Any) -> bool:
    """Whether a value is one that fits a column of numbers."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < 2**63  # not NaN


def _inner(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
