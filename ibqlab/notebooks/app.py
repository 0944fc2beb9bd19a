"""The notebooks without code: served by Voilà, the start page first.

Whoever opens a notebook here has a kernel of their own, which ends some minutes after they have left. Only what widgets
say is passed on to it: nobody types code. What is unusual: a notebook opens with its preset where that is finished and
only has to be shown, else with the smallest, because a visitor waits for a page and not for a training.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import nbformat
from tornado.web import HTTPError, RedirectHandler, StaticFileHandler
from traitlets.config import Config
from voila.app import Voila

from ibqlab.base.files import RunError
from ibqlab.config import ConfigError
from ibqlab.notebooks.catalogue import START_PAGE
from ibqlab.notebooks.links import APP_VARIABLE
from ibqlab.notebooks.parameters import Parameter, parameters_of_cell
from ibqlab.notebooks.status import folder_status
from ibqlab.runs import runs_root
from ibqlab.runs.newest import newest_tokenizer_run

IDLE_SECONDS = 600
"""After which a kernel ends whose page nobody has open any more."""
SMALLEST = "smoke"
"""The preset that every notebook with presets has; it takes seconds."""
JUPYTER = Path(__file__).with_name("jupyter")
"""Where Voilà finds its template, and JupyterLab how to show notebooks without code."""


def show_finished_or_smallest(handler: Any, notebook: nbformat.NotebookNode, cwd: str) -> nbformat.NotebookNode:
    """Voilà's hook: the notebook that it is about to run, under the preset that a visitor does not wait for.

    Args:
        handler: of the request, whose address names the notebook.
        notebook: is changed in place where it has presets.
        cwd: where its kernel will start.
    """
    # Asked for, it goes into a cookie, without which the page's last word, that its kernel may end, is refused.
    _ = handler.xsrf_token
    name = PurePosixPath(unquote(handler.request.path)).stem
    tagged = [number for number, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    if not tagged or _shows_the_newest_run(notebook):
        return notebook
    with suppress(ConfigError, RunError):
        preset = preset_to_show(name, parameters_of_cell(notebook.cells[tagged[0]].source, name), runs_root())
        if preset:
            notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(f"preset = {preset!r}"))
            notebook.cells.insert(1, nbformat.v4.new_markdown_cell(_said_of(preset)))
    return notebook


def _shows_the_newest_run(notebook: nbformat.NotebookNode) -> bool:
    """Whether a notebook trains nothing, because it shows a run that has finished."""
    is_asked = any("find_or_train(" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    with suppress(RunError):
        return is_asked and newest_tokenizer_run() is not None
    return False


def preset_to_show(name: str, parameters: Mapping[str, Parameter], runs: Path) -> str | None:
    """The preset that a notebook opens with: its own where its folder is finished, else the smallest.

    Args:
        name: of the notebook, without .ipynb.
        parameters: what its cell tagged `parameters` assigns.
        runs: the folder of all runs.
    Returns:
        The preset; None for a notebook without presets.
    """
    if "preset" not in parameters:
        return None
    own = parameters["preset"].default
    folder = runs / f"{name}-{own}"
    return own if folder.is_dir() and folder_status(folder).state == "finished" else SMALLEST


def _said_of(preset: str) -> str:
    if preset == SMALLEST:
        return (
            f"*Preset `{preset}`, too short to mean anything. Run the notebook's own preset, and this page shows it.*"
        )
    return f"*Preset `{preset}`, which has finished.*"


def without_addresses_elsewhere(page: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Voilà's hook: a page's settings, of which mathematics would otherwise be fetched from another machine."""
    # Without both, Voilà sets formulas with what it brings.
    return page | {"fullMathjaxUrl": None, "mathjaxConfig": None}


def configure(settings: Config) -> None:
    """What Voilà needs to know to serve the notebooks, by itself or inside JupyterLab.

    Args:
        settings: traitlets' configuration, to which it is added.
    """
    settings.VoilaConfiguration.template = "ibqlab"
    # Cells are shown as they finish; otherwise the page stays empty until the last one has.
    settings.VoilaConfiguration.progressive_rendering = True
    settings.VoilaConfiguration.prelaunch_hook = show_finished_or_smallest
    settings.VoilaConfiguration.page_config_hook = without_addresses_elsewhere


class _Results(StaticFileHandler):
    """Reports of the folder of runs, and the pictures in them."""

    def validate_absolute_path(self, root: str, absolute_path: str) -> str | None:
        if Path(absolute_path).suffix not in (".html", ".png", ".jpg", ".gif", ".svg", ".css", ".js"):
            raise HTTPError(404)
        return super().validate_absolute_path(root, absolute_path)


class NotebookApp(Voila):
    """Voilà with the start page in front, and reports beside it."""

    def init_handlers(self) -> list[Any]:
        start = {"url": f"{self.base_url}voila/render/{START_PAGE}.ipynb", "permanent": False}
        return [
            (self.server_url, RedirectHandler, start),
            (rf"{self.server_url}voila/tree.*", RedirectHandler, start),
            (rf"{self.server_url}runs/(.*)", _Results, {"path": str(runs_root().absolute())}),
            *super().init_handlers(),
        ]


def serve(folder: Path, options: list[str]) -> None:
    """Serve the notebooks of a folder until stopped.

    Args:
        folder: with the start page in it.
        options: of Voilà's command line, like --port=8866.
    """
    root = folder.absolute()
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (str(JUPYTER), os.environ.get("JUPYTER_PATH"))))
    # Kernels start in the notebooks' folder, from which other runs would be found.
    os.environ["IBQLAB_RUNS"] = str(runs_root().absolute())
    os.environ[APP_VARIABLE] = "1"

    settings = Config()
    configure(settings)
    settings.MappingKernelManager.update(cull_interval=60, cull_idle_timeout=IDLE_SECONDS)
    NotebookApp.launch_instance([str(root), *options], config=settings)
