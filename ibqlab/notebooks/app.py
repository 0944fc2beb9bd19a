"""The notebooks without code: served by Voilà, the start page first.

Whoever opens a notebook here has a kernel of their own, which ends some minutes after they have left. Only what widgets
say is passed on to it: nobody types code. What is unusual: a notebook opens with its preset where that is finished and
only has to be shown, else with the smallest, because a visitor waits for a page and not for a training.
"""

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbformat
from tornado.web import HTTPError, RedirectHandler, StaticFileHandler
from traitlets.config import Config
from voila.app import Voila

from ibqlab.config import ConfigError
from ibqlab.notebooks.catalogue import START_PAGE
from ibqlab.notebooks.parameters import notebook_parameters
from ibqlab.notebooks.start_page import APP_VARIABLE
from ibqlab.notebooks.status import folder_status
from ibqlab.runs import runs_root

IDLE_SECONDS = 600
"""After which a kernel ends whose page nobody has open any more."""
SMALLEST = "smoke"
"""The preset that every notebook with presets has; it takes seconds."""
MARK = "voila/render/"


def preset_to_show(notebook: Path, runs: Path) -> str | None:
    """The preset that a notebook opens with: its own where its folder is finished, else the smallest.

    Args:
        notebook: the file.
        runs: the folder of all runs.
    Returns:
        Its name; None for a notebook without presets.
    """
    try:
        preset = notebook_parameters(notebook).get("preset")
    except ConfigError:
        return None
    if preset is None:
        return None
    folder = runs / f"{notebook.stem}-{preset.default}"
    return preset.default if folder.is_dir() and folder_status(folder).state == "finished" else SMALLEST


def with_preset(notebook: nbformat.NotebookNode, preset: str) -> nbformat.NotebookNode:
    """A notebook under a preset, which it says behind its first cell. Changed in place.

    Args:
        notebook: with a cell tagged `parameters`.
        preset: as in its parameter of this name.
    """
    tags = [cell.metadata.get("tags", ()) for cell in notebook.cells]
    place = next(number for number, words in enumerate(tags) if "parameters" in words) + 1
    notebook.cells.insert(place, nbformat.v4.new_code_cell(f"preset = {preset!r}"))
    words = f"*Shown under the preset `{preset}`" + (
        ", which is too short to mean anything: run the notebook's own preset, and this page shows that.*"
        if preset == SMALLEST
        else ", which has finished.*"
    )
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell(words))
    return notebook


class _Results(StaticFileHandler):
    """Reports of the folder of runs, and the pictures in them."""

    def validate_absolute_path(self, root: str, absolute_path: str) -> str | None:
        if Path(absolute_path).suffix not in (".html", ".png", ".gif", ".svg", ".css", ".js"):
            raise HTTPError(404)
        return super().validate_absolute_path(root, absolute_path)


class NotebookApp(Voila):
    """Voilà with the start page in front, and reports beside it."""

    def init_handlers(self) -> list[Any]:
        start = {"url": f"{self.base_url}{MARK}{START_PAGE}.ipynb", "permanent": False}
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
    # Kernels start in the notebooks' folder, from which other runs would be found.
    os.environ["IBQLAB_RUNS"] = str(runs_root().absolute())
    os.environ[APP_VARIABLE] = "1"

    def prepare(handler: Any, notebook: nbformat.NotebookNode, cwd: str) -> nbformat.NotebookNode:
        name = unquote(handler.request.path.partition(MARK)[2])
        preset = preset_to_show(root / name, runs_root())
        return with_preset(notebook, preset) if preset else notebook

    settings = Config()
    settings.VoilaConfiguration.update(template="ibqlab", progressive_rendering=True, prelaunch_hook=prepare)
    settings.MappingKernelManager.update(cull_interval=60, cull_idle_timeout=IDLE_SECONDS)
    NotebookApp.launch_instance([str(root), *options], config=settings)
