"""The plain part of YAML, read in a fiftieth of the time: what `dump_yaml` writes of most settings.

Lines `key: value`, two spaces deeper for each level, where a value is a number, true, false, null, a word, or a short
list of these. A text with anything else in it is left to `yaml_rules`, which agrees wherever both read.
"""

import re
from typing import Any

_LINE = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z_][A-Za-z0-9_]*):(?: (?P<value>[^ ].*))?")
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,20}(e[-+][0-9]{2,3})?")
_WORD = re.compile(r"[A-Za-z/][A-Za-z0-9_./+-]*|[0-9]+-[a-z]+")
_CONSTANTS = {"true": True, "false": False, "null": None}
_EMPTY: dict[str, type] = {"''": str, "[]": list}
_DEEPEST = 16
_OTHER = object()
"""Stands for a value that is not plain."""


def read_plain(text: str) -> dict[str, Any] | None:
    """The mapping that a text stands for; None where not all of it is plain.

    Args:
        text: YAML.
    """
    root: dict[str, Any] = {}
    levels = [root]  # the mappings that the next line may add to, from the outside in
    needs_mapping = False  # the line above was a key alone
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# "):
            continue
        match = _LINE.fullmatch(line)
        depth, odd = divmod(len(match["indent"]), 2) if match else (0, 1)
        if odd or depth >= len(levels) or depth > _DEEPEST or (needs_mapping and depth != len(levels) - 1):
            return None
        del levels[depth + 1 :]
        key, needs_mapping = match["key"], match["value"] is None
        value = {} if needs_mapping else _read_value(match["value"])
        if value is _OTHER or key in levels[depth] or key.lower() in _CONSTANTS:
            return None
        levels[depth][key] = value
        if needs_mapping:
            levels.append(value)
    return None if needs_mapping or not root else root


def _read_value(text: str) -> Any:
    if text in _EMPTY:
        return _EMPTY[text]()
    if text.startswith("[") and text.endswith("]"):
        items = [_read_scalar(item) for item in text[1:-1].split(", ")]
        return _OTHER if any(item is _OTHER for item in items) else items
    return _read_scalar(text)


def _read_scalar(text: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    # Full YAML takes True, NULL and the like for values, too.
    return text if _WORD.fullmatch(text) and text.lower() not in _CONSTANTS else _OTHER
