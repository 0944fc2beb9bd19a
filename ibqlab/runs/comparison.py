"""How runs' settings differ: only those that are not the same in all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ibqlab.config.plain_values import NEWER_SETTINGS
from ibqlab.runs.queries import QueryError, as_text
from ibqlab.runs.summaries import RunSummary

NOT_SET = "–"
"""Stands where a run has no such setting."""
FACTS = {
    "commit of the code": ("commit",),
    "images for training": ("data", "train", "fingerprint"),
    "images for validation": ("data", "validation", "fingerprint"),
}
"""Of provenance.json, what may make runs of one configuration differ → where it stands there."""
_MISSING = object()


def differing_settings(runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    """The settings in which runs differ.

    Args:
        runs: at least two, all readable.
    Returns:
        Dotted key → the value of each run, in their order; `NOT_SET` where it has none. First the settings in their
        order, then what provenance tells of code and images. {}: the runs were told the same.
    Raises:
        QueryError: fewer than two runs, or one that cannot be read; the message says which and why.
    """
    if len(runs) < 2:
        raise QueryError(f"a difference needs at least two runs; got {len(runs)}")
    for run in runs:
        if run.problem:
            raise QueryError(f"{run.name} cannot be read: {run.problem}")
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = {key: [_setting(run.settings, key) for run in runs] for key in keys}
    rows |= {title: [_fact(run.facts, parts) for run in runs] for title, parts in FACTS.items()}
    return {
        key: [NOT_SET if value is _MISSING else as_text(value) or "''" for value in values]
        for key, values in rows.items()
        if not all(_are_same(value, values[0]) for value in values)
    }


def _are_same(one: Any, other: Any) -> bool:
    """As settings: 1 is 1.0, and true is no number."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _setting(settings: Mapping[str, Any], key: str) -> Any:
    """A run's setting; runs from before there was one were made as with its default."""
    value = settings.get(key, NEWER_SETTINGS.get(key.rpartition(".")[2], _MISSING))
    return "null" if value is None else value


def _fact(facts: Mapping[str, Any], parts: Sequence[str]) -> Any:
    value: Any = facts
    for part in parts:
        value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
    return value
