"""An image's tokens by hand: point at one, open its code's card, put another in its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
from PIL import Image

from ibqlab.data import open_picture
from ibqlab.runs import Run
from ibqlab.views.card_page import sentence_html
from ibqlab.views.cards import CardReader
from ibqlab.views.patches import IMAGES, PatchIndex, index_picture
from ibqlab.views.subject import FORESEEN, Subject, ViewError, lacking
from ibqlab.views.token_page import SIDE, TokenImage, token_html
from ibqlab.widgets.code_card import CodeCard, typed_codes
from ibqlab.widgets.live import with_static_page
from ibqlab.widgets.page import Page, safely, status_html

Picture = str | Path | bytes | Image.Image
"""An image of the user's own: its file, the file's content, or as Pillow has it."""


SIDE_BY_SIDE = 168
"""Height of pictures where two tokenizers share the page, CSS pixels."""


class TokenView(ipywidgets.VBox):
    """An image, its reconstruction and error, and the grid of its tokens; a click opens the code's card.

    The image is one of the run's, or one of the user's own. Where nothing can be encoded or decoded, that is said.

    Args:
        what: a run, its name or folder, a checkpoint's file, a `Subject`, or a `CardReader` that another view has.
        image: shown first: a number, or a picture of the user's own as its file or as Pillow has it.
        images: as of `open_subject`.
        count: images to choose from, at most.
    """

    def __init__(
        self,
        what: str | Path | Run | Subject | CardReader,
        image: int | Picture = 0,
        images: str | Path = "",
        count: int = IMAGES,
    ):
        self.reader: CardReader | None = None
        self.card: CodeCard | None = None
        self.chosen: tuple[int, int] | None = None
        self.tokens: TokenImage | None = None
        self.index: PatchIndex | None = None
        self.error_top: int | None = None
        """End of the error's scale, grey levels; None: what the image needs."""
        self.side = SIDE
        """Height of its pictures, CSS pixels."""
        self.picture: tuple[Image.Image, str] | None = None
        """The image of the user's own that is shown, and its name."""
        self._listeners: list[Callable[[], None]] = []
        self.said = ipywidgets.HTML()
        self.page = Page(clicked=safely(self._say, self._point))
        self.page.add_class("ibqlab-token-view")
        super().__init__([self.page])
        try:
            self.reader = CardReader.open(what, images, count)
            self._network = self.reader.subject.tokenizer
        except FORESEEN as error:
            self.page.value = sentence_html(lacking(error))
            return
        self.index = self.reader.index
        self._build_controls()
        if not isinstance(image, int | np.integer):
            safely(self._say_instead, self.open_image)(image)
        elif self.index is None:
            self._say_instead(" ".join(self.reader.lacks))
        else:
            safely(self._say_instead, self.show_image)(int(image))
            self._set_slider(int(image))

    # --- what others call ---

    def choose(self, row: int, column: int) -> None:
        """Choose a token, as a click does; its code's card is shown.

        Raises:
            ValueError: there is no such token.
        """
        if self.tokens is None:
            raise ViewError("there is no image yet; open one with open_image(FILE)")
        self.chosen = self.tokens.checked_place(row, column)
        self._draw()
        self.card.show(int(self.tokens.codes[row, column]))

    def show_image(self, image: int) -> None:
        """Show one of the run's images.

        Raises:
            ValueError: there is no such image.
        """
        if self.index is None:
            raise ViewError(" ".join(self.reader.lacks if self.reader else ()) or "there are no images")
        self._show(TokenImage(self._network, self.index, image, subject=self.reader.subject.name))

    def open_image(self, picture: Picture, name: str = "") -> None:
        """Show an image of the user's own, resized and cropped as validation images are.

        Args:
            picture: its file, the file's content, or as Pillow has it.
            name: what it is called; "": its file's name.
        Raises:
            ValueError: no picture, or one that cannot be cropped.
            ViewError: the network cannot encode it.
        """
        name = name or (Path(picture).name if isinstance(picture, str | Path) else "your image")
        opened = picture if isinstance(picture, Image.Image) else open_picture(picture, name)
        subject = self.reader.subject
        index = index_picture(subject, opened)
        self._show(TokenImage(self._network, index, hits=self._hits(), name=name, subject=subject.name), (opened, name))

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call a function whenever another image or token is chosen, or tokens are replaced."""
        self._listeners.append(listener)

    def redraw(self, error_top: int | None) -> None:
        """Draw again with another scale of errors."""
        self.error_top = error_top
        self._draw_page()

    def static_html(self) -> str:
        """The page and the card as they are shown now."""
        return f"{self.page.value}{self.card.static_html() if self.card and self.card.codes else ''}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    # --- inside ---

    def _build_controls(self) -> None:
        last = len(self.index.codes) - 1 if self.index is not None else 0
        self.image = ipywidgets.IntSlider(
            max=last, description="image", continuous_update=False, layout={"width": "min(100%, 420px)"}
        )
        self.own = ipywidgets.FileUpload(accept="image/*", description="open an image", layout={"width": "auto"})
        self.again = ipywidgets.Button(
            description="back to the run's images", layout={"width": "auto", "display": "none"}
        )
        self.code = ipywidgets.Text(
            description="replace by", placeholder="a code", continuous_update=True, layout={"width": "190px"}
        )
        self.one = ipywidgets.Button(description="this token", layout={"width": "auto"})
        self.all = ipywidgets.Button(description="all tokens of its code", layout={"width": "auto"})
        self.undo = ipywidgets.Button(description="undo", layout={"width": "auto"}, disabled=True)
        self.undo_all = ipywidgets.Button(description="undo all", layout={"width": "auto"}, disabled=True)
        self.card = CodeCard(self.reader, code=())
        self.image.observe(safely(self._say, lambda _: self.show_image(self.image.value)), names="value")
        self.again.on_click(safely(self._say, lambda _: self.show_image(self.image.value)))
        self.own.observe(safely(self._say, self._upload), names="value")
        self.one.on_click(safely(self._say_unreplaced, lambda _: self._replace(every=False)))
        self.all.on_click(safely(self._say_unreplaced, lambda _: self._replace(every=True)))
        self.undo.on_click(safely(self._say, lambda _: self._take_back(TokenImage.undo)))
        self.undo_all.on_click(safely(self._say, lambda _: self._take_back(TokenImage.restore)))
        wrapped = {"flex_flow": "row wrap"}
        choice = ipywidgets.HBox([*([self.image] if last else []), self.own, self.again], layout=wrapped)
        changes = ipywidgets.HBox([self.code, self.one, self.all, self.undo, self.undo_all], layout=wrapped)
        self.children = [choice, self.page, changes, self.said, self.card]

    def _hits(self) -> Any:
        """Of all codes in the run's images, where there are some."""
        return self.index.counts if self.index is not None else None

    def _show(self, tokens: TokenImage, picture: tuple[Image.Image, str] | None = None) -> None:
        self.tokens, self.picture, self.chosen, self.error_top = tokens, picture, None, None
        self.again.layout.display = "" if picture and self.index is not None else "none"
        self._draw()

    def _set_slider(self, image: int) -> None:
        if self.tokens is not None and 0 <= image <= self.image.max:
            self.image.value = image

    def _upload(self, change: Any) -> None:
        if change["new"]:
            file = change["new"][0]
            self.open_image(bytes(file["content"]), str(file["name"]))

    def _point(self, message: dict[str, Any]) -> None:
        row, _, column = str(message.get("token", "")).partition(",")
        if not (row.isdecimal() and column.isdecimal()):
            return
        if message.get("shift") and self.tokens is not None:
            self.code.value = str(self.tokens.codes[int(row), int(column)])
        else:
            self.choose(int(row), int(column))

    def _replace(self, every: bool) -> None:
        if self.tokens is None or self.chosen is None:
            raise ValueError("click a token first")
        size = self.tokens.index.codebook_size
        words = typed_codes(self.code.value, size)
        text = words[0] if len(words) == 1 else ""
        if not text.isdecimal():
            last = size - 1
            raise ValueError(f"type a code, 0 to {last:,}, into “replace by”; got {self.code.value!r}")
        here, own, new = int(self.tokens.codes[self.chosen]), int(self.tokens.original[self.chosen]), int(text)
        if every:
            # Where this one has been replaced already, the others of the code that it had are meant.
            old = own if here == new else here
            if not (old != new and self.tokens.replace_code(old, new)):
                raise ValueError(f"no token of code {old:,} is left here" if old != new else _already(new))
        elif here == new:
            raise ValueError(_already(new))
        else:
            self.tokens.replace(self.chosen, new)
        self._draw()

    def _take_back(self, how: Callable[[TokenImage], None]) -> None:
        if self.tokens is not None:
            how(self.tokens)
            self._draw()

    def _draw(self) -> None:
        self._draw_page()
        for listener in self._listeners:
            listener()

    def _draw_page(self) -> None:
        self.said.value = ""
        self.undo.disabled = self.undo_all.disabled = not self.tokens.can_undo
        self.page.value = token_html(self.tokens, self.chosen, self.error_top, self.side)

    def _say(self, text: str) -> None:
        self.said.value = status_html(text)

    def _say_unreplaced(self, text: str) -> None:
        self._say(f"Nothing replaced: {text}")

    def _say_instead(self, text: str) -> None:
        """In the place of an image."""
        self.page.value = sentence_html(text)


