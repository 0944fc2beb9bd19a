"""A card as HTML: pictures and numbers in one page that needs nothing from elsewhere.

Every code on it is a button with `data-code`, which a widget answers; where none does, `static_card` is the same page.
"""

import base64
import io
from collections.abc import Sequence
from importlib import resources

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ibqlab.base.escaping import for_html
from ibqlab.views.cards import Card, Life, Neighbour
from ibqlab.views.patches import PatchIndex
from ibqlab.views.snapshot_arrays import NEVER, NOT_STORED

PATCH_SIDE = 64
"""Height of a patch with its surroundings on a page, CSS pixels."""
PICTURE_SIDE = 132
"""Height of a decoded picture."""
MOST_NAMED = 12
"""Codes of a set that its card names."""
STYLE = resources.files(__package__).joinpath("card.css").read_text(encoding="utf-8")
"""Of cards and of tokens, in a notebook's colours where it has some."""


def card_html(card: Card, pending: str = "") -> str:
    """The page of a card, with its style.

    Args:
        card: of a code or a set.
        pending: what stands in the place of decoded pictures while they are being made.
    """
    title = f'<h3 tabindex="-1">{for_html(card.title)} <small>· {for_html(card.name)}</small></h3>'
    parts = [title, _facts(card)]
    if card.index is not None and card.codes:
        parts += _patch_rows(card, card.index)
    if card.decoded is not None:
        parts.append(_decoded_row(card))
    elif pending:
        parts.append(f'<h4>Decodes to</h4><p class="lack">{for_html(pending)}</p>')
    if card.life is not None:
        parts += ["<h4>Use through training</h4>", life_svg(card.life)]
    parts += [_classes(card), _shared(card), _neighbours(card)]
    parts += [f'<p class="lack">{for_html(text, None)}</p>' for text in card.lacks]
    return f'<style>{STYLE}</style><div class="ibq-card">{"".join(parts)}</div>'


def static_card(page: str) -> str:
    """A page of `card_html` for print and saved notebooks, where no kernel answers: codes are words, not buttons."""
    return page.replace('<button type="button" data-code=', "<span data-code=").replace("</button>", "</span>")


def sentence_html(text: object) -> str:
    """A page that holds a sentence alone: why there is no card."""
    return f'<style>{STYLE}</style><div class="ibq-card"><p class="lack">{for_html(text, None)}</p></div>'


def _facts(card: Card) -> str:
    if not card.codes:
        choose = "Click a point of a map or a token of an image, draw a lasso around points, or type a number."
        return f'<p class="lack">{choose}</p>'
    facts = []
    if card.index is not None:
        share = 100 * card.hits / card.index.tokens
        facts.append(f"{card.hits:,} of {card.index.tokens:,} tokens ({share:.3g} %)")
        facts.append(f"in {card.images:,} of {_images(card.index)}")
        if not card.is_set and card.hits:
            rank = 1 + int((card.index.counts > card.hits).sum())
            facts.append(f"rank {rank:,} by use")
        if card.is_set:
            facts.append(f"{int((card.index.counts[list(card.codes)] > 0).sum()):,} of them in use there")
    if card.parts:
        facts.append(f"stands for the indices {', '.join(f'{part:,}' for part in card.parts)} of its parts")
    if card.norm is not None:
        facts.append(f"{'mean ' if card.is_set else ''}norm {card.norm:.3g}")
    if card.life is not None:
        last = card.life.last_hit
        without = {NEVER: "never hit in training", NOT_STORED: "its last hit in training was not stored"}
        facts.append(without.get(last, f"last hit in training at step {last:,}"))
    return f"<p>{for_html('; '.join(facts), None)}</p>"


def _images(index: PatchIndex) -> str:
    return f"{len(index.codes):,} image{'s' if len(index.codes) != 1 else ''}"


def _patch_rows(card: Card, index: PatchIndex) -> list[str]:
    if not len(card.typical):
        return ['<p class="lack">No token of these images takes it.</p>']
    kind = "Patches" if index.has_grid else "Images of tokens"
    heading = f"{kind} nearest to" if index.ruler else f"{kind} of"
    parts = [f"<h4>{heading} {'their codes' if card.is_set else 'it'}</h4>"]
    parts.append(patch_row(index, card.typical, captions=card.is_set))
    mean = card.mean_patch() if card.is_set else None
    if mean is not None:
        parts += [
            f"<h4>What these {'patches' if index.has_grid else 'images'} share: their mean</h4>",
            f'<div class="row">{picture(mean, PATCH_SIDE, "mean patch")}</div>',
        ]
    if len(card.margin):
        parts += ["<h4>At the margin: nearly another code's</h4>", patch_row(index, card.margin, seconds=True)]
    return parts


