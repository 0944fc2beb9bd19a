"""One run as a page: curves, alarms, codes, what explains them, reconstructions or samples, settings, what to type.

report.md and report.html lie in the run folder, the pictures and the numbers behind each in its `figures/`. What a run
did not record is left out and named, so a run that was stopped early has a report too.
"""

import shlex
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ibqlab import plots
from ibqlab.base.checks import is_finite_number, require_choice
from ibqlab.base.escaping import for_markdown, for_terminal
from ibqlab.base.measures import measure
from ibqlab.base.progress import notice
from ibqlab.config import dump_yaml
from ibqlab.diagnostics.projection import PROJECTION_METHODS
from ibqlab.generating.class_labels import SHOWN_CLASSES
from ibqlab.generating.gallery import GalleryParameters, choose_classes, open_gallery
from ibqlab.plots.alarms import mark_alarms
from ibqlab.plots.style import mark_too_short
from ibqlab.runs import Run, RunError
from ibqlab.runs.caveats import few_tokens, why_too_short
from ibqlab.runs.kinds import is_monitored, kind_of
from ibqlab.runs.provenance_record import portable
from ibqlab.studies.figures import first_middle_last, map_run
from ibqlab.studies.pages import as_code, join_parts, picture, to_markdown, too_short_note, write_pages
from ibqlab.studies.provenance import provenance_text
from ibqlab.studies.run_explanation import describe_alarms, explaining_figures, how_to_read, run_alarms

MOST_WORK = 1e12
"""Multiplications (weights × tokens of all images) up to which a report draws samples: a minute on two cores."""
REPORTED = (
    *("loss", "validation_loss", "validation_usage", "validation_perplexity", "validation_psnr", "usage"),
    "gradient_reach",
)
"""Measures of the table, in its order."""


def write_run_report(run: Run, projection: str = "pca", *, redraw: bool = True) -> Path:
    """Report on a run, finished or not.

    Args:
        run: of a tokenizer, a generator or a monitored model, with at least one logged row; what cannot be drawn of it
            is told.
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
    sections, missing = _draw_figures(run, projection, redraw)
    if missing:
        notice(f"not drawn: {'; '.join(missing)}")
    step, alarms = int(metrics["step"].iloc[-1]), describe_alarms(run)
    # Pages are sent on: the folder that the run lies in is nobody else's business.
    reasons = "; ".join(for_markdown(reason.replace(str(run.path), run.name)) for reason in missing)
    # Indented, so that no fence inside can end the code.
    settings = "\n".join(f"    {for_terminal(line, None)}" for line in dump_yaml(_in_brief(run.config)).splitlines())
    text = join_parts(
        f"# {for_markdown(run.name)}",
        _standing(run, step),
        too_short_note(step),
        _numbers(metrics, run),
        f"## Alarms\n\n{alarms}" if alarms else "",
        *(f"## {title}\n\n{content}" for title, content in sections.items()),
        f"Not drawn: {reasons}." if missing else "",
        f"## Settings\n\nContent hash {run.config_hash}; all of them stand in config.yaml.\n\n" + settings,
        _provenance(run),
    )
    return write_pages(run.path, f"{text}\n", run.name)


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
    sections, missing = _draw_sections(run, figures, redraw)
    if not is_generator_run(run):
        explaining = explaining_figures(run, partial(save_run_figure, run))
        pictures, not_drawn = _draw_sections(run, explaining, redraw)
        missing += not_drawn
        if pictures:
            readings = {title: how_to_read(run)[name] for name, (title, _) in explaining.items()}
            sections["What explains it"] = join_parts(
                *(f"### {title}\n\n{readings[title]}\n\n{content}" for title, content in pictures.items())
            )
    return sections, missing


def _draw_sections(
    run: Run, figures: dict[str, tuple[str, Callable[[], Any]]], redraw: bool
) -> tuple[dict[str, str], list[str]]:
    sections, missing = {}, []
    for name, (title, draw) in figures.items():
        try:
            sections[title] = picture(run.path, name, title, draw, redraw)
        except (RunError, LookupError, ValueError, ImportError) as error:
            missing.append(f"{title.lower()} ({error})")
    return sections, missing


def is_generator_run(run: Run) -> bool:
    """Whether a run trains a generator, not a tokenizer."""
    return kind_of(run.config) == "generator"


def _figure_curves(run: Run) -> Figure:
    """The run's curves with its alarms, saved as `curves`."""
    plot, table = plots.plot_run_curves, plots.run_curve_table
    if is_generator_run(run):
        plot, table = plots.plot_generator_curves, plots.generator_curve_table
    figure = plot(run.metrics)
    mark_alarms(figure, run_alarms(run)[0])
    return save_run_figure(run, "curves", figure, table(run.metrics))


