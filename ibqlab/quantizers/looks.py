"""How figures show a quantizer: what its registration may say of name, colour and marker."""

import re
from typing import NamedTuple

from ibqlab.base.checks import require, require_choice

MARKERS = tuple("o^vDsPX<>*hpHd8")
"""matplotlib's filled markers."""
LETTERS = 60
"""Of a label: longer ones do not fit a legend."""


class QuantizerLook(NamedTuple):
    """A quantizer's name, colour and marker in figures; "" each: as figures choose."""

    label: str = ""
    """As legends and tables write it: "Soft VQ"."""
    color: str = ""
    """#RRGGBB."""
    marker: str = ""
    """One of `MARKERS`."""


def checked_look(name: str, label: str, color: str, marker: str) -> QuantizerLook:
    """The look of a quantizer that is about to be registered.

    Raises:
        ValueError: what no figure could show; the message says what to write.
    """
    require(
        isinstance(label, str) and len(label) <= LETTERS,
        f"{name!r}: label is the name in figures, text of at most {LETTERS} letters; got {label!r:.80}",
    )
    is_color = isinstance(color, str) and (color == "" or re.fullmatch("#[0-9a-fA-F]{6}", color))
    require(bool(is_color), f"{name!r}: color is written #RRGGBB, like #1B9E77; got {color!r:.80}")
    if marker != "":
        require_choice(f"{name!r}: marker", marker, MARKERS)
    return QuantizerLook(label, color, marker)
