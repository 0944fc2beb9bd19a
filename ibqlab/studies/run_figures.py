"""Figures of a single run, drawn from its folder and saved into it with the numbers behind them."""

from matplotlib.figure import Figure

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
from ibqlab.progress import why_too_short
from ibqlab.runs import Run
from ibqlab.studies.figures import map_run


def figure_run_codes(run: Run, method: str = "umap") -> Figure:
    """Codes and features at the first, a middle and the last snapshot, in one fitted space; saved as `code_maps`.

    Args:
        run: with at least one snapshot.
        method: "umap" or "pca".
    """
    projection, steps = map_run(run, method)
    frames = dict.fromkeys((0, len(steps) // 2, len(steps) - 1))
    panels = {f"step {steps[f]:,}": (projection, f, run.snapshot(steps[f])["counts"]) for f in frames}
    figure = plot_code_maps(panels)
    _mark(figure, run)
    save_figure(figure, run.figure_path("code_maps"), code_map_table(panels))
    return figure


def figure_run_histogram(run: Run) -> Figure:
    """Hits per code by rank on the validation images, at the first and the last snapshot; saved as
    `usage_histogram`."""
    counts = {
        f"step {step:,}": run.snapshot(step)["counts"] for step in (run.snapshot_steps[0], run.snapshot_steps[-1])
    }
    figure = plot_usage_histogram(counts)
    _mark(figure, run)
    save_figure(figure, run.figure_path("usage_histogram"), usage_histogram_table(counts))
    return figure


def figure_run_reconstructions(run: Run) -> Figure:
    """Validation images and their reconstructions at the last snapshot; saved as `reconstructions`."""
    last = run.snapshot()
    rebuilt = {f"step {run.snapshot_steps[-1]:,}": last["reconstructions"]}
    figure = plot_reconstructions(last["images"], rebuilt, which="the first ones of the validation images")
    _mark(figure, run)
    save_figure(figure, run.figure_path("reconstructions"), reconstruction_table(last["images"], rebuilt))
    return figure


def _mark(figure: Figure, run: Run) -> None:
    """Say on a figure that its run is too short to mean anything, where it is."""
    reason = why_too_short(run.config.get("steps"))
    if reason:
        mark_too_short(figure, reason)
