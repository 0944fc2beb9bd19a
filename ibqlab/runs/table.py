"""All runs in one table."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibqlab.base.checks import is_finite_number
from ibqlab.base.escaping import for_terminal
from ibqlab.runs.commands import leaves
from ibqlab.runs.finding import run_folders, runs_root
from ibqlab.runs.kinds import kind_of, quantizer_settings
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
        ("tokenizer", "generator", "monitored" or "lab"), quantizer, codebook_size (codes), code_dim, seed, the last
        value of step, loss (a generator's in nats per token), usage (share of codes hit in the last usage_tokens tokens
        of training), validation_usage (in validation_tokens tokens), validation_psnr (dB), validation_loss (a
        generator's), losses (those it was trained with; what it lacks of LPIPS and GAN is named), then duration_s
        (seconds), problem (why a run is unreadable, in one line; it never hides the others) and config_hash. What is no
        number or text where one belongs is left out. No run, or no such folder: an empty frame with these columns.
    """
    import pandas as pd  # noqa: PLC0415 - keeps `ibqlab --help` quick

    folder = Path(folder) if folder is not None else runs_root()
    return pd.DataFrame([_table_row(path, folder) for path in run_folders(folder)], columns=list(RUN_COLUMNS))


def _table_row(path: Path, folder: Path) -> dict[str, Any]:
    name = path.name if path == folder else path.relative_to(folder).as_posix()
    try:
        run = Run(path)
        settings, facts = dict(leaves(run.config)), run.provenance
        quantizer = quantizer_settings(run.config)
        vocabulary = settings.get("generator.vocabulary_size")
        row = {
            **run.last_values,
            "name": name,
            "path": str(path),
            "status": run.status,
            "kind": kind_of(run.config),
            "quantizer": quantizer.get("name"),
            "codebook_size": quantizer.get("codebook_size", vocabulary),
            "code_dim": quantizer.get("code_dim"),
            "seed": settings.get("seed", settings.get("settings.seed")),
            "losses": facts.get("losses"),
            "duration_s": facts.get("duration_s"),
            "config_hash": run.config_hash,
        }
        return {column: value for column, value in row.items() if _fits(column, value)}
    except Exception as error:  # one run's files, whatever they hold, must not hide the others
        problem = for_terminal(str(error) or type(error).__name__)
        return {"name": name, "path": str(path), "status": "unreadable", "problem": problem}


def _fits(column: str, value: Any) -> bool:
    """Whether a value out of a run's files is one of its column: text, or a number that 64 bits hold."""
    return isinstance(value, str) if column in TEXTS else is_finite_number(value) and abs(value) < 2**63
