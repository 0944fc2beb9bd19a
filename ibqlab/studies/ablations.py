"""The paper's tables as a study: its definition and its report.

study = open_study("ablations", AblationParameters(preset="laptop", tables=("key_designs",)))
print(study.run())                           # what became of the runs
AblationTables(study).shown("key_designs")   # ours beside the paper's
"""

from functools import partial

from ibqlab.base.escaping import for_markdown
from ibqlab.base.intervals import name_student_interval
from ibqlab.runs.caveats import SHORTEST
from ibqlab.studies.ablation_figures import compared_methods, figure_methods, figure_norms, figure_table, order_text
from ibqlab.studies.ablation_grid import AblationParameters, PaperTables, table_cells, table_facts
from ibqlab.studies.ablation_tables import AblationTables
from ibqlab.studies.figures import save_study_table
from ibqlab.studies.pages import TOO_SHORT, picture, to_markdown
from ibqlab.studies.study import Study, StudyDefinition


def _report(study: Study, redraw: bool) -> str:
    tables = AblationTables(study)
    seeds = study.grid.seeds
    parts = [
        f"# The paper's tables at preset {study.parameters.preset}",
        "Ours beside the paper's: "
        f"{len(tables.rows)} of {len(study.cells)} runs finished, seeds {', '.join(map(str, seeds))}. In brackets: "
        f"{name_student_interval(len(seeds))}. Usage: share of codes hit at least once in the tokens named. "
        "quantizer: one pass forward and backward over a step's tokens, float32, while others were trained; MiB: "
        "what autograd keeps for it. The paper's numbers are of ImageNet at 256 pixels, ours of what the column "
        "`here` says on the images named at the end: orders can be compared, values cannot. PSNR and usage "
        "are of the validation images of each run, as many as 10 tokens per code take.",
    ]
    if max((row["steps"] for row in tables.rows.values()), default=SHORTEST) < SHORTEST:
        parts.append(TOO_SHORT)
    title = "Collapse through training"
    curves = picture(study.folder, "collapse", title, partial(figure_methods, tables), redraw)
    if curves:
        parts.append(f"## {title} (figure 2)\n\n{compared_methods(tables)}.\n\n{curves}")
    parts += [_section(tables, name, redraw) for name in study.grid.tables]
    failures = [(cell.name, failure) for cell in study.cells if (failure := study.store.failure(cell))]
    if failures:
        lines = [f"- {for_markdown(name)}: {for_markdown(failure['error'], 2000)}" for name, failure in failures]
        parts.append("## Failed\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _section(tables: AblationTables, name: str, redraw: bool) -> str:
    """One table with what follows from it; saved as `<name>_table.csv`."""
    study, file, shown = tables.study, tables.grid.files[name], tables.shown(name)
    save_study_table(study, f"{name}_table", shown)
    norms_title = "Norms of features and codes, and the softmax's spread"
    norms = ""
    if file.also:
        norms = picture(study.folder, f"{name}_norms", norms_title, partial(figure_norms, tables, name), redraw)
    blocks = [
        f"## {file.title} ({file.table})",
        to_markdown(shown),
        tables.sentences(name),
        f"Printed numbers: {file.source}.",
        picture(study.folder, name, file.title, partial(figure_table, tables, name), redraw),
        order_text(tables, name) if norms else "",
        norms,
    ]
    return "\n\n".join(block for block in blocks if block)


ABLATIONS = StudyDefinition(
    name="ablations",
    parameters=AblationParameters,
    grid=PaperTables,
    cells=table_cells,
    facts=table_facts,
    report=_report,
)
