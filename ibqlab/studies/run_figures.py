"""Figures of a single run, drawn from its folder and saved into it with the numbers behind them."""

import shlex

from matplotlib.figure import Figure

from ibqlab.generating.class_labels import SHOWN_CLASSES
from ibqlab.generating.gallery import GalleryParameters, choose_classes, open_gallery
from ibqlab.plots import (
    code_map_table,
    plot_code_maps,
    plot_reconstructions,
    plot_usage_histogram,
    reconstruction_table,
    save_figure,
    usage_histogram_table,
)
from ibqlab.plots.style import mark_too_short
from ibqlab.runs import Run, RunError
from ibqlab.runs.caveats import why_too_short
from ibqlab.studies.figures import map_run

MOST_WORK = 1e12
"""Multiplications (weights × tokens of all images) up to which a report draws samples: a minute on two cores."""


def figure_run_codes(run: Run, method: str = "umap") -> Figure:
    """Codes and features at the first, a middle and the last snapshot, in one fitted space; saved as `code_maps`.

    Args:
        run: with at least one snapshot.
        method: "umap" or "pca".
    """
    projection, steps = map_run(run, method)
    frames = dict.fromkeys((0, len(steps) // 2, len(steps) - 1))
    panels = {_step_label(run, steps[f]): (projection, f, run.snapshot(steps[f])["counts"]) for f in frames}
    figure = plot_code_maps(panels)
    mark_short_run(figure, run)
    save_figure(figure, run.figure_path("code_maps"), code_map_table(panels))
    return figure


def figure_run_histogram(run: Run) -> Figure:
    """Hits per code by rank on the validation images, at the first and the last snapshot; saved as
    `usage_histogram`."""
    ends = (run.snapshot_steps[0], run.snapshot_steps[-1])
    counts = {_step_label(run, step): run.snapshot(step)["counts"] for step in ends}
    figure = plot_usage_histogram(counts)
    mark_short_run(figure, run)
    save_figure(figure, run.figure_path("usage_histogram"), usage_histogram_table(counts))
    return figure


def figure_run_reconstructions(run: Run) -> Figure:
    """Validation images and their reconstructions at the last snapshot; saved as `reconstructions`."""
    last = run.snapshot()
    rebuilt = {_step_label(run, run.snapshot_steps[-1]): last["reconstructions"]}
    figure = plot_reconstructions(last["images"], rebuilt, which="the first ones of the validation images")
    mark_short_run(figure, run)
    save_figure(figure, run.figure_path("reconstructions"), reconstruction_table(last["images"], rebuilt))
    return figure


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
    classes = choose_classes(gallery.parameters, gallery.generator)
    return gallery.figure_seeds(classes, "samples")


def _step_label(run: Run, step: int) -> str:
    """The step of a snapshot; of the last one besides where the run itself stands, if that is elsewhere."""
    now = int(run.metrics["step"].max())
    if step < run.snapshot_steps[-1] or step == now:
        return f"step {step:,}"
    return f"step {step:,}, the last snapshot (the run is at step {now:,})"


def mark_short_run(figure: Figure, run: Run) -> None:
    """Say on a figure that its run is too short to mean anything, where it is."""
    reason = why_too_short(float(run.metrics["step"].max()))
    if reason:
        mark_too_short(figure, reason)
