"""Classes by name and by number, and what is odd about the classes of a data set.

A class's number is its place among the names of a source, `source.classes`; runs and token stores keep these names.
"""

import operator
import re
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from jaxtyping import Int32

from ibqlab.base.checks import require
from ibqlab.base.escaping import for_terminal

NO_CLASS = "(no class)"
"""Name of the class of images that have none."""

SHOWN = 5
_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")


def class_numbers(chosen: str | int | Iterable[str | int], classes: Sequence[str]) -> list[int]:
    """The numbers of classes that somebody names, numbers, or gives as ranges.

    A name is taken before a number. A number that is the name of another class, too (folders 0 … 11 are sorted as
    text), is refused until it is written as "number:10" or "name:10".

    Args:
        chosen: a class, several in a text with commas between them ("cat, 3, 5-7"), or a list of such. A range includes
            both ends. Whole numbers (int, NumPy) are always numbers.
        classes: all names in the order of their numbers.
    Returns:
        Numbers, 0 to len(classes) − 1, in the given order, each once.
    Raises:
        ValueError: no such class, a number that could mean two, or nothing was chosen.
    """
    numbers: dict[str, int] = {}
    for number, name in enumerate(classes):
        numbers.setdefault(name, number)
    items = [chosen] if isinstance(chosen, str) or not isinstance(chosen, Iterable) else list(chosen)
    found = [number for item in items for number in _numbers_of(item, numbers, classes)]
    if not found:
        raise ValueError(f"at least one class must be chosen; got {chosen!r}. {_known(classes)}")
    return list(dict.fromkeys(found))


def _numbers_of(item: Any, numbers: dict[str, int], classes: Sequence[str]) -> list[int]:
    """Numbers of one item: a name, a number, a range, or a text with several of them."""
    if not isinstance(item, str):
        return [_checked(item, classes)]
    text = item.strip()
    if "," in text and text not in numbers:
        return [number for part in text.split(",") if part.strip() for number in _numbers_of(part, numbers, classes)]
    if text in numbers:
        return [_unambiguous(text, numbers[text], classes)]
    prefix, _, rest = text.partition(":")
    if prefix == "name" and rest in numbers:
        return [numbers[rest]]
    if prefix == "number":
        text = rest
    if match := _RANGE.fullmatch(text):
        return _range_of(*(_checked(end, classes) for end in match.groups()))
    if text.lstrip("+-").isdecimal():
        return [_checked(text, classes)]
    close = get_close_matches(text, classes[:100_000], n=1)
    hint = f" Did you mean {for_terminal(close[0])!r}?" if close else ""
    raise ValueError(
        f"a class must be a name, a number or a range such as 0-3; got {for_terminal(text)!r}.{hint} {_known(classes)}"
    )


def _range_of(first: int, last: int) -> list[int]:
    require(first <= last, f"a range of classes must go up; got {first}-{last}. Use {last}-{first}")
    return list(range(first, last + 1))


def _checked(value: Any, classes: Sequence[str]) -> int:
    try:
        number = int(value) if isinstance(value, str) and len(value) < 20 else operator.index(value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or not 0 <= number < len(classes):
        raise ValueError(
            f"class numbers lie in 0 to {len(classes) - 1}; got {for_terminal(value, 40)}. {_known(classes)}"
        )
    return number


def _unambiguous(text: str, number: int, classes: Sequence[str]) -> int:
    """The number of the class of that name, unless the name is the number of another class."""
    if text.isdecimal() and len(text) < 20 and int(text) != number and int(text) < len(classes):
        raise ValueError(
            f"{text!r} is the name of class number {number}, and class number {text} is named "
            f"{for_terminal(classes[int(text)])!r}. Write name:{text} or number:{text}"
        )
    return number


def _known(classes: Sequence[str]) -> str:
    shown = ", ".join(f"{number} {for_terminal(name, 40)}" for number, name in enumerate(classes[:SHOWN]))
    return f"The {len(classes):,} classes are: {shown}{', …' if len(classes) > SHOWN else ''}"


def warn_of_numeric_order(classes: Sequence[str], where: str) -> None:
    """Warn where class folders are numbers whose order as text is another one: 0, 1, 10, 11, 2."""
    if not all(name.isdecimal() and len(name) < 20 for name in classes):
        return
    place = next((number for number, name in enumerate(sorted(classes, key=int)) if classes[number] != name), None)
    if place is not None:
        warnings.warn(
            f"the class folders of {for_terminal(where)} are numbered by their names as text, as torchvision does, not "
            f"as numbers: class number {place} is folder {classes[place]!r}. The list is open_data(config, "
            f"'train').classes. To have number n mean folder n, give all names the same length, such as {place:03}",
            stacklevel=2,
        )


def warn_of_unseen(classes: Sequence[str], labels: Int32[np.ndarray, "N"], where: str) -> None:
    """Warn of classes without a single training image, of which a generator would learn nothing."""
    seen = np.bincount(labels[labels >= 0], minlength=len(classes)) > 0
    unseen = np.flatnonzero(~seen[: len(classes)])
    if len(unseen):
        names = ", ".join(for_terminal(classes[number], 40) for number in unseen[:SHOWN].tolist())
        warnings.warn(
            f"{len(unseen):,} of {len(classes):,} classes of {for_terminal(where)} have no training image: {names}"
            f"{', …' if len(unseen) > SHOWN else ''}. Nothing can be learnt of them: leave them out when sampling",
            stacklevel=2,
        )
