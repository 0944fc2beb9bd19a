"""Devices and processes that a user names or a launcher announces, checked before any work."""

import os
from collections.abc import Mapping

KINDS = ("cpu", "cuda", "mps")
LAUNCHED = ("RANK", "WORLD_SIZE")
"""What every launcher tells its processes: this one's number, and how many there are."""
TALKING = (*LAUNCHED, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What processes that train together need besides: who else is on this machine, and where they meet."""


def require_device(device: str, setting: str = "device") -> str:
    """A device that is there.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps".
        setting: what it was given for, for the message.
    Returns:
        The same text.
    Raises:
        ValueError: no such kind of device, or none on this machine.
    """
    kind, colon, number = str(device).partition(":")
    if kind not in KINDS or (colon and not (number.isdecimal() and len(number) < 5)):
        raise ValueError(f"{setting} must be cpu, cuda, cuda:1 (one by its number) or mps; got {device!r:.60}")
    if kind == "cpu":
        return device
    import torch  # noqa: PLC0415 - "cpu" needs no look at the machine

    if kind == "mps":
        count = int(torch.backends.mps.is_available())
    else:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        availability = f"there are {count}, numbered from 0" if count else f"torch finds no {kind} device here"
        raise ValueError(
            f"{setting}={device}: {availability}; use {setting}=cpu" + (f" or {kind}:{count - 1}" if count else "")
        )
    return device


def require_processes(variables: Mapping[str, str] = os.environ, talking: bool = False) -> None:
    """Refuse half of what a launcher sets: a process would wait for ever for others, or do their work again.

    Args:
        variables: the environment.
        talking: the processes exchange gradients, so that they must also know where to meet.
    Raises:
        ValueError: some of the variables are missing or are no numbers that fit together.
    """
    names = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in variables]
    alone = variables.get("WORLD_SIZE", "1") == "1" and variables.get("RANK", "0") == "0"
    if not names or alone:
        return
    missing = [name for name in (TALKING if talking else LAUNCHED) if name not in variables]
    if missing:
        raise ValueError(
            f"{', '.join(f'{name}={variables[name]}' for name in names)} is set in the environment and "
            f"{', '.join(missing)} not, as if a launcher had started one of several processes. Start them with "
            f"torchrun --nproc-per-node N -m ibqlab …, or unset {', '.join(names)}"
        )
    rank, count = variables["RANK"], variables["WORLD_SIZE"]
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ValueError(
            f"RANK must be a number from 0 to below WORLD_SIZE; got {rank!r} and {count!r}. "
            "Start the processes with torchrun, or unset both"
        )
