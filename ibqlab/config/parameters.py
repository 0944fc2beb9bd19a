"""A notebook's parameters: checked against a dataclass, also where papermill has made text of them."""

import ast
from collections.abc import Mapping
from typing import Any, TypeVar

from ibqlab.config.annotations import alternatives, field_types, takes_list
from ibqlab.config.assignments import read_as
from ibqlab.config.checking import parse
from ibqlab.config.problems import ConfigError, Problem, nearest

T = TypeVar("T")


def read_parameters(cls: type[T], namespace: Mapping[str, Any]) -> T:
    """A notebook's parameters, checked: `settings = read_parameters(ExploreCollapse, globals())` in its third cell.

    Papermill only warns about a parameter that the notebook does not have, and passes lists given with `-p` as text:
    the first becomes an error here, the second a list.

    Args:
        cls: a dataclass whose fields are the parameters; what the notebook does not define takes its default.
        namespace: the notebook's globals().
    Raises:
        ConfigError: a misspelt name, a wrong type or an impossible value.
    """
    valid = list(field_types(cls))
    unknown = [name for name in _injected_names(namespace) if name not in valid]
    if unknown:
        problems = [Problem((name,), f"no such parameter; {nearest(name, valid)}") for name in unknown]
        raise ConfigError.of("notebook parameters", problems)
    values = {name: namespace[name] for name in valid if name in namespace}
    return check_parameters(cls, values, "notebook parameters")


def check_parameters(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """Parameters that may arrive as text, checked against a dataclass.

    Text is read wherever the field does not take text itself (`read_as`): "[256, 1024]" and "256,1024" become lists,
    "none" becomes None where None is allowed. One value where a list belongs becomes a list of one.

    Args:
        cls: a dataclass whose fields are the parameters.
        values: parameter values by name.
        source: where they came from; starts the message.
    Raises:
        ConfigError: as `parse`; also text that cannot be read as the field's type.
    """
    types = field_types(cls)
    typed = {name: _from_text(value, types[name]) if name in types else value for name, value in values.items()}
    return parse(cls, typed, source=source)


def _injected_names(namespace: Mapping[str, Any]) -> list[str]:
    """Names assigned in the last cell that papermill injected; it starts with "# Parameters"."""
    cells = [cell for cell in namespace.get("In", ()) if isinstance(cell, str)]
    injected = [cell for cell in cells if cell.lstrip().split("\n", 1)[0].strip() == "# Parameters"]
    try:
        lines = ast.parse(injected[-1]).body if injected else []
    except SyntaxError:
        return []
    targets = [target for line in lines if isinstance(line, ast.Assign) for target in line.targets]
    targets += [line.target for line in lines if isinstance(line, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _from_text(value: Any, hint: Any) -> Any:
    """A parameter as the type of its field; what does not fit stays as it is, for `parse` to refuse."""
    choices = alternatives(hint)
    if isinstance(value, (int, float)) and all(takes_list(choice) for choice in choices):
        return [value]
    if not isinstance(value, str):
        return value
    try:
        typed = read_as(value, choices)
    except ConfigError:
        return value
    return value if typed is None and type(None) not in choices else typed
