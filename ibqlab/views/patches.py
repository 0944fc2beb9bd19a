"""The tokens of many images: which code stands where, how near its feature lies, and the pictures to cut patches from.

`index_patches` computes them once per run and images; `PatchIndex` answers from them without the network. How they are
computed is `encoding`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from ibqlab.base.checks import whole_number
from ibqlab.data.broken import UnreadableName
from ibqlab.views import encoding
from ibqlab.views.subject import Subject

IMAGES = 512
"""Images that a view looks at, at most, unless it is told."""
MOST_IMAGES = 100_000
EDGE = 128
"""Grey of what lies beyond a picture's edge."""
WHOLE_SIDE = 96
"""Height and width of a whole picture where it stands for a token that lies on no grid, pixels at most."""
_OFTEN = 3
"""Times that codes must stand beside each other to be named as neighbours."""
_RANKED = 32_768
"""Tokens of a set, the nearest, that take turns by code and image, at most."""
_BY_CHANCE = 1.005
"""Times as often as by chance that count as chance: they are shown as 1."""
_VERSION = 5
"""Of what is stored; a change of its meaning needs another."""


@dataclass(frozen=True, kw_only=True)
class PatchIndex:
    """Tokens of N images on grids of h × w, and their pictures.

    Tokens without a grid, as TiTok's, are one row (N, 1, T). No square of the picture is theirs, so that the whole
    picture is shown in its place, and no code stands beside another.
    """

    pictures: UInt8[np.ndarray, "N H W 3"]
    """As the tokenizer saw them."""
    codes: Int[np.ndarray, "N h w"]
    """Code of each token."""
    seconds: Int[np.ndarray, "N h w"]
    """The code that would come next; −1 where no ruler orders the codes."""
    distance: Float[np.ndarray, "N h w"]
    """From the token's feature to its code, by the ruler; of a dot product its negative; NaN without one."""
    margin: Float[np.ndarray, "N h w"]
    """Lead of the code over the second, 0 (a tie) to 1, by the ruler; NaN without one."""
    labels: Int[np.ndarray, "N"]
    """Class of each image; −1 where it has none."""
    classes: tuple[str, ...]
    """Their names."""
    ruler: str
    """How nearness is measured: "L2", "dot product" or "cosine", the one that chooses the same codes as the method;
    "" where none does, as for codes of several parts."""
    codebook_size: int
    """K."""
    broken: tuple[UnreadableName, ...] = ()
    """Names of images that could not be read, each with its reason; they are left out."""
    numbers: tuple[int, ...] = ()
    """Of each image in its source; empty for a picture of the user's own."""
    step: int | None = None
    """Training step of the network; None of a file, which does not tell it."""
    images_mark: str = ""
    """Identity of the images, whatever the tokenizer."""
    has_grid: bool = True
    """Whether tokens lie over the picture."""

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.codes.size

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a token's square, pixels; of the picture where tokens lie on no grid."""
        if not self.has_grid:
            return self.pictures.shape[1:3]
        (height, width), (rows, columns) = self.pictures.shape[1:3], self.codes.shape[1:]
        return height // rows, width // columns

    @cached_property
    def counts(self) -> Int[np.ndarray, "K"]:
        """Hits per code."""
        return np.bincount(self.codes.ravel(), minlength=self.codebook_size)

    @cached_property
    def _order(self) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "K1"]]:
        """Tokens sorted by code, and where each code's begin."""
        order = np.argsort(self.codes.ravel(), kind="stable")
        return order, np.concatenate([[0], np.cumsum(self.counts)])

    def tokens_of(self, code: int) -> Int[np.ndarray, "n"]:
        """Numbers of a code's tokens, in the images' order."""
        order, starts = self._order
        return order[starts[code] : starts[code + 1]]

    def tokens_of_set(self, codes: Sequence[int]) -> Int[np.ndarray, "n"]:
        """Numbers of the tokens of several codes."""
        if len(codes) == 1:
            return self.tokens_of(codes[0])
        inside = np.zeros(self.codebook_size, bool)
        inside[list(codes)] = True
        return np.flatnonzero(inside[self.codes.ravel()])

    def typical(self, codes: Sequence[int], count: int, inside: int = 0) -> Int[np.ndarray, "n"]:
        """Tokens of some codes that lie nearest to their code, of as many codes and images as possible.

        Args:
            codes: their numbers.
            count: tokens at most.
            inside: only tokens with so many squares of their picture on each side.
        """
        tokens = self.tokens_of_set(codes)
        tokens = tokens[self.is_inside(tokens, inside)] if inside else tokens
        return self._spread(tokens, self.distance.ravel()[tokens], count, by_code=len(codes) > 1)

    def at_margin(self, codes: Sequence[int], count: int) -> Int[np.ndarray, "n"]:
        """Tokens of some codes that nearly went to another; none without a ruler."""
        tokens = self.tokens_of_set(codes) if self.ruler else np.zeros(0, np.int64)
        return self._spread(tokens, self.margin.ravel()[tokens], count)

    def _spread(self, tokens: np.ndarray, values: np.ndarray, count: int, by_code: bool = False) -> np.ndarray:
        """Tokens with the smallest values; of each image one, until all images had their turn.

        Args:
            tokens: their numbers.
            values: of each.
            count: how many at most.
            by_code: likewise of each code, before images take turns.
        """
        if len(tokens) > _RANKED:
            few = np.sort(np.argpartition(values, _RANKED)[:_RANKED])
            tokens, values = tokens[few], values[few]
        tokens = tokens[np.argsort(values, kind="stable")]
        tokens = tokens[_turns(tokens // (self.codes.shape[1] * self.codes.shape[2]))]
        return (tokens[_turns(self.codes.ravel()[tokens])] if by_code else tokens)[:count]

    def place(self, token: int) -> tuple[int, int, int]:
        """Image, row and column of a token."""
        image, row, column = np.unravel_index(token, self.codes.shape)
        return int(image), int(row), int(column)

    def place_words(self, row: int, column: int) -> str:
        """The place of a token in its image, for people."""
        return f"row {row}, column {column}" if self.has_grid else f"token {column}"

    def cut(self, token: int, context: int = 1) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int, int, int] | None]:
        """A token's square with its surroundings; without a grid the whole picture, small.

        Args:
            token: its number.
            context: squares around it on each side, at least 0; grey beyond the picture's edge.
        Returns:
            The cut-out, 2·context + 1 squares high and wide, and the square's left, top, width and height in it,
            pixels; None where there is no grid.
        """
        image, row, column = self.place(token)
        if not self.has_grid:
            return shrink(self.pictures[image], WHOLE_SIDE), None
        height, width = self.patch
        top, left = (row - context) * height, (column - context) * width
        bottom, right = (row + context + 1) * height, (column + context + 1) * width
        inside = self.pictures[image, max(0, top) : bottom, max(0, left) : right]
        around = ((max(0, -top), bottom - top - max(0, -top) - inside.shape[0]),)
        around += ((max(0, -left), right - left - max(0, -left) - inside.shape[1]), (0, 0))
        cut = np.pad(inside, around, constant_values=EDGE)
        return cut, (context * width, context * height, width, height)

    def is_inside(self, tokens: Int[np.ndarray, "*n"], context: int = 1) -> Bool[np.ndarray, "*n"]:
        """Whether the surroundings of tokens lie within their picture; without a grid they have none."""
        if not self.has_grid:
            return np.ones(np.shape(tokens), bool)
        _, row, column = np.unravel_index(tokens, self.codes.shape)
        rows, columns = self.codes.shape[1:]
        return (np.minimum(row, rows - 1 - row) >= context) & (np.minimum(column, columns - 1 - column) >= context)

    def class_counts(self, codes: Sequence[int]) -> Int[np.ndarray, "C"]:
        """Tokens of some codes by the class of their image."""
        tokens = self.tokens_of_set(codes)
        labels = self.labels[tokens // (self.codes.shape[1] * self.codes.shape[2])]
        return np.bincount(labels[labels >= 0], minlength=len(self.classes))

    def beside(self, code: int) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Codes that stand beside a code more often than chance has it.

        Returns:
            Codes, and how many times as often as if tokens were shuffled they are its neighbours above, below, left or
            right; the largest first, of those seen beside it at least three times. None without a grid.
        """
        first, second, seen = self._pairs
        begin, end = np.searchsorted(first, [code, code + 1])
        others, times = second[begin:end], seen[begin:end]
        expected = times.sum() * self.counts[others] / max(1, self.tokens - self.counts[code])
        lift = times / np.maximum(expected, 1e-9)
        more = np.flatnonzero((times >= _OFTEN) & (lift > _BY_CHANCE))
        order = more[np.argsort(-lift[more], kind="stable")]
        return others[order], lift[order]

    def pairs_within(self, inside: Bool[np.ndarray, "K"]) -> tuple[int, int, int]:
        """Pairs of a set's codes that stand beside each other.

        Args:
            inside: which codes are in the set.
        Returns:
            Pairs of different codes seen; how often, counted from both sides; and how often all codes' pairs are seen.
        """
        first, second, seen = self._pairs
        both = inside[first] & inside[second]
        return int(both.sum()) // 2, int(seen[both].sum()), int(seen.sum())

    @cached_property
    def _pairs(self) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
        """Codes that stand beside each other, in both directions, and how often; sorted by the first."""
        codes, pairs = self.codes.astype(np.int64), []
        if not self.has_grid:
            codes = codes[:, :0]  # no row, so that nothing stands beside anything
        for here, there in ((codes[:, 1:], codes[:, :-1]), (codes[:, :, 1:], codes[:, :, :-1])):
            apart = here != there
            pairs += [self.codebook_size * here[apart] + there[apart], self.codebook_size * there[apart] + here[apart]]
        both, seen = np.unique(np.concatenate(pairs), return_counts=True)
        return both // self.codebook_size, both % self.codebook_size, seen


def shrink(pixels: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of at most so many pixels along its longer side; a smaller one as it is."""
    longest = max(pixels.shape[:2])
    if longest <= side:
        return pixels
    height, width = (max(1, round(length * side / longest)) for length in pixels.shape[:2])
    return np.array(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BOX))


