"""What made a run: enough to repeat it. What may be published tells nothing of whose machine it was."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = (
    *("ibqlab", "torch", "torchvision", "lightning-fabric", "numpy", "pandas"),
    *("scikit-learn", "pillow", "pydantic"),
)


def provenance(private: bool = False) -> dict[str, Any]:
    """What made a run: enough to repeat it, and by default nothing that tells whose machine it was.

    Args:
        private: for a run's own folder, which stays here: the command with all paths, and started_in, the folder it was
            typed in, from which its relative paths count.
    Returns:
        started (UTC), command (file names without their folders), command_line (the same for a shell, quoted; paths
        relative to the folder it was typed in or to ~; of others only their end behind …/, unless private), folder
        (that folder's name), commit (None outside a checkout), dirty (whether the checkout held changes), versions,
        platform, hardware (cpu, cores, memory_gib, gpu).
    """
    return {
        "started": utc_now(),
        "command": [_without_folders(argument) for argument in sys.argv],
        "command_line": command_line(private),
        "folder": Path.cwd().name,
        **({"started_in": str(Path.cwd())} if private else {}),
        **_commit(Path(__file__).resolve().parents[2]),
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware": _hardware(),
    }


def utc_now() -> str:
    """The time, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


COMMAND = "IBQLAB_COMMAND"
"""Environment variable under which a study tells its workers the command that started it."""


def command_line(private: bool = False) -> str:
    """What was typed to start this process, or the study that it works for, to be pasted into a shell.

    Args:
        private: with all paths; else of those outside this folder and the home folder only their end.
    """
    if os.environ.get(COMMAND):
        return os.environ[COMMAND]
    program, *arguments = sys.argv
    name = Path(program).name
    if name == "ipykernel_launcher.py":  # whose arguments nobody typed
        return "(run in a notebook)"
    start = ["python", "-m", "ibqlab"] if name == "__main__.py" else [name]
    return shlex.join([*start, *(portable(argument, private) for argument in arguments)])


def portable(argument: str, private: bool = False) -> str:
    """An argument with its absolute path written from the current folder or from ~. Of others the end.

    Args:
        argument: of a command: a word, a path, or key=path.
        private: other paths stay as they are.
    """
    key, equals, value = argument.partition("=") if not argument.startswith("/") else ("", "", argument)
    value = value if equals or not key else key
    key = key if equals else ""
    if not os.path.isabs(value):
        return argument
    for base, sign in ((Path.cwd(), "."), (Path.home(), "~")):
        if Path(value).is_relative_to(base):
            inside = Path(value).relative_to(base).as_posix()
            return f"{key}{equals}{sign}/{inside}"
    return argument if private else f"{key}{equals}…/{Path(value).name}"


def _without_folders(argument: str) -> str:
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name if os.path.isabs(value) else value}"


def _commit(checkout: Path) -> dict[str, Any]:
    """Commit and dirtiness, if the package lies in its own checkout and not in somebody else's."""
    if _git(checkout, "rev-parse", "--show-toplevel") != str(checkout):
        return {"commit": None, "dirty": None}
    changes = _git(checkout, "status", "--porcelain")
    return {
        "commit": _git(checkout, "rev-parse", "--verify", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


@cache  # they are those that were imported
def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _hardware() -> dict[str, Any]:
    """Of the machine, also where this process was given little of it."""
    import torch  # noqa: PLC0415 - reading runs needs no torch

    names, memory = [], None
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    with suppress(AttributeError, OSError, ValueError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    cpu = names[0] if names else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": memory, "gpu": gpus}