def _already(code: int) -> str:
    return f"the token has code {code:,} already"


def compare_tokens(
    first: TokenView | str | Path | Run | Subject | CardReader,
    second: TokenView | str | Path | Run | Subject | CardReader,
    image: int | Picture = 0,
    images: str | Path = "",
    count: int = IMAGES,
) -> ipywidgets.HBox:
    """Two tokenizers on one image, side by side: one slider moves both, and errors have one scale.

    Their grids and codebooks may differ. A token that is chosen on one side is chosen at the same place on the other,
    where tokens of both lie on a grid.

    Args:
        first, second: views of the same images, or what `TokenView` takes.
        image, images, count: as of `TokenView`; images that are not named are those of the first.
    Raises:
        ValueError: the two look at different images.
    """
    views = [first, second]
    if not isinstance(first, TokenView):
        views[0] = TokenView(first, image, images, count)
    if not isinstance(second, TokenView):
        subject = views[0].reader.subject if views[0].reader else None
        own = (subject.images or str(subject.path if subject.run else "")) if subject else ""
        views[1] = TokenView(second, image, images or own, count)
    _require_same_images(*views)
    both = [view for view in views if view.tokens is not None]
    for view in both:
        view.side = SIDE_BY_SIDE
        view.redraw(None)
    if len(both) == 2:
        ipywidgets.link((both[0].image, "value"), (both[1].image, "value"))
        _Pair(*both)
    for view in views:
        view.layout.width, view.layout.padding = "50%", "0 12px 0 0"
    return ipywidgets.HBox(views)


