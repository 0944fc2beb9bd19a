"""What is wrong with settings, said so that the message tells what to write instead."""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ibqlab.base.escaping import for_terminal

PROBLEMS_SHOWN = 20
"""Problems that one message lists; the others are counted."""


class Problem(NamedTuple):
    """One thing wrong with a set of settings."""

    path: tuple[str | int, ...]
    """Keys from the outside in; () for the settings as a whole."""
    text: str
    """What was expected, what arrived, and what to write instead."""


class ConfigError(ValueError):
    """Settings that cannot be used.

    Args:
        message: the whole message.
        problems: the same piece by piece, for whoever nests these settings in larger ones.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()):
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def from_problems(cls, source: str, problems: Sequence[Problem]) -> "ConfigError":
        """One message that lists every problem under the name of where the settings came from."""
        first_problems = problems[:PROBLEMS_SHOWN]
        lines = [f"{for_terminal(dotted(p.path))}: {p.text}" if p.path else p.text for p in first_problems]
        if len(lines) == 1:
            return cls(f"{source}: {lines[0]}", problems)
        if len(problems) > len(first_problems):
            lines.append(f"… and {len(problems) - len(first_problems)} more")
        return cls("\n  ".join([f"{source}: {len(problems)} problems", *lines]), problems)


def dotted(path: Sequence[str | int]) -> str:
    """A path as it is typed on a command line: ("betas", 1) → "betas[1]"."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def nearest(key: str, valid: Sequence[str]) -> str:
    """A hint for a misspelt key: the nearest valid one, or all of them."""
    close = difflib.get_close_matches(key, valid, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are: {', '.join(valid) or 'none'}"


def describe(value: Any) -> str:
    """A value that was not expected, for a message: "the text 'x'", "null"."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}…"
    kinds = {str: "the text", list: "the list", dict: "the mapping", int: "the number", float: "the number"}
    return f"{kinds.get(type(value), type(value).__name__)} {text}"