def figure_run_codes(run: Run, method: str = "umap") -> Figure:
    """Codes and features at the first, a middle and the last snapshot, in one fitted space; saved as `code_maps`.

    Args:
        run: with at least one snapshot.
        method: "umap" or "pca".
    """
    _require_arrays(run, run.snapshot(), "codebook", "features")
    projection, steps = map_run(run, method)
    panels = {
        _step_label(run, step): (projection, steps.index(step), run.snapshot(step)["counts"])
        for step in first_middle_last(steps)
    }
    return save_run_figure(run, "code_maps", plots.plot_code_maps(panels), plots.code_map_table(panels))


def figure_run_histogram(run: Run) -> Figure:
    """Hits per code by rank on the validation images, at the first and the last snapshot; saved as
    `usage_histogram`."""
    last = run.snapshot()  # a run without one is refused
    first_step, last_step = run.snapshot_steps[0], run.snapshot_steps[-1]
    counts = {_step_label(run, first_step): run.snapshot(first_step)["counts"]}
    counts[_step_label(run, last_step)] = last["counts"]
    figure = plots.plot_usage_histogram(counts)
    return save_run_figure(run, "usage_histogram", figure, plots.usage_histogram_table(counts))


def figure_run_reconstructions(run: Run) -> Figure:
    """Validation images and their reconstructions at the last snapshot; saved as `reconstructions`."""
    last = run.snapshot()
    _require_arrays(run, last, "images", "reconstructions")
    rebuilt = {_step_label(run, run.snapshot_steps[-1]): last["reconstructions"]}
    which = "validation images" if not is_monitored(run.config) else "images that the monitor was given"
    figure = plots.plot_reconstructions(last["images"], rebuilt, which=f"the first ones of the {which}")
    return save_run_figure(run, "reconstructions", figure, plots.reconstruction_table(last["images"], rebuilt))


def _require_arrays(run: Run, snapshot: dict[str, Any], *names: str) -> None:
    """Refuse a snapshot that lacks arrays: a monitor stores what it was given."""
    missing = [name for name in names if name not in snapshot]
    if missing:
        grid = "; codes that are not stored: a function from indices to codes" if "codebook" in missing else ""
        raise RunError(
            f"{run.path}: its snapshots hold no {' and no '.join(missing)}; give them to the monitor's update{grid}"
        )


def figure_run_samples(run: Run, images_per_class: int = 4) -> Figure:
    """Images that a generator's run draws now, a row per class with the same seeds; saved as `samples`.

    Args:
        run: of a generator, with a checkpoint.
        images_per_class: columns.
    Raises:
        RunError: that many images would take minutes.
        CheckpointError: no checkpoint, or none with its tokenizer.
    """
    config = run.config.get("generator", {})
    classes = min(config.get("num_classes", 0), SHOWN_CLASSES)
    weights = run.provenance.get("parameters") or 0
    if weights * config.get("grid_size", 0) ** 2 * classes * images_per_class > MOST_WORK:
        command = f"ibqlab run generation_gallery {shlex.quote(f'generator={run.path}')}"
        raise RunError(f"with {weights / 1e6:,.0f} million weights they take minutes: type {command}")
    gallery = open_gallery(GalleryParameters(generator=str(run.path), images_per_class=images_per_class))
    return gallery.figure_seeds(choose_classes(gallery.parameters, gallery.generator), "samples")


