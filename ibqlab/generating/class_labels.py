"""Classes of a generator: asked for by number, range or name, and named beside the images."""

import difflib
from collections.abc import Iterable, Sequence

from ibqlab.config import nearest

SHOWN_CLASSES = 10
"""Rows of a picture where no classes are named."""
NAMES_SHOWN = 10
"""Names of classes that a message lists."""


def row_names(labels: Iterable[int], names: Sequence[str]) -> list[str]:
    """What stands beside the images of each class: its name, or its number where it has none.

    Args:
        labels: classes, a row each.
        names: of all classes by label; may be too few, or none.
    """
    return [names[label] if label < len(names) else f"class {label}" for label in labels]


def read_classes(classes: str | Sequence[str | int], names: Sequence[str], num_classes: int) -> tuple[int, ...]:
    """Labels of classes by number, range or name.

    Args:
        classes: "0,7,12", "0-3", "cat,dog" or a list of the same; empty: none, which stands for all.
        names: of the classes by label; empty where nobody knows them.
        num_classes: labels lie below it.
    Returns:
        Labels in this order.
    Raises:
        ValueError: no such class; the message names the nearest.
    """
    words = [word.strip() for word in classes.split(",")] if isinstance(classes, str) else list(classes)
    return tuple(label for word in words if word != "" for label in _labels(word, names, num_classes))


def _labels(word: str | int, names: Sequence[str], num_classes: int) -> range:
    """One number, one name, or a range like 0-3."""
    if str(word) in names:
        first = last = list(names).index(str(word))
    else:
        start, dash, end = str(word).partition("-")
        numbers = [start, end] if dash else [start]
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            hint = _near_name(str(word), names) if names else "its classes have no names here"
            raise ValueError(f"classes are numbers like 0,7,12, ranges like 0-3, or names; got {word!r}; {hint}")
        first, last = int(numbers[0]), int(numbers[-1])
    if not first <= last < num_classes:
        raise ValueError(f"classes must lie in 0 to {num_classes - 1}, and ranges rise; got {word}")
    return range(first, last + 1)


def _near_name(word: str, names: Sequence[str]) -> str:
    """A hint for a misspelt class: the nearest name, or the first of them."""
    if len(names) > NAMES_SHOWN and not difflib.get_close_matches(word, names, n=1):
        return f"there are {len(names):,} names: {', '.join(names[:NAMES_SHOWN])}, …"
    return nearest(word, list(names))
