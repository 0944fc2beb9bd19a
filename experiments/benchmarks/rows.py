"""What every row of a benchmark's CSV file tells beside its measurement."""

from ibqlab.runs import provenance


def origin_columns(seed: int) -> dict[str, str | int | bool | None]:
    """Columns that say where a measurement comes from.

    Args:
        seed: of the random numbers measured on.
    Returns:
        device, versions of Python and torch, commit, dirty (uncommitted changes), seed, command, started (UTC).
    """
    facts = provenance()
    hardware, versions = facts["hardware"], facts["versions"]
    return {
        "device": ", ".join(hardware["gpu"]) or f"{hardware['cpu']}, {hardware['cores']} cores",
        "python": versions["python"],
        "torch": versions["torch"],
        "commit": facts["commit"],
        "dirty": facts["dirty"],
        "seed": seed,
        "command": " ".join(facts["command"]),
        "started": facts["started"],
    }
