"""What to type: how two sets of settings differ, and the command that trains with one."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ibqlab.base.escaping import for_terminal


def train_command(recipe: Path, output: Path, settings: Mapping[str, Any], processes: Any = 1) -> str:
    """A line for a shell that trains into a folder, or continues the run that is there.

    Args:
        recipe: a YAML file; a run's own config.yaml is one.
        output: the run folder.
        settings: dotted keys and values that replace the recipe's.
        processes: more than 1 are started by torchrun.
    """
    many = type(processes) is int and processes > 1
    start = ["torchrun", "--nproc-per-node", str(processes), "-m", "ibqlab"] if many else ["ibqlab"]
    changes = [
        f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in settings.items()
    ]
    # Absolute: a plain name would lie below the folder of all runs.
    return shlex.join([*start, "train", str(recipe.absolute()), *changes, "--output", str(output.absolute())])


def differences(recorded: Mapping[str, Any], settings: Mapping[str, Any], limit: int = 8) -> str:
    """How settings differ, for an error message: "steps: 300 → 500; seed: 0 → 1"."""
    old, new = dict(leaves(recorded)), dict(leaves(settings))
    changed = [key for key in (old | new) if old.get(key, "not set") != new.get(key, "not set")]
    parts = [
        f"{for_terminal(key)}: {for_terminal(old.get(key, 'not set'))} → {for_terminal(new.get(key, 'not set'))}"
        for key in changed[:limit]
    ]
    return "; ".join(parts) + (f"; and {len(changed) - limit} more" if len(changed) > limit else "")


def leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested settings with their values."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
