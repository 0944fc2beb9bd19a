"""Settings as typed on a command line: `training.steps=300`.

A value is text as it stands, unless it is plainly a list, a mapping, a number, true, false or null (`read_value`).
Where the setting takes text it is always text (`read_as`).
"""

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import NESTING, UnreadableFile
from ibqlab.config.annotations import alternatives, dataclasses_in, derived_classes, field_types, takes_list, takes_text
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
        section[last] = read_assigned(key, value, _types_at(cls, parents, last) if cls else ())
    return changed


def split_assignment(assignment: str) -> tuple[str, str]:
    """Key and value of "key=value".

    Raises:
        ConfigError: there is no "=", a part of the key is empty, or the key is longer than any is.
    """
    key, equals, value = assignment.partition("=")
    key = key.strip()
    shown = for_terminal(assignment, 80)
    if not equals:
        raise ConfigError(f"{shown!r}: settings are typed key=value, without spaces, like {key[:40] or 'steps'}=300")
    if not all(key.split(".")):
        raise ConfigError(f"{shown!r}: the key is missing; settings are typed key=value, like steps=300")
    if len(key) > KEY_LETTERS or key.count(".") >= NESTING:
        raise ConfigError(f"{shown!r}: no key has more than {KEY_LETTERS} letters or {NESTING} parts; shorten it")
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
    others = [choice for choice in choices if choice not in lists and choice is not type(None)]
    if lists and (not others or text.strip().startswith(("[", "("))):
        items = [item for choice in lists for item in typing.get_args(choice) if item is not Ellipsis]
        return as_list(text, items_are_text=bool(items) and all(map(takes_text, items)))
    return text if _want_text(choices) else read_value(text)


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


def _types_at(cls: type, parents: Sequence[str], last: str) -> tuple[Any, ...]:
    """The types that a setting may have, from the dataclass and those that may stand in its fields."""
    sections = [cls]
    for key in parents:
        hints = [field_types(section).get(key) for section in sections]
        bases = [base for hint in hints for base in dataclasses_in(hint)]
        # A quantizer's own settings stand where its base class is annotated.
        sections = list(dict.fromkeys(sub for base in bases for sub in (base, *derived_classes(base))))
    hints = [hint for section in sections if (hint := field_types(section).get(last)) is not None]
    return tuple(dict.fromkeys(choice for hint in hints for choice in alternatives(hint)))
