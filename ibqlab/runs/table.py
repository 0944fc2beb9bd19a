"""Where runs lie, and all of them in one table."""

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibqlab.files import RunError
from ibqlab.runs.run import Run

if TYPE_CHECKING:
    import pandas as pd

RUN_COLUMNS = (
    *("name", "path", "status", "kind", "quantizer", "codebook_size", "code_dim", "seed", "step", "loss", "usage"),
    *("usage_tokens", "validation_usage", "validation_tokens", "validation_psnr", "validation_loss", "losses"),
    *("duration_s",),
    "config_hash",
)


def runs_root() -> Path:
    """The folder that holds all runs.

    $IBQLAB_RUNS; else `runs` of the ibqlab checkout around the current directory; else `runs` right here.
    """
    if os.environ.get("IBQLAB_RUNS"):
        return Path(os.environ["IBQLAB_RUNS"]).expanduser()
    return (checkout_root() or Path.cwd()) / "runs"


def checkout_root() -> Path | None:
    """The nearest folder from the current directory upwards whose pyproject.toml is ibqlab's; None if there is none."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        try:
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            continue
        if project.get("project", {}).get("name") == "ibqlab":
            return folder
    return None


def list_runs(folder: str | Path | None = None) -> "pd.DataFrame":
    """All runs below a folder.

    Args:
        folder: searched with all its sub-folders; the folder of all runs by default.
    Returns:
        One row per run, by name. Columns: name (path below the folder), path, status ("unreadable" if damaged), kind
        ("tokenizer" or "generator"), quantizer, codebook_size (codes), code_dim, seed, the last value of step, loss (a
        generator's in nats per token), usage (share of codes hit in the last usage_tokens tokens of training),
        validation_usage (in validation_tokens tokens), validation_psnr (dB), validation_loss (a generator's), losses
        (those it was trained with; what it lacks of LPIPS and GAN is named), then duration_s (seconds) and config_hash.
        No run, or no such folder: an empty frame with these columns.
    """
    import pandas as pd  # noqa: PLC0415 - keeps `ibqlab --help` quick

    folder = Path(folder) if folder is not None else runs_root()
    return pd.DataFrame([_table_row(path, folder) for path in _run_folders(folder)], columns=list(RUN_COLUMNS))


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, inner, files in os.walk(folder):
        if "config.yaml" in files and {"provenance.json", "metrics.jsonl"} & set(files):
            inner.clear()
            yield Path(place)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def _table_row(path: Path, folder: Path) -> dict[str, Any]:
    name = path.name if path == folder else path.relative_to(folder).as_posix()
    try:
        run = Run(path)
        quantizer = _inner(_inner(run.config, "tokenizer"), "quantizer")
        generator = _inner(run.config, "generator")
        metrics = run.metrics
        last = {column: metrics[column].dropna() for column in RUN_COLUMNS if column in metrics}
        return {
            **{column: values.iloc[-1] for column, values in last.items() if len(values)},
            "name": name,
            "path": str(path),
            "status": run.status,
            "kind": "generator" if generator else "tokenizer",
            "quantizer": quantizer.get("name"),
            "codebook_size": quantizer.get("codebook_size", generator.get("vocabulary_size")),
            "code_dim": quantizer.get("code_dim"),
            "seed": run.config.get("seed"),
            "losses": run.provenance.get("losses"),
            "duration_s": run.provenance.get("duration_s"),
            "config_hash": run.config_hash,
        }
    except (RunError, OSError):
        return {"name": name, "path": str(path), "status": "unreadable"}


def _inner(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}
