"""Notebooks as commands: their parameters read from their cells, checked, and the notebook executed by papermill."""

import ast
import contextlib
import itertools
import json
import logging
import os
import re
import socket
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.config import ConfigError, as_list, nearest, read_assigned, split_assignment
from ibqlab.files import (
    UnreadableFile,
    create_new,
    explained,
    is_alive,
    parse_json,
    read_bytes,
    read_json,
    sweep,
    write_whole,
)
from ibqlab.runs import checkout_root, runs_root

CHECKOUT = Path(__file__).resolve().parents[1]
NOTE_BYTES = 1024
"""A copy that holds no more was never written by its run."""
COPY_BYTES = 2**30
"""Largest executed copy that is looked at before it is replaced."""
PLAIN_TYPES = {"int": int, "float": (int, float), "bool": bool}


class Parameter(NamedTuple):
    """A name that a notebook's `parameters` cell assigns."""

    annotation: str
    """As written, "" if there is none."""
    default: Any
    """Its value, where it is a literal; None otherwise."""


def find_notebook(name: str) -> Path:
    """The notebook's file, given as a path or as a name under the checkout's notebooks/, with or without .ipynb.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    folder = (checkout_root() or CHECKOUT) / "notebooks"
    for candidate in (Path(name), folder / name, folder / f"{name}.ipynb"):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in folder.glob("*.ipynb"))
    raise ConfigError(f"there is no notebook {name!r}, neither as a file nor under notebooks/; {nearest(name, known)}")


def read_settings(notebook: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Values for a notebook's parameters, checked against its `parameters` cell.

    Args:
        notebook: the file.
        settings: "key=value" each; the value is read as YAML, except for a parameter annotated `str`.
    Raises:
        ConfigError: no `parameters` cell, an unknown name, or a type that the annotation does not allow.
    """
    known = notebook_parameters(notebook)
    values = {}
    for setting in settings:
        name, text = split_assignment(setting)
        if name not in known:
            raise ConfigError(f"{notebook.name} has no parameter {name!r}; {nearest(name, list(known))}")
        values[name] = _typed(name, text, known[name])
    return values


def notebook_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook: what its cell tagged `parameters` assigns.

    Papermill's own inspection drops annotations like `str | None` and every line with a second "=".

    Raises:
        ConfigError: the file is no notebook, has no such cell, or the cell is not plain Python.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell["source"] for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", ())]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{notebook} is not a notebook of format 4 ({type(error).__name__}: {error})") from None
    if not tagged:
        raise ConfigError(f"{notebook} has no cell tagged `parameters`; tag one in JupyterLab's property inspector")
    try:
        lines = ast.parse("".join(tagged[0])).body
    except SyntaxError as error:
        raise ConfigError(f"{notebook}: the `parameters` cell is not plain Python: {error}") from None
    return {name: parameter for line in lines for name, parameter in _assigned(line)}


def _assigned(line: ast.stmt) -> list[tuple[str, Parameter]]:
    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
        return [(line.target.id, Parameter(ast.unparse(line.annotation), _literal(line.value)))]
    targets = line.targets if isinstance(line, ast.Assign) else []
    return [(target.id, Parameter("", _literal(line.value))) for target in targets if isinstance(target, ast.Name)]


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node else None
    except ValueError:
        return None


def _typed(name: str, text: str, parameter: Parameter) -> Any:
    """A setting's value in the parameter's type. What is not annotated plainly is left to the notebook's third cell."""
    kind = parameter.annotation.partition("[")[0]
    if kind == "str":
        return text
    value = read_assigned(name, text)
    if value is None and parameter.default is None:
        return None
    if kind in ("list", "tuple"):
        return as_list(value)
    wanted = PLAIN_TYPES.get(kind, object)
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind in ("int", "float")):
        raise ConfigError(f"{name} must be {kind}, as in {name}={json.dumps(parameter.default)}; got {text!r}")
    return float(value) if kind == "float" else value


