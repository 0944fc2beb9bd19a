"""Unreadable files: each is named once while it happens, with the reason, and all are counted at the end."""

import warnings
from collections.abc import Iterable

from ibqlab.escaping import for_terminal

SHOWN = 10


class BrokenImages:
    """Collects the names of unreadable files that `Batch.broken` carries from the loader processes.

    It lives in the training process, so that a file is named once and not once per loader process and epoch.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def add(self, names: Iterable[str]) -> None:
        """Warn about every name not seen before, and say why it cannot be read.

        Args:
            names: file names as in `Batch.broken`, repetitions allowed.
        """
        for name in names:
            if name not in self.names:
                self.names.append(name)
                reason = getattr(name, "reason", "")
                warnings.warn(
                    f"unreadable image skipped, another one takes its place: {for_terminal(name)}"
                    + (f" ({for_terminal(reason)})" if reason else ""),
                    stacklevel=2,
                )

    def report(self) -> str | None:
        """One line for the end of a run: how many files were skipped and the first ten names; None if none was."""
        if not self.names:
            return None
        count = len(self.names)
        shown = ", ".join(map(for_terminal, self.names[:SHOWN])) + (", …" if count > SHOWN else "")
        return f"{count} unreadable {'image was' if count == 1 else 'images were'} skipped: {shown}"