def _require_same_images(first: TokenView, second: TokenView) -> None:
    one, two = first.index, second.index
    if one is None or two is None or (one.images_mark, len(one.codes)) == (two.images_mark, len(two.codes)):
        return
    names = [view.reader.subject.name for view in (first, second)]
    sides = one.pictures.shape[1], two.pictures.shape[1]
    sizes = "" if sides[0] == sides[1] else f", at {sides[0]} and {sides[1]} pixels, for which photos are cut again"
    raise ValueError(
        f"both views must look at the same images; {names[0]} has {len(one.codes):,} and {names[1]} {len(two.codes):,} "
        f"of its own{sizes}: give both the same images=FOLDER, or images='digits', and the same count= "
        "and image_size="
    )


class _Pair:
    """Keeps two views in step."""

    def __init__(self, first: TokenView, second: TokenView):
        self._views, self._busy = (first, second), False
        for one, other in (self._views, self._views[::-1]):
            one.on_change(lambda one=one, other=other: self._follow(one, other))
        self._follow(first, second)

    def _follow(self, one: TokenView, other: TokenView) -> None:
        """The same image, the same scale of errors, and the same place chosen."""
        if self._busy:
            return
        self._busy = True
        try:
            if one.picture != other.picture:
                if one.picture is not None:
                    other.open_image(*one.picture)
                else:
                    other.show_image(one.image.value)
            if one.chosen is not None and one.tokens.index.has_grid and other.tokens.index.has_grid:
                places = zip(one.chosen, one.tokens.codes.shape, other.tokens.codes.shape, strict=True)
                place = tuple(int((chosen + 0.5) / size * others) for chosen, size, others in places)
                if place != other.chosen:
                    other.choose(*place)
            top = max(view.tokens.error_top for view in self._views)
            for view in self._views:
                if view.error_top != top:
                    view.redraw(top)
        finally:
            self._busy = False
