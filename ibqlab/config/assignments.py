"""Settings as typed on a command line: `training.steps=300`.

A value is text as it stands, unless it is plainly a list, a mapping, a number, true, false or null (`read_value`).
Where the setting takes text it is always text (`read_as`).
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import NESTING, UnreadableFile
from ibqlab.config.plain_values import plain
from ibqlab.config.problems import ConfigError, describe

KEY_LETTERS = 500
"""Letters of a dotted key."""


def apply_overrides(mapping: Mapping[str, Any], assignments: Sequence[str], cls: type | None = None) -> dict[str, Any]:
    """A copy of settings with some replaced, as typed on a command line.

    Args:
        mapping: settings, left as they are.
        assignments: "training.steps=300" each. Keys between the dots that are missing are made; whether they are valid
            is for `parse` to say.
        cls: the dataclass that the settings are for: values are read as its fields want them (`read_as`); None: as
            `read_value` does.
    Raises:
        ConfigError: no "=", no key, a value that is a list or mapping and not YAML, or a dot after a key that holds a
            value.
    """
    changed = plain(mapping, ())
    for assignment in assignments:
        key, value = split_assignment(assignment)
        *parents, last = key.split(".")
        section = changed
        for depth, parent in enumerate(parents):
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                above = ".".join(parents[: depth + 1])
                raise ConfigError(f"{assignment!r}: {above} holds {describe(section)}, it has no settings of its own")
        hints = [field_types(kind).get(last) for kind in sections_at(cls, parents)] if cls else []
        choices = [choice for hint in hints if hint is not None for choice in alternatives(hint)]
        section[last] = read_assigned(key, value, choices)
    return changed


def split_assignment(assignment: str) -> tuple[str, str]:
    """Key and value of "key=value".

    Raises:
        ConfigError: there is no "=", a part of the key is empty, or the key is longer than any is.
    """
    key, equals, value = assignment.partition("=")
    key = key.strip()
    text = for_terminal(assignment, 80)
    if not equals:
        raise ConfigError(f"{text!r}: settings are typed key=value, without spaces, like {key[:40] or 'steps'}=300")
    if not all(key.split(".")):
        raise ConfigError(f"{text!r}: the key is missing; settings are typed key=value, like steps=300")
    if len(key) > KEY_LETTERS or key.count(".") >= NESTING:
        raise ConfigError(f"{text!r}: no key has more than {KEY_LETTERS} letters or {NESTING} parts; shorten it")
    return key, value


def read_assigned(key: str, value: str, choices: Sequence[Any] = ()) -> Any:
    """A command line's value; the error names its key.

    Args:
        key: the setting.
        value: as typed.
        choices: types that the setting may have; () where they are not known.
    """
    try:
        return read_as(_without_quotes(value.strip()) if _want_text(choices) else value, choices)
    except ConfigError as error:
        raise ConfigError(f"{for_terminal(key)}: {error}") from None


def read_value(text: str) -> Any:
    """A value as typed on a command line for a setting of unknown type.

    Text stays as it is, unless it is plainly something else: [a list], {a: mapping}, a decimal number, true, false,
    null or nothing at all (None), or text in quotes.

    Raises:
        ConfigError: a list or mapping that is not YAML.
    """
    from ibqlab.config.yaml_rules import is_plain_text, read_yaml  # noqa: PLC0415 - heavy

    text = text.strip()
    is_list = text.startswith("[")
    is_mapping = text.startswith("{") and text.endswith("}")
    if not (is_list or is_mapping) and is_plain_text(text):
        return _without_quotes(text)
    try:
        return read_yaml(text)
    except UnreadableFile as error:
        raise ConfigError(f"cannot read {for_terminal(text, 60)!r} as a value: {error}") from None


def read_as(text: str, choices: Sequence[Any]) -> Any:
    """Text as a value of one of some types.

    A setting of text takes any text: 2024, [old], set #2. A setting that is a list takes `256,1024` and a single value.
    None is written none, null or ~.

    Args:
        text: as typed.
        choices: types, from a dataclass's annotation; () for `read_value`.
    """
    if type(None) in choices and text.strip().lower() in ("none", "null", "~", ""):
        return None
    lists = [choice for choice in choices if takes_list(choice)]
    scalars = [choice for choice in choices if choice not in lists and choice is not type(None)]
    if lists and (not scalars or text.strip().startswith(("[", "("))):
        items = [item for choice in lists for item in typing.get_args(choice) if item is not Ellipsis]
        return as_list(text, items_are_text=bool(items) and all(map(takes_text, items)))
    return text if _want_text(choices) else read_value(text)


def read_parameter(value: Any, hint: Any) -> Any:
    """A notebook's parameter as the type of its field; what does not fit stays as it is, for `parse` to refuse."""
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


