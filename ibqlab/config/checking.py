"""Settings checked against a dataclass: no unknown key, no wrong type, no impossible value.

Settings are plain frozen dataclasses that know nothing of this module; pydantic's TypeAdapter does the checking.
Everything passes through JSON on its way in, so that a YAML list fits a tuple while "3" never fits an int.
"""

import ast
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ibqlab.base.checks import FLOAT32, WHOLE
from ibqlab.base.escaping import for_terminal
from ibqlab.config.assignments import as_list, field_types, read_or_none, read_parameter, sections_at
from ibqlab.config.plain_values import plain, to_dict
from ibqlab.config.problems import ConfigError, Problem, describe, nearest

T = TypeVar("T")
_adapter = functools.cache(TypeAdapter)
_OTHER_INT = re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+|[0-9]+(?:_[0-9]+)+)$")
"""Whole numbers as Python and YAML 1.1 write them; settings do not."""
# pydantic's words on the left.
_WORDS = {
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid number": "a number",
    "a valid integer": "an integer",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid array": "a list",
    "an object": "a mapping of settings",
}


def parse(cls: type[T], mapping: Mapping[str, Any], *, source: str = "settings") -> T:
    """Settings checked against a dataclass: no unknown key, no wrong type, no impossible value.

    Args:
        cls: a dataclass, nested as deep as you like; fields that are missing take their defaults. Its __post_init__
            raises ValueError for impossible values. Its class method `before_parsing` may do something with the plain
            mapping first, such as importing what the settings name.
        mapping: what arrived.
        source: where it came from; starts the message.
    Returns:
        An instance of cls.
    Raises:
        ConfigError: one message with every problem: dotted key, what was expected, what arrived, what to write.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError.from_problems(
            source, [Problem((), f"must be settings as `key: value`; got {describe(mapping)}")]
        )
    try:
        plain_mapping = plain(mapping, ())
    except ConfigError as error:
        raise ConfigError.from_problems(source, error.problems) from None
    impossible = list(_impossible_values(plain_mapping, ()))
    if impossible:
        raise ConfigError.from_problems(source, impossible)
    before_parsing = getattr(cls, "before_parsing", None)
    if before_parsing:
        before_parsing(plain_mapping)
    try:
        # Through JSON: a list then fits a tuple, while "3" fits no int.
        return _adapter(cls).validate_json(json.dumps(plain_mapping), strict=True, extra="forbid")
    except ValidationError as error:
        problems = [problem for detail in error.errors() for problem in _problems(cls, detail)]
        raise ConfigError.from_problems(source, problems) from None


def completed(cls: type, mapping: Any) -> Any:
    """Recorded settings as `to_dict` would write them today: settings that came later have their defaults.

    Args:
        cls: their dataclass.
        mapping: what was recorded.
    Returns:
        The dictionary; what arrived, where it no longer parses.
    """
    try:
        return to_dict(parse(cls, mapping))
    except ConfigError:
        return mapping


def _impossible_values(value: Any, path: tuple) -> Iterator[Problem]:
    """Numbers that are none or too long, and text that no file could hold."""
    if isinstance(value, float) and not math.isfinite(value):
        word = "NaN" if math.isnan(value) else f"{value} (1e400 is more than a number can be)"
        yield Problem(path, f"must be a finite number; got {word}")
    elif isinstance(value, float) and abs(value) > FLOAT32:
        yield Problem(path, f"must be a number that float32 holds, to {FLOAT32:.1e}; got {value:g}")
    elif isinstance(value, int) and abs(value) > WHOLE:
        yield Problem(path, f"must be a number of at most 64 bits; got one of {value.bit_length():,} bits")
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        yield Problem(path, f"must be text in UTF-8; got {for_terminal(value, 60)!r}. Rename the file or folder")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _impossible_values(item, (*path, key))


def _problems(cls: type, detail: Mapping[str, Any]) -> list[Problem]:
    """What one of pydantic's findings means to whoever wrote the settings."""
    path, arrived = tuple(detail["loc"]), detail["input"]
    cause = detail.get("ctx", {}).get("error")
    if detail["type"] == "unexpected_keyword_argument":
        keys = dict.fromkeys(name for section in sections_at(cls, path[:-1]) for name in field_types(section))
        return [Problem(path, f"unknown key; {nearest(str(path[-1]), list(keys))}")]
    if isinstance(cause, ConfigError) and cause.problems:
        return [Problem((*path, *problem.path), problem.text) for problem in cause.problems]
    if detail["type"] == "value_error":
        return [Problem(path, str(cause))]
    if detail["type"] == "missing":
        return [Problem(path, "must be given; it has no default")]
    expected = (detail["msg"][:1].lower() + detail["msg"][1:]).replace("input should be", "must be")
    for phrase, words in _WORDS.items():
        expected = expected.replace(phrase, words)
    return [Problem(path, f"{expected}; got {describe(arrived)}{_remedy(detail['type'], arrived)}")]


def _remedy(kind: str, arrived: Any) -> str:
    """What to write instead, where that can be told."""
    if isinstance(arrived, str) and kind in ("int_type", "float_type", "bool_type"):
        types = {"int_type": int, "float_type": (int, float), "bool_type": bool}[kind]
        value = int(arrived.replace("_", ""), 0) if _OTHER_INT.match(arrived) else read_or_none(arrived)
        fits = isinstance(value, types) and (kind == "bool_type" or not isinstance(value, bool))
        return f"; write {json.dumps(value)}{'' if _OTHER_INT.match(arrived) else ' without quotes'}" if fits else ""
    if kind == "int_type" and isinstance(arrived, float) and arrived.is_integer():
        return f"; write {int(arrived)}"
    if kind in ("tuple_type", "list_type") and not isinstance(arrived, (dict, list)):
        return f"; write {json.dumps(as_list(arrived))}"
    return ""


# --- the parameters of a notebook, also where papermill has made text of them -----------------------------------------


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
        raise ConfigError.from_problems("notebook parameters", problems)
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
    typed = {name: read_parameter(value, types[name]) if name in types else value for name, value in values.items()}
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
