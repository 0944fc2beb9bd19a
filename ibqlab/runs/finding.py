"""One way to name what is there – a run, a study, a token store, samples, a file – and one to say where new ones go.

There: a path, if something lies at it; else a name below the folder of all runs (`locate`, `find_run`).
New: a name below the folder of all runs, unless it is plainly a path (`output_folder`):

    mine, study/a, runs/mine               below the folder of all runs
    ./mine, ../mine, ~/mine, /data/mine    as typed
"""

import contextlib
import os
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

from ibqlab.base.checks import NAME
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, expanded, read_text
from ibqlab.config import nearest

ROOT_NAME = "runs"
"""What the folder of all runs is called in front of a name, wherever it lies."""

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Weights in a folder as libraries of the Hugging Face hub write it, the first that is there."""


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
    current = Path.cwd()
    for folder in (current, *current.parents):
        try:
            project = tomllib.loads(read_text(folder / "pyproject.toml")).get("project")
        except (FileNotFoundError, UnreadableFile, tomllib.TOMLDecodeError, RecursionError):
            continue
        if isinstance(project, dict) and project.get("name") == "ibqlab":
            return folder
    return None


def locate(name: str | Path) -> Path:
    """Where something lies that is given as a path or by its name; where it would lie if there is nothing.

    Args:
        name: a path, in which ~ is the home folder, or a name below the folder of all runs, with or without `runs/`.
    Returns:
        The path, if something is there; else the place below the folder of all runs, if something is there; else the
        path again. Of a published folder, config.json beside a file of weights, that file.
    """
    return _weights_in(_located(name))


def _located(name: str | Path) -> Path:
    path = Path(name)
    if path.parts[:1] and path.parts[0].startswith("~"):
        path = expanded(path)
    if not path.parts or path.is_absolute() or str(name).startswith(".") or os.path.exists(path):
        return path
    below = below_root(path)
    return below if os.path.exists(below) else path


def _weights_in(path: Path) -> Path:
    """The file of weights beside a config.json, given their folder; any other path as it is."""
    with contextlib.suppress(OSError, ValueError):
        if (path / "config.json").is_file() and not (path / "config.yaml").exists():
            files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
            return files[0] if files else path
    return path


def below_root(path: Path) -> Path:
    """A relative path below the folder of all runs, without that folder's name in front of it."""
    parts = path.parts[1:] if path.parts[:1] == (ROOT_NAME,) else path.parts
    return runs_root().joinpath(*parts)


def run_folders(folder: Path) -> Iterator[Path]:
    """The runs in a folder and its sub-folders, by name."""
    for path, subfolders, files in os.walk(folder):
        if "config.yaml" in files and {"provenance.json", "metrics.jsonl"} & set(files):
            subfolders.clear()
            yield Path(path)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))


def hint_at_runs(folder: Path, command: str) -> str:
    """What to type where a folder holds runs and is none itself, such as a lab's with one run a method; else "".

    Args:
        folder: that was named.
        command: of ibqlab, which takes a run.
    """
    names = [shlex.quote(run_name(run)) for run in run_folders(folder)]
    if not names:
        return ""
    others = f", or of {', '.join(names[1:6])}{', …' if names[6:] else ''}" if names[1:] else ""
    return f"it holds runs; of one of them type ibqlab {command} {names[0]}{others}"


def find_run(name: str | Path, kind: str = "run") -> Path:
    """As `locate`, for something that must be there.

    Args:
        name: path or name.
        kind: what is looked for, for the message.
    Raises:
        FileNotFoundError: nothing is there; the message gives the nearest name.
    """
    path = locate(name)
    if not os.path.exists(path) or not Path(name).parts:
        raise FileNotFoundError(f"there is no such {kind} {for_terminal(name)!r}: no path and {hint(name)}")
    return path


def hint(name: str | Path) -> str:
    """The end of a message about a name that nothing has: which come near it, or how to list them."""
    root = runs_root()
    names = {path.relative_to(root).as_posix() for path in run_folders(root)} - {"."} if root.is_dir() else set()
    names |= {entry.name for entry in root.iterdir() if entry.is_dir()} if root.is_dir() else set()
    near = nearest(str(name)[:NAME].removeprefix(f"{ROOT_NAME}/"), sorted(names))
    near = near if near.startswith("did you mean") else "list them with: ibqlab runs"
    return f"no name in the folder of all runs, {for_terminal(root)}; {near}"


def output_folder(text: str | Path, default: str = "") -> Path:
    """Where something new goes. The same text finds it again.

    Args:
        text: a name, which lies below the folder of all runs with or without `runs/` in front; or a path that starts
            with /, ./, ../ or ~.
        default: the name to take where the text is empty.
    Returns:
        The folder; it need not exist.
    Raises:
        ValueError: a name that no folder can have, the current folder or one around it, or a plain name that is a
            folder here and none among the runs, so that either could be meant.
    """
    typed = str(text) or default
    if "\0" in typed or any(len(component.encode("utf-8", "replace")) > NAME for component in Path(typed).parts):
        raise ValueError(
            f"output: a folder's name has at most {NAME} bytes and no zero byte; got {for_terminal(typed, 60)!r}"
        )
    path = Path(typed)
    is_path = path.is_absolute() or typed.startswith((".", "~")) or ".." in path.parts
    folder = expanded(path) if is_path else below_root(path)
    absolute = Path(os.path.abspath(folder))
    if absolute in (Path.cwd(), *Path.cwd().parents, Path(os.path.abspath(runs_root()))):
        raise ValueError(f"output must name a folder of its own, such as ./name; got {for_terminal(typed)!r}")
    if not is_path and path.is_dir() and not folder.exists() and absolute != Path(os.path.abspath(path)):
        raise ValueError(
            f"output={typed} is a folder here, and a name goes below {runs_root()}: write ./{typed} for the one here, "
            f"{ROOT_NAME}/{typed} for a new one there"
        )
    return folder


def run_name(folder: Path) -> str:
    """The text that names a folder in settings and commands: below the folder of all runs its name, else its path."""
    absolute, root = Path(os.path.abspath(folder)), Path(os.path.abspath(runs_root()))
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(absolute)
