"""Where the paths in a run's settings lead: a relative one counts from the folder that the run was started in.

config.yaml keeps every path as it was typed, because the content hash is of that text. What a path leads to is decided
here, so that a run can be used from any folder and a folder may be spelt in any way.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from ibqlab.base.resources import BUILT_IN
from ibqlab.runs.commands import leaves
from ibqlab.runs.finding import locate

PLUGINS = "plugins"
"""The setting that is a list of files and modules."""
PATHS = ("data.source", "data.validation_source", "tokenizer", "tokens", "start_from")
"""Settings that may hold a path."""


def located(settings: Mapping[str, Any], start: str, *, typed_here: bool = False) -> dict[str, Any]:
    """Settings whose relative paths lead from the current folder to where they led from another one.

    Args:
        settings: nested, as `ibqlab.config.to_dict` gives them.
        start: the folder that relative paths count from, absolute; "" where it is not known.
        typed_here: a path that leads somewhere from the current folder is meant from there.
    """

    def change(_: str, text: str) -> str:
        path = os.path.expanduser(text)
        from_start = os.path.join(start, path)
        is_elsewhere = start and _is_path(text) and not os.path.isabs(path) and _leads_somewhere(from_start)
        if not is_elsewhere or os.path.realpath(from_start) == os.path.realpath(path):
            return text
        return text if typed_here and _leads_somewhere(path) else from_start

    return _with_paths(settings, change)


def spelt_as(settings: Mapping[str, Any], recorded: Mapping[str, Any], start: str) -> dict[str, Any]:
    """Settings in which each path that leads where that of `recorded` leads is spelt as it is there.

    Args:
        settings: typed in the current folder.
        recorded: those of a run.
        start: the folder that the run was started in; "" where it is not known.
    """

    recorded_values = dict(leaves(recorded))

    def change(key: str, text: str) -> str:
        old = recorded_values.get(key)
        if not isinstance(old, str) or not (_is_path(text) and _is_path(old)):
            return text
        return old if _target(key, text, "") == _target(key, old, start) else text

    spelt = _with_paths(settings, change)
    # Of plugins the file's name counts here; whether the content is the same is asked where a run is continued.
    names, recorded_names = settings.get(PLUGINS), recorded.get(PLUGINS)
    if (
        isinstance(names, list)
        and isinstance(recorded_names, list)
        and _file_names(names) == _file_names(recorded_names)
    ):
        spelt[PLUGINS] = recorded_names
    return spelt


def _file_names(plugins: list[Any]) -> list[str]:
    return [os.path.basename(str(plugin)) for plugin in plugins]


def _target(key: str, text: str, start: str) -> str:
    """What a path leads to, links followed; all but images may be a name below the folder of all runs."""
    path = os.path.join(start, os.path.expanduser(text))
    is_name = not key.startswith("data.") and not os.path.exists(path)
    return os.path.realpath(locate(text) if is_name else path)


def _is_path(text: str) -> bool:
    return bool(text) and text not in BUILT_IN and "\0" not in text


def _leads_somewhere(path: str) -> bool:
    """Whether something is there; of a pattern of shards, the folder in which they lie."""
    return os.path.exists(os.path.dirname(path.partition("{")[0]) if "{" in path else path)


def _with_paths(settings: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """A copy whose paths went through a function of key and text."""
    copy = dict(settings)
    for key, text in leaves(settings):
        if key in PATHS and isinstance(text, str):
            section, _, name = key.rpartition(".")
            if not section:
                copy[name] = change(key, text)
            elif isinstance(copy.get(section), dict):  # and no key that holds the dot itself
                copy[section] = {**copy[section], name: change(key, text)}
        elif key == PLUGINS and isinstance(text, list):
            copy[key] = [change(key, plugin) if isinstance(plugin, str) else plugin for plugin in text]
    return copy
