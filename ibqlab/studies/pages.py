"""Pages: Markdown, and the same as one HTML file that holds its pictures, so that it can be sent.

report.md and report.html are written here and nowhere else, for studies and for single runs.
"""

import base64
import html
import math
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.escaping import for_html, for_markdown, for_terminal
from ibqlab.base.files import read_bytes, write_whole
from ibqlab.runs.caveats import SHORTEST

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;display:block;overflow-x:auto;font-size:13px}"
    "th,td{border-bottom:1px solid #ddd;padding:.3em .7em;text-align:left;vertical-align:top}"
    "td{overflow-wrap:anywhere;min-width:4em}@media print{table{display:table;font-size:9px}}"
    "img{max-width:100%;border:0}code{background:#f4f4f4;padding:.1em .3em;overflow-wrap:anywhere}"
)
TOO_SHORT = (
    "**Too short to mean anything.** Runs of so few steps show that everything works, not what a method does: orders "
    "may be the reverse of what longer runs show."
)
PICTURE_BYTES = 64 * 2**20
"""Largest picture that a page takes in."""


def join_parts(*parts: str) -> str:
    """Parts of a page, one below the other. Empty ones are left out."""
    return "\n\n".join(text for text in parts if text)


def too_short_note(steps: float) -> str:
    """The warning that stands above results of so few steps; "" where they are enough."""
    return TOO_SHORT if steps < SHORTEST else ""


def to_markdown(table: pd.DataFrame) -> str:
    """A table of strings and numbers as Markdown; names from outside stay text, floats have four digits."""
    cells = [[_as_cell(value) for value in line] for line in [list(table.columns), *table.itertuples(index=False)]]
    lines = [cells[0], ["---"] * len(table.columns), *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _as_cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return for_markdown(value)


def as_code(text: object) -> str:
    """Text of any origin as a code span of Markdown."""
    return f"`{for_terminal(text, None).replace('`', chr(39))}`"


def picture(folder: Path, name: str, title: str, draw: Callable[[], Figure | None], redraw: bool) -> str:
    """A figure for a page; "" where there is nothing to draw.

    Args:
        folder: of the study or run.
        name: of its file in `figures/`, without .png.
        title: what it shows.
        draw: draws and saves it.
        redraw: False: a file that is there already is taken as it is.
    """
    file = folder / "figures" / f"{name}.png"
    if (redraw or not file.is_file()) and draw() is None:
        return ""
    return f"![{title}](figures/{name}.png)"


def write_pages(folder: Path, text: str, title: str) -> Path:
    """Write Markdown as report.md, and as report.html with its pictures inside.

    Returns:
        Path of report.html; of report.md where the notebook tools, which make the page, are not installed.
    """
    write_whole(folder / "report.md", text.encode(errors="replace"))
    try:
        import mistune  # noqa: PLC0415 - comes with the notebook tools
    except ModuleNotFoundError:
        return folder / "report.md"
    body = mistune.create_markdown(escape=True, plugins=["table"])(text)
    body = re.sub(r"<img\b[^>]*>", lambda tag: _embed(tag[0], folder / "figures"), body)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{for_html(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
    write_whole(folder / "report.html", page.encode(errors="replace"))
    return folder / "report.html"


def _embed(tag: str, figures: Path) -> str:
    """An image of the page with its bytes inside; its description alone where it is none of the study's figures.

    Only ordinary .png files that lie inside `figures/`, links followed, are read: whatever else a page may name, from
    the disk or from the net, must not travel with it.
    """
    source, description = (re.search(rf'{name}="([^"]*)"', tag) for name in ("src", "alt"))
    description = description[1] if description else ""
    file = figures.parent / html.unescape(source[1] if source else "")
    try:
        inside = file.resolve().is_relative_to(figures.resolve()) and file.resolve().suffix == ".png"
        content = read_bytes(file, PICTURE_BYTES) if inside else b""
    except (OSError, ValueError, RuntimeError):
        content = b""
    if not content.startswith(b"\x89PNG"):
        return f"<em>{description}</em>"
    return f'<img src="data:image/png;base64,{base64.b64encode(content).decode()}" alt="{description}">'
