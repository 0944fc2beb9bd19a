"""The folder of all runs, and what a name below it means."""

import os
import tomllib
from pathlib import Path

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, expanded, read_text

ROOT_NAME = "runs"
"""What the folder of all runs is called in front of a name, wherever it lies."""


def runs_root() -> Path:
    """The folder that holds all runs.

    $IBQLAB_RUNS; else `runs` of the ibqlab checkout around the current directory; else `runs` right here.

    Raises:
        RunError: $IBQLAB_RUNS is a file.
    """
    if os.environ.get("IBQLAB_RUNS"):
        root = expanded(os.environ["IBQLAB_RUNS"])
        if os.path.exists(root) and not os.path.isdir(root):
            raise RunError(
                f"IBQLAB_RUNS must name a folder; got {for_terminal(root)}, a file. Name another, or unset it"
            )
        return root
    return (checkout_root() or Path.cwd()) / "runs"


def checkout_root() -> Path | None:
    """The nearest folder from the current directory upwards whose pyproject.toml is ibqlab's; None if there is none."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        try:
            project = tomllib.loads(read_text(folder / "pyproject.toml"))
        except (FileNotFoundError, UnreadableFile, tomllib.TOMLDecodeError, RecursionError):
            continue
        if _is_ibqlab(project):
            return folder
    return None


def _is_ibqlab(settings: dict) -> bool:
    project = settings.get("project")
    return isinstance(project, dict) and project.get("name") == "ibqlab"


def locate(name: str | Path) -> Path:
    """Where something lies that is given as a path or by its name; where it would lie if there is nothing.

    Args:
        name: a path, in which ~ is the home folder, or a name below the folder of all runs, with or without `runs/`.
    Returns:
        The path, if something is there; else the place below the folder of all runs, if something is there; else the
        path again.
    """
    path = Path(name)
    if path.parts[:1] and path.parts[0].startswith("~"):
        path = expanded(path)
    if not path.parts or path.is_absolute() or str(name).startswith(".") or os.path.exists(path):
        return path
    below = below_root(path)
    return below if os.path.exists(below) else path


def below_root(path: Path) -> Path:
    """A relative path below the folder of all runs, without that folder's name in front of it."""
    parts = path.parts[1:] if path.parts[:1] == (ROOT_NAME,) else path.parts
    return runs_root().joinpath(*parts)