def as_list(arrived: Any, items_are_text: bool = False) -> list:
    """The list that someone meant who typed `[256, 1024]`, `(256, 1024)`, `256,1024`, or one value.

    Args:
        arrived: text, or a value that is taken as it is.
        items_are_text: leave items as text, whatever they look like: [2024, set #2, my: pics].
    """
    if not isinstance(arrived, str):
        return list(arrived) if isinstance(arrived, (list, tuple)) else [arrived]
    text = arrived.strip()
    in_brackets = len(text) >= 2 and text[0] + text[-1] in ("[]", "()")
    if not items_are_text and in_brackets and text[0] == "[":
        value = read_or_none(text)
        return value if isinstance(value, list) else [arrived]
    items = split_items(text[1:-1] if in_brackets else text)
    if items_are_text:
        return [_without_quotes(item) for item in items]
    values = [item if (value := read_or_none(item)) is None else value for item in items]
    return values if in_brackets or values else [arrived]


def split_items(text: str) -> list[str]:
    """Text cut at its commas, except inside quotes and brackets: "a, [1, 2], 'b, c'" has three items."""
    items, start, depth, quote = [], 0, 0, ""
    for position, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not text[start:position].strip():
            quote = letter
        elif letter in "[({":
            depth += 1
        elif letter in "])}":
            depth -= 1
        elif letter == "," and depth <= 0:
            items.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*items, last] if last else items


def _without_quotes(text: str) -> str:
    """Text without the quotes around all of it."""
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def read_or_none(text: str) -> Any:
    """As `read_value`; None for what cannot be read."""
    try:
        return read_value(text)
    except ConfigError:
        return None


def _want_text(choices: Sequence[Any]) -> bool:
    return any(takes_text(choice) for choice in choices)


# --- what a field may hold, from its annotation -----------------------------------------------------------------------


def field_types(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses that an annotation names."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for argument in typing.get_args(hint) for cls in dataclasses_in(argument)]


def sections_at(cls: type, path: Sequence[str | int]) -> list[type]:
    """The dataclasses that keys lead to from a dataclass. A key that is none of its fields leads nowhere else."""
    sections = [cls]
    for key in path:
        bases = [base for section in sections for base in dataclasses_in(field_types(section).get(key))]
        # A quantizer's own settings stand where its base class is annotated.
        subsections = list(dict.fromkeys(sub for base in bases for sub in (base, *derived_classes(base))))
        sections = subsections or sections
    return sections


def derived_classes(cls: type) -> list[type]:
    """The dataclasses derived from one, such as the settings of each quantizer."""
    return [sub for child in cls.__subclasses__() for sub in (child, *derived_classes(child))]


def alternatives(hint: Any) -> list[Any]:
    """The types that an annotation allows: `int | None` is two."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [alternative for choice in typing.get_args(hint) for alternative in alternatives(choice)]
    return alternatives(typing.get_args(hint)[0]) if typing.get_origin(hint) is typing.Annotated else [hint]


def takes_text(hint: Any) -> bool:
    """Whether text is a value of this type."""
    if typing.get_origin(hint) is typing.Literal:
        return any(isinstance(choice, str) for choice in typing.get_args(hint))
    return hint is Any or (isinstance(hint, type) and issubclass(hint, (str, Path, Enum)))


def takes_list(hint: Any) -> bool:
    """Whether a list is a value of this type."""
    return (typing.get_origin(hint) or hint) in (tuple, list, Sequence)
