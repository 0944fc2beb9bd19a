"""Kills training, a study, tokenising and sampling at random moments, and looks whether anything was lost.

    python tests/kills.py --rounds 100 --seed 0

A round kills one kind of work with all its processes, up to three times, each time starting the same command again,
and lets it finish at last. Every command is a fork of this process, which has imported all that is needed, so that
rounds take seconds. Exit code 1 if a finished unit was lost, a file cannot be read, something was left over, or the
result differs from that of an undisturbed run.
"""

import argparse
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"

import numpy as np
import torch
from test_sampling_runs import draw
from test_studies import small
from test_tokens_store import DIGITS, make_tokenizer

from ibqlab.base.files import is_temporary
from ibqlab.base.locking import is_held
from ibqlab.grids import cell_rows  # noqa: F401 - imported once, for all forks
from ibqlab.grids import local as launching
from ibqlab.runs import Run
from ibqlab.tokens import pieces
from ibqlab.tokens import writing as token_writing
from ibqlab.training import (
    fabric,  # noqa: F401 - as above
    recipe_config,
    train,
)

KILLS = 3
"""Most kills of a round."""
TIMES = re.compile(r"second|_ms$|duration|provenance")
"""Columns that no two runs share."""
SUBREAPER = 36
"""Linux's number of the setting by which orphans come to this process."""


# --- the work ---


def train_smoke(folder: Path) -> None:
    """A run with many checkpoints."""
    settings = {"steps": 24, "record.checkpoint_every": 3, "record.validate_every": 6, "record.log_every": 1}
    train(recipe_config("builtin/smoke", settings), folder, progress=False)


def run_study(folder: Path) -> None:
    """Two cells in two workers."""
    launching.START_METHOD = "fork"  # of the engine, which has imported everything
    small(folder, seeds=[0], workers=2).run(progress=False).check()


def tokenize(folder: Path) -> None:
    """All digits, in twelve pieces."""
    pieces.PIECE = 150
    token_writing.write_tokens(make_tokenizer(), DIGITS, folder, progress=False)


def sample(folder: Path) -> None:
    """Sixty images in twelve shards."""
    draw(folder, images_per_class=20)


WORK: dict[str, Callable[[Path], None]] = {
    "train": train_smoke,
    "tokenize": tokenize,
    "study": run_study,
    "sample": sample,
}


# --- processes ---


def start(kind: str, folder: Path, log: Path) -> int:
    """The command as a new process; its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        WORK[kind](folder)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def children() -> list[int]:
    """Processes below this one, however deep."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    below, level = [], [os.getpid()]
    while level:
        level = [process for process, parent in parents.items() if parent in level]
        below += level
    return below


def kill_all() -> None:
    """End every process below this one; orphans come to this one and are ended, too."""
    while living := children():
        for process in living:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def wait(process: int, seconds: float) -> int | None:
    """Exit code of a process; None if it does not end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


# --- what is in a folder ---


def files(folder: Path) -> list[Path]:
    """All files under their own names."""
    return [f for f in sorted(folder.rglob("*")) if f.is_file() and not any(is_temporary(p) for p in f.parts)]


def read_shard(file: Path) -> list[tarfile.TarInfo]:
    """All members of a shard."""
    with tarfile.open(file) as tar:
        return tar.getmembers()


def unreadable(folder: Path) -> list[str]:
    """Files that cannot be read."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda file: json.loads(file.read_text()),
        ".npz": lambda file: [np.load(file)[name] for name in np.load(file).files],
        ".npy": np.load,
        ".tar": read_shard,
        ".pt": lambda file: torch.load(file, weights_only=True),
    }
    bad = []
    for file in files(folder):
        try:
            readers.get(file.suffix, Path.read_bytes)(file)
        except Exception as error:
            bad.append(f"{file.relative_to(folder)}: {type(error).__name__}: {error}")
    for settings in folder.rglob("config.yaml"):
        if any(is_temporary(part) for part in settings.parts):
            continue
        try:
            Run(settings.parent).metrics  # noqa: B018 - reads every line
        except Exception as error:
            bad.append(f"{settings.parent.name}: {error}")
    return bad


def units(folder: Path) -> dict[str, str]:
    """Finished pieces of work and their content: rows, shards, pieces of stores."""
    done = [*folder.glob("rows/*.json"), *folder.glob("*.tar"), *folder.glob("unfinished/*.npz")]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in done}


def last_steps(folder: Path) -> dict[str, int]:
    """Run → step of its last checkpoint."""
    runs = [Run(file.parent) for file in folder.rglob("config.yaml") if not any(map(is_temporary, file.parts))]
    return {run.name: int(run.last_checkpoint.stem.removeprefix("step_")) for run in runs if run.last_checkpoint}


def lost(before: Path, units_before: dict[str, str], steps_before: dict[str, int]) -> list[str]:
    """Finished units that are not there any more, or have changed."""
    now, steps = units(before), last_steps(before)
    store_finished = (before / "manifest.json").is_file() and (before / "train_tokens.npy").is_file()
    gone = [
        name
        for name, content in units_before.items()
        if now.get(name) != content and not (store_finished and name.startswith("unfinished"))
    ]
    return gone + [
        f"{name} back at step {steps.get(name)}" for name, at in steps_before.items() if steps.get(name, -1) < at
    ]


