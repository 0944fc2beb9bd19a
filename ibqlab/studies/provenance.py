"""What made the rows of a study: commands, commits, versions, hardware, images, each once."""

import json
from collections.abc import Iterable
from typing import Any

from ibqlab.base.escaping import for_markdown, for_terminal
from ibqlab.training.data_check import unreadable_line


def provenance_of(rows: Iterable[dict[str, Any]], command: str) -> dict[str, Any]:
    """What made some rows: commits, versions, hardware, data, each once."""
    found = [row.get("provenance", {}) for row in rows]
    return {
        "command": command,
        "started": min((one["started"] for one in found if one.get("started")), default=None),
        "commits": sorted({commit_of(one) for one in found}),
        "hardware": _distinct(one.get("hardware") for one in found),
        "threads": _distinct(one.get("threads") for one in found),
        "versions": _distinct(one.get("versions") for one in found),
        "data": _distinct(one.get("data") for one in found),
        "seeds": sorted({row["seed"] for row in rows if "seed" in row}),
    }


def provenance_text(rows: list[dict[str, Any]], *commands: str) -> str:
    """The same for people."""
    facts = provenance_of(rows, commands[0])
    hardware = "; ".join(
        f"{one.get('cpu')}, {one.get('cores')} core(s) per run" + (f", {one['gpu']}" if one.get("gpu") else "")
        for one in facts["hardware"]
        if one
    )
    versions = "; ".join(f"torch {one.get('torch')}, Python {one.get('python')}" for one in facts["versions"] if one)
    data = sorted(
        {
            str(part["description"])
            for one in facts["data"]
            if one
            for part in one.values()
            if isinstance(part, dict) and "description" in part
        }
    )
    unread = sorted({line for row in rows if (line := unreadable_line(row.get("provenance", {})))})
    seeds, threads = (", ".join(map(str, facts[key])) for key in ("seeds", "threads"))
    named = {
        "seeds": for_markdown(f"{seeds}; threads per run: {threads}", 2000),
        "images": for_markdown("; ".join(data) or "not noted", 2000),
        **({"images not read": "; ".join(unread)} if unread else {}),
        "hardware": for_markdown(hardware, 2000),
        "versions": for_markdown(versions, 2000),
        "commit": for_markdown(", ".join(facts["commits"]), 2000),
    }
    return "\n".join(
        [
            "## Provenance",
            "",
            *(f"- command: `{for_terminal(command, None).replace('`', chr(39))}`" for command in commands),
            *(f"- {name}: {text}" for name, text in named.items()),
        ]
    )


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def commit_of(facts: dict[str, Any]) -> str:
    """The commit a run started at, marked where the checkout held changes beside it."""
    return f"{facts.get('commit')}{' with uncommitted changes' if facts.get('dirty') else ''}"
