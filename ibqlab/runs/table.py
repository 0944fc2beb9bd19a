"""All runs in one table."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ibqlab.runs.summaries import RUN_COLUMNS, TEXTS, RunIndex

if TYPE_CHECKING:
    import pandas as pd


def list_runs(folder: str | Path | None = None) -> "pd.DataFrame":
    """All runs below a folder.

    Args:
        folder: searched with all its sub-folders; the folder of all runs by default.
    Returns:
        One row per run, by name. Columns: name (path below the folder), path, status ("unreadable" if damaged), kind
        ("tokenizer", "generator", "monitored" or "lab"), quantizer, codebook_size (codes), code_dim, codebook_init (its
        start), seed, the last value of step, loss (a generator's in nats per token), usage (share of codes hit in the
        last usage_tokens tokens of training), perplexity (codes, of the same), validation_usage and
        validation_perplexity (in validation_tokens tokens), validation_psnr (dB), validation_loss (a generator's),
        losses (those it was trained with; what it lacks of LPIPS and GAN is named), then duration_s (seconds), started
        (on this machine's clock), note (as `write_note` wrote it), problem (why a run is unreadable, in one line; it
        never hides the others) and config_hash. What is no number or text where one belongs is left out. No run, or no
        such folder: an empty frame with these columns.
    """
    import pandas as pd  # noqa: PLC0415 - keeps `ibqlab --help` quick

    runs = RunIndex(folder).read()
    # Texts as they are: pandas' own type for text holds no name with bytes that are no UTF-8.
    kinds = {column: object if column in TEXTS else None for column in RUN_COLUMNS}
    values = {column: [run.columns.get(column, math.nan) for run in runs] for column in RUN_COLUMNS}
    return pd.DataFrame({column: pd.Series(values[column], dtype=kinds[column]) for column in RUN_COLUMNS})
