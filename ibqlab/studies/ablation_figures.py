"""Figures of the paper's tables, each saved with its numbers; None before anything is finished."""

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.intervals import name_student_interval
from ibqlab.base.measures import Quantity, measure
from ibqlab.grids.cells import Cell
from ibqlab.plots import collapse_curve_table, norm_curve_table, plot_collapse_curves, plot_norm_curves, save_figure
from ibqlab.plots.ablation_dots import DOTS_KEY, plot_ablation
from ibqlab.plots.style import method_label
from ibqlab.quantizers import INITIALISATIONS
from ibqlab.runs import Run
from ibqlab.studies.ablation_tables import PAPER, STANDS_IN, AblationTables, describe_cells, paper_title
from ibqlab.studies.lead_lag import lead_lag, lead_lag_text

APART = ("gfid", "inception_score")
"""The paper's measures that have a panel of their own, since ours are of other images or another network."""


def figure_table(tables: AblationTables, name: str) -> Figure | None:
    """A table as a picture, saved under its name."""
    papers = tables.compared(tables.values(name))
    orderings, panels, same_panel = tables.orderings(name), [], {}
    for key in orderings:
        paper = papers[key]
        panels.append(tables.measures[key])
        if key in STANDS_IN or paper in APART:
            panels.append(paper_measure(paper))
        else:
            same_panel[f"paper_{paper}"] = key  # the paper's number of the same measure
    if not panels:
        return None
    table, file, data = tables.grid.tables[name], tables.grid.files[name], tables.data(name)
    drawn = data.assign(measure=data["measure"].replace(same_panel))
    here = {label: describe_cells(cells) for label, cells in table.items() if cells.tokenizers}
    drawn = drawn[drawn["measure"].isin([panel.key for panel in panels]) & drawn["row"].isin(list(here))]
    order = {label: number for number, label in enumerate(table)}
    drawn = drawn.sort_values("row", key=lambda rows: rows.map(order), kind="stable")
    drawn = drawn.assign(here=drawn["row"].map(here))
    caption = f"preset {tables.study.parameters.preset}: {name_student_interval(len(tables.grid.seeds))}; {DOTS_KEY}"
    figure = plot_ablation(drawn, panels[:4], f"{file.title} ({file.table})", caption)
    save_figure(figure, tables.study.folder / "figures" / name, drawn)
    return figure


def paper_measure(key: str) -> Quantity:
    """A measure of the paper, a field of `Published`, as something that has a panel of its own."""
    ours = measure(PAPER[key])
    return Quantity(f"paper_{key}", f"paper's {paper_title(key)}", "", "as the paper prints it", ours.better)


def figure_norms(tables: AblationTables, name: str) -> Figure | None:
    """Norms, the softmax's spread, gradient reach and each step's usage against the step, for a table's rows.

    Saved as `<name>_norms`. None also for tables that do not ask for these columns.
    """
    metrics = _row_metrics(tables, name)
    if metrics is None:
        return None
    figure = plot_norm_curves(metrics)
    save_figure(figure, tables.study.folder / "figures" / f"{name}_norms", norm_curve_table(metrics))
    return figure


def order_text(tables: AblationTables, name: str) -> str:
    """What changes first in a table's rows, computed over seeds; "" where the table does not ask, with one seed, and
    for runs that did not record it."""
    metrics = _row_metrics(tables, name) if len(tables.grid.seeds) > 1 else None
    return "" if metrics is None else lead_lag_text(lead_lag(metrics, by=("row",)), by=("row",))


def _row_metrics(tables: AblationTables, name: str) -> pd.DataFrame | None:
    """All logged rows of the training steps of a table's runs; None where there are none or the table does not ask."""
    frames = [
        _curves(tables, cell).assign(row=label)
        for label, cells in tables.grid.tables[name].items()
        for cell in cells.tokenizers
        if cell.name in tables.rows and tables.grid.files[name].also
    ]
    if not frames:
        return None
    metrics = pd.concat(frames, ignore_index=True)
    return metrics[metrics["step"] > 0]


def figure_methods(tables: AblationTables) -> Figure | None:
    """Usage, perplexity and gradient reach against the step, for all methods at one codebook size (figure 2).

    Saved as `collapse`.
    """
    frames = [_curves(tables, cell) for cell in _comparable(tables) if cell.name in tables.rows]
    if not frames:
        return None
    metrics = pd.concat(frames, ignore_index=True)
    figure = plot_collapse_curves(metrics)
    save_figure(figure, tables.study.folder / "figures" / "collapse", collapse_curve_table(metrics))
    return figure


def compared_methods(tables: AblationTables) -> str:
    """What `figure_methods` shows: methods need not have the same number of residual blocks."""
    shown = dict.fromkeys(
        f"{method_label(cell.labels['method'])} in {cell.labels['num_res_blocks']} residual blocks"
        for cell in _comparable(tables)
    )
    return ", ".join(shown)


def _comparable(tables: AblationTables) -> list[Cell]:
    """The deepest setting of each method, at the codebook size and dimension that most methods share."""
    groups: dict[tuple[int, int], list[Cell]] = {}
    for cell in tables.study.cells:
        if not cell.needs:
            groups.setdefault((cell.labels["codebook_size"], cell.labels["code_dim"]), []).append(cell)
    largest = max(groups.values(), key=lambda cells: len({cell.labels["method"] for cell in cells}), default=[])
    by_depth = sorted(largest, key=lambda cell: cell.labels["num_res_blocks"])
    return list({(cell.labels["method"], cell.labels["seed"]): cell for cell in by_depth}.values())


def _curves(tables: AblationTables, cell: Cell) -> pd.DataFrame:
    init = INITIALISATIONS[cell.config.tokenizer.quantizer.codebook_init]
    return Run(tables.study.folder / cell.name).metrics.assign(**cell.labels, init=init)
