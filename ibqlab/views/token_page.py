"""One image as its tokens: the picture under a grid that can be pointed at, what it decodes to, and where that errs.

tokens = TokenImage(subject.tokenizer, index, image=0)
tokens.replace((3, 4), code=51)      # one token
tokens.replace_code(17, code=51)     # all tokens of a code
token_html(tokens)
"""

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from ibqlab.base.escaping import for_html
from ibqlab.tokenizer import Tokenizer
from ibqlab.views.card_page import STYLE, data_uri
from ibqlab.views.decoding import grid_of
from ibqlab.views.patches import PatchIndex

SIDE = 288
"""Height of a picture on the page, CSS pixels."""


class TokenImage:
    """One image's tokens, which can be replaced.

    Args:
        tokenizer: the network.
        index: of the images.
        image: which of them.
    Raises:
        ValueError: there is no such image.
    """

    def __init__(self, tokenizer: Tokenizer, index: PatchIndex, image: int = 0):
        if not 0 <= image < len(index.codes):
            raise ValueError(f"images are 0 to {len(index.codes) - 1:,}; got {image}")
        self.tokenizer, self.index, self.image = tokenizer, index, image
        self.codes: Int[np.ndarray, "h w"] = index.codes[image].copy()
        self._decoded: dict[bytes, np.ndarray] = {}

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

    def replace(self, place: tuple[int, int], code: int) -> None:
        """Put a code in the place (row, column) of a token.

        Raises:
            ValueError: no such place, or no such code.
        """
        rows, columns = self.codes.shape
        row, column = place
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"places are rows 0 to {rows - 1} and columns 0 to {columns - 1}; got {row}, {column}")
        self.codes[row, column] = self._checked(code)

    def replace_code(self, old: int, code: int) -> int:
        """Put a code in the place of every token of another; how many there were."""
        places = self.codes == old
        self.codes[places] = self._checked(code)
        return int(places.sum())

    def restore(self) -> None:
        """Its own tokens again."""
        self.codes = self.original.copy()

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

    def psnr(self) -> float:
        """Of its own tokens' picture, dB; inf where nothing differs."""
        squares = ((self.picture.astype(float) - self.decode(self.original)) ** 2).mean()
        return float(10 * np.log10(255**2 / squares)) if squares > 0 else float("inf")

    def _checked(self, code: int) -> int:
        if not 0 <= code < self.index.codebook_size:
            raise ValueError(f"codes are 0 to {self.index.codebook_size - 1:,}; got {code:,}")
        return code


def token_html(tokens: TokenImage, chosen: tuple[int, int] | None = None) -> str:
    """The page: image, decoded tokens, error, and what they decode to after a change.

    Args:
        tokens: of one image.
        chosen: a token's row and column; all tokens of its code are marked.
    """
    index, image = tokens.index, tokens.image
    label = int(index.labels[image])
    words = f", {index.classes[label]}" if len(index.classes) > 1 and 0 <= label < len(index.classes) else ""
    figures = [
        _figure(tokens.picture, f"image {image:,}{words}: click a token", _grid(tokens, chosen)),
        _figure(tokens.decode(tokens.original), f"its tokens, decoded: {tokens.psnr():.1f} dB"),
        _figure(_as_heat(tokens.error()), f"error, black 0 to white {max(1, round(tokens.error().max()))} of 255"),
    ]
    if tokens.is_changed:
        changed = int((tokens.codes != tokens.original).sum())
        figures.append(_figure(tokens.decode(), f"{changed:,} token{'s' if changed != 1 else ''} replaced"))
        difference = np.abs(tokens.decode().astype(float) - tokens.decode(tokens.original)).mean(2)
        figures.append(_figure(_as_heat(difference), "what that changed"))
    facts = describe_token(tokens, chosen)
    style = f"<style>{STYLE}</style>"
    return f'{style}<div class="ibq-card"><div class="ibq-tokens">{"".join(figures)}</div><p>{facts}</p></div>'


def describe_token(tokens: TokenImage, chosen: tuple[int, int] | None) -> str:
    """The chosen token in a sentence, as HTML; how to choose one where none is."""
    if chosen is None:
        return "Hover over a token to read its code; click it to see all tokens of the code, and its card."
    row, column = chosen
    code = int(tokens.codes[row, column])
    here = int((tokens.codes == code).sum())
    text = f"Row {row}, column {column}: code {code:,}, {here:,} of {tokens.codes.size:,} tokens here"
    second = int(tokens.index.seconds[tokens.image, row, column])
    if second >= 0 and code == tokens.original[row, column]:
        text += f"; nearly {second:,} (lead {100 * tokens.index.margin[tokens.image, row, column]:.1f} %)"
    return for_html(f"{text}.", None)


def _grid(tokens: TokenImage, chosen: tuple[int, int] | None) -> str:
    """A square per token over the picture."""
    rows, columns = tokens.codes.shape
    height, width = SIDE / rows, SIDE * tokens.picture.shape[1] / tokens.picture.shape[0] / columns
    code = None if chosen is None else tokens.codes[chosen]
    squares = []
    for row in range(rows):
        for column in range(columns):
            here, old = int(tokens.codes[row, column]), int(tokens.original[row, column])
            kinds = ["same"] if code is not None and here == code else []
            kinds += ["chosen"] if chosen == (row, column) else []
            kinds += ["changed"] if here != old else []
            squares.append(
                f'<rect x="{column * width:.2f}" y="{row * height:.2f}" width="{width:.2f}" height="{height:.2f}" '
                f'class="{" ".join(kinds)}" data-token="{row},{column}" tabindex="0"><title>code {here:,}, row {row}, '
                f"column {column}</title></rect>"
            )
    return f'<svg class="grid" width="{columns * width:.1f}" height="{SIDE}">{"".join(squares)}</svg>'


def _figure(pixels: np.ndarray, words: str, over: str = "") -> str:
    width = round(SIDE * pixels.shape[1] / pixels.shape[0])
    image = f'<img src="{data_uri(pixels)}" width="{width}" height="{SIDE}" alt="{for_html(words, None)}">'
    return f'<figure>{image}{over}<figcaption style="max-width:{width}px">{for_html(words, None)}</figcaption></figure>'


def _as_heat(values: Float[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Black to white, the largest white."""
    scaled = (255 * values / max(values.max(), 1.0)).round().astype(np.uint8)
    return np.repeat(scaled[..., None], 3, axis=2)
