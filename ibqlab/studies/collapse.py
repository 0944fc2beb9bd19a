"""Why a codebook collapses: the same tokenizers from several starts, what became of them, and what changed first."""

from functools import partial

import pandas as pd

from ibqlab.base.escaping import for_markdown
from ibqlab.base.intervals import seed_range
from ibqlab.base.measures import SHARE, measure
from ibqlab.grids.cells import StudyError
from ibqlab.plots.style import method_label
from ibqlab.studies.figures import figure_collapse, figure_histogram, figure_reconstructions, save_study_table
from ibqlab.studies.lead_lag import lead_lag, lead_lag_text
from ibqlab.studies.method_grid import grid_study, name_start
from ibqlab.studies.pages import join_parts, picture, to_markdown, too_short_note
from ibqlab.studies.study import Study

AXES = ["method", "init", "published_init", "codebook_size", "code_dim"]
SUMMARY = {
    "validation_usage": "usage",
    "usage": "training_usage",
    "validation_perplexity": "perplexity",
    "gradient_reach": "gradient_reach",
    "validation_psnr": "psnr",
}
"""Column of the summary, as in metrics.jsonl → column of the rows."""


def summary_table(study: Study) -> pd.DataFrame:
    """What each method came to at the end of training.

    Returns:
        One row per method, start, codebook size and dimension: mean, min and max over seeds of validation usage,
        training-window usage, perplexity, gradient reach (shares 0 to 1) and PSNR (dB); the number of seeds, of
        training steps, of validation tokens (the fewest over seeds) and the seconds of one run (mean). Sorted as the
        study's grid.
    Raises:
        StudyError: nothing is finished, or rows of an earlier version lack a number.
    """
    rows = study.rows()
    missing = {*SUMMARY.values(), "tokens", "training_usage_tokens", "images", "steps", "seconds"} - set(rows)
    if missing:
        raise StudyError(
            f"{study.folder / 'rows'} must hold {', '.join(sorted(missing))} of each run, and no row does. Delete that "
            "folder and start the study again: finished runs are measured, not trained"
        )
    groups = rows.groupby(AXES, sort=False)
    parts = {
        f"{column}_{statistic}": groups[key].agg(statistic)
        for column, key in SUMMARY.items()
        for statistic in ("mean", "min", "max")
    }
    parts["validation_tokens"] = groups["tokens"].min()
    parts["usage_tokens"] = groups["training_usage_tokens"].min()
    parts["images"] = groups["images"].max()
    parts["steps"] = groups["steps"].max()
    parts["seconds"] = groups["seconds"].mean()
    parts["seeds"] = groups["seed"].nunique()
    return pd.DataFrame(parts).reset_index()


def show_table(table: pd.DataFrame) -> pd.DataFrame:
    """A summary table for reading: shares in %, lowest to highest in brackets where there are several seeds."""
    text_table = pd.DataFrame(
        {
            "method": [method_label(name) for name in table["method"]],
            "start": [name_start(row["init"], row["published_init"]) for _, row in table.iterrows()],
            "K": table["codebook_size"],
            "D": table["code_dim"],
        }
    )
    for column, key in SUMMARY.items():
        # Two usages stand side by side, so the first says of which tokens it is.
        quantity = measure("validation_usage" if key == "usage" else key)
        unit = " %" if quantity.unit == SHARE else ""
        values = table[[f"{column}_{statistic}" for statistic in ("mean", "min", "max")]]
        text_table[quantity.heading] = [
            seed_range(*row, seeds).text(1, quantity.scale, unit) if row[0] == row[0] else "–"  # not logged
            for row, seeds in zip(values.itertuples(index=False), table["seeds"], strict=True)
        ]
    text_table["validation tokens"] = table["validation_tokens"].map("{:,.0f}".format)
    text_table["seeds"] = table["seeds"]
    text_table["s per run"] = table["seconds"].round().astype(int)
    return text_table


def describe_collapse(study: Study) -> str:
    """The table with what its columns mean, and what changes first, as Markdown; the table is saved as table.csv.

    Args:
        study: with at least one finished run.
    """
    table = summary_table(study)
    save_study_table(study, "table", table)
    shares = [run.provenance.get("recorder_share_of_step", 0.0) for _, run in study.finished()]
    per_code = float((table["validation_tokens"] / table["codebook_size"]).min())
    enough = "at least 10 per code" if per_code >= 10 else f"only {per_code:.1f} per code at the least: it reads low"
    losses = "; ".join(sorted({cell.config.loss.describe() for cell in study.cells}))
    lines = [
        f"- recipe: {for_markdown(study.grid.base)}, {int(table['steps'].max())} steps; seeds {list(study.grid.seeds)}",
        "- start: \"default\" marks the one that a method has of its own; VQ's and IBQ's are the published ones, the "
        "paper does not state Soft VQ's",
        f"- losses beside the quantizer's: {losses}",
        f"- usage: share of codes hit at least once in the tokens named; {enough}",
        *(["- in brackets: lowest to highest over seeds"] if table["seeds"].max() > 1 else []),
        f"- PSNR: mean over the {int(table['images'].max()):,} validation images behind usage; that of a picture is "
        "over the images it names",
        f"- recording took {max(shares, default=0.0):.1%} of a step at most",
    ]
    order = lead_lag_text(lead_lag(study.metrics())) if table["seeds"].max() > 1 else ""
    return join_parts(
        too_short_note(table["steps"].max()),
        to_markdown(show_table(table)),
        "\n".join(lines),
        f"## What changes first\n\n{order}" if order else "",
    )


def _report(study: Study, redraw: bool) -> str:
    figures = {
        "collapse_curves": ("Each method from its own start", partial(figure_collapse, study, "published")),
        "collapse_curves_same_start": ("From every start", partial(figure_collapse, study, "same")),
        "usage_histogram": ("Hits per code", partial(figure_histogram, study)),
        "reconstructions": ("Reconstructions", partial(figure_reconstructions, study)),
    }
    pictures = [
        f"## {title}\n\n{picture(study.folder, name, title, draw, redraw)}" for name, (title, draw) in figures.items()
    ]
    return join_parts(f"# {for_markdown(study.name)}", describe_collapse(study), *pictures)


EXPLORE_COLLAPSE = grid_study("explore_collapse", _report)