def patch_row(index: PatchIndex, tokens: Sequence[int], *, captions: bool = False, seconds: bool = False) -> str:
    """Patches side by side, the token's own square framed; whole images where tokens lie on no grid.

    Args:
        index: of the images.
        tokens: their numbers.
        captions: name each token's code below its patch.
        seconds: name the code that it nearly went to.
    """
    figures = []
    for token in map(int, tokens):
        cut, square = index.cut(token)
        image, row, column = index.place(token)
        code, second = int(index.codes[image, row, column]), int(index.seconds[image, row, column])
        words = f"image {image}, {index.place_words(row, column)}: code {code:,}"
        below = code if captions else second if seconds and second >= 0 else None
        chip = "" if below is None else f"<figcaption>{code_chip(below)}</figcaption>"
        figures.append(f"<figure>{picture(cut, PATCH_SIDE, words, square)}{chip}</figure>")
    return f'<div class="row">{"".join(figures)}</div>'


def picture(
    pixels: UInt8[np.ndarray, "h w 3"], side: int, words: str, square: tuple[int, int, int, int] | None = None
) -> str:
    """An image of a page, `side` CSS pixels high.

    Args:
        pixels: of it.
        side: its height.
        words: what it shows, for those who do not see it.
        square: left, top, width and height of a frame, in pixels.
    """
    scale = side / pixels.shape[0]
    frame = ""
    if square is not None:
        left, top, width, height = (round(scale * value, 1) for value in square)
        frame = f'<span class="square" style="left:{left}px;top:{top}px;width:{width}px;height:{height}px"></span>'
    width = round(scale * pixels.shape[1])
    shown = for_html(words)
    return f'<img src="{data_uri(pixels)}" width="{width}" height="{side}" alt="{shown}" title="{shown}">{frame}'


