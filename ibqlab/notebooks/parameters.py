"""Notebooks as commands: their parameters read from their cells, checked, and the notebook executed by papermill."""

import ast
import contextlib
import importlib
import io
import itertools
import json
import logging
import os
import re
import socket
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import (
    UnreadableFile,
    create_new,
    expanded,
    explained,
    is_alive,
    is_ordinary,
    parse_json,
    read_bytes,
    read_json,
    sweep,
    write_whole,
)
from ibqlab.config import (
    ConfigError,
    alternatives,
    as_list,
    check_parameters,
    field_types,
    nearest,
    read_as,
    read_assigned,
    split_assignment,
    to_dict,
)
from ibqlab.notebooks.results import NotebookWatch, without_widgets
from ibqlab.runs import checkout_root, runs_root
from ibqlab.runs.finding import find_run

CHECKOUT = Path(__file__).resolve().parents[2]
NOTE_BYTES = 1024
"""A copy that holds no more was never written by its run."""
COPY_BYTES = 2**30
"""Largest executed copy that is looked at before it is replaced."""
PLAIN_TYPES = {"int": int, "float": (int, float), "bool": bool}
PLANNERS = ("open_study", "prepare_run", "plan_pipeline")
"""What a notebook's third cell may call to turn its parameters into a plan. They start and write nothing."""
TRAINED = ("checkpoint", "tokenizer", "generator")
"""Parameters that name something trained, which must be there."""


class Parameter(NamedTuple):
    """A name that a notebook's `parameters` cell assigns."""

    annotation: str
    """As written, "" if there is none."""
    default: Any
    """Its value, where it is a literal; None otherwise."""
    comment: str = ""
    """What stands behind it on its line."""


def find_notebook(name: str) -> Path:
    """The notebook's file, given as a path or as a name under the checkout's notebooks/, with or without .ipynb.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    folder = _folder()
    for candidate in (expanded(name), folder / name, folder / f"{name}.ipynb"):
        if is_ordinary(candidate):
            return candidate
    known = sorted(path.stem for path in folder.glob("*.ipynb"))
    shown = for_terminal(name, 80)
    raise ConfigError(f"there is no notebook {shown!r}, neither as a file nor under notebooks/; {nearest(name, known)}")


def _folder() -> Path:
    return (checkout_root() or CHECKOUT) / "notebooks"


def describe_notebooks() -> str:
    """The checkout's notebooks, a line each: name and heading."""
    files = sorted(_folder().glob("*.ipynb"))
    return "\n".join(f"  {file.stem:<20} {_heading(file)}" for file in files) or "  none"


def _heading(notebook: Path) -> str:
    with contextlib.suppress(ConfigError, LookupError):
        first = _cells(notebook)[0]
        return for_terminal(first[1].lstrip("# ").partition("\n")[0])
    return ""


def describe_parameters(notebook: Path) -> str:
    """A notebook's parameters: name, type, default, and what its `parameters` cell says of each.

    Raises:
        ConfigError: as `notebook_parameters`.
    """
    lines = []
    for name, parameter in notebook_parameters(notebook).items():
        kind = f" ({parameter.annotation})" if parameter.annotation else ""
        shown = json.dumps(parameter.default, default=str)
        lines.append(f"  {name}={shown}{kind}" + (f"\n      {parameter.comment}" if parameter.comment else ""))
    return "\n".join(map(for_terminal, "\n".join(lines).split("\n")))