def leftovers(folder: Path) -> list[str]:
    """Temporaries, unfinished folders and held locks."""
    names = [path for path in folder.parent.rglob("*") if folder == path or folder in path.parents]
    beside = [path for path in folder.parent.iterdir() if is_temporary(path.name)]
    odd = [path for path in names if is_temporary(path.name) or path.name == "unfinished" or ".unfinished" in path.name]
    held = [path for path in names if path.is_file() and "lock" in str(path.relative_to(folder)) and is_held(path)]
    return [str(path.relative_to(folder.parent)) for path in beside + odd + held]


def result(kind: str, folder: Path) -> dict[str, Any]:
    """What a finished command leaves, but for times."""
    if kind in ("tokenize", "sample"):
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files(folder)}
    found: dict[str, Any] = {}
    for file in folder.glob("rows/*.json"):
        found[file.name] = {key: value for key, value in json.loads(file.read_text()).items() if not TIMES.search(key)}
    for settings in folder.rglob("config.yaml"):
        run = Run(settings.parent)
        rows = [
            {key: value for key, value in json.loads(line).items() if not TIMES.search(key)}
            for line in (run.path / "metrics.jsonl").read_text().splitlines()
        ]
        step, state = run.load_checkpoint()
        weights = {name: hash_tensor(value) for name, value in tensors(state, "")}
        snapshots = {
            (at, name): hashlib.sha256(array.tobytes()).hexdigest()
            for at in run.snapshot_steps
            for name, array in run.snapshot(at).items()
            if not TIMES.search(name)
        }
        found[run.path.name if run.path != folder else ""] = [run.status, step, rows, weights, snapshots]
    return found


def tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a checkpoint by their place."""
    if isinstance(value, torch.Tensor):
        yield name, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from tensors(item, f"{name}.{key}")


def hash_tensor(value: torch.Tensor) -> str:
    """Content of a tensor."""
    return hashlib.sha256(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


# --- rounds ---


@dataclass
class Count:
    """What was seen over all rounds."""

    kills: int = 0
    problems: dict[str, list[str]] = field(
        default_factory=lambda: {"lost": [], "unreadable": [], "left over": [], "different": [], "failed": []}
    )


def undisturbed(kind: str, base: Path) -> tuple[dict[str, Any], float]:
    """The result of a run that nobody kills, and its seconds."""
    folder, began = base / f"undisturbed-{kind}", time.monotonic()
    code = wait(start(kind, folder, base / f"{kind}.log"), 600)
    kill_all()
    if code != 0:
        raise SystemExit(f"{kind} fails undisturbed:\n{(base / f'{kind}.log').read_text()[-3000:]}")
    return result(kind, folder), time.monotonic() - began


def play_round(
    kind: str, folder: Path, expected: tuple[dict[str, Any], float], chance: random.Random
) -> tuple[int, dict]:
    """Kill and restart one command until it has finished; the number of kills, and what went wrong by its kind."""
    reference, seconds = expected
    problems: dict[str, list[str]] = {}
    log, kills = folder.with_suffix(".log"), 0
    for last in (*[False] * chance.randint(1, KILLS), True):
        finished, steps = units(folder), last_steps(folder)
        code = wait(start(kind, folder, log), 600 if last else chance.uniform(0, 1.1 * seconds))
        kill_all()
        kills += code is None
        problems.setdefault("unreadable", []).extend(unreadable(folder))
        problems.setdefault("lost", []).extend(lost(folder, finished, steps))
        if code is not None and code != 0:
            problems.setdefault("failed", []).append(log.read_text()[-1500:])
        if code is not None:
            break
    # One more start, which has nothing to do but to sweep.
    if wait(start(kind, folder, log), 600) != 0:
        problems.setdefault("failed", []).append(log.read_text()[-1500:])
    kill_all()
    problems["left over"] = leftovers(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not problems.get("failed") and result(kind, folder) != reference:
            problems["different"] = [str(folder)]
    return kills, {name: found for name, found in problems.items() if found}


def main() -> int:
    """Play the rounds; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="kinds of work take turns")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kinds", default=",".join(WORK), help="some of them, such as train,study")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    base, chance, count = Path(tempfile.mkdtemp(prefix="ibqlab-kills-")), random.Random(options.seed), Count()
    kinds = options.kinds.split(",")
    expected = {kind: undisturbed(kind, base) for kind in kinds[: options.rounds]}
    print(", ".join(f"{kind} takes {seconds:.1f} s" for kind, (_, seconds) in expected.items()), flush=True)
    for number in range(options.rounds):
        kind = kinds[number % len(kinds)]
        folder = base / f"{number:04d}-{kind}"
        kills, problems = play_round(kind, folder, expected[kind], chance)
        count.kills += kills
        print(f"{number + 1:4d} {kind:9s} {kills} kills: {'; '.join(problems) or 'all right'}", flush=True)
        for name, found in problems.items():
            count.problems[name] += found
            print("\n".join(f"     {name}: {one}" for one in found), flush=True)
        if not problems:
            shutil.rmtree(folder, ignore_errors=True)
    told = ", ".join(f"{len(found)} {name}" for name, found in count.problems.items())
    print(f"{options.rounds} rounds, {count.kills} kills: {told}")
    if any(count.problems.values()):
        print(f"folders and logs: {base}")
        return 1
    shutil.rmtree(base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
