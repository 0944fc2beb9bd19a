"""The one strict door through which settings come in: recipes, command lines and notebook parameters.

Settings are plain frozen dataclasses that know nothing of this module; pydantic's TypeAdapter does the checking.
Everything passes through JSON on its way in, so that a YAML list fits a tuple while "3" never fits an int.
YAML is read by the rules of version 1.2, where 1e-3 is a number and `no` is a word; PyYAML alone reads 1.1.
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

T = TypeVar("T")


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
        lines = [f"{dotted(p.path)}: {p.text}" if p.path else p.text for p in problems]
        if len(lines) == 1:
            return cls(f"{source}: {lines[0]}", problems)
        return cls("\n  ".join([f"{source}: {len(lines)} problems", *lines]), problems)


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
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*$|0o[0-7]+$|0x[0-9a-fA-F]+$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars; a key given twice is an error."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


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
        ConfigError: no such file, empty, not YAML, not a mapping, or a key given twice; the message names the file.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if content is None:
        raise ConfigError(f"{path}: the file is empty; write settings as `key: value`")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold settings as `key: value`; got {_describe(content)}")
    return content


def read_text(text: str) -> Any:
    """A value as typed on a command line, read as YAML: "1e-3" → 0.001, "[1, 2]" → [1, 2], "null" → None.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read {text!r} as a value: {_one_line(error)}") from None


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"{error.problem or error.context} (line {mark.line + 1}, column {mark.column + 1})"


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

    Neither the order of keys nor 1 against 1.0 changes it.

    Args:
        config: a dataclass instance, or a mapping as `to_dict` returns it.
    """
    text = json.dumps(_canonical(to_dict(config)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any, path: tuple) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = getattr(value, "config_name", None)
        named = {"name": name} if name else {}
        return named | {f.name: _plain(getattr(value, f.name), (*path, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, Enum):
        return _plain(value.value, path)
    if isinstance(value, Path):
        return str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    text = f"must be a number, text, true, false, null, a list or a mapping; got {type(value).__name__} {value!r:.60}"
    raise ConfigError.of("settings", [Problem(path, text)])


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
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
    not_numbers = [Problem(path, "must be a number; got NaN") for path in _find_nan(plain, ())]
    if not_numbers:
        raise ConfigError.of(source, not_numbers)
    try:
        return _adapter(cls).validate_json(json.dumps(plain), strict=True, extra="forbid")
    except ValidationError as error:
        found = [problem for detail in error.errors() for problem in _problems(cls, detail)]
        raise ConfigError.of(source, found) from None


@functools.cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def _find_nan(value: Any, path: tuple) -> Iterator[tuple]:
    if isinstance(value, float) and math.isnan(value):
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _find_nan(item, (*path, key))


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
        deeper = [inner for place in places for inner in _dataclasses_in(_field_types(place).get(key))]
        places = deeper or places
    return [name for place in places for name in _field_types(place)]


def _field_types(cls: type) -> dict[str, Any]:
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
        meant = _read_or_none(arrived)
        right = isinstance(meant, wanted) and (kind == "bool_type" or not isinstance(meant, bool))
        return f"; write {json.dumps(meant)} without quotes" if right else ""
    if kind == "int_type" and isinstance(arrived, float) and arrived.is_integer():
        return f"; write {int(arrived)}"
    if kind in ("tuple_type", "list_type") and not isinstance(arrived, (dict, list)):
        return f"; write {json.dumps(as_list(arrived))}"
    return ""


def _read_or_none(text: str) -> Any:
    try:
        return read_text(text)
    except ConfigError:
        return None


def as_list(arrived: Any) -> list:
    """The list that someone meant who typed `256,1024`, or one value where a list belongs."""
    meant = _read_or_none(arrived) if isinstance(arrived, str) else arrived
    if isinstance(meant, str) and "," in meant:
        meant = _read_or_none(f"[{meant}]")
    if meant is None:
        return [arrived]
    return meant if isinstance(meant, list) else [meant]


def apply_overrides(mapping: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of settings with some replaced, as typed on a command line.

    Args:
        mapping: settings, left as they are.
        assignments: "training.steps=300" each; the value is read as YAML. Keys between the dots that are missing are
            made; whether they are valid is for `parse` to say.
    Raises:
        ConfigError: no "=", no key, a value that is not YAML, or a dot after a key that holds a value.
    """
    changed = json.loads(json.dumps(_plain(mapping, ())))
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
        place[last] = read_assigned(key, value)
    return changed


def split_assignment(assignment: str) -> tuple[str, str]:
    """Key and value of "key=value".

    Raises:
        ConfigError: there is no "=", or a part of the key is empty.
    """
    key, equals, value = assignment.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"{assignment!r}: settings are typed key=value, without spaces, like {key or 'steps'}=300")
    if not all(key.split(".")):
        raise ConfigError(f"{assignment!r}: the key is missing; settings are typed key=value, like steps=300")
    return key, value


def read_assigned(key: str, value: str) -> Any:
    """A command line's value, read as YAML; the error names its key."""
    try:
        return read_text(value)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


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
    valid = list(_field_types(cls))
    unknown = [name for name in _injected_names(namespace) if name not in valid]
    if unknown:
        problems = [Problem((name,), f"no such parameter; {nearest(name, valid)}") for name in unknown]
        raise ConfigError.of("notebook parameters", problems)
    given = {name: namespace[name] for name in valid if name in namespace}
    return check_parameters(cls, given, "notebook parameters")


def check_parameters(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """Parameters that may arrive as text, checked against a dataclass.

    Text is read as YAML wherever the field does not take text itself: "[256, 1024]" and "256,1024" become lists,
    "none" becomes None where None is allowed. One value where a list belongs becomes a list of one.

    Args:
        cls: a dataclass whose fields are the parameters.
        values: parameter values by name.
        source: where they came from; starts the message.
    Raises:
        ConfigError: as `parse`; also text that cannot be read as the field's type.
    """
    types_of = _field_types(cls)
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


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for part in typing.get_args(hint) for inner in _alternatives(part)]
    return _alternatives(typing.get_args(hint)[0]) if typing.get_origin(hint) is typing.Annotated else [hint]


def _takes_text(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return any(isinstance(choice, str) for choice in typing.get_args(hint))
    return hint is Any or (isinstance(hint, type) and issubclass(hint, (str, Path, Enum)))


def _takes_list(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in (tuple, list, Sequence)


def _from_text(value: Any, hint: Any) -> Any:
    choices = _alternatives(hint)
    if isinstance(value, str) and type(None) in choices and value.strip().lower() in ("none", "null"):
        return None
    if any(_takes_text(choice) for choice in choices):
        return value
    if any(_takes_list(choice) for choice in choices) and isinstance(value, (str, int, float)):
        return as_list(value)
    if isinstance(value, str):
        meant = _read_or_none(value)
        return value if meant is None else meant
    return value
