"""A notebook executed by papermill: where its copy goes, what its kernel says meanwhile, and how it ended."""

import contextlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ibqlab.base.files import UnreadableFile, expanded, explained, parse_json, read_bytes, sweep, write_whole
from ibqlab.base.progress import FILE_VARIABLE, ProgressLine, heard
from ibqlab.config import ConfigError
from ibqlab.notebooks.catalogue import NOTEBOOK_BYTES
from ibqlab.notebooks.results import without_widgets
from ibqlab.runs import runs_root
from ibqlab.runs.provenance_record import COMMAND, command_line

POLL_SECONDS = 0.5
"""Between two looks at what the kernel says."""
QUIET_SOCKETS = "__import__('logging').getLogger('tornado.general').setLevel('CRITICAL')"
"""What a kernel runs before its first cell."""


# --- the executed copy -----------------------------------------------------------------------------------------------


def prepare_copy(source: Path, output: Path | None) -> Path:
    """The file of a notebook's executed copy: `output`, or a new dated file under runs/notebooks.

    Raises:
        ConfigError: `output` is a folder, the notebook itself, or anything but an earlier executed copy.
    """
    if output is None:
        # Microseconds, so that runs of one second do not collide.
        name = f"{source.stem}-{datetime.now():%Y%m%d-%H%M%S-%f}.ipynb"
        target = runs_root() / "notebooks" / source.stem / name
    else:
        target = expanded(output)
        if target.is_dir():
            raise ConfigError(f"{target} is a folder; give --output a file, such as {target / source.name}")
        if os.path.lexists(target) and (not _is_executed_copy(target) or target.samefile(source)):
            raise ConfigError(f"{target} exists and is not an executed copy of papermill's; give --output another file")
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    return target


def _is_executed_copy(target: Path) -> bool:
    """Whether papermill wrote a file, also one that an earlier version left half written or empty."""
    try:
        content = read_bytes(target, NOTEBOOK_BYTES)
    except (UnreadableFile, FileNotFoundError):
        return False
    try:
        return "papermill" in parse_json(content, str(target))["metadata"]
    except (ValueError, LookupError, TypeError):
        return not content or (content.startswith(b'{\n "cells": [') and b'"papermill": {' in content)


# --- the execution ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _followed(notebook: Path) -> Iterator[dict[str, str]]:
    """Inside the block, show what a notebook's kernel says about its work, and otherwise the heading it stands at.

    Yields:
        What is known of the kernel: "heading", which the caller sets; after the block also what the kernel told last:
        "line", "folder", "result".
    """
    facts = {"heading": f"{notebook.stem}: starting a kernel"}
    ended = threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="ibqlab-", ignore_cleanup_errors=True) as folder,
        # Inherited by the kernel, which writes its line there, and whose runs note what was typed here.
        _environment({FILE_VARIABLE: str(file := Path(folder) / "progress.json"), COMMAND: command_line()}),
    ):

        def follow() -> None:
            with ProgressLine() as line:
                line.show(facts["heading"])
                while not ended.wait(POLL_SECONDS):
                    line.show(heard(file).get("line") or facts["heading"])

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield facts
        finally:
            ended.set()
            thread.join()
            facts.update(heard(file))


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Inside the block, environment variables have these values; afterwards those from before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _write_copy(content: str, path: str) -> None:
    """Write an executed copy whole, after each cell, so that a kill spoils none."""
    write_whole(path, content.encode("utf-8", "backslashreplace"))


def execute(source: Path, target: Path, values: dict[str, Any]) -> tuple[str | None, Path | None, str]:
    """Run a notebook in a kernel of its own, and show meanwhile where its work stands.

    Args:
        source: the notebook.
        target: its executed copy, which also holds what had run when it failed. Pictures stand where widgets were.
        values: of its parameters, as `read_settings` gives them.
    Returns:
        What went wrong, in one line, or None; the study, run or measurement that the notebook worked on, None where it
        was none; and what came of it in a sentence, "" where only the folder says.
    Raises:
        ValueError: papermill is not installed.
    """
    try:
        import papermill  # noqa: PLC0415
        from nbclient.exceptions import CellTimeoutError, DeadKernelError  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"running notebooks needs {error.name}: pip install 'ibqlab[lab]'") from None
    logging.getLogger("papermill").setLevel(logging.ERROR)
    failure = None
    target = target.absolute()
    papermill.iorw.papermill_io.register(str(target), SimpleNamespace(write=_write_copy, pretty_path=str))
    with _followed(source) as facts:

        def start_cell(cell: Any, **_: Any) -> None:
            headings = re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []
            if headings:
                facts["heading"] = f"{source.stem}: {headings[0]}"

        try:
            # The levels silence the kernel's remarks on transport encryption, and on being stopped: on a busy machine
            # its sockets may be closed before it has answered. Errors of cells come by themselves.
            papermill.execute_notebook(
                str(source),
                str(target),
                values,
                kernel_name="python3",
                language="python",
                extra_arguments=["--log-level=CRITICAL", f"--IPKernelApp.exec_lines={QUIET_SOCKETS}"],
                progress_bar=False,
                on_cell_start=start_cell,
            )
        except papermill.PapermillExecutionError as error:
            reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error.evalue))
            failure = f"{source.name} failed in notebook cell [{error.exec_count}]: {error.ename}: {reason}"
        except (DeadKernelError, CellTimeoutError) as error:
            failure = f"{source.name}: the kernel died, perhaps for want of memory ({type(error).__name__}: {error})"
        finally:
            without_widgets(target)
    folder = facts.get("folder")
    return failure, Path(folder) if folder else None, facts.get("result", "")
