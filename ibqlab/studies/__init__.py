"""Studies: many runs that answer one question, trained where missing, read again as tables, figures and a report.

There is one kind of study (`study.Study`): runs in a folder, found again by their settings. A definition says which
runs they are and how they are reported: `collapse`, `scaling`, `ablations` (the paper's tables), `token_costs` and
`fair_comparison`. All are listed in `registry`, which opens them: start there. `feature_code_map` draws the paper's
figures from their runs, `comparisons` says what a few seeds can tell apart, `pages` writes reports, and `run_report`
and `lab_report` are the same for a single run and for a lab.
"""

from ibqlab.grids.cells import StudyError
from ibqlab.studies.ablation_grid import AblationParameters
from ibqlab.studies.ablation_tables import AblationTables
from ibqlab.studies.ablations import figure_methods, figure_norms, figure_table
from ibqlab.studies.collapse import describe_collapse, show_table, summary_table
from ibqlab.studies.drawn_runs import FeatureMapParameters
from ibqlab.studies.fair_comparison import figure_fair
from ibqlab.studies.fair_grid import FairParameters
from ibqlab.studies.fair_tables import FairTables
from ibqlab.studies.feature_code_map import FeatureCodeMap, prepare_feature_map
from ibqlab.studies.figures import (
    figure_code_maps,
    figure_collapse,
    figure_histogram,
    figure_histogram_through_training,
    figure_maps_through_training,
    figure_reconstructions,
)
from ibqlab.studies.lab_report import write_lab_report
from ibqlab.studies.method_grid import StudyParameters
from ibqlab.studies.registry import DEFINITIONS, open_study, write_study_report
from ibqlab.studies.scaling import figure_laws, figure_scaling
from ibqlab.studies.study import Study, StudyDefinition
from ibqlab.studies.token_costs import LinkParameters

__all__ = [
    "DEFINITIONS",
    "AblationParameters",
    "AblationTables",
    "FairParameters",
    "FairTables",
    "FeatureCodeMap",
    "FeatureMapParameters",
    "LinkParameters",
    "Study",
    "StudyDefinition",
    "StudyError",
    "StudyParameters",
    "describe_collapse",
    "figure_code_maps",
    "figure_collapse",
    "figure_fair",
    "figure_histogram",
    "figure_histogram_through_training",
    "figure_laws",
    "figure_maps_through_training",
    "figure_methods",
    "figure_norms",
    "figure_reconstructions",
    "figure_scaling",
    "figure_table",
    "open_study",
    "prepare_feature_map",
    "show_table",
    "summary_table",
    "write_lab_report",
    "write_study_report",
]
