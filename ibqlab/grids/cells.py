"""Cells of a grid and the folder that remembers what became of each.

    cells/NAME.json     what the cell is: settings, what it needs, what is measured at its end. NAME may hold a /
    NAME/               its run folder
    rows/NAME.json      its row, written when it is finished, whole or not at all
    failed/NAME.json    why it failed, with the last lines it printed, and whether the cause lay outside it
    logs/NAME.log       what it printed
    locks/NAME          held by the process that works on it, let go by the system when that process ends, however

Processes share nothing but this folder, so a cell goes on when whoever started it is gone, and whoever comes back finds
it at work.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ibqlab.base import files
from ibqlab.base.checks import IMAGES, require_between, require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, explained, is_ordinary, sweep, write_whole
from ibqlab.base.locking import holding, is_held
from ibqlab.base.measures import OTHER_NETWORK
from ibqlab.config import ConfigError, content_hash, parse, to_dict
from ibqlab.diagnostics.lab import LabRunConfig
from ibqlab.runs.metrics import last_values
from ibqlab.training import GeneratorTrainConfig, TrainConfig

RunSettings = TrainConfig | GeneratorTrainConfig | LabRunConfig
KINDS: dict[str, type[RunSettings]] = {"tokenizer": TrainConfig, "generator": GeneratorTrainConfig, "lab": LabRunConfig}
"""What a cell may be of, and the settings of each."""
FOLDERS = ("cells", "rows", "failed", "logs", "locks")
REQUEST_KEYS = {"kind", "config", "labels", "needs", "measure"}
LAST_LINES = 12
"""Lines of a failed cell's log that are shown."""
STUDY_FILE = "study.json"
PARAMETERS_FILE = "parameters.json"
BUSY = 75
"""Exit code of a process that found another one at its cell."""
NO_ROOM = 74
"""Exit code of a process that failed for want of disk or memory and could not write that down."""
OUTSIDE = ("disk", "memory", "killed")
"""Causes of failures that lie outside the cell: it is tried again whenever its study is started again. Any other
failure would come again and is tried again only when asked for."""
STOPPED = "stopped"
"""Column of a row whose run the alarm ended early, as its recipe asks for: which rule, at which step. Such a cell is
finished; its numbers are those of its last validation."""
FILE_BYTES = 16 * 2**20
"""Largest file of a cell or of the grid."""


class StudyError(RuntimeError):
    """A study that cannot go on, or cells of it that failed; the message lists them."""


def cause_of(error: BaseException) -> str:
    """Why something failed: "disk", "memory", or "error" where it would fail again."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return "disk"
        # torch says so in plain RuntimeErrors: one text on GPUs, another on CPUs.
        text = str(seen) if isinstance(seen, RuntimeError) else ""
        short_of_memory = isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno == errno.ENOMEM)
        if short_of_memory or "out of memory" in text or "can't allocate memory" in text:
            return "memory"
        seen = seen.__cause__ or seen.__context__
    return "error"


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What is to be measured of a cell's run when it is finished, beside what its training recorded."""

    weights: str = "raw"
    """"ema" (published for IBQ) or "raw": averages mean nothing after a few hundred steps."""
    metrics: tuple[str, ...] = ()
    """Of `evaluate_reconstruction`, on the run's validation images: "rfid", "lpips_vgg", "ssim", …"""
    protocol: str = "seed-voken-ibq"
    """Of the same."""
    extractor: str = ""
    """Feature extractor in place of the protocol's Inception; empty: the protocol's."""
    samples_per_class: int = 0
    """Images that a generator draws of each class; 0: none."""
    card: str = ""
    """Published sampling card; empty: without guidance, at temperature 1."""
    reference: str = ""
    """Images or statistics that samples are compared with; empty: the run's own validation images."""
    generation_metrics: tuple[str, ...] = ()
    """Of `evaluate_generation`, on the samples: "fid", "is", "precision", "recall"."""
    recognised: bool = False
    """Samples are digits, judged by a classifier of real ones."""

    def __post_init__(self):
        require_choice("weights", self.weights, ("ema", "raw"))
        require_between("samples_per_class", self.samples_per_class, 0, IMAGES)


def column_of(metric: str, extractor: str) -> str:
    """The column of a row for a metric of features: FID and its kin are called so only with Inception's.

    Args:
        metric: "rfid", or one of `evaluate_generation`.
        extractor: another network than Inception, whose name the column then bears; empty: Inception.
    """
    if extractor and not extractor.startswith("inception-"):
        return f"{OTHER_NETWORK.get(metric, metric)}_{extractor}"
    return "gfid" if metric == "fid" else metric


