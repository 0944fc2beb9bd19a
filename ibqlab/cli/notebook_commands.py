"""`ibqlab run` executes a notebook; `ibqlab notebooks` copies them out."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from ibqlab.cli.run_commands import report_on
from ibqlab.cli.terminal import PLUGIN, say, say_loading, sigterm_as_ctrl_c

HELP = "Show this and all notebooks; with NOTEBOOK its parameters and presets."


def _help_of_run(ctx: click.Context, _: click.Parameter, is_requested: bool) -> None:
    """Without a notebook the command's help and all notebooks, with one its parameters."""
    if not is_requested or ctx.resilient_parsing:
        return
    from ibqlab.notebooks.catalogue import describe_notebooks, find_notebook
    from ibqlab.notebooks.parameters import describe_parameters

    name = ctx.params.get("notebook")
    if name:
        source = find_notebook(name)
        say(f"ibqlab run {name} [KEY=VALUE]...\n\nparameters of {source.name}\n{describe_parameters(source)}")
    else:
        say(f"{ctx.get_help()}\n\nNotebooks:\n{describe_notebooks()}\n\nParameters: ibqlab run NOTEBOOK --help")
    ctx.exit()


@click.command(add_help_option=False)
@click.argument("notebook", required=False, is_eager=True, metavar="NOTEBOOK")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Executed copy; by default dated, under runs/notebooks."
)
@PLUGIN
@click.option("--help", is_flag=True, expose_value=False, callback=_help_of_run, help=HELP)
def run(notebook: str | None, settings: Sequence[str], output: Path | None, plugins: Sequence[str]) -> None:
    """Execute NOTEBOOK, a path or a name under notebooks/, with some of its parameters replaced.

    codebook_sizes=[256,1024] is a list, text stays as it is typed. All parameters, presets and settings of recipes are
    checked before anything starts.
    """
    if not notebook:
        raise click.UsageError("NOTEBOOK is missing; list them with: ibqlab run --help")
    say_loading(f"run {notebook}")
    from ibqlab.notebooks.catalogue import find_notebook
    from ibqlab.notebooks.execution import execute, prepare_copy
    from ibqlab.notebooks.parameters import read_settings
    from ibqlab.notebooks.results import results_of

    source = find_notebook(notebook)
    values = read_settings(source, [*settings, *([f"plugins=[{', '.join(plugins)}]"] if plugins else [])])
    target = prepare_copy(source, output)
    with sigterm_as_ctrl_c():
        failure, folder, result = execute(source, target, values)
    if folder and (folder / "config.yaml").is_file():
        report_on(folder, redraw=False, result=result)
    elif folder:
        say("\n".join(results_of(folder, result)))
    say(f"executed copy: {target}")
    if failure:
        say(f"Error: {failure}", err=True)
        sys.exit(1)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def notebooks(folder: Path) -> None:
    """Copy all notebooks into FOLDER, where you may change them; files of these names with other content are kept."""
    from ibqlab.notebooks.catalogue import copy_notebooks

    copies = copy_notebooks(folder)
    example = next((copy for copy in copies if copy.stem == "explore_collapse"), copies[0])
    say(f"{len(copies)} notebooks in {folder}")
    say(f"open them: jupyter lab {shlex.quote(str(folder))}")
    say(f"or without code: ibqlab app {shlex.quote(str(folder))}")
    say(f"or run one: ibqlab run {shlex.quote(str(example))} preset=smoke")


@click.command()
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--port", default=8866, show_default=True, help="The next free one where it is taken.")
@click.option("--no-browser", is_flag=True, help="Only serve; the address is printed.")
def app(folder: Path | None, port: int, no_browser: bool) -> None:
    """Serve the notebooks of FOLDER without code, to this machine, until Ctrl-C; without FOLDER those of the package.

    A notebook opens with its own preset where that has finished, else with the preset smoke.
    """
    say_loading("app")
    from ibqlab.notebooks.catalogue import START_PAGE, notebook_folder

    folder = folder or notebook_folder()
    if not (folder / f"{START_PAGE}.ipynb").is_file():
        raise FileNotFoundError(
            f"{folder} holds no start page {START_PAGE}.ipynb; copy it and all notebooks: ibqlab notebooks {folder}"
        )
    try:
        from ibqlab.notebooks.app import serve
    except ImportError as error:
        raise ValueError(f"serving notebooks needs {error.name}: pip install 'ibqlab[lab]'") from None
    serve(folder, [f"--port={port}", *(["--no-browser"] if no_browser else [])])
