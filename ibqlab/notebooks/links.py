"""Addresses that open notebooks and results on the server that shows them, as far as a kernel can know it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ibqlab.base.escaping import for_html, for_terminal
from ibqlab.runs import runs_root
from ibqlab.views.atlas_facts import is_atlas

APP_VARIABLE = "IBQLAB_APP"
"""Set where notebooks are served without code and without JupyterLab."""


class Links(NamedTuple):
    """Where links of the page lead."""

    lab: str | None
    """What stands before a notebook's name in the address that opens it in JupyterLab; None where there is none."""
    app: str | None
    """The same for the address that opens it without code."""
    root: Path
    """The folder that the server reaches, with results of the notebooks in it."""
    results: str
    """What stands before a file's path below `root` in the address that opens it."""
    endings: tuple[str, ...] = (".html", ".md", ".ipynb")
    """Of results that the server shows."""
    runs_scripts: bool = False
    """Whether pages of results may run their scripts there. JupyterLab's server locks them in: with its token set, as
    it is by default, it refuses such a page every file beside it."""

    def to_result(self, file: Path | None) -> str | None:
        """The address of a result; None where the server does not reach it or would not show it."""
        if file is None or file.suffix not in self.endings or (is_atlas(file.parent) and not self.runs_scripts):
            return None
        with suppress(ValueError, OSError):
            return self.results + quote(file.resolve().relative_to(self.root.resolve()).as_posix())
        return None


def links_here(folder: Path) -> Links:
    """Where links lead from this kernel: JupyterLab, a page of Voilà's inside it, or Voilà alone have told it.

    Args:
        folder: of the notebook that shows the page.
    """
    address, mark = os.environ.get("SCRIPT_NAME", ""), "voila/render/"
    base, found, notebook = address.partition(mark)
    folder = folder.absolute()
    if not found or not os.environ.get("SERVER_SOFTWARE", "").startswith("voila"):
        # JupyterLab follows paths from the notebook; of its folders it is known only that the notebook's is one.
        return Links(lab="", app=None, root=folder.parent, results="../")
    if os.environ.get(APP_VARIABLE):
        return Links(lab=None, app="", root=runs_root(), results=f"{base}runs/", endings=(".html",), runs_scripts=True)
    above = notebook.rpartition("/")[0]
    root = Path(os.path.normpath(folder / "/".join([".."] * len(above.split("/"))))) if above else folder
    lab = f"{base}lab/tree/"
    return Links(lab=f"{lab}{above}/" if above else lab, app="", root=root, results=lab)


class PageLink:
    """Where a page of several files lies, as a notebook's output: a link where the server opens it, else its folder.

    Browsers open no file of the disk from a server's page, so that a link to one would be dead.

    Args:
        page: its index.html.
    """

    def __init__(self, page: Path):
        self.page = page.absolute()
        self._address = links_here(Path()).to_result(self.page)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        folder = f"<code>{for_html(self.page.parent, None)}</code>"
        if self._address is None:
            shown = f"It lies in the folder {folder}<br>Open {self.page.name} in it with a browser."
        else:
            shown = f'<a href="{for_html(self._address, None)}" target="_blank">Open it</a>, from the folder {folder}'
        return {"text/html": f"<p>{shown}</p>", "text/plain": str(self)}

    def __str__(self) -> str:
        return (
            f"It lies in the folder {for_terminal(self.page.parent, None)}\nOpen {self.page.name} in it with a browser."
        )