def codebook_labels(quantizer: Any) -> dict[str, Any]:
    """What tells the codebooks of a grid apart, as labels of cells: method, codebook_size, code_dim."""
    sizes = {"codebook_size": quantizer.codebook_size, "code_dim": quantizer.code_dim}
    return {"method": quantizer.config_name, **sizes}


@dataclass(frozen=True)
class Cell:
    """One run of a grid and the values that tell it from the others."""

    name: str
    config: RunSettings
    labels: dict[str, Any]
    needs: str = ""
    """The cell whose tokenizer a generator is trained over; it must be finished first."""
    measure: EvaluationRequest = field(default_factory=EvaluationRequest)

    @cached_property
    def key(self) -> str:
        """Content hash of all that changes the row."""
        return content_hash({"config": to_dict(self.config), "measure": to_dict(self.measure), "needs": self.needs})


def check_distinct(cells: Sequence[Cell]) -> None:
    """Raise unless every cell has a name and settings of its own.

    Raises:
        ConfigError: two names for one run, or two runs of one name.
    """
    keys: dict[str, str] = {}
    names: dict[str, str] = {}
    for cell in cells:
        if names.setdefault(cell.name, cell.key) != cell.key:
            raise ConfigError(f"two runs are named {cell.name} and differ in their settings; name one otherwise")
        if keys.setdefault(cell.key, cell.name) != cell.name:
            raise ConfigError(
                f"{keys[cell.key]} and {cell.name} are the same run (content hash {cell.key}): their "
                "settings do not differ. Change one or drop it"
            )


