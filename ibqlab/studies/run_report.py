"""One run as a page: curves, hits per code, codes among features, reconstructions or samples, settings, what to type.

report.md and report.html lie in the run folder, the pictures and the numbers behind each in its `figures/`. What a run
did not record is left out and named, so a run that was stopped early has a report too.
"""

import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.checks import is_finite_number, require_choice
from ibqlab.base.escaping import for_markdown, for_terminal
from ibqlab.base.progress import notice
from ibqlab.config import dump_yaml
from ibqlab.diagnostics.projection import PROJECTION_METHODS
from ibqlab.plots import (
    generator_curve_table,
    plot_generator_curves,
    plot_run_curves,
    run_curve_table,
    save_figure,
)
from ibqlab.runs import Run, RunError
from ibqlab.runs.caveats import SHORTEST, few_tokens
from ibqlab.runs.provenance_record import portable
from ibqlab.studies.pages import TOO_SHORT, picture, to_markdown, write_pages
from ibqlab.studies.provenance import provenance_text
from ibqlab.studies.run_figures import (
    figure_run_codes,
    figure_run_histogram,
    figure_run_reconstructions,
    figure_run_samples,
    mark_short_run,
)

MEASURES = {
    "loss": ("training loss", "{:.4g}"),
    "validation_loss": ("validation loss, nats per token", "{:.4g}"),
    "validation_usage": ("usage, share of codes hit", "{:.2%}"),
    "validation_perplexity": ("perplexity, codes", "{:,.1f}"),
    "validation_psnr": ("PSNR, dB", "{:.2f}"),
    "validation_tokens": ("validation tokens", "{:,.0f}"),
    "usage": ("usage in the training window", "{:.2%}"),
    "gradient_reach": ("gradient reach, share of codes", "{:.2%}"),
}
"""Metric → its title and how it is written."""


def write_run_report(run: Run, projection: str = "pca", *, redraw: bool = True) -> Path:
    """Report on a run, finished or not.

    Args:
        run: of a tokenizer or a generator, with at least one logged row; what cannot be drawn of it is told.
        projection: how the map of codes is drawn: "pca" (a second) or "umap" (half a minute).
        redraw: False: pictures that are there already are taken as they are, such as those of a notebook.
    Returns:
        Path of report.html; of report.md where the notebook tools, which make the page, are not installed.
    Raises:
        RunError: nothing was logged yet.
        ValueError: an unknown projection.
    """
    require_choice("projection", projection, PROJECTION_METHODS)
    metrics = run.metrics
    if metrics.empty:
        raise RunError(f"{run.path} has logged nothing yet, so there is nothing to report; train it first")
    drawn, missing = _draw_figures(run, projection, redraw)
    if missing:
        notice(f"not drawn: {'; '.join(missing)}")
    step = int(metrics["step"].iloc[-1])
    parts = [
        f"# {for_markdown(run.name)}",
        _standing(run, step),
        *([TOO_SHORT] if step < SHORTEST else []),
        _numbers(metrics, run),
        *(f"## {title}\n\n{shown}" for title, shown in drawn.items()),
        *([f"Not drawn: {'; '.join(for_markdown(_public(one, run)) for one in missing)}."] if missing else []),
        f"## Settings\n\nContent hash {run.config_hash}; all of them stand in config.yaml.\n\n"
        + _as_code(dump_yaml(_in_brief(run.config))),
        _provenance(run),
    ]
    return write_pages(run.path, "\n\n".join(parts) + "\n", run.name)


def _draw_figures(run: Run, projection: str, redraw: bool) -> tuple[dict[str, str], list[str]]:
    """Titles and Markdown of the figures that were drawn, and what could not be drawn and why."""
    figures: dict[str, tuple[str, Callable[[], Any]]] = {"curves": ("Curves", lambda: _figure_curves(run))}
    if is_generator_run(run):
        figures["samples"] = ("Samples", lambda: figure_run_samples(run))
    else:
        figures |= {
            "usage_histogram": ("Hits per code", lambda: figure_run_histogram(run)),
            "code_maps": ("Codes among features", lambda: figure_run_codes(run, projection)),
            "reconstructions": ("Reconstructions", lambda: figure_run_reconstructions(run)),
        }
    drawn, missing = {}, []
    for name, (title, draw) in figures.items():
        try:
            drawn[title] = picture(run.path, name, title, draw, redraw)
        except (RunError, LookupError, ValueError, ImportError) as error:
            missing.append(f"{title.lower()} ({error})")
    return drawn, missing


