"""What every command says and how: lines on the terminal, one process of several, what the system said of a file."""

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import click

from ibqlab.base.escaping import for_terminal, lines_for_terminal
from ibqlab.base.files import why_not

WHERE = "A plain name goes below the folder of all runs; a path starts with / ./ ../ or ~."
"""End of the help of every option that names a folder."""


def say(text: object, err: bool = False) -> None:
    """Lines on the terminal, whatever was named by others made harmless."""
    click.echo(lines_for_terminal(text), err=err)


def section(title: str, text: str) -> None:
    say(f"\n{title}\n" + "\n".join(f"  {line}" for line in text.splitlines()))


def _run_plugins(ctx: click.Context, _: click.Parameter, plugins: tuple[str, ...]) -> tuple[str, ...]:
    if plugins and not ctx.resilient_parsing:
        from ibqlab.recipes.plugins import allow_plugins, import_plugins  # noqa: PLC0415 - heavy

        allow_plugins(plugins)
        import_plugins(plugins)
    return plugins


_PLUGIN = partial(
    click.option,
    "--plugin",
    "plugins",
    multiple=True,
    metavar="FILE",
    callback=_run_plugins,
    help="File or module of yours that registers a quantizer; may be given several times.",
)
PLUGIN = _PLUGIN()
"""Option of every command that may meet a quantizer of the user's. What it names is run at once."""
PLUGIN_RUN = _PLUGIN(expose_value=False)
"""The same where a command needs no more than that."""


def is_first_process() -> bool:
    """Whether this is the process, of several under torchrun, that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def say_loading(command: str) -> None:
    """Say that a command has begun: what it imports takes seconds."""
    if is_first_process():
        say(f"ibqlab {command}: loading …", err=True)


def about_file(error: OSError) -> str:
    """What the system said about a file, in words that name a remedy."""
    if error.filename:
        return f"{for_terminal(error.filename)}: {why_not(error)}"
    if error.errno == errno.ENOSPC:
        return "the disk that this output is written to is full; make room, or send it elsewhere"
    return why_not(error)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside the block SIGTERM stops the work as Ctrl-C does, so that what was made is still written down."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