def _step_label(run: Run, step: int) -> str:
    """The step of a snapshot; of the last one besides where the run itself stands, if that is elsewhere."""
    now = int(run.metrics["step"].max())
    if step < run.snapshot_steps[-1] or step == now:
        return f"step {step:,}"
    return f"step {step:,}, the last snapshot (the run is at step {now:,})"


def save_run_figure(run: Run, name: str, figure: Figure, data: pd.DataFrame) -> Figure:
    """Write a figure and its numbers into the run's `figures/`, a run that is too short named on its face; the same
    figure."""
    reason = why_too_short(float(run.metrics["step"].max()))
    if reason:
        mark_too_short(figure, reason)
    plots.save_figure(figure, run.figure_path(name), data)
    return figure


def _standing(run: Run, step: int) -> str:
    """Status, step, and what to type next."""
    steps = run.config.get("steps")
    of_all = f" of {steps:,}" if isinstance(steps, int) else ""
    next_step = "the command below goes on where it stopped"
    if is_monitored(run.config):
        next_step = "it is somebody's own model, watched by a monitor"
    elif run.status == "finished":
        next_step = f"look at it with {as_code(f'ibqlab show {run.name}')}"
    return f"{run.status.capitalize()} at step {step:,}{of_all}; {next_step}."


def _numbers(metrics: pd.DataFrame, run: Run) -> str:
    """The last value of each measure, and the step that it is of, as a table."""
    rows = []
    for key in REPORTED:
        logged = metrics.dropna(subset=[key]) if key in metrics else metrics[:0]
        if len(logged) and is_finite_number(logged[key].iloc[-1]):
            row = logged.iloc[-1].to_dict()
            value, title = measure(key).text(row[key], row), for_markdown(measure(key).title)
            rows.append({"measure": title, "last value": value, "at step": f"{row['step']:,.0f}"})
    table = to_markdown(pd.DataFrame(rows, columns=["measure", "last value", "at step"]))
    if not {"validation_usage", "validation_tokens"} <= set(metrics):
        return table
    tokens = next(iter(metrics["validation_tokens"].dropna()[::-1]), 0)
    few = few_tokens(tokens, run.config) if is_finite_number(tokens) else ""
    return f"{table}\n\nUsage is counted in {tokens:,.0f} validation tokens: {few}." if few else table


def _in_brief(config: dict[str, Any]) -> dict[str, Any]:
    """What tells one run from another at a glance."""
    if is_monitored(config):
        return config
    tokenizer = config.get("tokenizer")
    model = tokenizer if isinstance(tokenizer, dict) else config.get("generator")
    names = ("steps", "batch_size", "seed", "precision", "processes")
    brief = {"model": model, "data": config.get("data"), "optimizer": config.get("optimizer")}
    return {key: value for key, value in (brief | {name: config.get(name) for name in names}).items() if value}


def _provenance(run: Run) -> str:
    """What made the run. Pages are sent on, so of paths outside this folder and ~ only the end is shown."""
    facts = run.provenance
    command = facts.get("command_line") or facts.get("command")
    if isinstance(command, str):
        with suppress(ValueError):  # quotes that do not match, written by somebody else
            command = shlex.join(portable(word) for word in shlex.split(command))
    if isinstance(command, list):
        command = " ".join(map(str, command))
    time = {name: facts.get(name, "not noted") for name in ("started", "ended", "duration_s")}
    entries = {"time": "{started} to {ended}, {duration_s} s of training".format(**time), "losses": facts.get("losses")}
    row = {"seed": facts.get("seed", "not noted"), "provenance": facts}
    return provenance_text([row], command or "not noted", **{name: text for name, text in entries.items() if text})