def is_generator_run(run: Run) -> bool:
    """Whether a run trains a generator, not a tokenizer."""
    return isinstance(run.config.get("generator"), dict)


def _figure_curves(run: Run) -> Figure:
    """The run's curves, saved as `curves`."""
    plot, table = plot_run_curves, run_curve_table
    if is_generator_run(run):
        plot, table = plot_generator_curves, generator_curve_table
    figure = plot(run.metrics)
    mark_short_run(figure, run)
    save_figure(figure, run.figure_path("curves"), table(run.metrics))
    return figure


def _standing(run: Run, step: int) -> str:
    """Status, step, and what to type next."""
    steps = run.config.get("steps")
    of_all = f" of {steps:,}" if isinstance(steps, int) else ""
    next_step = f"look at it with `ibqlab show {_word(run.name)}`"
    if run.status != "finished":
        next_step = "the command below goes on where it stopped"
    return f"{run.status.capitalize()} at step {step:,}{of_all}; {next_step}."


def _numbers(metrics: pd.DataFrame, run: Run) -> str:
    """The last value of each measure, and the step that it is of, as a table."""
    rows = []
    for name, (title, form) in MEASURES.items():
        values = metrics.set_index("step")[name].dropna() if name in metrics else ()
        if len(values) and is_finite_number(values.iloc[-1]):
            step = f"{int(values.index[-1]):,}"
            rows.append({"measure": title, "last value": form.format(values.iloc[-1]), "at step": step})
    table = to_markdown(pd.DataFrame(rows, columns=["measure", "last value", "at step"]))
    if not {"validation_usage", "validation_tokens"} <= set(metrics):
        return table
    tokens = next(iter(metrics["validation_tokens"].dropna()[::-1]), 0)
    few = few_tokens(tokens, run.config) if is_finite_number(tokens) else ""
    return f"{table}\n\nUsage is counted in {tokens:,.0f} validation tokens: {few}." if few else table


def _in_brief(config: dict[str, Any]) -> dict[str, Any]:
    """What tells one run from another at a glance."""
    tokenizer = config.get("tokenizer")
    model = tokenizer if isinstance(tokenizer, dict) else config.get("generator")
    names = ("steps", "batch_size", "seed", "precision", "processes")
    brief = {"model": model, "data": config.get("data"), "optimizer": config.get("optimizer")}
    return {key: value for key, value in (brief | {name: config.get(name) for name in names}).items() if value}


def _provenance(run: Run) -> str:
    """What made the run; of paths outside this folder and ~ only the end, as pages are sent on."""
    facts = run.provenance
    command = facts.get("command_line") or facts.get("command")
    if isinstance(command, str):
        with suppress(ValueError):  # quotes that do not match, written by somebody else
            command = shlex.join(portable(word) for word in shlex.split(command))
    if isinstance(command, list):
        command = " ".join(map(str, command))
    time = {name: facts.get(name, "not noted") for name in ("started", "ended", "duration_s")}
    more = {"time": "{started} to {ended}, {duration_s} s of training".format(**time), "losses": facts.get("losses")}
    row = {"seed": facts.get("seed", "not noted"), "provenance": facts}
    return provenance_text([row], command or "not noted", **{name: text for name, text in more.items() if text})


def _public(text: str, run: Run) -> str:
    """A reason without the folder that the run lies in."""
    return text.replace(str(run.path), run.name)


def _as_code(text: str) -> str:
    """Lines as Markdown shows them unchanged: indented, so that no fence inside can end them."""
    return "\n".join(f"    {for_terminal(line, None)}" for line in text.splitlines())


def _word(name: str) -> str:
    """A name inside backticks."""
    return for_terminal(name).replace("`", "'")
