"""One image as its tokens: the picture under a grid that can be pointed at, what it decodes to, and where that errs.

Tokens that lie on no grid, as TiTok's, are a strip beside the picture. What one of them does, replacing it shows.

tokens = TokenImage(subject.tokenizer, index, image=0)
tokens.replace((3, 4), code=51)      # one token
tokens.replace_code(17, code=51)     # all tokens of a code
token_html(tokens)
"""

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from ibqlab.base.escaping import for_html
from ibqlab.tokenizer import Tokenizer
from ibqlab.views.card_page import STYLE, data_uri
from ibqlab.views.decoding import grid_of
from ibqlab.views.encoding import DOT
from ibqlab.views.patches import PatchIndex

SIDE = 256
"""Height of a picture on the page, CSS pixels: three stand side by side in a narrow notebook."""
TOPS = (8, 16, 32, 64, 128, 255)
"""Ends that the scale of errors may have, grey levels."""
_HEAT = "inferno"
_STRIP, _CELL_WIDTH, _CELL_HEIGHT = 12, 42, 20
"""Tokens of a strip's line, and a token's size there, CSS pixels."""


class TokenImage:
    """One image's tokens, which can be replaced.

    Args:
        tokenizer: the network.
        index: of the images.
        image: which of them.
        hits: of every code in the images that a view looks at; None: in those of the index.
        name: of an image that is none of the run's; "": its number says which it is.
        subject: what the run or checkpoint is called, for the heading.
    Raises:
        ValueError: there is no such image.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        index: PatchIndex,
        image: int = 0,
        *,
        hits: Int[np.ndarray, "K"] | None = None,
        name: str = "",
        subject: str = "",
    ):
        if not 0 <= image < len(index.codes):
            raise ValueError(f"images are 0 to {len(index.codes) - 1:,}; got {image}")
        self.tokenizer, self.index, self.image = tokenizer, index, image
        self.name, self.subject = name, subject
        self.hits = index.counts if hits is None else hits
        self.codes: Int[np.ndarray, "h w"] = index.codes[image].copy()
        self._decoded: dict[bytes, np.ndarray] = {}
        self._before: list[Int[np.ndarray, "h w"]] = []

    @property
    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        """The image itself."""
        return self.index.pictures[self.image]

    @property
    def original(self) -> Int[np.ndarray, "h w"]:
        """Its own tokens."""
        return self.index.codes[self.image]

    @property
    def is_changed(self) -> bool:
        """Whether any token was replaced."""
        return bool((self.codes != self.original).any())

    @property
    def can_undo(self) -> bool:
        """Whether there is a replacement to take back."""
        return bool(self._before)

    def replace(self, place: tuple[int, int], code: int) -> None:
        """Put a code in the place (row, column) of a token; (0, token) where tokens lie on no grid.

        Raises:
            ValueError: no such place, or no such code.
        """
        row, column = self.checked_place(*place)
        places = np.zeros(self.codes.shape, bool)
        places[row, column] = True
        self._put(places, code)

    def checked_place(self, row: int, column: int) -> tuple[int, int]:
        """A token's row and column.

        Raises:
            ValueError: no such place.
        """
        rows, columns = self.codes.shape
        if not (0 <= row < rows and 0 <= column < columns):
            places = f"rows 0 to {rows - 1} and columns 0 to {columns - 1}"
            if not self.index.has_grid:
                places = f"(0, token) with tokens 0 to {columns - 1}, because tokens lie on no grid"
            raise ValueError(f"places are {places}; got {row}, {column}")
        return row, column

    def replace_code(self, old: int, code: int) -> int:
        """Put a code in the place of every token of another; how many there were."""
        places = self.codes == old
        self._put(places, code)
        return int(places.sum())

    def undo(self) -> None:
        """The tokens as they were before the last replacement; nothing where there was none."""
        if self._before:
            self.codes = self._before.pop()

    def restore(self) -> None:
        """Its own tokens again."""
        self.codes, self._before = self.original.copy(), []

    def decode(self, codes: Int[np.ndarray, "h w"] | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """The picture of tokens, of those as they stand now where none are given."""
        codes = self.codes if codes is None else codes
        key = codes.tobytes()
        if key not in self._decoded:
            with torch.no_grad():
                vectors = self.tokenizer.quantizer.decode(torch.from_numpy(codes.astype(np.int64))[None])
            self._decoded = dict([*self._decoded.items(), (key, grid_of(self.tokenizer, vectors)[0])][-8:])
        return self._decoded[key]

    def error(self) -> Float[np.ndarray, "H W"]:
        """Mean absolute difference of the channels between the image and its own tokens' picture, 0 to 255."""
        return np.abs(self.picture.astype(float) - self.decode(self.original)).mean(2)

    @property
    def error_top(self) -> int:
        """The end of a scale that holds 99.5 % of the errors, one of `TOPS`."""
        return scale_top(self.error())

    def psnr(self) -> float:
        """Of its own tokens' picture, dB; inf where nothing differs."""
        squares = ((self.picture.astype(float) - self.decode(self.original)) ** 2).mean()
        return float(10 * np.log10(255**2 / squares)) if squares > 0 else float("inf")

    def _put(self, places: Bool[np.ndarray, "h w"], code: int) -> None:
        if not 0 <= code < self.index.codebook_size:
            raise ValueError(f"codes are 0 to {self.index.codebook_size - 1:,}; got {code:,}")
        if (self.codes[places] != code).any():
            self._before.append(self.codes.copy())
            self.codes[places] = code


