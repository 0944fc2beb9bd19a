"""`ibqlab runs`: the runs of a folder, some of them, in an order; how their settings differ; notes on them."""

import itertools
import os
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ibqlab.base.escaping import for_terminal
from ibqlab.cli.terminal import say

if TYPE_CHECKING:
    from ibqlab.runs.queries import RunNames
    from ibqlab.runs.summaries import RunSummary

LEAST_TELLING = (
    *("validation_tokens", "usage_tokens", "losses", "duration_s", "validation_perplexity", "started", "code_dim"),
    *("seed", "kind", "usage", "perplexity", "validation_loss", "loss", "problem", "codebook_init", "step"),
    *("codebook_size", "quantizer", "note", "status", "validation_psnr", "validation_usage"),
)
"""Columns of `ibqlab runs` in the order in which they give way to a narrow terminal."""
LEFT_OUT = ("path", "config_hash")
CELL_LETTERS = 40
"""Of a text that may be long, in a narrow terminal."""
LEAST_NAME = 12


@click.command()
@click.argument("words", nargs=-1, metavar="[FOLDER] [CONDITION]...")
@click.option("--sort", "order", default="", metavar="NAME", help="Best or least first; -NAME the other way round.")
@click.option("--columns", default="", metavar="A,B", help="Settings and results to show beside name and status.")
@click.option("--wide", is_flag=True, help="All columns, however narrow the terminal.")
@click.option("--diff", is_flag=True, help="The settings in which the runs differ; runs may be named: --diff A B.")
@click.option("--note", nargs=2, default=None, metavar="RUN TEXT", help='Write a note on RUN; "" takes it away.')
def runs(
    words: Sequence[str], *, order: str, columns: str, wide: bool, diff: bool, note: tuple[str, str] | None
) -> None:
    """List the runs below FOLDER, by default all, in as many columns as the terminal has room for.

    A CONDITION leaves some out: method=ibq, method=ibq|vq, validation_usage>0.5 or validation_usage>50%, K=1024..16384,
    name=study/*, note~word, or ~word for a word anywhere. Several must all hold. < and > need quotes in a shell. Names
    are columns, settings, in full or by their last part, and all results.
    """
    from ibqlab.runs import RunIndex, runs_root
    from ibqlab.runs.finding import find_run, locate
    from ibqlab.runs.queries import QueryError, RunNames, is_condition, read_condition, split_conditions

    if note is not None:
        _write_note(*note)
        return
    names = [word for word in words if not is_condition(word) or os.path.isdir(word)]
    conditions = [one for word in words if word not in names for one in split_conditions(word)]
    if diff and names and (len(names) > 1 or (locate(names[0]) / "config.yaml").is_file()):
        if conditions:
            raise QueryError(f"--diff takes runs or conditions, not both; leave out {' and '.join(conditions)}")
        _say_differences(_summaries([find_run(name) for name in names]))
        return
    if len(names) > 1:
        raise QueryError(
            f"one FOLDER at most; got {' and '.join(map(for_terminal, names))}. A condition has a sign, such as "
            f"method=ibq; runs to compare follow --diff"
        )
    folder = locate(names[0]) if names else runs_root()
    if names and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; without a folder, `ibqlab runs` lists all runs")
    known = RunNames(RunIndex(folder).read())
    if not known.runs:
        say(f"no runs in {folder}; make one with: ibqlab train builtin/photos")
        return
    chosen = known.select(conditions)
    if not chosen:
        say(f"none of {len(known.runs):,} runs in {folder} fulfils {' and '.join(conditions)}")
        return
    if order:
        chosen = known.sort(chosen, order)
    if diff:
        _say_differences(chosen)
        return
    asked = [name.strip() for name in columns.split(",") if name.strip()]
    used = [name for name in (order.removeprefix("-"), *(read_condition(word).name for word in conditions)) if name]
    _say_table(known, chosen, asked, used, wide)


def _write_note(name: str, text: str) -> None:
    from ibqlab.runs import Run, write_note
    from ibqlab.runs.finding import find_run

    run = Run(find_run(name))
    write_note(run.path, text)
    say(f"{'note on' if text.strip() else 'no note on'} {run.path}")


def _summaries(paths: Sequence[Path]) -> "list[RunSummary]":
    """Runs by their paths, told apart by as much of the path as it takes."""
    from ibqlab.runs import Run
    from ibqlab.runs.summaries import summarize_run

    absolute = [Run(path).path.absolute() for path in paths]
    around = Path(os.path.commonpath([path.parent for path in absolute]))
    return [summarize_run(path, around) for path in absolute]


def _say_differences(chosen: "Sequence[RunSummary]") -> None:
    """A line for each setting that is not the same in all runs; runs get numbers where names have no room, and equal
    values stand in one line where columns have none either."""
    from ibqlab.runs.comparison import NOT_SET, differing_settings

    rows = differing_settings(chosen)
    if not rows:
        say(f"the settings of {' and '.join(run.name for run in chosen)} are the same")
        return
    _say_rows([run.name for run in chosen], rows)
    if any(NOT_SET in values for values in rows.values()):
        say(f"{NOT_SET}: the run has no such setting")


