"""The paper's tables as a study: its definition, its report, and its figures, each saved with its numbers.

A figure is None before anything is finished.

    study = open_study("ablations", AblationParameters(preset="laptop", tables=("key_designs",)))
    print(study.run())                           # what became of the runs
    AblationTables(study).shown("key_designs")   # ours beside the paper's
"""

import math
from dataclasses import replace
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.escaping import for_markdown
from ibqlab.base.intervals import name_student_interval
from ibqlab.base.measures import Quantity, measure
from ibqlab.grids.cells import Cell
from ibqlab.plots import collapse_curve_table, norm_curve_table, plot_collapse_curves, plot_norm_curves, save_figure
from ibqlab.plots.ablation_dots import DOTS_KEY, plot_ablation
from ibqlab.plots.style import method_label
from ibqlab.quantizers import INITIALISATIONS
from ibqlab.runs import Run
from ibqlab.studies.ablation_grid import AblationParameters, PaperTables, table_cells, table_facts
from ibqlab.studies.ablation_tables import PAPER, STANDS_IN, AblationTables, describe_cells, paper_title
from ibqlab.studies.figures import save_study_table
from ibqlab.studies.lead_lag import lead_lag, lead_lag_text
from ibqlab.studies.pages import join_parts, picture, to_markdown, too_short_note
from ibqlab.studies.study import Study, StudyDefinition

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
            panels.append(paper_panel(paper))
        else:
            same_panel[f"paper_{paper}"] = key  # the paper's number of the same measure
    if not panels:
        return None
    table, file, data = tables.grid.tables[name], tables.grid.files[name], tables.data(name)
    dots = data.assign(measure=data["measure"].replace(same_panel))
    descriptions = {label: describe_cells(cells) for label, cells in table.items() if cells.tokenizers}
    dots = dots[dots["measure"].isin([panel.key for panel in panels]) & dots["row"].isin(list(descriptions))]
    order = {label: number for number, label in enumerate(table)}
    dots = dots.sort_values("row", key=lambda rows: rows.map(order), kind="stable")
    dots = dots.assign(here=dots["row"].map(descriptions))
    caption = f"preset {tables.study.parameters.preset}: {name_student_interval(len(tables.grid.seeds))}; {DOTS_KEY}"
    figure = plot_ablation(dots, panels[:4], f"{file.title} ({file.table})", caption)
    save_figure(figure, tables.study.folder / "figures" / name, dots)
    return figure


def paper_panel(key: str) -> Quantity:
    """A measure of the paper, one of `PAPER`, as a panel of its own."""
    return replace(measure(PAPER[key]), key=f"paper_{key}", title=f"paper's {paper_title(key)}")


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
    return "" if metrics is None else lead_lag_text(lead_lag(metrics, by=("row",)))


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
    labels = dict.fromkeys(
        f"{method_label(cell.labels['method'])} in {cell.labels['num_res_blocks']} residual blocks"
        for cell in _comparable(tables)
    )
    return ", ".join(labels)


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


def _report(study: Study, redraw: bool) -> str:
    tables = AblationTables(study)
    seeds = study.grid.seeds
    title = "Collapse through training"
    curves = picture(study.folder, "collapse", title, partial(figure_methods, tables), redraw)
    lines = [f"- {for_markdown(name)}: {for_markdown(error, 2000)}" for name, error in study.failures()]
    return join_parts(
        f"# The paper's tables at preset {study.parameters.preset}",
        "Ours beside the paper's: "
        f"{len(tables.rows)} of {len(study.cells)} runs finished, seeds {', '.join(map(str, seeds))}. In brackets: "
        f"{name_student_interval(len(seeds))}. Usage: share of codes hit at least once in the tokens named. "
        "quantizer: one pass forward and backward over a step's tokens, float32, while others were trained; MiB: "
        "what autograd keeps for it. The paper's numbers are of ImageNet at 256 pixels, ours of what the column "
        "`here` says on the images named at the end: orders can be compared, values cannot. PSNR and usage "
        "are of the validation images of each run, as many as 10 tokens per code take.",
        too_short_note(max((row["steps"] for row in tables.rows.values()), default=math.inf)),
        f"## {title} (figure 2)\n\n{compared_methods(tables)}.\n\n{curves}" if curves else "",
        *(_section(tables, name, redraw) for name in study.grid.tables),
        "## Failed\n\n" + "\n".join(lines) if lines else "",
    )


def _section(tables: AblationTables, name: str, redraw: bool) -> str:
    """One table with what follows from it; saved as `<name>_table.csv`."""
    study, file, table = tables.study, tables.grid.files[name], tables.shown(name)
    save_study_table(study, f"{name}_table", table)
    title, norms = "Norms of features and codes, and the softmax's spread", ""
    if file.also:
        norms = picture(study.folder, f"{name}_norms", title, partial(figure_norms, tables, name), redraw)
    return join_parts(
        f"## {file.title} ({file.table})",
        to_markdown(table),
        tables.sentences(name),
        f"Printed numbers: {file.source}.",
        picture(study.folder, name, file.title, partial(figure_table, tables, name), redraw),
        order_text(tables, name) if norms else "",
        norms,
    )


ABLATIONS = StudyDefinition(
    name="ablations",
    parameters=AblationParameters,
    grid=PaperTables,
    cells=table_cells,
    facts=table_facts,
    report=_report,
)