def read_settings(notebook: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Values for a notebook's parameters, checked as its first cells will check them, before anything is started.

    Where the third cell calls `read_parameters(X, globals())` with a dataclass X of this package, values are read as
    its fields want them and checked by it; and where it hands them to one of `PLANNERS`, so is the plan: presets,
    recipes, quantizers, settings. In other notebooks the annotations of the `parameters` cell say what fits.

    Args:
        notebook: the file.
        settings: "key=value" each.
    Raises:
        ConfigError: no `parameters` cell, an unknown name, or a value that cannot be.
        ValueError, RuntimeError, FileNotFoundError: whatever else is wrong with the plan.
    """
    known = notebook_parameters(notebook)
    texts = {}
    for setting in settings:
        name, text = split_assignment(setting)
        if name not in known:
            raise ConfigError(f"{notebook.name} has no parameter {name!r}; {nearest(name, list(known))}")
        texts[name] = text
    door = _find_door(notebook)
    if door is None:
        return {name: _typed(name, text, known[name]) for name, text in texts.items()}
    return _checked(notebook.name, door, texts, known)


class _Door(NamedTuple):
    """What a notebook's third cell does with its parameters."""

    parameters: type
    planner: Any
    """One of PLANNERS; None where the cell calls none."""
    arguments: tuple[Any, ...]
    """What stands before the parameters in its call: the name of a study."""


def _checked(name: str, door: _Door, texts: Mapping[str, str], known: Mapping[str, Parameter]) -> dict[str, Any]:
    """Values in their fields' types, once the whole plan has been looked at."""
    hints = field_types(door.parameters)
    defaults = {key: one.default for key, one in known.items() if key in hints and one.default is not None}
    values = {key: read_as(text, alternatives(hints[key])) if key in hints else text for key, text in texts.items()}
    parameters = check_parameters(door.parameters, defaults | values, name)
    for key in TRAINED:
        if getattr(parameters, key, ""):
            find_run(getattr(parameters, key), key)
    if door.planner:
        door.planner(*door.arguments, parameters)
    return {key: to_dict(parameters)[key] for key in texts}


def _find_door(notebook: Path) -> _Door | None:
    """The first cell that calls `read_parameters` with a class of this package; None where there is none."""
    for kind, source in _cells(notebook):
        if kind != "code" or "read_parameters" not in source:
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return None
        homes = {
            alias.asname or alias.name: (line.module, alias.name)
            for line in tree.body
            if isinstance(line, ast.ImportFrom) and (line.module or "").partition(".")[0] == "ibqlab"
            for alias in line.names
        }
        calls = {
            call.func.id: call
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in homes
        }
        reading = calls.get("read_parameters")
        if reading is None or not reading.args or not isinstance(reading.args[0], ast.Name):
            return None
        found = _import(homes.get(reading.args[0].id))
        planner = next((name for name in PLANNERS if name in calls), None)
        if found is None or planner is None:
            return _Door(found, None, ()) if found else None
        constants = tuple(part.value for part in calls[planner].args if isinstance(part, ast.Constant))
        return _Door(found, _import(homes[planner]), constants)
    return None


def _import(home: tuple[str, str] | None) -> Any:
    """Something of this package by its module and name; None where it is not there."""
    if home is None:
        return None
    try:
        return getattr(importlib.import_module(home[0]), home[1], None)
    except ImportError:
        return None


def notebook_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook: what its cell tagged `parameters` assigns.

    Papermill's own inspection drops annotations like `str | None` and every line with a second "=".

    Raises:
        ConfigError: the file is no notebook, has no such cell, or the cell is not plain Python.
    """
    tagged = [source for kind, source in _cells(notebook) if kind == "parameters"]
    if not tagged:
        raise ConfigError(f"{notebook} has no cell tagged `parameters`; tag one in JupyterLab's property inspector")
    try:
        lines = ast.parse(tagged[0]).body
        comments = _comments(tagged[0])
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ConfigError(f"{notebook}: the `parameters` cell is not plain Python: {error}") from None
    return {name: parameter for line in lines for name, parameter in _assigned(line, comments)}


def _cells(notebook: Path) -> list[tuple[str, str]]:
    """Kind and text of every cell: "markdown", "code", or "parameters" for the cell with that tag.

    Raises:
        ConfigError: the file is no notebook.
    """
    try:
        cells = read_json(notebook)["cells"]
        return [
            (
                "parameters" if "parameters" in cell.get("metadata", {}).get("tags", ()) else cell["cell_type"],
                "".join(cell["source"]),
            )
            for cell in cells
        ]
    except (UnreadableFile, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{notebook} is not a notebook of format 4 ({type(error).__name__}: {error})") from None


def _comments(source: str) -> dict[int, str]:
    """Line → the comment at its end."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _assigned(line: ast.stmt, comments: Mapping[int, str]) -> Iterator[tuple[str, Parameter]]:
    annotated = isinstance(line, ast.AnnAssign)
    targets = [line.target] if annotated else line.targets if isinstance(line, ast.Assign) else []
    for target in targets:
        if isinstance(target, ast.Name):
            annotation = ast.unparse(line.annotation) if annotated else ""
            yield target.id, Parameter(annotation, _literal(line.value), comments.get(line.end_lineno or 0, ""))


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
    output = expanded(output)
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
    if not os.path.lexists(target):
        return
    if not _is_executed_copy(target) or target.samefile(source):
        raise ConfigError(f"{target} exists and is not an executed copy of papermill's; give --output another file")


def _is_executed_copy(target: Path) -> bool:
    """Whether papermill wrote a file, also one that an earlier version left half written or empty."""
    try:
        content = read_bytes(target, COPY_BYTES)
    except (UnreadableFile, FileNotFoundError):
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


class Execution(NamedTuple):
    """What came of executing a notebook."""

    failure: str | None
    """What went wrong in it, in one line, or None."""
    folder: Path | None
    """The study, run or measurement that it worked on; None where it was none."""
    result: str = ""
    """What came of it in a sentence, where the notebook said so; otherwise the folder does."""


def execute(source: Path, target: Path, values: dict[str, Any]) -> Execution:
    """Run a notebook in a kernel of its own, and show meanwhile where its work stands.

    Args:
        source: the notebook.
        target: its executed copy, which also holds what had run when it failed. Pictures stand where widgets were.
        values: of its parameters, as `read_settings` gives them.
    Returns:
        The failure, if there was one, and what the notebook worked on.
    Raises:
        ValueError: papermill is not installed.
    """
    try:
        import papermill  # noqa: PLC0415
        from nbclient.exceptions import CellTimeoutError, DeadKernelError  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"running notebooks needs {error.name}: pip install 'ibqlab[lab]'") from None
    logging.getLogger("papermill").setLevel(logging.ERROR)
    failure = None
    target = target.absolute()
    papermill.iorw.papermill_io.register(str(target), _WholeFiles())
    with NotebookWatch(source) as watch:
        try:
            # The kernel's level silences its remarks on transport encryption, and on being stopped.
            papermill.execute_notebook(
                str(source),
                str(target),
                values,
                kernel_name="python3",
                language="python",
                extra_arguments=["--log-level=CRITICAL"],
                progress_bar=False,
                on_cell_start=watch.start_cell,
            )
        except papermill.PapermillExecutionError as error:
            reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error.evalue))
            failure = f"{source.name} failed in notebook cell [{error.exec_count}]: {error.ename}: {reason}"
        except (DeadKernelError, CellTimeoutError) as error:
            failure = f"{source.name}: the kernel died, perhaps for want of memory ({type(error).__name__}: {error})"
        finally:
            without_widgets(target)
    folder = watch.facts.get("folder")
    return Execution(failure, Path(folder) if folder else None, watch.facts.get("result", ""))
