"""What made a run: enough to repeat it, nothing that tells whose machine it was."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = (
    "ibqlab",
    "torch",
    "torchvision",
    "lightning-fabric",
    "numpy",
    "pandas",
    "scikit-learn",
    "pillow",
    "pydantic",
)


def provenance() -> dict[str, Any]:
    """What made a run: enough to repeat it, nothing that tells whose machine it was.

    Returns:
        started (UTC), command (file names without their folders), command_line (the same for a shell, quoted; paths
        relative to the folder it was typed in or to ~, and of others only their end behind …/), folder (that folder's
        name), commit (None outside a checkout), dirty (whether the
        checkout held changes), versions, platform, hardware (cpu, cores, memory_gib, gpu).
    """
    return {
        "started": utc_now(),
        "command": [_without_folders(part) for part in sys.argv],
        "command_line": command_line(),
        "folder": Path.cwd().name,
        **_commit(Path(__file__).resolve().parents[2]),
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": f"{platform.system()} {platform.machine()}",
        "hardware": {"cpu": _cpu(), "cores": _cores(), "memory_gib": _memory_gib(), "gpu": _gpus()},
    }


def utc_now() -> str:
    """The time, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


COMMAND = "IBQLAB_COMMAND"
"""Environment variable under which a study tells its workers the command that started it."""


def command_line() -> str:
    """What was typed to start this process, or the study that it works for, to be pasted into a shell."""
    if os.environ.get(COMMAND):
        return os.environ[COMMAND]
    program, *arguments = sys.argv
    name = Path(program).name
    start = ["python", "-m", "ibqlab"] if name == "__main__.py" else [name]
    return shlex.join([*start, *map(portable, arguments)])


def portable(part: str) -> str:
    """An argument whose absolute path is written from the current folder, or from ~; else only its end, behind …/."""
    key, equals, value = part.partition("=") if not part.startswith("/") else ("", "", part)
    value = value if equals or not key else key
    key = key if equals else ""
    if not os.path.isabs(value):
        return part
    for base, sign in ((Path.cwd(), "."), (Path.home(), "~")):
        if Path(value).is_relative_to(base):
            inside = Path(value).relative_to(base).as_posix()
            return f"{key}{equals}{sign}/{inside}"
    return f"{key}{equals}…/{Path(value).name}"


def _without_folders(part: str) -> str:
    key, equals, value = part.rpartition("=")
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _cores() -> int | None:
    """Of the machine, also where this process was given few of them."""
    return os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> list[str]:
    import torch  # noqa: PLC0415 - reading runs needs no torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
