"""Tables of a study: one row per method and setting, mean and range over seeds."""

import json
import math
from pathlib import Path

import pandas as pd

from ibqlab.base.escaping import for_markdown, for_terminal
from ibqlab.base.files import explained, write_whole
from ibqlab.base.progress import SHORTEST
from ibqlab.plots.style import method_label
from ibqlab.studies.lead_lag import lead_lag, lead_lag_text
from ibqlab.studies.provenance import commit_of
from ibqlab.studies.study import Study, name_start
from ibqlab.training.data_check import unreadable_line

AXES = ["method", "init", "published_init", "codebook_size", "code_dim"]
MEASURES = {
    "validation_usage": "validation usage",
    "usage": "training usage (window)",
    "validation_perplexity": "perplexity (codes)",
    "gradient_reach": "gradient reach",
    "validation_psnr": "PSNR (dB)",
}
TOO_SHORT = (
    "**Too short to mean anything.** Runs of so few steps show that everything works, not what a method does: orders "
    "may be the reverse of what longer runs show."
)
SHARES = {"validation_usage", "usage", "gradient_reach"}


def summary_table(study: Study) -> pd.DataFrame:
    """What each method came to at the end of training.

    Returns:
        One row per method, start, codebook size and dimension: mean, min and max over seeds of validation usage,
        training-window usage, perplexity, gradient reach (shares 0 to 1) and PSNR (dB); the number of seeds, of
        training steps, of validation tokens (the fewest over seeds) and the seconds of one run (mean). Sorted as the
        study's grid.
    """
    groups = study.final_rows().groupby(AXES, sort=False)
    parts = {
        f"{measure}_{statistic}": groups[measure].agg(statistic)
        for measure in MEASURES
        for statistic in ("mean", "min", "max")
    }
    parts["validation_tokens"] = groups["validation_tokens"].min()
    parts["usage_tokens"] = groups["usage_tokens"].min()
    parts["images"] = groups["validation_images"].max()
    parts["steps"] = groups["step"].max()
    parts["seconds"] = groups["seconds"].mean()
    parts["seeds"] = groups["seed"].nunique()
    return pd.DataFrame(parts).reset_index()


def show_table(table: pd.DataFrame) -> pd.DataFrame:
    """A summary table for reading: shares in %, ranges in brackets where there are several seeds, token counts."""
    shown = pd.DataFrame(
        {
            "method": [method_label(name) for name in table["method"]],
            "start": [name_start(row["init"], row["published_init"]) for _, row in table.iterrows()],
            "K": table["codebook_size"],
            "D": table["code_dim"],
        }
    )
    for measure, title in MEASURES.items():
        shown[title] = [_cell(row, measure) for _, row in table.iterrows()]
    shown["validation tokens"] = table["validation_tokens"].map("{:,.0f}".format)
    shown["seeds"] = table["seeds"]
    shown["s per run"] = table["seconds"].round().astype(int)
    return shown


def to_markdown(table: pd.DataFrame) -> str:
    """A table of strings and numbers as Markdown; names from outside stay text, floats have four digits."""
    cells = [[_as_cell(value) for value in line] for line in [list(table.columns), *table.itertuples(index=False)]]
    lines = [cells[0], ["---"] * len(table.columns), *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_code(text: object) -> str:
    """Text of any origin as a code span of Markdown."""
    return f"`{for_terminal(text, None).replace('`', chr(39))}`"


def _as_cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return for_markdown(value)


def write_report(study: Study, seconds: float | None = None) -> Path:
    """Write the study's table as report.md and table.csv into its folder's `figures/`, with provenance.json.

    Args:
        study: with at least one finished cell.
        seconds: wall-clock time of the whole study, where it was measured.
    Returns:
        Path of report.md.
    """
    folder = study.folder / "figures"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    table = summary_table(study)
    write_whole(folder / "table.csv", table.to_csv(index=False).encode())
    facts = study.finished()[0][1].provenance
    shares = [run.provenance.get("recorder_share_of_step", 0.0) for _, run in study.finished()]
    commits = sorted({commit_of(run.provenance) for _, run in study.finished()})
    hardware, versions = facts.get("hardware", {}), facts.get("versions", {})
    lines = [
        f"# {for_markdown(study.name)}",
        to_markdown(show_table(table)),
        f"- command: {as_code(study.command)}",
        f"- recipe: {for_markdown(study.grid.base)}, {int(table['steps'].max())} steps; seeds {list(study.grid.seeds)}",
        "- start: \"default\" marks the one that a method has of its own; VQ's and IBQ's are the published ones, the "
        "paper does not state Soft VQ's",
        f"- losses beside the quantizer's: {_losses(study)}",
        f"- usage: share of codes hit at least once in the tokens named; {_tokens_per_code(table)}",
        f"- PSNR: mean over the {int(table['images'].max()):,} validation images behind usage; that of a picture is "
        "over the images it names",
        f"- recording took {max(shares):.1%} of a step at most",
        f"- hardware: {for_markdown(hardware.get('cpu', 'unknown'))}, {for_markdown(hardware.get('cores', '?'))} cores",
        f"- versions: torch {for_markdown(versions.get('torch'))}, Python {for_markdown(versions.get('python'))}",
        f"- commit: {for_markdown(', '.join(commits), 2000)}",
    ]
    unread = sorted({line for _, run in study.finished() if (line := unreadable_line(run.provenance))})
    lines += [f"- {line}" for line in unread]
    if seconds is not None:
        lines.append(f"- wall-clock time of all runs and figures: {seconds:.0f} s")
    kept = {key: facts.get(key) for key in ("versions", "platform", "hardware", "threads", "data")}
    origin = {
        "command": study.command,
        "recipe": study.grid.base,
        "seeds": list(study.grid.seeds),
        "commits": commits,
        **kept,
    }
    write_whole(folder / "provenance.json", (json.dumps(origin, indent=2, ensure_ascii=False) + "\n").encode())
    path = folder / "report.md"
    short = [TOO_SHORT] if int(table["steps"].max()) < SHORTEST else []
    order = lead_lag_text(lead_lag(study.metrics()))
    after = ["## What changes first\n\n" + order] if order and table["seeds"].max() > 1 else []
    blocks = [lines[0], *short, lines[1], "\n".join(lines[2:]), *after]
    write_whole(path, ("\n\n".join(blocks) + "\n").encode())
    return path


def _losses(study: Study) -> str:
    """What the cells were trained with; without LPIPS or GAN the text says so."""
    return "; ".join(sorted({cell.config.loss.describe() for cell in study.cells}))


def _tokens_per_code(table: pd.DataFrame) -> str:
    """Whether usage was counted on tokens enough."""
    least = float((table["validation_tokens"] / table["codebook_size"]).min())
    return "at least 10 per code" if least >= 10 else f"only {least:.1f} per code at the least: it reads low"


def _cell(row: pd.Series, measure: str) -> str:
    mean, low, high = (row[f"{measure}_{statistic}"] for statistic in ("mean", "min", "max"))
    scale, unit = (100, " %") if measure in SHARES else (1, "")
    text = f"{mean * scale:.1f}{unit}"
    return text if row["seeds"] == 1 else f"{text} ({low * scale:.1f}–{high * scale:.1f})"
