"""A study's folder knows what it was made with: reading that again, and refusing whatever does not fit it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibqlab.base.escaping import for_terminal
from ibqlab.grids.cells import PARAMETERS_FILE, CellStore, StudyError, read_json
from ibqlab.runs.finding import find_run, run_name

REMEDY_LETTERS = 2000
"""Letters of what a message says to type; the folder's own parameters stand in it."""


def read_parameters_of(folder: str | Path) -> tuple[Path, str, dict[str, Any]]:
    """What a study's folder was last run with.

    Args:
        folder: a path, or a name below the folder of all runs.
    Returns:
        The folder, the study's name, and its notebook's parameters, whose output is this folder.
    Raises:
        FileNotFoundError: there is no such folder.
        StudyError: it is no study's folder.
    """
    place = find_run(folder, "study")
    found = read_json(place / PARAMETERS_FILE)
    if found is None:
        raise StudyError(f"{place} is no study's folder: it holds no {PARAMETERS_FILE}; run a study's notebook first")
    name = found.pop("study", None)
    if not isinstance(name, str):
        raise StudyError(f"{place / PARAMETERS_FILE} is damaged: it names no study; run the study's notebook again")
    return place, name, found | {"output": str(place.resolve())}


def command_of_study(name: str, parameters: Mapping[str, Any], folder: Path) -> str:
    """What is typed to go on with a study.

    Args:
        name: of its notebook.
        parameters: of its `parameters` cell; those that say nothing are left out.
        folder: that it lies in.
    """
    preset = parameters.get("preset", "")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
    plain = {"preset", "output", "retry"} | {key for key, value in given.items() if not value or value == "local"}
    words = [f"preset={preset}", *(f"{key}={as_typed(value)}" for key, value in given.items() if key not in plain)]
    if run_name(folder) != f"{name}-{preset}":
        words.append(shlex.quote(f"output={run_name(folder)}"))
    return " ".join(["ibqlab run", name, *words])


def require_same_study(store: CellStore, facts: Mapping[str, Any]) -> None:
    """Refuse the folder of another study, before anything is read from it or started in it.

    Args:
        store: of the folder.
        facts: what all cells of the study have in common, as `CellStore.claim` takes them.
    Raises:
        StudyError: the folder is another grid's; the message gives both, and what to type.
    """
    changes = store.differences(facts)
    if not changes:
        return
    try:
        folder, name, parameters = read_parameters_of(store.folder)
    except (StudyError, FileNotFoundError):
        remedy = "Give output another folder, or the parameters that the folder was made with"
    else:
        there = run_name(folder)
        opened = "open_ablations" if name == "ablations" else "open_study"
        remedy = (
            f"To open it as it is: {opened}({there!r}), or ibqlab report {shlex.quote(there)}; to go on with it: "
            f"{command_of_study(name, parameters, folder)}; to make another one: output=ANOTHER"
        )
    remedy = for_terminal(remedy, REMEDY_LETTERS)
    raise StudyError(f"{store.folder} holds another grid; nothing was changed. There → yours: {changes}. {remedy}")


def as_typed(value: Any) -> str:
    """A parameter's value as a shell takes it."""
    if not isinstance(value, tuple):
        return shlex.quote(str(value))
    items = [f'"{item}"' if "," in str(item) else str(item) for item in value]
    return shlex.quote(f"[{', '.join(items)}]")