def _turns(groups: np.ndarray) -> np.ndarray:
    """The order in which each group gives one in turn: all firsts, then all seconds, …"""
    by_group = np.argsort(groups, kind="stable")
    turn = np.empty(len(groups), np.int64)
    turn[by_group] = np.arange(len(groups)) - np.searchsorted(groups[by_group], groups[by_group])
    return np.argsort(turn, kind="stable")


def index_patches(subject: Subject, images: int = IMAGES, *, progress: bool = True) -> PatchIndex:
    """Encode a subject's images once, or read what an earlier view has stored.

    Args:
        subject: with a network and images.
        images: how many at most, the first readable ones.
        progress: show a line on the way.
    Raises:
        ViewError: no network, no images, or features that are not finite.
    Cost: the encoder's pass over the images, and products with the codebook to find the two nearest codes.
    """
    whole_number("count", images, 1, MOST_IMAGES)
    mark, side = subject.images_mark(images), subject.side
    of_images = {"source": mark, "resize": subject.resize, "side": side, "images": images, "version": _VERSION}
    pictures = subject.store.get(
        "pictures",
        lambda: encoding.read_pictures(subject, images, progress),
        needs=encoding.PICTURES,
        **of_images,
    )
    tokens = subject.store.get(
        "patches",
        lambda: encoding.encode_pictures(subject, pictures["pictures"], progress),
        needs=encoding.TOKENS,
        weights=subject.weights_mark,
        **of_images,
    )
    return _as_index(subject, pictures | tokens, tuple(subject.source.classes), mark)


