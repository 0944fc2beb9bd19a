"""The one strict door through which settings come in: recipes, command lines and notebook parameters.

Settings are plain frozen dataclasses that know nothing of this module; pydantic's TypeAdapter does the checking.
Everything passes through JSON on its way in, so that a YAML list fits a tuple while "3" never fits an int.
YAML is read by the rules of version 1.2, where 1e-3 is a number and `no` is a word; PyYAML alone reads 1.1. Numbers are
decimal: 0x10, 0o17 and 1_000 are text, which no number accepts.
A value typed on a command line is text as it stands, unless it is plainly a list, a mapping, a number, true, false or
null (`read_value`); where the setting takes text it is always text (`read_as`).
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ibqlab.base.checks import FLOAT32
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import INTEGER_DIGITS, NESTING, UnreadableFile, nesting, read_text

T = TypeVar("T")

PROBLEMS_SHOWN = 20
"""Problems that one message lists; the others are counted."""
YAML_VALUES = 100_000
"""Values that a YAML text may stand for once its aliases are written out; recipes have a hundred."""
KEY_LETTERS = 500
"""Letters of a dotted key."""
NEWER_SETTINGS = {"unreadable": "skip"}
"""Settings that came after the first runs, with their defaults. A content hash leaves them out at these values, so that
it is that of settings from before: folders made then are found again. Add to it whatever setting is added."""
LARGEST_INTEGER = 2**63 - 1
"""Settings are numbers of at most 64 bits."""


class Problem(NamedTuple):
    """One thing wrong with a set of settings."""

    path: tuple[str | int, ...]
    """Keys from the outside in; () for the settings as a whole."""
    text: str
    """What was expected, what arrived, and what to write instead."""


class ConfigError(ValueError):
    """Settings that cannot be used.

    Args:
        message: the whole message.
        problems: the same piece by piece, for whoever nests these settings in larger ones.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()):
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, source: str, problems: Sequence[Problem]) -> "ConfigError":
        """One message that lists every problem under the name of where the settings came from."""
        shown = problems[:PROBLEMS_SHOWN]
        lines = [f"{for_terminal(dotted(p.path))}: {p.text}" if p.path else p.text for p in shown]
        if len(lines) == 1:
            return cls(f"{source}: {lines[0]}", problems)
        if len(problems) > len(shown):
            lines.append(f"… and {len(problems) - len(shown)} more")
        return cls("\n  ".join([f"{source}: {len(problems)} problems", *lines]), problems)


def dotted(path: Sequence[str | int]) -> str:
    """A path as it is typed on a command line: ("betas", 1) → "betas[1]"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def nearest(key: str, valid: Sequence[str]) -> str:
    """A hint for a misspelt key: the nearest valid one, or all of them."""
    close = difflib.get_close_matches(key, valid, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are: {', '.join(valid) or 'none'}"


# --- YAML ------------------------------------------------------------------------------------------------------------


_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?[0-9]+$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_OTHER_INT = re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+|[0-9]+(?:_[0-9]+)+)$")
"""Whole numbers as Python and YAML 1.1 write them; settings do not."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars; no key twice, no deep nesting, no aliases that stand for more than they write."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        try:
            if self._depth > NESTING:
                raise yaml.composer.ComposerError(
                    None, None, f"nested deeper than {NESTING} levels", self.peek_event().start_mark
                )
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_document(self, node: yaml.Node) -> Any:
        if _count_values(node, {}) > YAML_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"its aliases stand for more than {YAML_VALUES:,} values", node.start_mark
            )
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            is_key = isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge"
            key = self.construct_object(key_node, deep=True) if is_key else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Values that a node stands for, every alias counted like what it repeats."""
    if counted.get(id(node)) == 0:
        raise yaml.constructor.ConstructorError(None, None, "an alias stands inside what it repeats", node.start_mark)
    if id(node) not in counted:
        counted[id(node)] = 0  # its count is not known yet: an alias that leads here goes in a circle
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        counted[id(node)] = 1 + sum(_count_values(part, counted) for part in parts)
    return counted[id(node)]


def _read_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) > INTEGER_DIGITS:
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of more than {INTEGER_DIGITS:,} digits", node.start_mark
        )
    return int(node.value)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else; short lists on one line."""


