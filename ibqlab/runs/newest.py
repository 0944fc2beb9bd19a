"""Which run a view shows that was told none."""

from contextlib import suppress

from ibqlab.base.files import RunError
from ibqlab.runs.finding import run_folders, runs_root
from ibqlab.runs.kinds import kind_of
from ibqlab.runs.view import RunView


def newest_tokenizer_run() -> RunView | None:
    """Of the tokenizers' runs below the folder of all runs the one that finished last; None where there is none.

    Runs whose checkpoints are gone do not count: nothing can be decoded from them.
    """
    runs = []
    for folder in run_folders(runs_root()):
        with suppress(RunError, ValueError, OSError):
            runs.append((str(RunView(folder).provenance.get("ended", "")), folder))
    for _, folder in sorted(runs, reverse=True):
        with suppress(RunError, ValueError, OSError):
            run = RunView(folder)
            if run.status == "finished" and kind_of(run.config) == "tokenizer" and run.last_checkpoint is not None:
                return run
    return None
