"""The page that opens first: a card per notebook of a folder, with picture, question, minutes and status.

What the cards say is read from the notebooks' own first cells, and what has come of them from the folder of runs. A
notebook without such a cell, like one of the user's own, has a card, too. Pictures lie in `pictures/`, small and taken
from results of this project (`experiments/start_page_pictures.py` makes them). They go into the page as text, so that
it asks no other machine for anything.
"""

import base64
import html
import io
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from ibqlab.base.escaping import for_html
from ibqlab.base.files import RunError, read_bytes
from ibqlab.config import ConfigError
from ibqlab.data.pictures import open_picture
from ibqlab.notebooks.catalogue import START_PAGE
from ibqlab.notebooks.links import Links, links_here
from ibqlab.notebooks.parameters import calls, first_text
from ibqlab.notebooks.status import NotebookStatus, notebook_status
from ibqlab.runs import runs_root

if TYPE_CHECKING:
    from PIL.Image import Image

FIRST = ("explore_collapse", "your_case", "playground")
"""Notebooks that stand in front of the others."""
KINDS = {"trains_one": "prepare_run", "writes_atlases": "write_atlas", "looks_at_runs": "RunBrowser"}
"""What `notebook_status` wants to know of a notebook, by the function that one calls which does it."""
PICTURES = Path(__file__).with_name("pictures")
STYLE = Path(__file__).with_name("start_page.css")
PICTURE_BYTES = 2**24
PICTURE_WIDTH = 480
"""Pixels of a picture, twice its width on the page."""
TEMPLATE = "?template=ibqlab"
"""Voilà's page without what its own asks other machines for: `jupyter/voila/templates/ibqlab`."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Of cards without a picture: Okabe and Ito's."""


class NotebookCard(NamedTuple):
    """What the start page shows of a notebook."""

    file: Path
    title: str
    question: str
    """"" where its first cell asks none."""
    minutes: str
    """"" where its first cell does not say."""
    status: NotebookStatus


def read_cards(folder: str | Path = ".", runs: Path | None = None) -> list[NotebookCard]:
    """A card per notebook of a folder: `FIRST`, then by name.

    Args:
        folder: of notebooks; files that are none are left out.
        runs: the folder of all runs; None: as `runs_root` finds it.
    """
    files = sorted(file for file in Path(folder).glob("*.ipynb") if file.stem != START_PAGE)
    files.sort(key=lambda file: FIRST.index(file.stem) if file.stem in FIRST else len(FIRST))
    runs = runs or runs_root()
    return [card for card in (_read_card(file, runs) for file in files) if card]


def _read_card(file: Path, runs: Path) -> NotebookCard | None:
    try:
        text = first_text(file)
        does = {kind: calls(file, function) for kind, function in KINDS.items()}
    except (ConfigError, OSError):
        return None
    heading, _, rest = text.strip().partition("\n")
    title = heading.lstrip("# ") if heading.startswith("#") else file.stem
    paragraphs = dict(re.findall(r"^\*\*(\w+)\.\*\* (.+?)(?=\n\s*\n|\Z)", text, re.DOTALL | re.MULTILINE))
    question = paragraphs.get("Question") or (rest if heading.startswith("#") else text).strip().partition("\n\n")[0]
    # The first thing that is said of the time; what stands behind it is about other machines and other settings.
    minutes = re.split(r"[.;](?:\s|$)", paragraphs.get("Time", ""))[0]
    return NotebookCard(file, title, question, minutes, notebook_status(file.stem, runs, **does))


# --- the page --------------------------------------------------------------------------------------------------------


class StartPage:
    """The page as a notebook's output.

    Args:
        folder: of the notebooks; links lead there, so it is the folder of the notebook that shows the page.
    """

    def __init__(self, folder: str | Path = "."):
        self.cards = read_cards(folder)
        self._links = links_here(Path(folder))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": page_html(self.cards, self._links), "text/plain": str(self)}

    def __str__(self) -> str:
        return "\n".join(f"{card.file.stem:<20} {card.title} – {card.status}" for card in self.cards)


def page_html(cards: list[NotebookCard], links: Links) -> str:
    """The whole page.

    Args:
        cards: in the order in which they are shown.
        links: where a click leads.
    """
    shown = "".join(_card_html(card, number, links) for number, card in enumerate(cards))
    shown = shown or "<p>There is no notebook in this folder.</p>"
    return f'<style>{STYLE.read_text(encoding="utf-8")}</style><div class="ibq-start">{shown}</div>'


def _card_html(card: NotebookCard, number: int, links: Links) -> str:
    name = quote(card.file.name)
    opens = []
    if links.lab is not None:
        # A page of Voilà's inside JupyterLab is a frame of it.
        opens.append((f'href="{html.escape(links.lab + name)}"' + (' target="_parent"' if links.lab else ""), "open"))
    if links.app is not None:
        opens.append((f'href="{html.escape(links.app + name)}{TEMPLATE}"', "without code" if opens else "open"))
    first, status = opens[0][0], card.status
    results = {"report": links.to_result(status.report), "executed copy": links.to_result(status.executed_copy)}
    target = ' target="_parent"' if links.lab else ' target="_blank"' if links.app is not None else ""
    opens += [(f'href="{html.escape(address)}"{target}', label) for label, address in results.items() if address]
    kind = "short" if status.too_short else status.state.partition(" ")[0]
    picture, about = _picture_html(card, number), str(status).removeprefix(status.state)
    return (
        f'<article><a class="picture" {first} tabindex="-1">{picture}</a><div class="text">'
        f"<h3><a {first}>{_line_html(card.title)}</a></h3><p>{_line_html(card.question)}</p>"
        f'<p class="minutes"><code>{for_html(card.file.stem)}</code> · '
        f"{_line_html(card.minutes) or 'time not stated'}</p>"
        f'<p class="status {kind}"><b>{for_html(status.state)}</b>{for_html(about)}</p>'
        f'<p class="links">{" · ".join(f"<a {link}>{label}</a>" for link, label in opens)}</p></div></article>'
    )


def _line_html(text: str) -> str:
    """A line of Markdown: what stands between backticks is code, and nothing else means anything."""
    words = for_html(" ".join(text.split()), 400)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", words)


# --- pictures --------------------------------------------------------------------------------------------------------


def thumbnail(picture: "Image") -> bytes:
    """A picture at the page's size, as WebP: about 10 kB of a figure."""
    small = picture.convert("RGB")
    small.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=75, method=6)
    return file.getvalue()


def _picture_html(card: NotebookCard, number: int) -> str:
    """The package's picture of a notebook; else the first of its own figures; else its name on a colour."""
    with suppress(OSError):
        return _image((PICTURES / f"{card.file.stem}.webp").read_bytes(), card)
    for figure in card.status.figures:
        with suppress(OSError, RunError, ValueError):
            return _image(thumbnail(open_picture(read_bytes(figure, PICTURE_BYTES), figure.name)), card)
    colour = COLOURS[number % len(COLOURS)]
    return f'<span class="blank" style="background: {colour}">{for_html(card.file.stem, 30)}</span>'


def _image(content: bytes, card: NotebookCard) -> str:
    shown = f"a figure of {for_html(card.file.stem)}"
    return f'<img alt="{shown}" src="data:image/webp;base64,{base64.b64encode(content).decode()}">'
