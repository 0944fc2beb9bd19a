"""Settings checked against a dataclass: no unknown key, no wrong type, no impossible value.

Settings are plain frozen dataclasses that know nothing of this module; pydantic's TypeAdapter does the checking.
Everything passes through JSON on its way in, so that a YAML list fits a tuple while "3" never fits an int.
"""

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ibqlab.base.checks import FLOAT32
from ibqlab.base.escaping import for_terminal
from ibqlab.config.annotations import dataclasses_in, field_types
from ibqlab.config.assignments import as_list, read_or_none
from ibqlab.config.plain_values import plain, to_dict
from ibqlab.config.problems import ConfigError, Problem, describe, nearest

T = TypeVar("T")
LARGEST_INTEGER = 2**63 - 1
"""Settings are numbers of at most 64 bits."""
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
            raises ValueError for impossible values.
        mapping: what arrived.
        source: where it came from; starts the message.
    Returns:
        An instance of cls.
    Raises:
        ConfigError: one message with every problem: dotted key, what was expected, what arrived, what to write.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError.of(source, [Problem((), f"must be settings as `key: value`; got {describe(mapping)}")])
    try:
        plain_mapping = plain(mapping, ())
    except ConfigError as error:
        raise ConfigError.of(source, error.problems) from None
    impossible = list(_impossible_values(plain_mapping, ()))
    if impossible:
        raise ConfigError.of(source, impossible)
    try:
        # Through JSON: a list then fits a tuple, while "3" fits no int.
        return _adapter(cls).validate_json(json.dumps(plain_mapping), strict=True, extra="forbid")
    except ValidationError as error:
        problems = [problem for detail in error.errors() for problem in _problems(cls, detail)]
        raise ConfigError.of(source, problems) from None


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


@functools.cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def _impossible_values(value: Any, path: tuple) -> Iterator[Problem]:
    """Numbers that are none or too long, and text that no file could hold."""
    if isinstance(value, float) and not math.isfinite(value):
        word = "NaN" if math.isnan(value) else f"{value} (1e400 is more than a number can be)"
        yield Problem(path, f"must be a finite number; got {word}")
    elif isinstance(value, float) and abs(value) > FLOAT32:
        yield Problem(path, f"must be a number that float32 holds, to {FLOAT32:.1e}; got {value:g}")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
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
        return [Problem(path, f"unknown key; {nearest(str(path[-1]), _keys_at(cls, path[:-1]))}")]
    if isinstance(cause, ConfigError) and cause.problems:
        return [Problem((*path, *inner.path), inner.text) for inner in cause.problems]
    if detail["type"] == "value_error":
        return [Problem(path, str(cause))]
    if detail["type"] == "missing":
        return [Problem(path, "must be given; it has no default")]
    return [Problem(path, f"{_expected(detail['msg'])}; got {describe(arrived)}{_remedy(detail['type'], arrived)}")]


def _keys_at(cls: type, path: Sequence[str | int]) -> list[str]:
    """The field names of the dataclasses that a path into cls leads to."""
    sections = [cls]
    for key in path:
        inner = [one for section in sections for one in dataclasses_in(field_types(section).get(key))]
        sections = inner or sections
    return [name for section in sections for name in field_types(section)]


def _expected(message: str) -> str:
    """pydantic's message in the words of this library."""
    message = (message[:1].lower() + message[1:]).replace("input should be", "must be")
    for phrase, words in _WORDS.items():
        message = message.replace(phrase, words)
    return message


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
