"""Which runs of many, in what order: conditions and names as they are typed in a terminal and in the run browser.

    method=ibq usage>0.5         both hold
    method=ibq|vq  name=study/*  one of several; any letters
    usage>50%  K=1024..16384     shares in %, a range, of which either end may be missing
    note~collapse  ~collapse     holds the letters: in the note, or anywhere
    note=  note!=                nothing is there; something is there
    note~two words usage>0.5     spaces belong to a value until the next name with a sign

A name is a column of `ibqlab runs`, a setting in full or by its last part (learning_rate), or any result.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ibqlab.base.checks import is_finite_number
from ibqlab.base.escaping import for_terminal
from ibqlab.base.measures import is_measure, measure
from ibqlab.config import nearest
from ibqlab.runs.summaries import RUN_COLUMNS, RunSummary

SHORT_NAMES = {
    "method": "quantizer",
    "K": "codebook_size",
    "D": "code_dim",
    "start": "codebook_init",
    "psnr": "validation_psnr",
    "duration": "duration_s",
    "date": "started",
}
"""What may be typed in place of a column's name."""
ANYWHERE = ("name", "note", "status", "kind", "quantizer", "problem")
"""Columns that `~text` looks into."""
_CONDITION = re.compile(r"(?P<name>[^=<>!~]*?)\s*(?P<sign>!=|>=|<=|=|<|>|~)(?P<value>.*)", re.DOTALL)

_BEGIN = re.compile(r"\s+(?=[\w.]+\s*(?:[!<>]?=|[<>~])|~)")


class QueryError(ValueError):
    """A condition or a name that cannot be meant; the message says what to type."""


class Condition(NamedTuple):
    """One thing that a run must fulfil."""

    name: str
    sign: str
    value: str


def split_conditions(text: str) -> list[str]:
    """The conditions of a line: a new one begins where a name and a sign stand behind a space."""
    pieces: list[str] = []
    for piece in _BEGIN.split(text.strip()):
        if piece.startswith("~") and pieces and not is_condition(pieces[-1]):  # "note ~word"
            pieces[-1] += piece
        elif piece:
            pieces.append(piece)
    return pieces


def is_condition(word: str) -> bool:
    """Whether a word is meant as a condition: it has one of the signs."""
    return _CONDITION.fullmatch(word) is not None


def read_condition(word: str) -> Condition:
    """A condition as typed.

    Raises:
        QueryError: it has no sign.
    """
    match = _CONDITION.fullmatch(word)
    if match is None:
        raise QueryError(
            f"a condition is a name, a sign and a value, such as method=ibq or usage>0.5; got {for_terminal(word)!r}. "
            f"Runs that hold a word anywhere: ~{for_terminal(word)}"
        )
    value = match["value"].strip()
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return Condition(match["name"].strip(), match["sign"], value[1:-1] if is_quoted else value)