class CellStore:
    """The folder of a grid, as this module's docstring describes it.

    Args:
        folder: created when the first cell is prepared.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    # --- what the folder is of ---

    def claim(self, facts: Mapping[str, Any]) -> None:
        """Note what grid this folder is of; refuse the folder of another.

        Args:
            facts: what all cells of the grid have in common. Seeds and rows may be added to a grid later.
        Raises:
            StudyError: the folder holds another grid's cells; the message gives both.
            RunError: it cannot be written.
        """
        file = self.folder / STUDY_FILE
        is_new = read_json(file) is None
        with explained(file):
            self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        for name in FOLDERS:
            for folder in (self.folder / name, *(self.folder / name).glob("*/")):
                sweep(folder)
        if is_new:
            write_whole(file, as_json(dict(facts)))
            return
        changes = self.differences(facts)
        if changes:
            raise StudyError(
                f"{self.folder} holds another grid; nothing was changed. There → yours: {changes}. Give output "
                "another folder, or the parameters that the folder was made with"
            )

    def differences(self, facts: Mapping[str, Any]) -> str:
        """How facts, as `claim` takes them, differ from those of the folder's grid; "" where they do not, or where it
        is of none yet."""
        noted, yours = read_json(self.folder / STUDY_FILE), json.loads(json.dumps(dict(facts)))
        if noted is None:
            return ""
        differing = [key for key in {**noted, **yours} if noted.get(key) != yours.get(key)]
        return "; ".join(
            f"{for_terminal(key)}: {_short(noted.get(key))} → {_short(yours.get(key))}" for key in differing
        )

    # --- requests ---

    def prepare(self, cell: Cell) -> None:
        """Write down what a cell is, for the process that will work on it."""
        request = {
            "kind": next(name for name, kind in KINDS.items() if isinstance(cell.config, kind)),
            "config": to_dict(cell.config),
            "labels": cell.labels,
            "needs": cell.needs,
            "measure": to_dict(cell.measure),
        }
        file = self.folder / "cells" / f"{cell.name}.json"
        content = as_json(request)
        with explained(file):
            for name in FOLDERS:
                (self.folder / name / cell.name).parent.mkdir(parents=True, exist_ok=True)
        if read_json(file) != json.loads(content):
            write_whole(file, content)

    def request(self, name: str) -> Cell:
        """The cell of a name, as `prepare` wrote it.

        Raises:
            StudyError: there is none, or its file is damaged.
        """
        request = read_json(self.folder / "cells" / f"{name}.json")
        if request is None or not request.keys() >= REQUEST_KEYS:
            raise StudyError(f"{self.folder / 'cells'} holds no run {name}; start the study again")
        kind = KINDS.get(request["kind"])
        if kind is None:
            raise StudyError(f"run {name} is of an unknown kind, {for_terminal(request['kind'], 40)}; update ibqlab")
        return Cell(
            name,
            parse(kind, request["config"], source=f"run {name}"),
            request["labels"],
            request["needs"],
            parse(EvaluationRequest, request["measure"], source=f"run {name}"),
        )

    # --- rows ---

    def row(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's row; None where it is not there, is damaged, or is of other settings."""
        row = read_json(self.folder / "rows" / f"{cell.name}.json")
        extractor = cell.measure.extractor
        if row and extractor and "gfid" in row:  # rows of earlier versions
            row = {column_of("fid", extractor) if key == "gfid" else key: value for key, value in row.items()}
        return row if row and row.get("key") == cell.key and _is_whole(row, cell) else None

    def write_row(self, cell: Cell, values: Mapping[str, Any]) -> None:
        """Note that a cell is finished, and with what."""
        row = {"cell": cell.name, "key": cell.key, **cell.labels, **values}
        write_whole(self.folder / "rows" / f"{cell.name}.json", as_json(row))
        (self.folder / "failed" / f"{cell.name}.json").unlink(missing_ok=True)

    def table(self, cells: Sequence[Cell]) -> pd.DataFrame:
        """The rows of all cells that are finished by now, in the cells' order."""
        rows = [row for cell in cells if (row := self.row(cell))]
        return pd.DataFrame(rows)

    # --- failures ---

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """What is known of a cell's failure: "error", "lines", "cause" and "killed"; None where it has not failed."""
        failure = read_json(self.folder / "failed" / f"{cell.name}.json")
        if not failure or failure.get("key") != cell.key:
            return None
        lines = failure.get("lines")
        # Earlier versions told only the killed from the others.
        cause = failure.get("cause", "killed" if failure.get("killed") is True else "error")
        return {
            "key": cell.key,
            "error": str(failure.get("error", "not known")),
            "cause": cause if cause in OUTSIDE else "error",
            "killed": cause == "killed",
            "lines": [str(line) for line in lines] if isinstance(lines, list) else [],
        }

    def write_failure(self, cell: Cell, error: str, cause: str = "error") -> dict[str, Any]:
        """Note that a cell failed.

        Args:
            cell: which.
            error: in one line.
            cause: one of `OUTSIDE`, or "error".
        """
        failure = {"key": cell.key, "error": error, "cause": cause, "killed": cause == "killed"}
        failure["lines"] = self.last_lines(cell)
        # On a full disk what is known must still reach whoever asked.
        with suppress(RunError):
            write_whole(self.folder / "failed" / f"{cell.name}.json", as_json(failure))
        return failure

    def forget_failure(self, cell: Cell) -> None:
        """Let a failed cell be tried again."""
        file = self.folder / "failed" / f"{cell.name}.json"
        with explained(file):
            file.unlink(missing_ok=True)

    def last_lines(self, cell: Cell) -> list[str]:
        """The end of what a cell printed, progress bars left out."""
        file = self.log(cell.name)
        if not file.is_file():
            return []
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 16384))
            text = stream.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]

    def log(self, name: str) -> Path:
        """Where a cell's process prints to."""
        return self.folder / "logs" / f"{name}.log"

    # --- who works on it ---

    @contextmanager
    def working(self, name: str) -> Iterator[bool]:
        """Hold a cell's lock inside the block; False if another process holds it.

        Raises:
            RunError: the lock's file cannot be made.
        """
        file = self.folder / "locks" / name
        with ExitStack() as stack:
            with explained(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                ours = stack.enter_context(holding(file))
            yield ours

    def is_taken(self, name: str) -> bool:
        """Whether some process works on a cell now."""
        return is_held(self.folder / "locks" / name)

    def last_step(self, name: str) -> int:
        """The last step that a cell's run has logged, 0 before the first."""
        step = last_values(self.folder / name / "metrics.jsonl").get("step")
        return step if isinstance(step, int) else 0


def as_json(value: Any) -> bytes:
    """A value as a JSON file's content."""
    # Names that are not UTF-8 become JSON's own escapes.
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where it is missing or damaged: what stands there can be made again.

    Raises:
        RunError: there is something that may not be read, or that is no file.
    """
    try:
        return files.read_json(file, limit=FILE_BYTES)
    except FileNotFoundError:
        return None
    except UnreadableFile as error:
        if is_ordinary(file) and os.access(file, os.R_OK):
            return None
        raise RunError(f"{error}; nothing was changed") from None


def _is_whole(row: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a row holds the cell's labels as they are, and nothing but numbers beside them and its provenance."""
    labels = json.loads(as_json(cell.labels))
    if any(row.get(name) != value for name, value in labels.items()) or row.get("cell") != cell.name:
        return False
    named = {"cell", "key", "provenance", STOPPED, *labels}
    measured = {name: value for name, value in row.items() if name not in named}
    # Runs of earlier versions may not know their parameters.
    if measured.get("parameters", 0) is None:
        del measured["parameters"]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in measured.values())
    return numbers and isinstance(row.get("provenance", {}), dict) and isinstance(row.get(STOPPED, ""), str)


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return for_terminal(text, 80)
