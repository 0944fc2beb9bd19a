"""`ibqlab show` and `report`: one run or study of the folder of all runs."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ibqlab.base.checks import is_finite_number
from ibqlab.base.escaping import for_terminal
from ibqlab.base.measures import is_measure, measure, whole_or_short
from ibqlab.cli.terminal import say, say_loading, section

if TYPE_CHECKING:
    from ibqlab.runs import Run


MAIN_SETTINGS = (
    *("data.source", "data.image_size", "tokens", "tokenizer", "tokenizer.quantizer.name"),
    *("tokenizer.quantizer.codebook_size", "tokenizer.quantizer.code_dim", "generator.name", "generator.width"),
    *("generator.depth", "start_from", "optimizer.learning_rate", "batch_size", "steps", "precision", "seed"),
    *("kind", "codebook_size", "code_dim"),
)
MAIN_METRICS = (
    *("step", "loss", "validation_loss", "validation_bits_per_token", "validation_psnr", "validation_usage"),
    *("validation_perplexity", "usage", "perplexity", "dead_codes", "images_per_second", "seconds"),
)


@click.command()
@click.argument("name", metavar="RUN")
@click.option("--all", "everything", is_flag=True, help="All settings, all metrics and the provenance.")
def show(name: str, everything: bool) -> None:
    """Show RUN, a path or a name that `ibqlab runs` lists: status, main settings and last metrics, what is there."""
    from ibqlab.config import dump_yaml
    from ibqlab.runs import Run, read_note
    from ibqlab.runs.commands import leaves
    from ibqlab.runs.finding import find_run

    run = Run(find_run(name))
    last = run.last_values
    lines = {name: describe_metric(name, last) for name in last}
    say(f"{run.name}: {run.describe_status()}\n{run.path}")
    if note := read_note(run.path):
        section("note", note)
    if everything:
        settings, metric_lines = dump_yaml(run.config), list(lines.values())
    else:
        values = dict(leaves(run.config))
        main = [key for key in MAIN_SETTINGS if values.get(key, "") != ""]
        main += [key for key in values if key.startswith("settings.")]  # of a monitored run, its owner's
        settings = "\n".join(f"{key}: {for_terminal(values[key])}" for key in main)
        metric_lines = [lines[key] for key in MAIN_METRICS if key in lines] or list(lines.values())[:12]
    section(f"settings (content hash {run.config_hash})", settings)
    section("last metrics", "\n".join(metric_lines) or "none yet")
    if run.alarms:
        section("alarms", "\n".join(_alarm_lines(run, everything)))
    section("in the folder", "\n".join(_contents(run, everything)))
    if everything:
        section("provenance", dump_yaml(run.provenance))
    else:
        say(f"\nall settings, all metrics, provenance: ibqlab show {shlex.quote(name)} --all")


def _alarm_lines(run: "Run", everything: bool) -> Iterator[str]:
    """What the alarm told while the run trained: step, rule and the setting to change; what was seen, if all is asked
    for."""
    for row in run.alarms:
        told = [f"step {row['step']:,}", row.get("title"), *([row.get("seen"), row.get("cause")] if everything else [])]
        yield for_terminal(f"{', '.join(map(str, told))}; try {row.get('remedy')}", None)


def _contents(run: "Run", everything: bool) -> Iterator[str]:
    """Snapshots, checkpoint, figures and report of a run, each in a line, figures by name where all is asked for."""
    from ibqlab.runs.kinds import is_lab

    steps, checkpoint = run.snapshot_steps, run.last_checkpoint
    few = everything or len(steps) < 9
    at = ", ".join(map(str, steps)) if few else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    yield f"snapshots: {at or 'none'}"
    none = "none; the lab keeps none" if is_lab(run.config) else "none"
    yield f"last checkpoint: {checkpoint.name if checkpoint else none}"
    figures = sorted(path.name for path in (run.path / "figures").glob("*"))
    figure_names = ", ".join(figures) if everything or len(figures) < 5 else f"{len(figures)} files in figures"
    yield f"figures: {figure_names or 'none'}"
    yield f"report: {'report.html' if (run.path / 'report.html').exists() else 'none; make it with ibqlab report'}"


def describe_metric(name: str, last: dict[str, Any]) -> str:
    """One of a run's last values as a line with its unit; usage names the number of tokens that it was counted in."""
    value = last[name]
    if not is_finite_number(value):
        return f"{name}: {for_terminal(value)}"
    return f"{name}: {measure(name).text(value, last) if is_measure(name) else whole_or_short(value)}"


@click.command()
@click.argument("name")
@click.option(
    "--projection",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="Of a run's map of codes.",
)
def report(name: str, projection: str) -> None:
    """One HTML page and one Markdown file on NAME, a run or a study: tables, figures, provenance, commands.

    NAME is a folder, or a name in the folder of all runs, such as ablations-laptop. A run may still be training; runs
    of a study that are not finished are left out and named.
    """
    say_loading(f"report {name}")
    from ibqlab.runs.finding import find_run

    folder = find_run(name, "run or study")
    if (folder / "config.yaml").is_file():
        from ibqlab.runs import Run
        from ibqlab.studies.run_report import write_run_report

        page = write_run_report(Run(folder), projection)
    else:
        from ibqlab.studies.registry import write_study_report

        page = write_study_report(folder)
    say("\n".join(str(file) for file in dict.fromkeys((page, page.with_suffix(".md")))))


def report_on(folder: Path, redraw: bool = True, result: str = "") -> None:
    """Write a run's report and say where it lies; what is wrong with it is no error of the training."""
    if not folder.is_dir():  # stopped before anything was written
        return
    say(f"drawing the figures of {folder.name} …", err=True)
    from ibqlab.notebooks.results import results_of
    from ibqlab.runs import Run
    from ibqlab.studies.run_report import write_run_report

    try:
        write_run_report(Run(folder), redraw=redraw)
    except (RuntimeError, ValueError, OSError) as error:
        say(f"no report was written: {error}", err=True)
        return
    for line in results_of(folder, result):
        say(line)
