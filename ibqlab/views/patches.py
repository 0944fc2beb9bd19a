"""The tokens of many images: which code stands where, how near its feature lies, and the pictures to cut patches from.

`index_patches` computes them once per run and images; `PatchIndex` answers from them without the network.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ibqlab.base.checks import require_between
from ibqlab.base.progress import CountingLine
from ibqlab.data import to_model_range
from ibqlab.data.batches import readable_batches
from ibqlab.quantizers.blocks import rows_per_block
from ibqlab.tokenizer import Tokenizer
from ibqlab.views.subject import Subject

IMAGES = 512
"""Images that a view looks at, at most, unless it is told."""
MOST_IMAGES = 100_000
EDGE = 128
"""Grey of what lies beyond a picture's edge."""
_BATCH = 16
_OFTEN = 3
"""Times that codes must stand beside each other to be named as neighbours."""
_SURE = 0.99
"""Share of tokens whose code a ruler has to find for its distances to be the method's own."""


@dataclass(frozen=True, kw_only=True)
class PatchIndex:
    """Tokens of N images on grids of h × w, and their pictures."""

    pictures: UInt8[np.ndarray, "N H W 3"]
    """As the tokenizer saw them."""
    codes: Int[np.ndarray, "N h w"]
    """Code of each token."""
    seconds: Int[np.ndarray, "N h w"]
    """The code that would come next; −1 where no ruler orders the codes."""
    distance: Float[np.ndarray, "N h w"]
    """From the token's feature to its code, by the ruler; NaN without one."""
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

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.codes.size

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a token's square, pixels."""
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

    def typical(self, codes: list[int], count: int) -> Int[np.ndarray, "n"]:
        """Tokens of some codes that lie nearest to their code, of as many images as possible."""
        tokens = np.concatenate([self.tokens_of(code) for code in codes]) if codes else np.zeros(0, np.int64)
        return self._spread(tokens, self.distance.ravel()[tokens], count)

    def at_margin(self, codes: list[int], count: int) -> Int[np.ndarray, "n"]:
        """Tokens of some codes that nearly went to another; none without a ruler."""
        tokens = np.concatenate([self.tokens_of(code) for code in codes]) if codes and self.ruler else np.zeros(0, int)
        return self._spread(tokens, self.margin.ravel()[tokens], count)

    def _spread(self, tokens: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
        """Tokens with the smallest values; of each image one, until all images had their turn."""
        tokens = tokens[np.argsort(values, kind="stable")]
        images = tokens // (self.codes.shape[1] * self.codes.shape[2])
        turn = np.zeros(len(tokens), np.int64)
        by_image = np.argsort(images, kind="stable")
        first = np.searchsorted(images[by_image], images[by_image])
        turn[by_image] = np.arange(len(tokens)) - first
        return tokens[np.argsort(turn, kind="stable")][:count]

    def place(self, token: int) -> tuple[int, int, int]:
        """Image, row and column of a token."""
        image, row, column = np.unravel_index(token, self.codes.shape)
        return int(image), int(row), int(column)

    def cut(self, token: int, context: int = 1) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int, int, int]]:
        """A token's square with its surroundings.

        Args:
            token: its number.
            context: squares around it on each side, at least 0; grey beyond the picture's edge.
        Returns:
            The cut-out, 2·context + 1 squares high and wide, and the square's left, top, width and height in it,
            pixels.
        """
        image, row, column = self.place(token)
        height, width = self.patch
        top, left = (row - context) * height, (column - context) * width
        bottom, right = (row + context + 1) * height, (column + context + 1) * width
        inside = self.pictures[image, max(0, top) : bottom, max(0, left) : right]
        around = ((max(0, -top), bottom - top - max(0, -top) - inside.shape[0]),)
        around += ((max(0, -left), right - left - max(0, -left) - inside.shape[1]), (0, 0))
        cut = np.pad(inside, around, constant_values=EDGE)
        return cut, (context * width, context * height, width, height)

    def is_inside(self, token: int, context: int = 1) -> bool:
        """Whether a token's surroundings lie within the picture."""
        _, row, column = self.place(token)
        rows, columns = self.codes.shape[1:]
        return context <= row < rows - context and context <= column < columns - context

    def class_counts(self, codes: list[int]) -> Int[np.ndarray, "C"]:
        """Tokens of some codes by the class of their image."""
        tokens = np.concatenate([self.tokens_of(code) for code in codes]) if codes else np.zeros(0, np.int64)
        labels = self.labels[tokens // (self.codes.shape[1] * self.codes.shape[2])]
        return np.bincount(labels[labels >= 0], minlength=len(self.classes))

    def beside(self, code: int) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Codes that stand beside a code more often than chance has it.

        Returns:
            Codes, and how many times as often as if tokens were shuffled they are its neighbours above, below, left or
            right; the largest first, of those seen beside it at least three times.
        """
        first, second, seen = self._pairs
        begin, end = np.searchsorted(first, [code, code + 1])
        others, times = second[begin:end], seen[begin:end]
        expected = times.sum() * self.counts[others] / max(1, self.tokens - self.counts[code])
        often = times >= _OFTEN
        lift = times[often] / np.maximum(expected[often], 1e-9)
        order = np.argsort(-lift, kind="stable")
        return others[often][order], lift[order]

    @cached_property
    def _pairs(self) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
        """Codes that stand beside each other, in both directions, and how often; sorted by the first."""
        codes, pairs = self.codes.astype(np.int64), []
        for here, there in ((codes[:, 1:], codes[:, :-1]), (codes[:, :, 1:], codes[:, :, :-1])):
            apart = here != there
            pairs += [self.codebook_size * here[apart] + there[apart], self.codebook_size * there[apart] + here[apart]]
        both, seen = np.unique(np.concatenate(pairs), return_counts=True)
        return both // self.codebook_size, both % self.codebook_size, seen


def index_patches(subject: Subject, images: int = IMAGES, *, progress: bool = True) -> PatchIndex:
    """Encode a subject's images once, or read what an earlier view has stored.

    Args:
        subject: with a network and images.
        images: how many at most, the first readable ones.
        progress: show a line on the way.
    Raises:
        ViewError: no network, or no images.
    Cost: the encoder's pass over the images, and a product with the codebook for each ruler tried.
    """
    require_between("images", images, 1, MOST_IMAGES)
    source = subject.source
    depends = {"weights": subject.weights_mark, "source": source.fingerprint, "images": images}
    side = subject.tokenizer.config.autoencoder.resolution

    def build() -> dict[str, np.ndarray]:
        return _encode(subject, images, progress)

    arrays = subject.store.get("patches", build, side=side, **depends)
    return PatchIndex(
        **{name: arrays[name] for name in ("pictures", "codes", "seconds", "distance", "margin", "labels")},
        classes=tuple(source.classes),
        ruler=str(arrays["ruler"]),
        codebook_size=subject.tokenizer.quantizer.config.codebook_size,
    )


@torch.no_grad()
def _encode(subject: Subject, images: int, progress: bool) -> dict[str, np.ndarray]:
    tokenizer, source = subject.tokenizer, subject.source
    pictures, codes, labels, vectors = [], [], [], []
    total = images if source.endless else min(images, len(source))
    with CountingLine(f"patches of {subject.name}", total, "images", progress) as line:
        for batch in readable_batches(source, images, batch_size=_BATCH):
            features = tokenizer.quant_conv(tokenizer.encoder(to_model_range(batch.images)))
            codes.append(tokenizer.quantizer.encode(features).int())
            vectors.append(features.float().permute(0, 2, 3, 1))
            pictures.append(batch.images.permute(0, 2, 3, 1))
            labels.append(batch.labels)
            for _ in batch.images:
                line.advance()
    found, tokens = torch.cat(codes), torch.cat(vectors)
    ruler, (distance, seconds, margin) = _measure(tokenizer, tokens.flatten(0, 2), found.flatten())
    shape = tuple(found.shape)
    return {
        "pictures": torch.cat(pictures).numpy(),
        "codes": found.numpy(),
        "seconds": seconds.view(shape).int().numpy(),
        "distance": distance.view(shape).numpy(),
        "margin": margin.view(shape).numpy(),
        "labels": torch.cat(labels).int().numpy(),
        "ruler": np.array(ruler),
    }


def _measure(
    tokenizer: Tokenizer, features: Float[Tensor, "N D"], codes: Int[Tensor, " N"]
) -> tuple[str, tuple[Tensor, Tensor, Tensor]]:
    """The ruler that finds the method's codes, and by it: distance to the code, the second code, and the lead."""
    nothing = torch.full((len(features),), torch.nan)
    without = "", (nothing, torch.full((len(features),), -1), nothing)
    codebook = _whole_codebook(tokenizer)
    if codebook is None:
        return without
    for name, ruler in RULERS.items():
        prepared = ruler(features, codebook)
        best, seconds, distances = _two_best(*prepared)
        if (best == codes).float().mean() >= _SURE:
            near, far = distances[:, 0], distances[:, 1]
            margin = ((far - near) / far.abs().clamp_min(1e-12)).clamp(0, 1)
            return name, (near, seconds, margin)
    return without


def _whole_codebook(tokenizer: Tokenizer) -> Float[Tensor, "K D"] | None:
    """All code vectors, where they are few enough to be listed: those of several parts are not."""
    try:
        codebook = tokenizer.quantizer.codebook.float()
    except (ValueError, MemoryError, RuntimeError):
        return None
    return codebook if codebook.ndim == 2 and len(codebook) > 1 else None


def _two_best(
    features: Float[Tensor, "N D"], codes: Float[Tensor, "K D"]
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"], Float[Tensor, "N 2"]]:
    """The two nearest codes of each feature by L2 distance, and both distances."""
    best, distances = [], []
    for rows in features.split(max(1, rows_per_block(len(codes), features))):
        found = torch.cdist(rows, codes).topk(2, largest=False)
        best.append(found.indices)
        distances.append(found.values)
    both = torch.cat(best)
    return both[:, 0], both[:, 1], torch.cat(distances)


def _by_dot(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors whose L2 distance orders codes as the dot product does: one more dimension evens out the codes' norms."""
    squares = codes.square().sum(1)
    more = (squares.max() - squares).clamp_min(0).sqrt()
    return torch.cat([features, features.new_zeros(len(features), 1)], 1), torch.cat([codes, more[:, None]], 1)


def _by_cosine(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.normalize(features), torch.nn.functional.normalize(codes)


RULERS = {"L2": lambda features, codes: (features, codes), "dot product": _by_dot, "cosine": _by_cosine}
"""How nearness may be measured → vectors between which it is the L2 distance."""