def _write_list(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    flat = not any(isinstance(item, (list, dict)) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Dumper.add_representer(list, _write_list)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: the file.
    Returns:
        Plain dictionaries, lists, numbers, text; 1e-3 is a number.
    Raises:
        ConfigError: no such file, no ordinary file, empty, not YAML, not a mapping, a key given twice, nested too deep,
            or aliases that multiply; the message names the file.
    """
    path = Path(path)
    try:
        content = _load(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a YAML file") from None
    except UnreadableFile as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if content is None:
        raise ConfigError(f"{path}: the file is empty; write settings as `key: value`")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold settings as `key: value`; got {_describe(content)}")
    return content


def _load(text: str) -> Any:
    """What YAML text stands for; every mistake in it is a YAMLError."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError(f"nested deeper than {NESTING} levels, by its aliases") from None
    # An explicit tag, such as `!!float x`, ends in whatever the conversion raises.
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise yaml.YAMLError(f"a value does not fit its tag ({type(error).__name__}: {error})") from None
    if nesting(value) > NESTING:
        raise yaml.YAMLError(f"nested deeper than {NESTING} levels, by its aliases")
    _refuse_other_values(value)
    return value


def _refuse_other_values(value: Any) -> None:
    """Only what settings may be: tags also make sets, dates and bytes, and escapes halves of letters."""
    if isinstance(value, (dict, list)):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _refuse_other_values(item)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise yaml.YAMLError(
            f"values are numbers, text, true, false, null, lists and mappings; got {type(value).__name__} {value!r:.60}"
        )
    elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise yaml.YAMLError(f"text must be in UTF-8; got {value!r:.60}")


def read_value(text: str) -> Any:
    """A value as typed on a command line for a setting of unknown type.

    Text stays as it is, unless it is plainly something else: [a list], {a: mapping}, a decimal number, true, false,
    null or nothing at all (None), or text in quotes.

    Raises:
        ConfigError: a list or mapping that is not YAML.
    """
    text = text.strip()
    is_list = text.startswith("[")
    is_mapping = text.startswith("{") and text.endswith("}")
    is_scalar = any(kind.match(text) for kind in (_INT, _FLOAT, _BOOL, _NULL))
    if not (is_list or is_mapping or is_scalar):
        return _without_quotes(text)
    try:
        return _load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read {for_terminal(text, 60)!r} as a value: {_one_line(error)}") from None


def _without_quotes(text: str) -> str:
    """Text without the quotes around all of it."""
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(for_terminal(error).split())
    return for_terminal(f"{error.problem or error.context} (line {mark.line + 1}, column {mark.column + 1})")


# --- out -------------------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries, lists, numbers and text, as YAML and JSON can hold.

    Args:
        config: a dataclass instance or a mapping. An object with a `config_name` (a registered quantizer's config)
            gets {"name": config_name} first, so that `parse` finds its class again.
    Returns:
        The dictionary; `parse(type(config), to_dict(config)) == config`.
    Raises:
        ConfigError: a value that has no plain form; the message names its key.
    """
    return _plain(config, ())


def dump_yaml(config: Any) -> str:
    """A config as YAML, keys in the order of its fields; every value reads back equal."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def content_hash(config: Any) -> str:
    """Twelve hexadecimal digits that two configs share if and only if they hold the same values.

    Neither the order of keys nor 1 against 1.0 changes it. A missing one of `NEWER_SETTINGS` counts as its default.

    Args:
        config: a dataclass instance, or a mapping as `to_dict` returns it.
    """
    text = json.dumps(_canonical(to_dict(config)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any, path: tuple) -> Any:
    if len(path) > NESTING:
        text = f"settings may lie {NESTING} levels deep at most; these go deeper"
        raise ConfigError.of("settings", [Problem(path[:3], text)])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = getattr(value, "config_name", None)
        named = {"name": name} if name else {}
        return named | {f.name: _plain(getattr(value, f.name), (*path, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, (Enum, Path)):
        return str(value) if isinstance(value, Path) else _plain(value.value, path)
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()  # a number of NumPy or torch
    if value is None or type(value) in (bool, int, float, str):
        return value
    text = f"must be a number, text, true, false, null, a list or a mapping; got {type(value).__name__} {value!r:.60}"
    raise ConfigError.of("settings", [Problem(path, text)])


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items() if (key, item) not in NEWER_SETTINGS.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# --- in --------------------------------------------------------------------------------------------------------------


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
        raise ConfigError.of(source, [Problem((), f"must be settings as `key: value`; got {_describe(mapping)}")])
    try:
        plain = _plain(mapping, ())
    except ConfigError as error:
        raise ConfigError.of(source, error.problems) from None
    impossible = list(_impossible_values(plain, ()))
    if impossible:
        raise ConfigError.of(source, impossible)
    try:
        return _adapter(cls).validate_json(json.dumps(plain), strict=True, extra="forbid")
    except ValidationError as error:
        found = [problem for detail in error.errors() for problem in _problems(cls, detail)]
        raise ConfigError.of(source, found) from None


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
        shown = "NaN" if math.isnan(value) else f"{value} (1e400 is more than a number can be)"
        yield Problem(path, f"must be a finite number; got {shown}")
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
    return [Problem(path, f"{_expected(detail['msg'])}; got {_describe(arrived)}{_remedy(detail['type'], arrived)}")]


def _keys_at(cls: type, path: Sequence[str | int]) -> list[str]:
    """The field names of the dataclasses that a path into cls leads to."""
    places = [cls]
    for key in path:
        deeper = [inner for place in places for inner in _dataclasses_in(field_types(place).get(key))]
        places = deeper or places
    return [name for place in places for name in field_types(place)]


def field_types(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _dataclasses_in(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for inner in typing.get_args(hint) for found in _dataclasses_in(inner)]


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


def _expected(message: str) -> str:
    message = (message[:1].lower() + message[1:]).replace("input should be", "must be")
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message


def _describe(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}…"
    kinds = {str: "the text", list: "the list", dict: "the mapping", int: "the number", float: "the number"}
    return f"{kinds.get(type(value), type(value).__name__)} {shown}"


def _remedy(kind: str, arrived: Any) -> str:
    """What to write instead, where that can be told."""
    if isinstance(arrived, str) and kind in ("int_type", "float_type", "bool_type"):
        wanted = {"int_type": int, "float_type": (int, float), "bool_type": bool}[kind]
        meant = int(arrived.replace("_", ""), 0) if _OTHER_INT.match(arrived) else _read_or_none(arrived)
        right = isinstance(meant, wanted) and (kind == "bool_type" or not isinstance(meant, bool))
        return f"; write {json.dumps(meant)}{'' if _OTHER_INT.match(arrived) else ' without quotes'}" if right else ""
    if kind == "int_type" and isinstance(arrived, float) and arrived.is_integer():
        return f"; write {int(arrived)}"
    if kind in ("tuple_type", "list_type") and not isinstance(arrived, (dict, list)):
        return f"; write {json.dumps(as_list(arrived))}"
    return ""


def _read_or_none(text: str) -> Any:
    try:
        return read_value(text)
    except ConfigError:
        return None


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
        meant = _read_or_none(text)
        return meant if isinstance(meant, list) else [arrived]
    items = split_items(text[1:-1] if in_brackets else text)
    if items_are_text:
        return [_without_quotes(item) for item in items]
    values = [item if (meant := _read_or_none(item)) is None else meant for item in items]
    return values if in_brackets or values else [arrived]


def split_items(text: str) -> list[str]:
    """Text cut at its commas, except inside quotes and brackets: "a, [1, 2], 'b, c'" has three items."""
    items, start, depth, quote = [], 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not text[start:place].strip():
            quote = letter
        elif letter in "[({":
            depth += 1
        elif letter in "])}":
            depth -= 1
        elif letter == "," and depth <= 0:
            items.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*items, last] if last else items


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
    changed = _plain(mapping, ())
    for assignment in assignments:
        key, value = split_assignment(assignment)
        *parents, last = key.split(".")
        place = changed
        for depth, parent in enumerate(parents):
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                above = ".".join(parents[: depth + 1])
                raise ConfigError(f"{assignment!r}: {above} holds {_describe(place)}, it has no settings of its own")
        place[last] = read_assigned(key, value, _types_at(cls, parents, last) if cls else ())
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


def read_as(text: str, choices: Sequence[Any]) -> Any:
    """Text as a value of one of some types.

    Where text is wanted, it is text, whatever it looks like: 2024, [old], set #2. Where a list is wanted, `256,1024`
    and a single value are lists. None is written none, null or ~.

    Args:
        text: as typed.
        choices: types, from a dataclass's annotation; () for `read_value`.
    """
    if type(None) in choices and text.strip().lower() in ("none", "null", "~", ""):
        return None
    lists = [choice for choice in choices if _takes_list(choice)]
    others = [choice for choice in choices if choice not in lists and choice is not type(None)]
    if lists and (not others or text.strip().startswith(("[", "("))):
        items = [item for choice in lists for item in typing.get_args(choice) if item is not Ellipsis]
        return as_list(text, items_are_text=bool(items) and all(map(_takes_text, items)))
    return text if _want_text(choices) else read_value(text)


def _want_text(choices: Sequence[Any]) -> bool:
    return any(_takes_text(choice) for choice in choices)


def _types_at(cls: type, parents: Sequence[str], last: str) -> tuple[Any, ...]:
    """The types that a setting may have, from the dataclass and those that may stand in its fields."""
    places = [cls]
    for key in parents:
        hints = [field_types(place).get(key) for place in places]
        inner = [found for hint in hints for found in _dataclasses_in(hint)]
        places = list(dict.fromkeys(one for found in inner for one in (found, *_derived(found))))
    hints = [hint for place in places if (hint := field_types(place).get(last)) is not None]
    return tuple(dict.fromkeys(choice for hint in hints for choice in alternatives(hint)))


def _derived(cls: type) -> list[type]:
    """The dataclasses derived from one, such as the settings of each quantizer."""
    return [one for direct in cls.__subclasses__() for one in (direct, *_derived(direct))]


# --- notebook parameters ---------------------------------------------------------------------------------------------


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
    given = {name: namespace[name] for name in valid if name in namespace}
    return check_parameters(cls, given, "notebook parameters")


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
    types_of = field_types(cls)
    read = {name: _from_text(value, types_of[name]) if name in types_of else value for name, value in values.items()}
    return parse(cls, read, source=source)


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


def alternatives(hint: Any) -> list[Any]:
    """The types that an annotation allows: `int | None` is two."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for part in typing.get_args(hint) for inner in alternatives(part)]
    return alternatives(typing.get_args(hint)[0]) if typing.get_origin(hint) is typing.Annotated else [hint]


def _takes_text(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return any(isinstance(choice, str) for choice in typing.get_args(hint))
    return hint is Any or (isinstance(hint, type) and issubclass(hint, (str, Path, Enum)))


def _takes_list(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in (tuple, list, Sequence)


def _from_text(value: Any, hint: Any) -> Any:
    """A parameter as its field wants it; what does not fit stays as it is, for `parse` to refuse."""
    choices = alternatives(hint)
    if isinstance(value, (int, float)) and all(_takes_list(choice) for choice in choices):
        return [value]
    if not isinstance(value, str):
        return value
    try:
        meant = read_as(value, choices)
    except ConfigError:
        return value
    return value if meant is None and type(None) not in choices else meant
