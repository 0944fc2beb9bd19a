"""YAML text in and out: version 1.2 within bounds. Imported at the first text only, since ruamel takes 0.1 s to load.

`1e-3` is a number and `no` is text. Numbers are decimal: 0x10, 0o17, 1_000 and dates are text, which no number accepts.
"""

import io
import re
from copy import deepcopy
from functools import lru_cache
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import INTEGER_DIGITS, NESTING, UnreadableFile, nesting

VALUES = 100_000
"""Values that a text may stand for once its aliases are replaced by what they repeat; recipes have a hundred."""
REMEMBERED_LETTERS = 20_000
"""Longest text whose values are remembered; a run's settings have about 3,000 letters."""
TOO_DEEP = f"nested deeper than {NESTING} levels"
_TEXT = VersionedResolver.DEFAULT_SCALAR_TAG


class _ReadingRules(VersionedResolver):
    """Version 1.2, whatever the text says, without what no setting is: other than decimal numbers, dates, `=`."""

    processing_version = (1, 2)

    def resolve(self, kind: type, value: str, implicit: Any) -> Tag:
        tag = super().resolve(kind, value, implicit)
        if str(tag).endswith((":int", ":float")):
            return _TEXT if set("xob_") & set(value) else tag
        return _TEXT if str(tag).endswith((":timestamp", ":value")) else tag


class _Constructor(SafeConstructor):
    """Plain values; no key twice, and no aliases that stand for more than they write."""

    def construct_document(self, node: Node) -> Any:
        if _count_values(node, {}) > VALUES:
            raise ConstructorError(None, None, f"its aliases stand for more than {VALUES:,} values", node.start_mark)
        return super().construct_document(node)

    def flatten_mapping(self, node: MappingNode) -> Any:
        # Here, since ruamel looks for keys given twice only where there is no `<<`. Keys become text: 1 is "1".
        keys: set[str] = set()
        for key, _ in node.value if node.merge is None else ():
            text = key.value if isinstance(key, ScalarNode) else None
            if text in keys:
                raise DuplicateKeyError(None, None, f"the key {text!r} is given twice", key.start_mark)
            keys |= {text} if text is not None else set()
        return super().flatten_mapping(node)

    def construct_yaml_int(self, node: ScalarNode) -> int:
        if len(node.value) > INTEGER_DIGITS:
            problem = f"a number of more than {INTEGER_DIGITS:,} digits"
            raise ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)


_Constructor.add_default_constructor("int")


def _count_values(node: Node, counts: dict[int, int]) -> int:
    """Values that a node stands for, every alias counted like what it repeats."""
    if counts.get(id(node)) == 0:
        raise ConstructorError(None, None, "an alias stands inside what it repeats", node.start_mark)
    if id(node) not in counts:
        counts[id(node)] = 0  # its count is not known yet: an alias that leads here goes in a circle
        items = node.value if isinstance(node, CollectionNode) else ()
        children = [child for item in items for child in (item if isinstance(item, tuple) else (item,))]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


class _Representer(SafeRepresenter):
    """Short lists on one line; text in quotes wherever a reader of version 1.1 or 1.2 would take it for a value."""

    def represent_str(self, data: str) -> ScalarNode:
        is_text = all(rules.resolve(ScalarNode, data, (True, False)) == _TEXT for rules in _VERSIONS)
        is_plain = is_text and "?" not in data  # a question mark begins a key for some readers
        return self.represent_scalar(str(_TEXT), data, style=None if is_plain else "'")

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")  # 1e-05 would be text to a reader of version 1.1
        return node

    def represent_list(self, data: list) -> Node:
        is_flat = not any(isinstance(item, (list, dict)) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=is_flat)


_VERSIONS = VersionedResolver((1, 1)), VersionedResolver((1, 2))
_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(float, _Representer.represent_float)
_Representer.add_representer(list, _Representer.represent_list)


def read_yaml(text: str) -> Any:
    """What YAML text stands for: numbers, text, true, false, null, lists and mappings. The caller may change it.

    Raises:
        UnreadableFile: why it is not valid, in one line with line and column.
    """
    # A study opens its runs' settings again and again, and parsing takes a hundred times as long as copying.
    return deepcopy(_parse_again(text)) if len(text) <= REMEMBERED_LETTERS else _parse(text)


@lru_cache(maxsize=256)
def _parse_again(text: str) -> Any:
    return _parse(text)


def _parse(text: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Constructor, yaml.max_depth = _ReadingRules, _Constructor, NESTING
    try:
        value = yaml.load(text)
    except YAMLError as error:
        raise UnreadableFile(_one_line(error)) from None
    except RecursionError:
        raise UnreadableFile(f"{TOO_DEEP}, by its aliases") from None
    # An explicit tag, such as `!!float x`, ends in whatever the conversion raises.
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        raise UnreadableFile(f"a value does not fit its tag ({type(error).__name__}: {error})") from None
    if nesting(value) > NESTING:
        raise UnreadableFile(f"{TOO_DEEP}, by its aliases")
    _refuse_other_values(value)
    return value


def _refuse_other_values(value: Any) -> None:
    """Only what settings may be: tags also make sets, dates and bytes, and escapes halves of letters."""
    if isinstance(value, (dict, list)):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _refuse_other_values(item)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise UnreadableFile(
            f"values are numbers, text, true, false, null, lists and mappings; got {type(value).__name__} {value!r:.60}"
        )
    elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise UnreadableFile(f"text must be in UTF-8; got {value!r:.60}")


def _one_line(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return for_terminal(" ".join(str(error).split()))
    problem = TOO_DEEP if isinstance(error, MaxDepthExceededError) else error.problem or error.context
    return for_terminal(f"{problem} (line {mark.line + 1}, column {mark.column + 1})")


def is_plain_text(text: str) -> bool:
    """Whether YAML reads a word as text: neither a number nor true, false, null or nothing."""
    tag = _ReadingRules().resolve(ScalarNode, text, (True, False))
    return not str(tag).endswith((":int", ":float", ":bool", ":null"))


def write_yaml(value: Any) -> str:
    """Plain values as YAML that every reader takes for the same, keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer, yaml.default_flow_style, yaml.width = _Representer, False, 120
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()
