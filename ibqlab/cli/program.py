"""The program `ibqlab`: a group of commands that shows what a user can mend as one message, not as a traceback."""

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from ibqlab.base.escaping import for_terminal
from ibqlab.cli.terminal import about_file, is_first_process, say

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
"""Warnings of files below it are the package's own."""


class _Commands(click.Group):
    """Prints what the user can mend as one message instead of a traceback; exit code 2."""

    def main(self, *words: Any, **options: Any) -> Any:
        _open_closed_streams()
        try:
            return super().main(*words, **options)
        except OSError as error:  # the text of --help, which is written before any command is run
            if error.errno != errno.ENOSPC:
                raise
            say(f"Error: {about_file(error)}", err=True)
            return sys.exit(2)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _require_current_folder()
            with _warnings_in_one_line():
                return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort) as error:
            say(str(error) or "Interrupted; the same command goes on where it stopped", err=True)
            return ctx.exit(130)
        except FileNotFoundError as error:
            message = str(error) if error.errno is None else about_file(error)
        except ValueError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            message = about_file(error)
        except RuntimeError as error:
            # The package's own errors, told by their home so that torch need not be imported to name their classes.
            if type(error).__module__.partition(".")[0] != "ibqlab":
                raise
            message = str(error)
        say(f"Error: {message}", err=True)
        return ctx.exit(2)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Inside the block the package's own warnings are a line each, without the place in the code that warns."""
    with warnings.catch_warnings():
        shown_otherwise = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, *position: Any, **options: Any
        ) -> None:
            if issubclass(category, UserWarning) and os.path.abspath(filename).startswith(PACKAGE):
                if is_first_process():
                    say(f"Warning: {for_terminal(message, None)}", err=True)
            else:
                shown_otherwise(message, category, filename, *position, **options)

        warnings.showwarning = show
        yield


def _open_closed_streams() -> None:
    """Whatever a shell has closed of input, output and errors leads nowhere: a run's file must not get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _require_current_folder() -> None:
    """Refuse to work where relative paths lead nowhere."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder has been deleted; go to another one: cd FOLDER") from None


@click.group(cls=_Commands)
@click.version_option(package_name="ibqlab")
def main() -> None:
    """Why do codebooks collapse, and what keeps every code alive?"""
