"""What is odd about the classes of a data set.

A class's number is its place among the names of a source, `source.classes`; runs and token stores keep these names.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from ibqlab.base.escaping import for_terminal

NO_CLASS = "(no class)"
"""Name of the class of images that have none."""

SHOWN = 5


def warn_of_numeric_order(classes: Sequence[str], where: str) -> None:
    """Warn where class folders are numbers whose order as text is another one: 0, 1, 10, 11, 2."""
    if not all(name.isdecimal() and len(name) < 20 for name in classes):
        return
    number = next((number for number, name in enumerate(sorted(classes, key=int)) if classes[number] != name), None)
    if number is not None:
        warnings.warn(
            f"the class folders of {for_terminal(where)} are numbered by their names as text, as torchvision does, not "
            f"as numbers: class number {number} is folder {classes[number]!r}. The list is open_data(config, "
            f"'train').classes. To have number n mean folder n, give all names the same length, such as {number:03}",
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
