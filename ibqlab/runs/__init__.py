"""The run folder: everything that a training run leaves behind, readable with pandas and NumPy alone.

    config.yaml       the complete settings, with their content hash
    metrics.jsonl     one object per logged step
    alarms.jsonl      one object per alarm; missing where there was none
    snapshots/        step_00000300.npz: codebook, features, assignments and counts at a step
    checkpoints/      step_00000300.pt: what resuming needs, the newest two
    figures/          pictures and the CSV behind each
    provenance.json   status, commit, versions, hardware, seed, duration
    note.txt          what somebody has written about the run; missing where nobody has

Every file but the two .jsonl is written under another name, forced to disk and then renamed: at any moment it is there
whole or not at all. Those only grow, and a last line that a kill cut short is left out when it is read.
Start with `view`, what a folder tells, then `run`, which writes it; `finding` says what a name means.
"""

from ibqlab.base.files import RunError
from ibqlab.runs.finding import checkout_root, runs_root
from ibqlab.runs.notes import read_note, write_note
from ibqlab.runs.provenance_record import provenance
from ibqlab.runs.run import Run
from ibqlab.runs.summaries import RUN_COLUMNS, RunIndex, RunSummary
from ibqlab.runs.table import list_runs

__all__ = [
    "RUN_COLUMNS",
    "Run",
    "RunError",
    "RunIndex",
    "RunSummary",
    "checkout_root",
    "list_runs",
    "provenance",
    "read_note",
    "runs_root",
    "write_note",
]
