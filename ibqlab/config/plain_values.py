"""Settings as plain dictionaries, lists, numbers and text: their content hash, and YAML files that hold them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from ibqlab.base.files import NESTING, UnreadableFile, read_text
from ibqlab.config.plain_lines import read_plain
from ibqlab.config.problems import ConfigError, Problem, describe

NEWER_SETTINGS = {"unreadable": "skip", "plugins": [], "alarm": "warn", "matmul": "float32"}
NEWER_SETTINGS |= {"middle_attention": True, "unit_vectors": False, "straight_through": True}
NEWER_SETTINGS |= {"scale_lr_by_batch": 0, "start_family": "", "start_num_heads": [], "start_weights": ""}
NEWER_SETTINGS |= {"grow_codes": "split", "grow_noise": 0.1}
"""Settings that came after the first runs, with their defaults. A content hash leaves them out at these values, so that
it is that of settings from before: folders made then are found again. Add to it whatever setting is added."""


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
    return plain(config, ())


def content_hash(config: Any) -> str:
    """Twelve hexadecimal digits that two configs share if and only if they hold the same values.

    Neither the order of keys nor 1 against 1.0 changes it. A missing one of `NEWER_SETTINGS` counts as its default.

    Args:
        config: a dataclass instance, or a mapping as `to_dict` returns it.
    """
    text = json.dumps(_canonical(to_dict(config)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain(value: Any, path: tuple) -> Any:
    """A value inside settings as `to_dict` gives it; the path of keys that leads to it starts an error's message."""
    if len(path) > NESTING:
        text = f"settings may lie {NESTING} levels deep at most; these go deeper"
        raise ConfigError.from_problems("settings", [Problem(path[:3], text)])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = getattr(value, "config_name", None)
        named = {"name": name} if name else {}
        return named | {f.name: plain(getattr(value, f.name), (*path, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, (Enum, Path)):
        return str(value) if isinstance(value, Path) else plain(value.value, path)
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()  # a number of NumPy or torch
    if value is None or type(value) in (bool, int, float, str):
        return value
    text = f"must be a number, text, true, false, null, a list or a mapping; got {type(value).__name__} {value!r:.60}"
    raise ConfigError.from_problems("settings", [Problem(path, text)])


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items() if (key, item) not in NEWER_SETTINGS.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
        text = read_text(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a YAML file") from None
    except UnreadableFile as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); give the path of a YAML file") from None
    content: Any = read_plain(text)
    if content is None:
        from ibqlab.config.yaml_rules import read_yaml  # noqa: PLC0415 - heavy

        try:
            content = read_yaml(text)
        except UnreadableFile as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        raise ConfigError(f"{path}: the file is empty; write settings as `key: value`")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold settings as `key: value`; got {describe(content)}")
    return content


def dump_yaml(config: Any) -> str:
    """A config as YAML, keys in the order of its fields; every value reads back equal."""
    from ibqlab.config.yaml_rules import write_yaml  # noqa: PLC0415 - heavy

    return write_yaml(to_dict(config))