def place_for(source: Path, output: Path | None) -> Path:
    """Where a notebook's executed copy goes: `output`, or a new dated file under runs/notebooks.

    Raises:
        ConfigError: `output` is a folder, the notebook itself, or anything but an earlier executed copy.
    """
    if output is None:
        return _dated_copy(source)
    _keep_other_files(output, source)
    with explained(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    sweep(output.parent)
    return output


def _dated_copy(source: Path) -> Path:
    """A new file for the executed copy. Making it takes its name, so that runs of one second do not collide."""
    folder = runs_root() / "notebooks" / source.stem
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _sweep_copies(folder)
    started = f"{source.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([started], (f"{started}-{number}" for number in itertools.count(2)))
    return next(target for name in names if (target := _taken(folder / f"{name}.ipynb")))


def _taken(target: Path) -> Path | None:
    """The file, made with a note of who will fill it; None where it is there already."""
    with explained(target), contextlib.suppress(FileExistsError):
        stream = create_new(target)
        with stream:
            stream.write(json.dumps(_note()).encode())
        return target
    return None


def _note() -> dict[str, Any]:
    """A notebook without cells that says which process is about to fill it."""
    holder = {"process": os.getpid(), "host": socket.gethostname()}
    return {"cells": [], "metadata": {"papermill": {}, "ibqlab": holder}, "nbformat": 4, "nbformat_minor": 5}


def _sweep_copies(folder: Path) -> None:
    """Delete copies that processes of this machine were killed before they wrote, and what they left half written."""
    sweep(folder)
    for file in folder.glob("*.ipynb"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            if file.stat().st_size > NOTE_BYTES:
                continue
            holder = read_json(file, limit=NOTE_BYTES)["metadata"]["ibqlab"]
            if holder["host"] == socket.gethostname() and not is_alive(int(holder["process"])):
                file.unlink()


def _keep_other_files(target: Path, source: Path) -> None:
    """Refuse to write over anything but an earlier executed copy."""
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; give --output a file, such as {target / source.name}")
    if not target.exists():
        return
    if not _is_executed_copy(target) or target.samefile(source):
        raise ConfigError(f"{target} exists and is not an executed copy of papermill's; give --output another file")


def _is_executed_copy(target: Path) -> bool:
    """Whether papermill wrote a file, also one that an earlier version left half written or empty."""
    try:
        content = read_bytes(target, COPY_BYTES)
    except UnreadableFile:
        return False
    try:
        return "papermill" in parse_json(content, str(target))["metadata"]
    except (ValueError, LookupError, TypeError):
        return not content or (content.startswith(b'{\n "cells": [') and b'"papermill": {' in content)


class _WholeFiles:
    """How papermill writes an executed copy: after each cell, and whole each time, so that a kill spoils none."""

    def write(self, content: str, path: str) -> None:
        """As papermill's own handler of local files."""
        write_whole(path, content.encode("utf-8", "backslashreplace"))

    def pretty_path(self, path: str) -> str:
        """Likewise."""
        return path


def execute(source: Path, target: Path, values: dict[str, Any]) -> str | None:
    """Run a notebook in a kernel of its own.

    Args:
        source: the notebook.
        target: its executed copy, which also holds what had run when it failed.
        values: of its parameters, as `read_settings` gives them.
    Returns:
        What went wrong in it, in one line, or None.
    Raises:
        ValueError: papermill is not installed.
    """
    try:
        import papermill  # noqa: PLC0415
        from nbclient.exceptions import CellTimeoutError, DeadKernelError  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"running notebooks needs {error.name}: pip install 'ibqlab[lab]'") from None
    logging.getLogger("papermill").setLevel(logging.ERROR)
    target = target.absolute()
    papermill.iorw.papermill_io.register(str(target), _WholeFiles())
    try:
        # The kernel's level silences its remarks on transport encryption, which a local run does not need.
        papermill.execute_notebook(
            str(source),
            str(target),
            values,
            kernel_name="python3",
            language="python",
            extra_arguments=["--log-level=ERROR"],
        )
    except papermill.PapermillExecutionError as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error.evalue))
        return f"{source.name} failed in cell [{error.exec_count}]: {error.ename}: {reason}"
    except (DeadKernelError, CellTimeoutError) as error:
        return f"{source.name}: the kernel died, perhaps for want of memory ({type(error).__name__}: {error})"
    return None
