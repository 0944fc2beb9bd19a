"""An image's tokens by hand: point at one, open its code's card, put another in its place."""

from pathlib import Path
from typing import Any

import ipywidgets

from ibqlab.base.escaping import for_html
from ibqlab.base.files import RunError
from ibqlab.runs import Run
from ibqlab.views.cards import CardReader
from ibqlab.views.patches import IMAGES
from ibqlab.views.subject import ViewError, open_subject
from ibqlab.views.token_page import TokenImage, token_html
from ibqlab.widgets.code_card import CodeCard
from ibqlab.widgets.live import with_static_page
from ibqlab.widgets.page import Page


class TokenView(ipywidgets.VBox):
    """An image, its reconstruction and error, and the grid of its tokens; a click opens the code's card.

    Args:
        what: a run, its name or folder, a checkpoint's file, or a `CardReader` that another view has.
        image: shown first.
        images: as of `open_subject`.
        count: images to choose from, at most.
    Raises:
        ViewError: no network or no images, so that there are no tokens.
    """

    def __init__(
        self, what: str | Path | Run | CardReader, image: int = 0, images: str | Path = "", count: int = IMAGES
    ):
        reader = what if isinstance(what, CardReader) else CardReader(open_subject(what, images), count)
        if reader.index is None:
            raise ViewError(f"no tokens of {reader.subject.name}: {' '.join(reader.lacks)}")
        self.reader, self.index = reader, reader.index
        self._network = reader.subject.tokenizer
        self.chosen: tuple[int, int] | None = None
        self.tokens = TokenImage(self._network, self.index, image)
        self.image = ipywidgets.IntSlider(
            value=image, max=len(self.index.codes) - 1, description="image", layout={"width": "min(100%, 420px)"}
        )
        self.code = ipywidgets.Text(
            description="replace by", placeholder="a code", continuous_update=True, layout={"width": "190px"}
        )
        self.one = ipywidgets.Button(description="this token", layout={"width": "auto"})
        self.all = ipywidgets.Button(description="all tokens of its code", layout={"width": "auto"})
        self.undo = ipywidgets.Button(description="undo all", layout={"width": "auto"})
        self.said = ipywidgets.HTML()
        self.page = Page(clicked=self._point)
        self.page.add_class("ibqlab-token-view")
        self.card = CodeCard(reader, code=())
        self.image.observe(self._other_image, names="value")
        self.one.on_click(lambda _: self._replace(every=False))
        self.all.on_click(lambda _: self._replace(every=True))
        self.undo.on_click(self._restore)
        row = ipywidgets.HBox([self.code, self.one, self.all, self.undo], layout={"flex_flow": "row wrap"})
        super().__init__([self.image, self.page, row, self.said, self.card])
        self._draw()

    def choose(self, row: int, column: int) -> None:
        """Choose a token, as a click does; its code's card is shown."""
        rows, columns = self.tokens.codes.shape
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"places are rows 0 to {rows - 1} and columns 0 to {columns - 1}; got {row}, {column}")
        self.chosen = (row, column)
        self._draw()
        self.card.show(int(self.tokens.codes[row, column]))

    def static_html(self) -> str:
        """The page and the card as they are shown now."""
        return f"{self.page.value}{self.card.static_html() if self.chosen else ''}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    def _point(self, message: dict[str, Any]) -> None:
        row, _, column = str(message.get("token", "")).partition(",")
        if row.isdecimal() and column.isdecimal():
            self.choose(int(row), int(column))

    def _other_image(self, _: Any) -> None:
        self.tokens, self.chosen = TokenImage(self._network, self.index, self.image.value), None
        self._draw()

    def _replace(self, every: bool) -> None:
        text = self.code.value.strip().replace(",", "")
        try:
            if self.chosen is None:
                raise ValueError("click a token first")
            if not text.isdecimal():
                raise ValueError(
                    f"type a code, 0 to {self.index.codebook_size - 1:,}, into “replace by”; got {self.code.value!r}"
                )
            if every:
                self.tokens.replace_code(int(self.tokens.codes[self.chosen]), int(text))
            else:
                self.tokens.replace(self.chosen, int(text))
        except ValueError as error:
            self.said.value = for_html(f"Nothing replaced: {error}.", None)
            return
        self._draw()

    def _restore(self, _: Any) -> None:
        self.tokens.restore()
        self._draw()

    def _draw(self) -> None:
        """Show the tokens, or why they cannot be shown: an error in a callback would be seen by nobody."""
        self.said.value = ""
        self.undo.disabled = not self.tokens.is_changed
        try:
            self.page.value = token_html(self.tokens, self.chosen)
        except (RunError, ValueError, RuntimeError) as error:
            self.said.value = for_html(error, None)


def compare_tokens(first: TokenView, second: TokenView) -> ipywidgets.HBox:
    """Two tokenizers on one image, side by side; one slider moves both.

    Args:
        first, second: views of the same images.
    Raises:
        ValueError: they look at different images.
    """
    if first.index.pictures.shape[0] != second.index.pictures.shape[0]:
        raise ValueError(
            f"both views must look at the same images; {first.reader.subject.name} has "
            f"{len(first.index.pictures):,} and {second.reader.subject.name} {len(second.index.pictures):,}: give both "
            "the same images= and count="
        )
    ipywidgets.link((first.image, "value"), (second.image, "value"))
    for view in (first, second):
        view.layout.width = "49%"
    return ipywidgets.HBox([first, second])