class RunNames:
    """What can be asked of some runs: their columns, settings and results by name.

    Args:
        runs: all that are there, not only those asked for.
    """

    def __init__(self, runs: Iterable[RunSummary]):
        self.runs = list(runs)
        self.settings = sorted({key for run in self.runs for key in run.settings})
        self.results = sorted({key for run in self.runs for key in run.results})

    def reader(self, name: str) -> Callable[[RunSummary], Any]:
        """How to read a name off a run; None where the run has no such value.

        Raises:
            QueryError: no run has the name, or several settings end in it.
        """
        key = self.full_name(name)
        if key in RUN_COLUMNS:
            return lambda run: run.columns.get(key)
        if key in self.settings:
            return lambda run: run.settings.get(key)
        return lambda run: run.results.get(key)

    def full_name(self, name: str) -> str:
        """The column, setting or result that a name stands for; errors as of `reader`."""
        if name in RUN_COLUMNS or name in self.settings:
            return name
        if name in SHORT_NAMES and name not in self.results:
            return SHORT_NAMES[name]
        by_last_part = [key for key in self.settings if key.endswith(f".{name}")]
        if len(by_last_part) == 1:
            return by_last_part[0]
        if name in self.results:
            return name
        if by_last_part:
            raise QueryError(f"{name!r} could be {' or '.join(by_last_part)}; write one of them in full")
        known = [*RUN_COLUMNS, *SHORT_NAMES, *self.settings, *self.results]
        last_parts = sorted({key.rpartition(".")[2] for key in self.settings} - set(known))
        near = nearest(name, [*known, *last_parts])
        if not near.startswith("did you mean"):
            near = f"columns are {', '.join([*SHORT_NAMES, 'name', 'status', 'step', 'usage', 'note'])} and others"
        raise QueryError(f"no run has a column, setting or result {for_terminal(name)!r}; {near}")

    def select(self, words: Sequence[str]) -> list[RunSummary]:
        """The runs that fulfil all conditions, in their order.

        Raises:
            QueryError: a word that is no condition, or a name that no run has.
        """
        conditions = [self._test(read_condition(one)) for word in words for one in split_conditions(word)]
        return [run for run in self.runs if all(holds(run) for holds in conditions)]

    def sort(self, runs: Sequence[RunSummary], name: str) -> list[RunSummary]:
        """Runs in the order of a column: the best first where one is better, else the least; those without it last.

        Args:
            runs: to be sorted.
            name: as of `reader`; a "-" in front turns the order around.
        """
        read = self.reader(name.removeprefix("-"))
        key = self.full_name(name.removeprefix("-"))
        is_turned = name.startswith("-") != (is_measure(key) and measure(key).better == "higher")
        known = [run for run in runs if read(run) is not None]
        numbers = [run for run in known if is_finite_number(read(run))]
        texts = [run for run in known if not is_finite_number(read(run))]
        numbers.sort(key=read, reverse=is_turned)
        texts.sort(key=lambda run: as_text(read(run)).lower(), reverse=is_turned)
        return [*numbers, *texts, *(run for run in runs if read(run) is None)]

    def _test(self, condition: Condition) -> Callable[[RunSummary], bool]:
        name, sign, wanted = condition
        if sign == "~":
            readers = [self.reader(one) for one in ((name,) if name else ANYWHERE)]
            return lambda run: any(wanted.lower() in as_text(read(run)).lower() for read in readers)
        if not name:
            raise QueryError(
                f"{sign}{for_terminal(wanted)} lacks a name in front, such as usage{sign}{wanted or '0.5'}"
            )
        read = self.reader(name)
        if sign in ("=", "!="):
            self._require_numbers(name, read, wanted)
            return lambda run: _is_one_of(read(run), wanted) == (sign == "=")
        if not wanted:
            raise QueryError(f"{name}{sign} lacks a number behind it, such as {name}{sign}0.5")
        bound = _number(wanted)
        if bound is None and any(is_finite_number(read(run)) for run in self.runs):
            raise QueryError(f"{name} is a number, so {sign} needs one behind it; got {for_terminal(wanted)!r}")
        return lambda run: _compares(read(run), sign, bound, wanted)

    def _require_numbers(self, name: str, read: Callable[[RunSummary], Any], wanted: str) -> None:
        """Refuse text for what is a number in every run."""
        values = [value for value in map(read, self.runs) if value is not None]
        ends = [end for one in wanted.split("|") for end in one.strip().split("..") if end]
        if values and all(map(is_finite_number, values)) and not all(_number(end) is not None for end in ends):
            raise QueryError(
                f"{name} is a number: type {name}=1024, {name}=256..1024, or {name}=256|1024; "
                f"got {for_terminal(wanted)!r}"
            )


def _is_one_of(value: Any, wanted: str) -> bool:
    return any(_equals(value, one.strip()) for one in wanted.split("|"))


def _equals(value: Any, wanted: str) -> bool:
    """Whether a value is what somebody has typed: nothing, a number, a range of numbers, or text with * for letters."""
    if value is None or value == "":
        return wanted == ""
    if is_finite_number(value):
        low, is_range, high = wanted.partition("..")
        if is_range:
            least, most = _number(low) if low else -math.inf, _number(high) if high else math.inf
            return least is not None and most is not None and least <= value <= most
        number = _number(wanted)
        return number is not None and math.isclose(value, number, rel_tol=1e-9)
    # Square brackets are those of a list.
    return fnmatch.fnmatchcase(as_text(value).lower(), wanted.lower().replace("[", "[[]"))


def _compares(value: Any, sign: str, bound: float | None, wanted: str) -> bool:
    if value is None or is_finite_number(value) != (bound is not None):
        return False
    one, other = (value, bound) if bound is not None else (as_text(value), wanted)
    return {"<": one < other, "<=": one <= other, ">": one > other, ">=": one >= other}[sign]


def _number(text: str) -> float | None:
    """A number as typed, "50%" being 0.5 and "262,144" a whole one; None for other text."""
    share = text.endswith("%")
    try:
        number = float(text.removesuffix("%").replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return number / 100 if share else number


def as_text(value: Any) -> str:
    """A value of a setting or column as it is typed: true, null, [1, 2]; "" for one that is not there."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_text, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
