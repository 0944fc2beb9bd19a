"""What made the rows of a study, or a run: commands, commits, versions, hardware, images, each once."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ibqlab.base.escaping import for_markdown
from ibqlab.studies.pages import as_code
from ibqlab.training.data_check import unreadable_line


def provenance_of(rows: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """What made some rows, as provenance.json holds it.

    Args:
        rows: of finished runs; each holds its run's provenance.
        command: that makes them again.
    """
    facts = [row.get("provenance", {}) for row in rows]
    return {
        "command": command,
        "started": min((entry["started"] for entry in facts if entry.get("started")), default=None),
        "commits": sorted({commit_of(entry) for entry in facts}),
        "hardware": _distinct(entry.get("hardware") for entry in facts),
        "threads": _distinct(entry.get("threads") for entry in facts),
        "versions": _distinct(entry.get("versions") for entry in facts),
        "data": _distinct(entry.get("data") for entry in facts),
        "seeds": sorted({row["seed"] for row in rows if "seed" in row}),
    }


def provenance_text(rows: Sequence[dict[str, Any]], *commands: str, **entries: Any) -> str:
    """The same for people, as the last section of a report.

    Args:
        rows: as for `provenance_of`.
        commands: that make them, and the report, again.
        entries: other lines, by their names; of features that come from no images "features" says so.
    """
    facts = provenance_of(rows, commands[0])
    hardware = "; ".join(
        f"{entry.get('cpu')}, {entry.get('cores')} core(s) per run" + (f", {entry['gpu']}" if entry.get("gpu") else "")
        for entry in _mappings(facts["hardware"])
    )
    versions = "; ".join(
        f"torch {entry.get('torch')}, Python {entry.get('python')}" for entry in _mappings(facts["versions"])
    )
    images = sorted(
        {
            str(split["description"])
            for data in _mappings(facts["data"])
            for split in _mappings(data.values())
            if "description" in split
        }
    )
    unread = sorted({line for row in rows if (line := unreadable_line(row.get("provenance", {})))})
    seeds = ", ".join(map(str, facts["seeds"]))
    threads = ", ".join(str(count) for count in facts["threads"] if count is not None)
    lines = {
        "seeds": for_markdown(seeds + (f"; threads per run: {threads}" if threads else ""), 2000),
        **({} if "features" in entries else {"images": for_markdown("; ".join(images) or "not noted", 2000)}),
        **({"images not read": "; ".join(unread)} if unread else {}),
        "hardware": for_markdown(hardware, 2000),
        "versions": for_markdown(versions, 2000),
        "commit": for_markdown(", ".join(facts["commits"]), 2000),
        **{name: for_markdown(text, 2000) for name, text in entries.items()},
    }
    named = [*(f"- command: {as_code(command)}" for command in commands), *(f"- {key}: {lines[key]}" for key in lines)]
    return "## Provenance\n\n" + "\n".join(named)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _mappings(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Those that are mappings: runs of earlier versions, and files changed by hand, may hold something else."""
    return [value for value in values if isinstance(value, dict)]


def commit_of(facts: dict[str, Any]) -> str:
    """The commit a run started at, marked where the checkout held changes beside it."""
    return f"{facts.get('commit')}{' with uncommitted changes' if facts.get('dirty') else ''}"
