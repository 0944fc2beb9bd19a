"""Unreadable images: how they are named, collected while they turn up, and told in one line with the reasons."""

from collections.abc import Callable, Iterable, Sequence

from ibqlab.base.escaping import for_terminal

SHOWN = 3
"""So many names are told."""
LEFT_OUT = "left out"
STAND_INS = "left out; in training others stand in for them"
"""What becomes of the unreadable images of a run."""


class UnreadableName(str):
    """The name of an image that could not be read, and why; an ordinary text otherwise, also for other processes.

    Args:
        name: of the image.
        reason: in a few words.
    """

    reason: str

    def __new__(cls, name: str, reason: str = "") -> "UnreadableName":
        text = super().__new__(cls, name)
        text.reason = reason
        return text


class UnreadableImages(ValueError):
    """Images that cannot be read where they must be; the message names them, the reason and the setting."""


class BrokenImages:
    """The names of unreadable files that `Batch.broken` carries from the loader processes, each once.

    It lives in the training process, so that a file is named once and not once per loader process and epoch.

    Args:
        names: of files that are known already.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = dict.fromkeys(names)

    @property
    def names(self) -> list[str]:
        """All names, in the order in which they turned up."""
        return list(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Note every name not seen before.

        Args:
            names: file names as in `Batch.broken`, repetitions allowed.
        """
        self._names |= dict.fromkeys(names)

    def report(self, images: int, become: str = LEFT_OUT) -> str | None:
        """One line as `describe_unreadable` has it; None if no file was unreadable.

        Args:
            images: how many there are, these included.
            become: what is done with them.
        """
        return describe_unreadable(self.names, images, become=become) if self.names else None


def describe_unreadable(
    names: Sequence[str],
    images: int,
    count: int | None = None,
    become: str = LEFT_OUT,
    escape: Callable[[object], str] = for_terminal,
) -> str:
    """How many images are unreadable, the first three names with the reasons, and what becomes of them.

    Args:
        names: at least one; `UnreadableName` where the reason is known.
        images: how many there are, these included.
        count: how many are unreadable; None: as many as there are names.
        become: what is done with them.
        escape: makes a name harmless where the line is shown.
    """
    count = len(names) if count is None else count
    return f"{count:,} of {images:,} images unreadable: {name_a_few(names, count, escape)}, {become}"


def name_a_few(names: Sequence[str], count: int | None = None, escape: Callable[[object], str] = for_terminal) -> str:
    """The first three names, with each reason once where it is known; arguments as in `describe_unreadable`."""
    by_reason: dict[str, list[str]] = {}
    for name in names[:SHOWN]:
        by_reason.setdefault(getattr(name, "reason", ""), []).append(escape(name))
    texts = [", ".join(group) + (f" ({escape(why)})" if why else "") for why, group in by_reason.items()]
    count = len(names) if count is None else count
    return ", ".join(texts + ["…"] * (count > SHOWN))
