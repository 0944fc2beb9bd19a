"""A notebook's parameters: what its cell tagged `parameters` assigns, and what a command may put in their place.

Two kinds of notebook are known. Where the third cell hands the parameters to a dataclass of this package, that class
checks them, and so does what the cell opens with them. In any other notebook the annotations say what fits.
"""

import ast
import contextlib
import importlib
import io
import json
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, read_json
from ibqlab.config import ConfigError, check_parameters, nearest, to_dict
from ibqlab.config.assignments import alternatives, as_list, field_types, read_as, read_assigned, split_assignment
from ibqlab.runs.finding import find_run

PLAIN_TYPES = {"int": int, "float": (int, float), "bool": bool}
OPENERS = ("open_study", "prepare_run", "prepare_pipeline", "prepare_lab", "prepare_cases", "prepare_feature_map")
"""What a notebook's third cell may call with its parameters to learn what they mean. They start and write nothing."""
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


def notebook_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook: what its cell tagged `parameters` assigns.

    Papermill's own inspection drops annotations like `str | None` and every line with a second "=".

    Raises:
        ConfigError: the file is no notebook, has no such cell, or the cell is not plain Python.
    """
    tagged = [source for kind, source in _cells(notebook) if kind == "parameters"]
    if not tagged:
        raise ConfigError(f"{notebook} has no cell tagged `parameters`; tag one in JupyterLab's property inspector")
    return parameters_of_cell(tagged[0], notebook)


def parameters_of_cell(source: str, notebook: str | Path) -> dict[str, Parameter]:
    """What a cell tagged `parameters` assigns.

    Args:
        source: the cell's text.
        notebook: named in errors.
    Raises:
        ConfigError: it is not plain Python.
    """
    try:
        lines = ast.parse(source).body
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ConfigError(f"{notebook}: the `parameters` cell is not plain Python: {error}") from None
    # Line → the comment at its end.
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    return {name: parameter for line in lines for name, parameter in _parameters_of(line, comments)}


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


def heading(notebook: Path) -> str:
    """The first line of a notebook, for a list; "" where it has none."""
    with contextlib.suppress(ConfigError, LookupError):
        _, text = _cells(notebook)[0]
        return for_terminal(text.lstrip("# ").partition("\n")[0])
    return ""


def first_text(notebook: Path) -> str:
    """The first cell that is text: what the notebook says about itself; "" where it has none.

    Raises:
        ConfigError: the file is no notebook.
    """
    return next((text for kind, text in _cells(notebook) if kind == "markdown" and text.strip()), "")


def calls(notebook: Path, name: str) -> bool:
    """Whether a cell of a notebook calls a function of this name, as far as its text tells.

    Raises:
        ConfigError: the file is no notebook.
    """
    return any(f"{name}(" in source for kind, source in _cells(notebook) if kind == "code")


def describe_parameters(notebook: Path) -> str:
    """A notebook's parameters: name, type, default, and what its `parameters` cell says of each.

    Raises:
        ConfigError: as `notebook_parameters`.
    """
    lines = []
    for name, parameter in notebook_parameters(notebook).items():
        kind = f" ({parameter.annotation})" if parameter.annotation else ""
        default = json.dumps(parameter.default, default=str)
        lines.append(f"  {name}={default}{kind}" + (f"\n      {parameter.comment}" if parameter.comment else ""))
    return "\n".join(map(for_terminal, "\n".join(lines).split("\n")))


def _parameters_of(line: ast.stmt, comments: Mapping[int, str]) -> Iterator[tuple[str, Parameter]]:
    annotated = isinstance(line, ast.AnnAssign)
    targets = [line.target] if annotated else line.targets if isinstance(line, ast.Assign) else []
    for target in targets:
        if isinstance(target, ast.Name):
            annotation, default = ast.unparse(line.annotation) if annotated else "", None
            with contextlib.suppress(ValueError):  # no literal
                default = ast.literal_eval(line.value)
            yield target.id, Parameter(annotation, default, comments.get(line.end_lineno or 0, ""))


# --- what a command puts in their place ------------------------------------------------------------------------------


def read_settings(notebook: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Values for a notebook's parameters, checked as its first cells will check them, before anything is started.

    Where the third cell calls `read_parameters(X, globals())` with a dataclass X of this package, values are read as
    its fields want them and checked by it. Where it hands them to one of `OPENERS`, that is called too, and looks at
    presets, recipes, quantizers and settings. In other notebooks the annotations of the `parameters` cell say what
    fits.

    Args:
        notebook: the file.
        settings: "key=value" each.
    Raises:
        ConfigError: no `parameters` cell, an unknown name, or a value that cannot be.
        ValueError, RuntimeError, FileNotFoundError: whatever else the opener finds wrong.
    """
    signature = notebook_parameters(notebook)
    texts = {}
    for setting in settings:
        name, text = split_assignment(setting)
        if name not in signature:
            raise ConfigError(f"{notebook.name} has no parameter {name!r}; {nearest(name, list(signature))}")
        texts[name] = text
    cls, opener = _third_cell(notebook)
    if cls is None:
        return {name: _read_by_annotation(name, text, signature[name]) for name, text in texts.items()}
    hints = field_types(cls)
    defaults = {
        key: parameter.default for key, parameter in signature.items() if key in hints and parameter.default is not None
    }
    values = {key: read_as(text, alternatives(hints[key])) if key in hints else text for key, text in texts.items()}
    parameters = check_parameters(cls, defaults | values, notebook.name)
    for key in TRAINED:
        if getattr(parameters, key, ""):
            find_run(getattr(parameters, key), key)
    if opener:
        opener(parameters)
    return {key: to_dict(parameters)[key] for key in texts}


def _third_cell(notebook: Path) -> tuple[type | None, Callable[[Any], object] | None]:
    """The dataclass that a notebook reads its parameters into, and what it opens with them; None where there is none.

    Found in the first cell that says `read_parameters`, where both come from this package.
    """
    for kind, source in _cells(notebook):
        if kind != "code" or "read_parameters" not in source:
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:
            break
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
            break
        cls = _import(homes.get(reading.args[0].id))
        name = next((name for name in OPENERS if name in calls), None)
        opener = _import(homes[name]) if cls and name else None
        if opener is None:
            return cls, None
        # What stands before the parameters in the call: the name of a study.
        constants = [argument.value for argument in calls[name].args if isinstance(argument, ast.Constant)]
        return cls, partial(opener, *constants)
    return None, None


def _import(home: tuple[str, str] | None) -> Any:
    """Something of this package by its module and name; None where it is not there."""
    if home is None:
        return None
    try:
        return getattr(importlib.import_module(home[0]), home[1], None)
    except ImportError:
        return None


def _read_by_annotation(name: str, text: str, parameter: Parameter) -> Any:
    """A setting's value in the parameter's type. What is not annotated plainly is left to the notebook's third cell."""
    kind = parameter.annotation.partition("[")[0]
    if kind == "str":
        return text
    value = read_assigned(name, text)
    if value is None and parameter.default is None:
        return None
    if kind in ("list", "tuple"):
        return as_list(value)
    if not isinstance(value, PLAIN_TYPES.get(kind, object)) or (isinstance(value, bool) and kind in ("int", "float")):
        raise ConfigError(f"{name} must be {kind}, as in {name}={json.dumps(parameter.default)}; got {text!r}")
    return float(value) if kind == "float" else value