def data_uri(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    """Pixels as the address of a PNG."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def code_chip(code: int, words: str = "") -> str:
    """A code that can be clicked."""
    return f'<button type="button" data-code="{code}">{code:,}{words}</button>'


def _decoded_row(card: Card) -> str:
    decoded, index = card.decoded, card.index
    image, row, column = decoded.place
    height, width = index.patch
    square = (column * width, row * height, width, height) if index.has_grid else None
    mean = card.mean_patch()
    old = int(index.codes[image, row, column])
    patches, its = ("patches", "this code") if index.has_grid else ("images", f"token {column}, this code,")
    shown = [] if mean is None else [(mean, f"for comparison, the mean of its {patches}", None)]
    shown += [
        (decoded.alone, "every token is this code", None),
        (
            decoded.among_average,
            f"{its} among tokens of the mean code vector",
            _middle(decoded.among_average, index),
        ),
        (decoded.before, f"image {image}, decoded", square),
        (
            decoded.after,
            f"the same, its {'framed token' if index.has_grid else f'token {column}'} (code {old:,}) replaced",
            square,
        ),
    ]
    figures = "".join(
        f"<figure>{picture(pixels, PICTURE_SIDE, words, frame)}<figcaption>{for_html(words)}</figcaption></figure>"
        for pixels, words, frame in shown
    )
    return f'<h4>Decodes to</h4><div class="row">{figures}</div>'


def _middle(pixels: np.ndarray, index: PatchIndex) -> tuple[int, int, int, int] | None:
    if not index.has_grid:
        return None
    height, width = index.patch
    rows, columns = pixels.shape[0] // height, pixels.shape[1] // width
    return (columns // 2 * width, rows // 2 * height, width, height)


def life_svg(life: Life) -> str:
    """Share of tokens at each snapshot as a small chart, and below it when it came into use and was without a hit."""
    width, height, left, bottom = 430, 92, 58, 16
    shares = 100 * life.hits / np.maximum(life.tokens, 1)
    steps = life.steps.astype(float)
    span = max(steps[-1] - steps[0], 1.0)
    top = float(shares.max()) or 1.0
    x = left + (width - left - 8) * (steps - steps[0]) / span
    y = 8 + (height - bottom - 8) * (1 - shares / top)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2" fill="#0072B2"/>' for a, b in zip(x, y, strict=True))
    events = [f"{word} by step {step:,}" for step, word in life.events][:8]
    text = "; ".join(events) or f"no hit in the {life.counted} of any snapshot"
    floor = height - bottom
    more = " …" if len(life.events) > len(events) else ""
    return (
        f'<svg width="{width}" viewBox="0 0 {width} {height}" style="max-width: 100%" role="img" '
        f'aria-label="share of tokens against training step">'
        f'<line x1="{left}" y1="{floor}" x2="{width - 8}" y2="{floor}" stroke="currentColor" opacity=".4"/>'
        f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="1.5"/>{dots}'
        f'<text x="{left - 4}" y="14" text-anchor="end">{top:.2g} %</text>'
        f'<text x="{left - 4}" y="{floor + 3}" text-anchor="end">0</text>'
        f'<text x="{left}" y="{height - 3}">{int(steps[0]):,}</text>'
        f'<text x="{(left + width) / 2}" y="{height - 3}" text-anchor="middle">'
        f"training step; share of {life.counted}</text>"
        f'<text x="{width - 8}" y="{height - 3}" text-anchor="end">{int(steps[-1]):,}</text></svg>'
        f"<p>{for_html(text, None)}{more}</p>"
    )


def _classes(card: Card) -> str:
    rows = card.classes[:6]
    if not rows:
        return ""
    most = rows[0][1]
    lines = "".join(
        f'<tr><td>{for_html(name)}</td><td><span class="bar" style="width:{max(1, 120 * count // most)}px"></span>'
        f"{count:,}</td><td>{lift:.1f} × its share</td></tr>"
        for name, count, lift in rows
    )
    more = f"<p>and {len(card.classes) - len(rows):,} further classes</p>" if len(card.classes) > len(rows) else ""
    return f"<h4>Classes of the images</h4><table>{lines}</table>{more}"


def _shared(card: Card) -> str:
    """Whether the codes of a set are neighbours of each other."""
    texts = []
    if card.near_inside is not None:
        near = card.near_inside
        which = "each of its codes" if near.asked == len(card.codes) else f"each of {near.asked:,} of its codes"
        texts.append(
            f"Of the {near.nearest} codes nearest to {which}, {100 * near.share:.0f} % are in the set "
            f"(by chance {100 * near.by_chance:.3g} %)."
        )
    if card.beside_inside is not None:
        beside = card.beside_inside
        pairs = f"{beside.pairs:,} pair{'s' if beside.pairs != 1 else ''} of codes in use"
        texts.append(
            f"Of its {pairs}, {beside.seen:,} stand beside each other in the images "
            f"({100 * beside.seen / beside.pairs:.3g} %), {beside.lift:.2g} times as often as by chance."
        )
    return (
        "<h4>What its codes share</h4>" + "".join(f"<p>{for_html(text, None)}</p>" for text in texts) if texts else ""
    )


def _neighbours(card: Card) -> str:
    if card.is_set:
        named = "".join(code_chip(code) for code in card.codes[:MOST_NAMED])
        more = f"<p>and {len(card.codes) - MOST_NAMED:,} more</p>" if len(card.codes) > MOST_NAMED else ""
        return f'<h4>The codes</h4><div class="row">{named}</div>{more}' if card.codes else ""
    parts = []
    for title, found, unit in (
        ("Nearest codes, by distance", card.near, ""),
        ("Codes beside it more often than by chance", card.beside, " ×"),
    ):
        if found:
            parts.append(f'<h4>{title}</h4><div class="row">{"".join(_chip(card, one, unit) for one in found)}</div>')
    return "".join(parts)


def _chip(card: Card, neighbour: Neighbour, unit: str) -> str:
    """A neighbour with the patch nearest to it."""
    image = ""
    if card.index is not None:
        tokens = card.index.typical([neighbour.code], 1)
        if len(tokens):
            cut, _ = card.index.cut(int(tokens[0]))
            image = picture(cut, 44, f"code {neighbour.code:,}")
    return (
        f'<button type="button" data-code="{neighbour.code}">{image}{neighbour.code:,}<br>'
        f"<small>{neighbour.value:.3g}{unit}</small></button>"
    )
