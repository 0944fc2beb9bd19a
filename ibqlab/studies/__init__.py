"""Studies: grids of runs, trained where missing, read again as tables and figures."""

from ibqlab.generating.token_statistics import describe_tokenizer, generators_over, save_token_figure
from ibqlab.grids.cells import Cell, CellStore, StudyError
from ibqlab.grids.engine import Outcome, run_cells
from ibqlab.grids.local import LocalLauncher
from ibqlab.grids.slurm import SlurmLauncher
from ibqlab.studies.ablation import AblationParameters, open_ablations
from ibqlab.studies.ablation_tables import AblationTables
from ibqlab.studies.figures import (
    figure_code_maps,
    figure_collapse,
    figure_histogram,
    figure_histogram_through_training,
    figure_maps_through_training,
    figure_reconstructions,
    figure_scaling,
    save_study_figure,
)
from ibqlab.studies.reports import write_study_report
from ibqlab.studies.scaling import ScalingReport
from ibqlab.studies.study import Study, StudyParameters, open_study
from ibqlab.studies.tables import show_table, summary_table, write_report

__all__ = [
    "AblationParameters",
    "AblationTables",
    "Cell",
    "CellStore",
    "LocalLauncher",
    "Outcome",
    "ScalingReport",
    "SlurmLauncher",
    "Study",
    "StudyError",
    "StudyParameters",
    "describe_tokenizer",
    "figure_code_maps",
    "figure_collapse",
    "figure_histogram",
    "figure_histogram_through_training",
    "figure_maps_through_training",
    "figure_reconstructions",
    "figure_scaling",
    "generators_over",
    "open_ablations",
    "open_study",
    "run_cells",
    "save_study_figure",
    "save_token_figure",
    "show_table",
    "summary_table",
    "write_report",
    "write_study_report",
]
