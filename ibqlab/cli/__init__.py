"""The command line: what a notebook or a Python session does, asked for in one line and left alone.

Each command is a function that reads what was typed, hands it to the library and says what came of it; none of them
computes anything. Everything heavy is imported inside the command that needs it, so that `ibqlab --help` answers at
once. `program` is the group that turns errors into messages, `terminal` is how lines are said, and each other file
holds the commands of one kind. Start with `training_commands.train`.
"""

from ibqlab.cli.checkpoint_commands import download, export, inspect
from ibqlab.cli.list_commands import runs
from ibqlab.cli.notebook_commands import app, notebooks, run
from ibqlab.cli.program import main
from ibqlab.cli.quantizer_commands import check
from ibqlab.cli.run_commands import report, show
from ibqlab.cli.sampling_commands import sample, tokenize
from ibqlab.cli.training_commands import plan, train
from ibqlab.cli.view_commands import atlas

for command in (
    run,
    notebooks,
    app,
    train,
    plan,
    check,
    tokenize,
    sample,
    runs,
    show,
    report,
    atlas,
    inspect,
    download,
    export,
):
    main.add_command(command)

__all__ = ["main"]
