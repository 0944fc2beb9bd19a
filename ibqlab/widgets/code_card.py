"""The card of a code or a set, with its neighbours one click away, and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets

from ibqlab.base.escaping import for_html
from ibqlab.base.files import RunError
from ibqlab.runs import Run
from ibqlab.views.card_page import STYLE, card_html
from ibqlab.views.cards import CardReader
from ibqlab.views.patches import IMAGES
from ibqlab.views.subject import open_subject
from ibqlab.widgets.live import with_static_page
from ibqlab.widgets.page import Page

REMEMBERED = 200
"""Cards that stay in memory, and steps that "back" goes at most."""


class CodeCard(ipywidgets.VBox):
    """What a code is: its patches, what it decodes to, its life, its neighbours.

    Args:
        what: a run, its name or folder, or a checkpoint's file; or a `CardReader` that another view has.
        code: shown first; several make the card of a set. None: the code in use most.
        images: as of `open_subject`.
        count: images that are looked at, at most.
    Raises:
        RunError, FileNotFoundError: nothing there to look at; what is missing of it is said on the card.
    """

    def __init__(
        self,
        what: str | Path | Run | CardReader,
        code: int | Sequence[int] | None = None,
        images: str | Path = "",
        count: int = IMAGES,
    ):
        self.reader = what if isinstance(what, CardReader) else CardReader(open_subject(what, images), count)
        self._pages: dict[tuple[int, ...], str] = {}
        self._path: list[tuple[int, ...]] = []
        self._place = -1
        self.page = Page(clicked=self._follow)
        self.back = ipywidgets.Button(description="◀ back", layout={"width": "auto", "flex": "0 0 auto"})
        self.forward = ipywidgets.Button(description="forward ▶", layout={"width": "auto", "flex": "0 0 auto"})
        self.number = ipywidgets.Text(
            description="code", placeholder="51, or 51 52 60", continuous_update=False, layout={"width": "240px"}
        )
        self.back.on_click(lambda _: self._go(-1))
        self.forward.on_click(lambda _: self._go(1))
        self.number.observe(self._typed, names="value")
        self.page.add_class("ibqlab-code-card")
        super().__init__(
            [ipywidgets.HBox([self.back, self.forward, self.number], layout={"flex_flow": "row wrap"}), self.page]
        )
        self.show(self._first(code))

    @property
    def codes(self) -> tuple[int, ...]:
        """What is shown."""
        return self._path[self._place] if self._path else ()

    def show(self, codes: int | Sequence[int]) -> None:
        """Show a code, or several as a set; "back" returns to what was shown before.

        Args:
            codes: numbers below K; none shows how to choose.
        """
        chosen = (int(codes),) if isinstance(codes, int) or not hasattr(codes, "__len__") else tuple(map(int, codes))
        if not self._path or chosen != self.codes:
            self._path = [*self._path[: self._place + 1], chosen][-REMEMBERED:]
            self._place = len(self._path) - 1
        self._draw()

    def static_html(self) -> str:
        """The card as it is shown now."""
        return self.page.value

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    def _first(self, code: int | Sequence[int] | None) -> int | Sequence[int]:
        if code is not None:
            return code
        return int(self.reader.index.counts.argmax()) if self.reader.index is not None else 0

    def _follow(self, message: dict[str, Any]) -> None:
        if str(message.get("code", "")).isdecimal():
            self.show(int(message["code"]))

    def _go(self, by: int) -> None:
        place = self._place + by
        if 0 <= place < len(self._path):
            self._place = place
            self._draw()

    def _typed(self, _: Any) -> None:
        words = self.number.value.replace(",", " ").split()
        if not words:
            return
        if all(word.isdecimal() for word in words):
            self.show([int(word) for word in words])
        else:
            self._say(f"Codes are whole numbers, 0 to {self.reader.codebook_size - 1:,}; got {self.number.value}.")

    def _draw(self) -> None:
        """Show the card, or why there is none: an error in a callback would be seen by nobody."""
        self.back.disabled, self.forward.disabled = self._place < 1, self._place + 1 >= len(self._path)
        codes = self.codes
        if codes not in self._pages:
            try:
                page = card_html(self.reader.read(codes))
            except (RunError, ValueError, OSError) as error:
                self._say(error)
                return
            self._pages = dict([*self._pages.items(), (codes, page)][-REMEMBERED:])
        self.page.value = self._pages[codes]

    def _say(self, text: object) -> None:
        self.page.value = (
            f'<style>{STYLE}</style><div class="ibq-card"><p class="lack">{for_html(text, None)}</p></div>'
        )
