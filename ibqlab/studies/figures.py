"""Figures of a study, each drawn from the run folders and saved with the numbers behind it."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.files import explained, write_whole
from ibqlab.diagnostics.projection import Projection, project_codes
from ibqlab.grids.cells import StudyError
from ibqlab.plots import (
    code_map_table,
    collapse_curve_table,
    plot_code_maps,
    plot_collapse_curves,
    plot_reconstructions,
    plot_usage_histogram,
    reconstruction_table,
    save_figure,
    usage_histogram_table,
)
from ibqlab.plots.code_map import Panel
from ibqlab.plots.style import extend_caption, mark_too_short
from ibqlab.runs import Run, RunError
from ibqlab.studies.method_grid import name_start, require_methods
from ibqlab.studies.study import Study

MAP_FRAMES = 4
"""Snapshots that a map's space is fitted on, at most: more would leave too few points for each."""
MAP_POINTS = 5000
"""Points that a map's space is fitted on, at most: more take UMAP longer than anybody waits for a figure."""
STARTS = {"published": "collapse_curves", "same": "collapse_curves_same_start"}
"""What `figure_collapse` may show, and the name of its file."""


def save_study_figure(study: Study, name: str, figure: Figure, data: pd.DataFrame) -> Figure:
    """Write a figure and its numbers into the study's `figures/`; the same figure.

    A figure of a study whose runs are too short says so on its face.
    """
    if study.too_short:
        mark_too_short(figure, study.too_short)
    save_figure(figure, study.folder / "figures" / name, data)
    return figure


def save_study_table(study: Study, name: str, table: pd.DataFrame) -> None:
    """Write a table into the study's `figures/` as CSV."""
    folder = study.folder / "figures"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.csv", table.to_csv(index=False).encode())


def _save_of_one_seed(study: Study, name: str, figure: Figure, data: pd.DataFrame) -> Figure:
    """`save_study_figure` of a figure that shows the first seed alone, which its caption says where there are more."""
    seeds = {cell.labels["seed"] for cell, _ in study.finished()}
    if len(seeds) > 1:
        extend_caption(figure, f"seed {study.grid.seeds[0]}, the first of {len(seeds)}")
    return save_study_figure(study, name, figure, data)


def figure_collapse(study: Study, starts: str = "published") -> Figure:
    """Usage, perplexity and gradient reach against training step.

    Where the study has several codebook sizes or dimensions, the largest of each is shown.

    Args:
        study: with at least one finished cell.
        starts: "published": each method from the start it has of its own, saved as `collapse_curves`; all starts where
            no method was trained from its own. "same": every start, so that methods can be compared from the same one,
            saved as `collapse_curves_same_start`.
    Raises:
        StudyError: no finished cell.
        ValueError: another value of `starts`.
    """
    if starts not in STARTS:
        raise ValueError(f"starts must be one of {', '.join(map(repr, STARTS))}; got {starts!r}")
    metrics = study.metrics()
    for axis in ("codebook_size", "code_dim"):
        metrics = metrics[metrics[axis] == metrics[axis].max()]
    if starts == "published" and metrics["published_init"].any():
        metrics = metrics[metrics["published_init"]]
    return save_study_figure(study, STARTS[starts], plot_collapse_curves(metrics), collapse_curve_table(metrics))


def figure_histogram(study: Study) -> Figure:
    """Rank and frequency of codes on the validation images after training; saved as `usage_histogram`."""
    counts = {label: run.snapshot()["counts"] for label, run in labelled_runs(study).items()}
    return _save_of_one_seed(study, "usage_histogram", plot_usage_histogram(counts), usage_histogram_table(counts))


def figure_code_maps(study: Study) -> Figure:
    """Codes and encoder features of each method after training, in one fitted space each; saved as `code_maps`.

    Raises:
        StudyError: no run has a snapshot that can be drawn.
    """
    panels, missing = map_each(labelled_runs(study), lambda run: [last_map(run, study.grid.projection)])
    figure = plot_code_maps(panels)
    extend_caption(figure, missing)
    return _save_of_one_seed(study, "code_maps", figure, code_map_table(panels))


def figure_maps_through_training(study: Study) -> Figure:
    """Codes and features of each method from its own start, at the first, a middle and the last snapshot, one row and
    one fitted space per method: the slider of `explore_study` on paper. Saved as `code_maps_through_training`."""

    def through_training(run: Run) -> list[tuple[str, Panel]]:
        projection, steps = map_run(run, study.grid.projection)
        return [
            (f", step {step:,}", (projection, steps.index(step), run.snapshot(step)["counts"]))
            for step in first_middle_last(steps)
        ]

    panels, missing = map_each(labelled_runs(study, own_start=True), through_training)
    figure = plot_code_maps(panels)
    extend_caption(figure, missing)
    return _save_of_one_seed(study, "code_maps_through_training", figure, code_map_table(panels))


def figure_histogram_through_training(study: Study) -> Figure:
    """Rank and frequency of codes for each method from its own start, at the first, a middle and the last snapshot.
    Saved as `usage_histogram_through_training`."""
    counts = {}
    for label, run in labelled_runs(study, own_start=True).items():
        for step in first_middle_last(mapped_steps(run)):
            counts[f"{label}, step {step:,}"] = run.snapshot(step)["counts"]
    figure = plot_usage_histogram(counts)
    return _save_of_one_seed(study, "usage_histogram_through_training", figure, usage_histogram_table(counts))


