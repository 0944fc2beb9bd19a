"""A note on a run, in words: one small text file in its folder, which nothing but people reads."""

from pathlib import Path

from ibqlab.base.checks import require_at_most
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, explained, is_ordinary, read_text
from ibqlab.runs.folder import require_own_files, writing

NOTE_FILE = "note.txt"
NOTE_LETTERS = 4000
"""Longest note."""
_NOTE_BYTES = 2**16


def read_note(path: Path) -> str:
    """The note on a run; "" where there is none, and what is wrong with its file where it cannot be read."""
    file = path / NOTE_FILE
    try:
        return read_text(file, _NOTE_BYTES).strip()
    except FileNotFoundError:
        return ""
    except UnreadableFile as error:
        return f"({NOTE_FILE} cannot be read{str(error).removeprefix(str(file))})"


def note_line(text: str, letters: int | None = None) -> str:
    """A note in one line, the end of a long one left out.

    Args:
        text: the note.
        letters: at most; None: all.
    """
    line = for_terminal(" ".join(text.split()), None)
    return line if letters is None or len(line) <= letters else f"{line[: letters - 1]}…"


def write_note(path: Path, text: str) -> None:
    """Put a note on a run in place of the one before, whole or not at all; the run may be training.

    Args:
        path: the run's folder.
        text: up to `NOTE_LETTERS` letters; "" takes the note away.
    Raises:
        ValueError: it is longer, or holds what no text file can.
        RunError: there is no such run any more, its note is no file of the folder, or the disk is full.
    """
    text = text.strip()
    require_at_most("letters of a note", len(text), NOTE_LETTERS)
    try:
        content = f"{text}\n".encode()
    except UnicodeEncodeError:
        raise ValueError("a note is text; this one holds half of a letter, which no file can keep") from None
    if not is_ordinary(path / "config.yaml"):
        raise RunError(f"{path} is no run any more, so no note was written; refresh the list of runs")
    require_own_files(path, NOTE_FILE)
    file = path / NOTE_FILE
    if not text:
        with explained(file):
            file.unlink(missing_ok=True)
        return
    with writing(path, file) as stream:
        stream.write(content)
