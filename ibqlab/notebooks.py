"""Notebooks as commands: their parameters read from their cells, checked, and the notebook executed by papermill."""

import ast
import contextlib
import itertools
import json
import logging
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.config import ConfigError, as_list, nearest, read_assigned, split_assignment
from ibqlab.executed import NotebookWatch, without_widgets
from ibqlab.runs import checkout_root, runs_root

CHECKOUT = Path(__file__).resolve().parents[1]
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
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def _dated_copy(source: Path) -> Path:
    """A new empty file for the executed copy. Making it takes its name, so that runs of one second do not collide."""
    folder = runs_root() / "notebooks" / source.stem
    folder.mkdir(parents=True, exist_ok=True)
    started = f"{source.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    names = itertools.chain([started], (f"{started}-{number}" for number in itertools.count(2)))
    return next(target for name in names if (target := _taken(folder / f"{name}.ipynb")))


def _taken(target: Path) -> Path | None:
    with contextlib.suppress(FileExistsError):
        target.touch(exist_ok=False)
        return target
    return None


def _keep_other_files(target: Path, source: Path) -> None:
    """Refuse to write over anything but an earlier executed copy."""
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; give --output a file, such as {target / source.name}")
    if not target.exists():
        return
    try:
        executed = "papermill" in json.loads(target.read_text(encoding="utf-8"))["metadata"]
    except (ValueError, LookupError, TypeError):
        executed = False
    if not executed or target.samefile(source):
        raise ConfigError(f"{target} exists and is not an executed copy of papermill's; give --output another file")


class Execution(NamedTuple):
    """What came of executing a notebook."""

    failure: str | None
    """What went wrong in it, in one line, or None."""
    folder: Path | None
    """The study or run that it worked on; None where it was none."""


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
    with NotebookWatch(source) as watch:
        try:
            # The kernel's level silences its remarks on transport encryption, which a local run does not need.
            papermill.execute_notebook(
                str(source),
                str(target),
                values,
                kernel_name="python3",
                language="python",
                extra_arguments=["--log-level=ERROR"],
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
    return Execution(failure, Path(folder) if folder else None)
