"""The card of a code or a set, with its neighbours one click away, and back."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np

from ibqlab.runs import Run
from ibqlab.views.card_page import card_html, sentence_html, static_card
from ibqlab.views.cards import CardReader
from ibqlab.views.patches import IMAGES
from ibqlab.views.subject import FORESEEN, Subject, lacking
from ibqlab.widgets.live import with_static_page
from ibqlab.widgets.page import Page, safely, status_html

REMEMBERED = 200
"""Steps that "back" goes at most."""
KEPT_PAGES = 64
"""Cards that stay in memory."""
_QUICK = 0.1
"""Seconds of decoding below which a card is shown at once, and not first without its decoded pictures."""
_NAMED = 12
"""Codes that the field of numbers names."""
WHOLE = {"width": "auto", "flex": "0 0 auto"}
"""Layout of a button whose words are never cut off."""


class CodeCard(ipywidgets.VBox):
    """What a code is: its patches, what it decodes to, its life, its neighbours.

    What is missing of a run or checkpoint is said on the card; where there is nothing to look at, that alone is shown.

    Args:
        what: a run, its name or folder, or a checkpoint's file; a `Subject`, or a `CardReader` that another view has.
        code: shown first; several make the card of a set. None: the code in use most.
        images: as of `open_subject`.
        count: images that are looked at, at most.
    """

    def __init__(
        self,
        what: str | Path | Run | Subject | CardReader,
        code: int | Sequence[int] | None = None,
        images: str | Path = "",
        count: int = IMAGES,
    ):
        self._pages: dict[tuple[int, ...], str] = {}
        self._path: list[tuple[int, ...]] = []
        self._place = -1
        self._listeners: list[Callable[[tuple[int, ...]], None]] = []
        self._decoding = float("inf")  # seconds that the last one took
        self.said = ipywidgets.HTML()
        self.page = Page(clicked=safely(self._say, self._follow))
        self.back = ipywidgets.Button(description="◀ back", layout=WHOLE, disabled=True)
        self.forward = ipywidgets.Button(description="forward ▶", layout=WHOLE, disabled=True)
        self.number = ipywidgets.Text(
            description="code", placeholder="51, or 51 52 60", continuous_update=False, layout={"width": "240px"}
        )
        self.back.on_click(safely(self._say, lambda _: self._go(-1)))
        self.forward.on_click(safely(self._say, lambda _: self._go(1)))
        self.number.observe(safely(self._say, self._typed), names="value")
        self.page.add_class("ibqlab-code-card")
        controls = ipywidgets.HBox([self.back, self.forward, self.number], layout={"flex_flow": "row wrap"})
        self.reader: CardReader | None = None
        try:
            self.reader = CardReader.open(what, images, count)
        except FORESEEN as error:
            self.page.value = sentence_html(lacking(error))
        super().__init__([controls, self.said, self.page] if self.reader is not None else [self.page])
        if self.reader is not None:
            self.show(self._first(code))

    @property
    def codes(self) -> tuple[int, ...]:
        """What is shown."""
        return self._path[self._place] if self._path else ()

    def show(self, codes: int | str | Sequence[int]) -> None:
        """Show a code, or several as a set; "back" returns to what was shown before.

        What is no code is said above the card, which stays as it is.

        Args:
            codes: numbers below K, also as text; none shows how to choose.
        """
        safely(self._say, lambda: self._open(self._as_codes(codes)))()

    def on_show(self, listener: Callable[[tuple[int, ...]], None]) -> None:
        """Call a function with the codes whenever a card is shown, whoever asked for it."""
        self._listeners.append(listener)

    def static_html(self) -> str:
        """The card as it is shown now and what is said above it, without its buttons."""
        return static_card(f"{self.said.value}{self.page.value}")

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    def _first(self, code: int | Sequence[int] | None) -> int | Sequence[int]:
        if code is not None:
            return code
        return int(self.reader.index.counts.argmax()) if self.reader.index is not None else 0

    def _open(self, codes: tuple[int, ...]) -> None:
        """Show codes as a new step of the way; one that fails is none."""
        if self.reader is None:
            return
        self._draw(codes)
        if not self._path or codes != self.codes:
            self._path = [*self._path[: self._place + 1], codes][-REMEMBERED:]
            self._place = len(self._path) - 1
        self._set_controls()

    def _follow(self, message: dict[str, Any]) -> None:
        code = str(message.get("code", ""))
        if code.isdecimal():
            self._open((int(code),))

    def _go(self, by: int) -> None:
        place = self._place + by
        if 0 <= place < len(self._path):
            self._draw(self._path[place])
            self._place = place
        self._set_controls()

    def _typed(self, _: Any) -> None:
        if self.number.value.strip() and self.number.value != _numbers(self.codes):
            self._open(self._as_codes(self.number.value))

    def _as_codes(self, codes: Any) -> tuple[int, ...]:
        """A number, several, or text of them, each once."""
        given = typed_codes(codes, self.reader.codebook_size) if isinstance(codes, str) else codes
        try:
            numbers = [int(given)] if np.ndim(given) == 0 else [int(number) for number in given]
        except (TypeError, ValueError):
            last = self.reader.codebook_size - 1
            raise ValueError(f"codes are whole numbers, 0 to {last:,}; got {codes}") from None
        return tuple(dict.fromkeys(numbers))

    def _set_controls(self) -> None:
        self.back.disabled, self.forward.disabled = self._place < 1, self._place + 1 >= len(self._path)
        self.number.value = _numbers(self.codes)
        for listener in self._listeners:
            listener(self.codes)

    def _draw(self, codes: tuple[int, ...]) -> None:
        """Show the card; one that takes a while to decode first without decoded pictures."""
        if codes not in self._pages:
            card = self.reader.read(codes, decode=False)
            if self.reader.index is not None and len(codes) == 1:
                if self._decoding > _QUICK:
                    self.page.value = card_html(card, pending="decoding …")
                began = time.perf_counter()
                card = self.reader.decode(card)
                self._decoding = time.perf_counter() - began
            self._pages = dict([*self._pages.items(), (codes, card_html(card))][-KEPT_PAGES:])
        self.page.value = self._pages[codes]
        self.said.value = ""

    def _say(self, text: str) -> None:
        self.said.value = status_html(text)


def typed_codes(text: str, size: int) -> list[str]:
    """The numbers in a text. Commas may group digits, as the pages here write numbers, or stand between codes.

    Args:
        text: "1,005" is one code where there are as many; "1, 5", "1,5" and "1 5" are two.
        size: of the codebook.
    """
    numbers = []
    for word in (word.strip(",") for word in text.split()):
        joined = word.replace(",", "")
        is_grouped = re.fullmatch(r"\d{1,3}(,\d{3})+", word) and int(joined) < size
        numbers += [joined] if is_grouped else word.replace(",", " ").split()
    return numbers


def _numbers(codes: tuple[int, ...]) -> str:
    """Codes as the field of numbers has them; "" for a set too large to be typed."""
    return " ".join(map(str, codes)) if len(codes) <= _NAMED else ""