def _say_rows(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    numbers = [f"[{number}]" for number in range(1, len(names) + 1)]
    for head in (names, numbers):
        table = [["", *head], *([key, *values] for key, values in rows.items())]
        table = [[for_terminal(cell, 80) for cell in row] for row in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) > _width():
            continue
        if head is numbers:
            _say_numbered(numbers, names)
        for row in table:
            say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    _say_numbered(numbers, names)
    for key, values in rows.items():
        say(for_terminal(key, 80))
        for value in dict.fromkeys(values):
            holders = [number for number, one in zip(numbers, values, strict=True) if one == value]
            say(f"  {for_terminal(value, 80)}   {' '.join(holders)}")


def _say_numbered(numbers: Sequence[str], names: Sequence[str]) -> None:
    """Which number stands for which run."""
    say("\n".join(f"{number}  {for_terminal(name)}" for number, name in zip(numbers, names, strict=True)) + "\n")


def _say_table(
    known: "RunNames", chosen: "Sequence[RunSummary]", asked: Sequence[str], used: Sequence[str], wide: bool
) -> None:
    """The runs as rows.

    Args:
        known: all runs, which tell the names.
        chosen: those to show.
        asked: columns beside name and status; none: `RUN_COLUMNS`, as far as any run has them and there is room.
        used: columns that runs were chosen or sorted by, shown in any case.
        wide: all columns and all letters.
    """
    from ibqlab.runs.notes import note_line
    from ibqlab.runs.summaries import RUN_COLUMNS

    usual = [name for name in RUN_COLUMNS if name not in LEFT_OUT]
    names = [known.full_name(name) for name in (*(("name", "status", *asked) if asked else usual), *used)]
    kept = {"name", *map(known.full_name, (*asked, *used))}
    cells: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        limit = None if wide or name == "name" else CELL_LETTERS
        read = known.reader(name)
        values = [note_line(run.note, limit) if name == "note" else _cell(read(run), limit) for run in chosen]
        if name in kept or any(values):
            cells[name] = values
    left_out = [] if wide else _left_out(cells, kept)
    shown = {name: values for name, values in cells.items() if name not in left_out}
    if not wide and _width_of(shown) > _width():
        longest = max(LEAST_NAME, max(map(len, shown["name"])) - (_width_of(shown) - _width()))
        shown["name"] = _shortened(shown["name"], longest)
    say(_as_text(shown))
    if left_out:
        text = f"left out: {', '.join(left_out)}; all columns: ibqlab runs --wide"
        say(textwrap.fill(text, max(_width(), 40), break_long_words=False, break_on_hyphens=False))


def _shortened(names: list[str], longest: int) -> list[str]:
    """Names in less room. Cut in the middle, all runs of a study would look the same: what the names have in common is
    left out first, the folder and then the end."""
    if len(names) > 1:
        folder = _common_start(names).rpartition("/")[0]
        names = [f"…{name.removeprefix(folder)}" for name in names] if folder else names
        end = _common_start([name[::-1] for name in names]).rpartition("-")[0]
        if max(map(len, names)) > longest and end:
            names = [f"{name[: -len(end) - 1]}…" for name in names]
    return [for_terminal(name, longest) for name in names]


def _common_start(texts: Sequence[str]) -> str:
    """The letters with which all begin."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def _cell(value: Any, limit: int | None) -> str:
    """A value in a cell; "" where there is none."""
    from ibqlab.runs.queries import as_text

    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return for_terminal(as_text(value), limit)


def _left_out(cells: dict[str, list[str]], kept: Collection[str]) -> list[str]:
    """The columns that the terminal has no room for."""
    left_out: list[str] = []
    for name in LEAST_TELLING:
        if _width_of({key: values for key, values in cells.items() if key not in left_out}) <= _width():
            break
        if name in cells and name not in kept:
            left_out.append(name)
    return left_out


def _width() -> int:
    return shutil.get_terminal_size((120, 24)).columns


def _widths(cells: dict[str, list[str]]) -> list[int]:
    return [max(len(name), *(len(value or "–") for value in values)) for name, values in cells.items()]


def _width_of(cells: dict[str, list[str]]) -> int:
    return sum(_widths(cells)) + 2 * (len(cells) - 1)


def _as_text(cells: dict[str, list[str]]) -> str:
    """Columns of text to the left, of numbers to the right."""
    from ibqlab.runs.summaries import TEXTS

    lines = []
    for row in ([*cells], *zip(*cells.values(), strict=True)):
        parts = [
            (value or "–").ljust(width) if name in TEXTS else (value or "–").rjust(width)
            for name, value, width in zip(cells, row, _widths(cells), strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
