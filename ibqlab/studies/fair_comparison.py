"""The fair comparison as a study."""

from ibqlab.studies.fair_grid import FairGrid, FairParameters, fair_facts, final_cells, search_cells
from ibqlab.studies.study import Study, StudyDefinition


def _report(study: Study, redraw: bool) -> str:
    return ""


FAIR_COMPARISON = StudyDefinition(
    name="fair_comparison",
    parameters=FairParameters,
    grid=FairGrid,
    cells=search_cells,
    follow_up=final_cells,
    facts=fair_facts,
    report=_report,
)
