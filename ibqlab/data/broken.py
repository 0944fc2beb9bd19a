"""Unreadable files: collected while they turn up, told in one line with the reasons at the end."""

from collections.abc import Callable, Iterable, Sequence

from ibqlab.escaping import for_terminal

SHOWN = 3
"""So many names are told."""


class BrokenImages:
    """The names of unreadable files that `Batch.broken` carries from the loader processes, each once.

    It lives in the training process, so that a file is named once and not once per loader process and epoch.

    Args:
        names: of files that are known already.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names: list[str] = list(names)

    def add(self, names: Iterable[str]) -> None:
        """Note every name not seen before.

        Args:
            names: file names as in `Batch.broken`, repetitions allowed.
        """
        self.names += [name for name in dict.fromkeys(names) if name not in self.names]

    def report(self, images: int) -> str | None:
        """One line: how many files were left out, and the first three names with the reasons; None if none was.

        Args:
            images: how many there are, these included.
        """
        return describe_unreadable(self.names, images) if self.names else None


def describe_unreadable(
    names: Sequence[str], images: int, count: int | None = None, escape: Callable[[object], str] = for_terminal
) -> str:
    """Which images were left out.

    Args:
        names: at least one; `UnreadableName` where the reason is known.
        images: how many there are, these included.
        count: how many are unreadable; None: as many as there are names.
        escape: makes a name harmless where the line is shown.
    """
    count = len(names) if count is None else count
    return f"{count:,} of {images:,} images unreadable: {name_a_few(names, count, escape)}, left out"


def name_a_few(names: Sequence[str], count: int | None = None, escape: Callable[[object], str] = for_terminal) -> str:
    """The first three names, with the reason where it is known; arguments as in `describe_unreadable`."""
    shown = []
    for name in names[:SHOWN]:
        reason = getattr(name, "reason", "")
        shown.append(escape(name) + (f" ({escape(reason)})" if reason else ""))
    count = len(names) if count is None else count
    return ", ".join(shown + ["…"] * (count > len(shown)))
