"""Text from outside – names of files, classes, runs, keys, tensors – made harmless for the place where it is shown.

One function per destination. Whatever somebody else has named goes through the one of its destination: escape
sequences never reach a terminal, a `$` never starts mathematics, a `<` never starts a tag, a `|` never ends a cell.
"""

import html
import re

SHOWN = 200
"""Letters of a name that are shown at most; the middle of a longer one becomes an ellipsis."""

# Control characters, lone surrogates, and marks that turn the direction of writing around.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
# Brackets are enough against links and pictures; round ones, dots and dashes mean nothing inside a line.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#!|~$&])")


def _visible(match: re.Match) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def for_terminal(text: object, limit: int | None = SHOWN) -> str:
    """Text for one line of a terminal or of a log. What cannot be printed stands as \\x1b or \\u202e.

    Args:
        text: anything; its str() is shown.
        limit: letters at most; None: all.
    """
    printable = _UNPRINTABLE.sub(_visible, str(text))
    if limit is None or len(printable) <= limit:
        return printable
    return f"{printable[: limit // 2]}…{printable[-(limit - limit // 2 - 1) :]}"


def lines_for_terminal(text: object) -> str:
    """Several lines for a terminal: newlines stay, everything else that cannot be printed becomes visible."""
    return "\n".join(for_terminal(line, None) for line in str(text).split("\n"))


def for_matplotlib(text: object, limit: int | None = SHOWN) -> str:
    """In a figure: as on a terminal, and a dollar sign is a dollar sign."""
    return for_terminal(text, limit).replace("$", r"\$")


def for_html(text: object, limit: int | None = SHOWN) -> str:
    """In a page or widget, in text and in attributes."""
    return html.escape(for_terminal(text, limit), quote=True)


def for_markdown(text: object, limit: int | None = SHOWN) -> str:
    """Inside a line or a table's cell of Markdown: no mark-up, no HTML, no second cell."""
    return _MARKDOWN.sub(r"\\\1", for_terminal(text, limit))