def index_picture(subject: Subject, picture: Image.Image) -> PatchIndex:
    """The tokens of one picture of the user's own, brought to the tokenizer's size as validation images are.

    Args:
        subject: with a network; its images do not matter.
        picture: any size and mode that `ibqlab.data` opens.
    Raises:
        ViewError: no network, or features that are not finite.
        ValueError: a strip more than 100 times as long as wide.
    """
    pixels = encoding.bring_to_size(subject, picture)
    nothing = {"numbers": np.zeros(0, np.int64), "broken": np.zeros(0, np.str_), "reasons": np.zeros(0, np.str_)}
    arrays = {"pictures": pixels, "labels": np.array([-1]), **nothing}
    return _as_index(subject, arrays | encoding.encode_pictures(subject, pixels), (), "")


def _as_index(subject: Subject, arrays: dict[str, np.ndarray], classes: tuple[str, ...], mark: str) -> PatchIndex:
    return PatchIndex(
        **{name: arrays[name] for name in ("pictures", "codes", "seconds", "distance", "margin", "labels")},
        classes=classes,
        ruler=str(arrays["ruler"]),
        codebook_size=subject.tokenizer.quantizer.config.codebook_size,
        broken=tuple(map(UnreadableName, map(str, arrays["broken"]), map(str, arrays["reasons"]))),
        numbers=tuple(map(int, arrays["numbers"])),
        step=subject.network_step,
        images_mark=mark,
        has_grid=subject.tokenizer.config.has_grid,
    )
