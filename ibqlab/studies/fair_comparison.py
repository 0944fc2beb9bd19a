"""The fair comparison as a study: its definition, its report, and a figure for each kind of data.

    study = open_study("fair_comparison", FairParameters(preset="laptop"))
    print(study.run())                           # the searches, then the results at the rates that they chose
    FairTables(study).shown("digits", "own")     # every method from its own start

`fair_grid` says which runs these are, `fair_tables` what they come to.
"""

from functools import partial

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.escaping import for_markdown
from ibqlab.base.intervals import name_student_interval
from ibqlab.plots.fair_dots import plot_fair_comparison
from ibqlab.quantizers import INITIALISATIONS
from ibqlab.studies.fair_grid import FairGrid, FairParameters, fair_facts, final_cells, search_cells
from ibqlab.studies.fair_tables import FairTables
from ibqlab.studies.figures import save_study_figure, save_study_table
from ibqlab.studies.pages import join_parts, picture, to_markdown, too_short_note
from ibqlab.studies.study import Study, StudyDefinition


def figure_fair(tables: FairTables, data: str) -> Figure | None:
    """One kind of data as a picture, saved as `fair_<data>`; None before anything of it has a result."""
    results = tables.data()
    results = results[results["data"] == data]
    if not results["seeds"].any():
        return None
    return save_study_figure(tables.study, f"fair_{data}", plot_fair_comparison(results), results)


def heading_of(tables: FairTables, view: str) -> str:
    """The heading of a view's table."""
    start = tables.views[view]
    return f"All from {INITIALISATIONS[start]}" if start else "Each from its own start"


def describe_view(tables: FairTables, data: str, view: str) -> str:
    """One table with what follows from it, as Markdown; saved as `<data>_<view>.csv`."""
    table = tables.shown(data, view)
    save_study_table(tables.study, f"{data}_{view}", table)
    return join_parts(to_bold_markdown(table), tables.verdicts(data, view))


def describe_start(tables: FairTables, data: str) -> str:
    """What the equal-budget start does to each method, as Markdown; saved as `<data>_start_effects.csv`."""
    table = tables.start_effects(data)
    if table.empty:
        return tables.describe_effects(data)
    save_study_table(tables.study, f"{data}_start_effects", table)
    return join_parts(to_bold_markdown(table), tables.describe_effects(data))


def describe_failures(study: Study) -> str:
    """Runs that failed, each with why: a list of Markdown; "" where none did."""
    return "\n".join(f"- {for_markdown(name)}: {for_markdown(error, 400)}" for name, error in study.failures())


def to_bold_markdown(table: pd.DataFrame) -> str:
    """A table of ours as Markdown, its bold numbers bold."""
    return to_markdown(table).replace("\\*\\*", "**")


def _report(study: Study, redraw: bool) -> str:
    tables = FairTables(study)
    save_study_table(study, "search", tables.search())
    save_study_table(study, "results", tables.data())
    failures = describe_failures(study)
    return join_parts(
        "# Every method at its best rate, from its own start and from the same one",
        too_short_note(max(cell.config.steps for cell in study.cells)),
        _introduction(tables),
        "## The search\n\n" + tables.describe_search(),
        *(_section(tables, data, redraw) for data in study.grid.data),
        f"## Runs that failed\n\nA rate at which a run failed counts as the worst of its search.\n\n{failures}"
        if failures
        else "",
    )


def _introduction(tables: FairTables) -> str:
    grid, preset = tables.grid, tables.grid.preset
    common, equal = INITIALISATIONS[preset.common_start], tables.equal_start
    lines = (
        f"{len(tables.rows)} of {len(tables.study.cells)} runs finished that can be named by now.",
        "**Alike for all**: the rates to choose from, the steps, and the data with their order. The rate is chosen by "
        f"reconstruction, on other seeds than the results, which are over seeds {', '.join(map(str, grid.seeds))}.",
        f"**Starts**: each method's own, then {common} for all, then {equal}, where comparisons of an equal budget "
        "begin. A method's own start is the default of its settings; grids of fixed codes have no other, and the "
        "dimension that goes with their K.",
        "**Measures**: usage and perplexity are of validation tokens, 10 per code. Variance lost is the share of the "
        "encoder features' variance that no linear layer behind their codes has back.",
        f"**In brackets**: {name_student_interval(len(grid.seeds))}; of differences Holm's, bold where they leave out "
        "0.",
    )
    return "\n".join(f"- {line}" for line in lines)


def _section(tables: FairTables, data: str, redraw: bool) -> str:
    title = f"Every method at its best rate: {data}"
    return join_parts(
        f"## {for_markdown(data)}",
        picture(tables.study.folder, f"fair_{data}", title, partial(figure_fair, tables, data), redraw),
        *(f"### {heading_of(tables, view)}\n\n{describe_view(tables, data, view)}" for view in tables.views),
        f"### What {tables.equal_start} does to each method\n\n{describe_start(tables, data)}",
    )


FAIR_COMPARISON = StudyDefinition(
    name="fair_comparison",
    parameters=FairParameters,
    grid=FairGrid,
    cells=search_cells,
    follow_up=final_cells,
    facts=fair_facts,
    report=_report,
)