def figure_reconstructions(study: Study) -> Figure:
    """Validation images and what each method makes of them; saved as `reconstructions`."""
    runs = labelled_runs(study)
    pictures = {label: run.snapshot() for label, run in runs.items()}
    images = next(iter(pictures.values()))["images"]
    rebuilt = {label: snapshot["reconstructions"] for label, snapshot in pictures.items()}
    tokens = int(study.rows()["tokens"].min())
    selection = f"the first ones; a table's PSNR is over the images of {tokens:,} validation tokens"
    figure = plot_reconstructions(images, rebuilt, which=selection)
    return _save_of_one_seed(study, "reconstructions", figure, reconstruction_table(images, rebuilt))


def mapped_steps(run: Run, frames: int = MAP_FRAMES) -> list[int]:
    """Steps of at most `frames` snapshots, evenly chosen, first and last included."""
    steps = run.snapshot_steps
    return sorted({steps[i] for i in np.linspace(0, len(steps) - 1, frames).round().astype(int)})


def first_middle_last(steps: list[int]) -> list[int]:
    """The steps that a figure shows of a run, each once."""
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]})


def map_run(
    run: Run, method: str, *, frames: int = MAP_FRAMES, max_points: int = MAP_POINTS
) -> tuple[Projection, list[int]]:
    """One fitted space for some of a run's snapshots, and the steps they stand for.

    Snapshots with NaN or infinity are left out, and those of another code dimension than the latest one's.

    Args:
        run: with at least one snapshot.
        method: "umap" or "pca".
        frames: most snapshots to show, evenly chosen, first and last included; at least 2.
        max_points: most points in the fit, all frames together.
    Returns:
        The projection, one frame per step, with every code in use at each; and the steps.
    Raises:
        RunError: no snapshot that a map can be made of.
    """
    snapshots = {step: run.snapshot(step) for step in mapped_steps(run, frames)}
    with_both = {step: shot for step, shot in snapshots.items() if {"codebook", "features"} <= set(shot)}
    finite = {step: shot for step, shot in with_both.items() if _is_finite(shot)}
    if not finite:
        why = "hold NaN or infinity: the run has diverged" if with_both else "hold no codebook and features"
        raise RunError(f"no map of {run.name}: its snapshots {why}")
    code_dim = finite[max(finite)]["codebook"].shape[1]
    shown = {step: shot for step, shot in finite.items() if shot["codebook"].shape[1] == code_dim}
    projection = project_codes(
        [shot["codebook"] for shot in shown.values()],
        [shot["features"] for shot in shown.values()],
        method=method,
        counts=[shot["counts"] for shot in shown.values()],
        max_points=max_points,
    )
    return projection, list(shown)


def last_map(run: Run, method: str) -> tuple[str, Panel]:
    """The panel of the last snapshot that can be drawn, and what its title needs to say where later ones cannot.

    Raises:
        RunError: none can be drawn.
    """
    projection, steps = map_run(run, method)
    step = steps[-1]
    remark = "" if step == run.snapshot_steps[-1] else f", step {step:,} (later: NaN)"
    return remark, (projection, len(steps) - 1, run.snapshot(step)["counts"])


def map_each(runs: dict[str, Run], panels_of: Callable[[Run], list[tuple[str, Panel]]]) -> tuple[dict[str, Panel], str]:
    """Panels of runs by title, and a line that says of which run none could be drawn and why.

    Args:
        runs: by the label that titles begin with.
        panels_of: what comes after the label, and the panel, for each of a run; may raise RunError.
    Raises:
        StudyError: no run has a panel.
    """
    panels, missing = {}, []
    for label, run in runs.items():
        try:
            panels |= {f"{label}{rest}": panel for rest, panel in panels_of(run)}
        except RunError as error:
            missing.append(str(error))
    if not panels:
        raise StudyError("; ".join(missing))
    return panels, "; ".join(missing)


def _is_finite(shot: dict[str, np.ndarray]) -> bool:
    return bool(np.isfinite(shot["codebook"]).all() and np.isfinite(shot["features"]).all())


def labelled_runs(study: Study, own_start: bool = False) -> dict[str, Run]:
    """One run per method and start, at the largest codebook and dimension and the first seed, by its label in figures.

    Args:
        study: with at least one finished cell.
        own_start: only runs from their method's own start, where there are any.
    """
    require_methods(study)
    finished = study.finished()
    if not finished:
        raise study.nothing_finished()
    size = max(cell.labels["codebook_size"] for cell, _ in finished)
    dim = max(cell.labels["code_dim"] for cell, _ in finished if cell.labels["codebook_size"] == size)
    labels = {"codebook_size": size, "code_dim": dim, "seed": study.grid.seeds[0]}
    if own_start and any(cell.labels["published_init"] for cell, _ in finished):
        labels["published_init"] = True
    return {
        f"{cell.labels['method']} from {name_start(cell.labels['init'], cell.labels['published_init'])}": run
        for cell, run in finished
        if labels.items() <= cell.labels.items()
    }