def scale_top(values: Float[np.ndarray, "H W"]) -> int:
    """The least of `TOPS` that 99.5 % of the values do not exceed."""
    most = float(np.quantile(values, 0.995))
    return next((top for top in TOPS if top >= most), TOPS[-1])


def token_html(
    tokens: TokenImage, chosen: tuple[int, int] | None = None, error_top: int | None = None, side: int = SIDE
) -> str:
    """The page: image, decoded tokens, error, and what they decode to after a change.

    Args:
        tokens: of one image.
        chosen: a token's row and column; all tokens of its code are marked.
        error_top: end of the error's scale, grey levels, so that two tokenizers can have one; None: its own.
        side: height of a picture, CSS pixels.
    """
    index, image = tokens.index, tokens.image
    label = int(index.labels[image])
    words = f", {index.classes[label]}" if len(index.classes) > 1 and 0 <= label < len(index.classes) else ""
    title = tokens.name or f"image {image:,}{words}"
    rows, columns = tokens.codes.shape
    count = f"{rows} × {columns}" if index.has_grid else f"{columns}"
    over = _grid(tokens, chosen, side) if index.has_grid else ""
    figures = [
        _figure(tokens.picture, side, f"{title}: {count} tokens of {index.codebook_size:,} codes", over),
        _figure(tokens.decode(tokens.original), side, f"its tokens, decoded: {tokens.psnr():.1f} dB"),
        _heat_figure(tokens.error(), side, "error in grey levels, mean of the channels", error_top or tokens.error_top),
    ]
    if tokens.is_changed:
        changed = int((tokens.codes != tokens.original).sum())
        figures.append(
            _figure(tokens.decode(), side, f"{changed:,} token{'s' if changed != 1 else ''} replaced, decoded")
        )
        difference = np.abs(tokens.decode().astype(float) - tokens.decode(tokens.original)).mean(2)
        figures.append(_heat_figure(difference, side, "what that changed, in grey levels", scale_top(difference)))
    if not index.has_grid:
        figures.append(_strip(tokens, chosen))
    facts = describe_token(tokens, chosen)
    heading = f"<h3>{for_html(title)} <small>· {for_html(tokens.subject)}</small></h3>" if tokens.subject else ""
    page = f'{heading}<div class="ibq-tokens">{"".join(figures)}</div><p>{facts}</p>'
    return f'<style>{STYLE}</style><div class="ibq-card">{page}</div>'


def describe_token(tokens: TokenImage, chosen: tuple[int, int] | None) -> str:
    """The chosen token in a sentence, as HTML; how to choose one where none is."""
    if chosen is None:
        return (
            "Point at a token to read its code; click it to mark all tokens of the code and to open its card. "
            "Shift-click takes a code for “replace by”."
        )
    row, column = chosen
    code = int(tokens.codes[row, column])
    here = int((tokens.codes == code).sum())
    of_it = f"{here:,} token{'s' if here != 1 else ''} of code {code:,} here"
    place = tokens.index.place_words(row, column).capitalize()
    return for_html(f"{place}: {_numbers(tokens, row, column)}; {of_it}.", None)


def _numbers(tokens: TokenImage, row: int, column: int) -> str:
    """What there is to know of a token, in one line."""
    index, code, old = tokens.index, int(tokens.codes[row, column]), int(tokens.original[row, column])
    hits = int(tokens.hits[code])
    rank = f", rank {1 + int((tokens.hits > hits).sum()):,}" if hits else ""
    text = f"code {code:,} · {hits:,} hit{'s' if hits != 1 else ''} in all images{rank}"
    if code != old:
        return f"{text} · in place of code {old:,}"
    second = int(index.seconds[tokens.image, row, column])
    if second >= 0:
        lead, distance = index.margin[tokens.image, row, column], index.distance[tokens.image, row, column]
        near = f"dot product {-distance:.3g}" if index.ruler == DOT else f"{index.ruler} distance {distance:.3g}"
        text += f" · {near} · nearly code {second:,}, which is {100 * lead:.2g} % behind"
    return text


def _grid(tokens: TokenImage, chosen: tuple[int, int] | None, side: int) -> str:
    """A square per token over the picture. One of them can be reached by Tab; arrow keys lead to the others."""
    rows, columns = tokens.codes.shape
    height, width = side / rows, side * tokens.picture.shape[1] / tokens.picture.shape[0] / columns
    squares = [
        _square(tokens, chosen, (row, column), (column * width, row * height, width, height))
        for row in range(rows)
        for column in range(columns)
    ]
    return f'<svg class="grid" width="{columns * width:.1f}" height="{side}">{"".join(squares)}</svg>'


def _strip(tokens: TokenImage, chosen: tuple[int, int] | None) -> str:
    """Tokens that lie on no grid, in their order, as cells with their codes."""
    count = tokens.codes.shape[1]
    cells = []
    for token in range(count):
        x, y = token % _STRIP * _CELL_WIDTH, token // _STRIP * _CELL_HEIGHT
        cells.append(_square(tokens, chosen, (0, token), (x, y, _CELL_WIDTH, _CELL_HEIGHT)))
        middle = f'x="{x + _CELL_WIDTH / 2}" y="{y + 14}" text-anchor="middle"'
        cells.append(f"<text {middle}>{int(tokens.codes[0, token])}</text>")
    width, height = min(count, _STRIP) * _CELL_WIDTH, -(-count // _STRIP) * _CELL_HEIGHT
    words = f"codes of tokens 0 to {count - 1}, line by line; they lie on no grid, each is about the whole image"
    figure = f'<svg class="strip" width="{width}" height="{height}">{"".join(cells)}</svg>'
    return f'<figure>{figure}<figcaption style="max-width:{width}px">{words}</figcaption></figure>'


def _square(
    tokens: TokenImage,
    chosen: tuple[int, int] | None,
    place: tuple[int, int],
    box: tuple[float, float, float, float],
) -> str:
    """A token's rectangle: left, top, width and height in `box`."""
    code = None if chosen is None else tokens.codes[chosen]
    here, old = int(tokens.codes[place]), int(tokens.original[place])
    kinds = ["same"] if code is not None and here == code else []
    kinds += ["chosen"] if chosen == place else []
    kinds += ["changed"] if here != old else []
    reached = 0 if place == (chosen or (0, 0)) else -1
    words = for_html(f"{_numbers(tokens, *place)} · {tokens.index.place_words(*place)}", None)
    x, y, width, height = box
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" class="{" ".join(kinds)}" '
        f'data-token="{place[0]},{place[1]}" tabindex="{reached}"><title>{words}</title></rect>'
    )


def _figure(pixels: np.ndarray, side: int, words: str, over: str = "", below: str = "") -> str:
    width = round(side * pixels.shape[1] / pixels.shape[0])
    said = for_html(words, None)
    image = f'<img src="{data_uri(pixels)}" width="{width}" height="{side}" alt="{said}">'
    return f'<figure>{image}{over}<figcaption style="max-width:{width}px">{said}{below}</figcaption></figure>'


def _heat_figure(values: Float[np.ndarray, "H W"], side: int, words: str, top: int) -> str:
    """A map of errors with its scale, dark to bright."""
    colours = matplotlib.colormaps[_HEAT]
    pixels = (255 * colours(np.clip(values / top, 0, 1))[..., :3]).round().astype(np.uint8)
    shades = ",".join(matplotlib.colors.to_hex(colours(part / 8)) for part in range(9))
    end = f"{top}" if top == TOPS[-1] else f"{top} or more"
    scale = f'<span class="scale">0 <i style="background:linear-gradient(to right,{shades})"></i> {end}</span>'
    return _figure(pixels, side, words, below=scale)
