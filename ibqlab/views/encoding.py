"""Images to tokens: their codes; by the ruler that chooses these, how near they lie, and which code comes second."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from ibqlab.base.progress import CountingLine
from ibqlab.data import resize_and_crop, to_model_range
from ibqlab.data.batches import readable_batches
from ibqlab.quantizers.blocks import rows_per_block
from ibqlab.tokenizer import Tokenizer
from ibqlab.views.subject import Subject, ViewError

PICTURES = ("pictures", "labels", "numbers", "broken", "reasons")
"""What is stored of images, whatever the weights: also their numbers in the source, and names and reasons of those that
could not be read."""
TOKENS = ("codes", "seconds", "distance", "margin", "ruler")
"""What is stored of their tokens."""
LISTED = 2**27
"""Numbers of a codebook that is looked at as a whole, at most: 512 MiB, twice the largest published."""
_BATCH_PIXELS = 2**18
"""Of a batch of images: four of 256 × 256, whose features take 130 MB at the first level of the published network."""
_MOST_BATCH = 64
_SAMPLE = 1024
"""Tokens that the ruler is chosen on."""
_SURE = 0.99
"""Share of tokens whose code a ruler has to find for its distances to be the method's own."""


def _as_they_are(vectors: Tensor, squares: Tensor | None) -> Tensor:
    return vectors


def _by_dot(vectors: Tensor, squares: Tensor | None) -> Tensor:
    """Vectors whose L2 distance orders codes as the dot product does: one more dimension evens out the codes' norms."""
    if squares is None:
        return torch.cat([vectors, vectors.new_zeros(len(vectors), 1)], 1)
    return torch.cat([vectors, (squares.max() - squares).clamp_min(0).sqrt()[:, None]], 1)


def _by_cosine(vectors: Tensor, squares: Tensor | None) -> Tensor:
    return torch.nn.functional.normalize(vectors)


DOT, COSINE = "dot product", "cosine"
RULERS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"L2": _as_they_are, DOT: _by_dot, COSINE: _by_cosine}
"""How nearness may be measured → vectors between which it is the L2 distance, of features (None) or of codes (their
squared norms)."""


class Measured(NamedTuple):
    """Of each token."""

    distance: Float[Tensor, " N"]
    """To its code, the smaller the nearer: L2, that of unit vectors for a cosine, minus a dot product; NaN without."""
    seconds: Int[Tensor, " N"]
    """The code that would come next; −1 without a ruler."""
    margin: Float[Tensor, " N"]
    """Lead of the code over the second, 0 to 1; NaN without a ruler."""


class Ruler:
    """The distance by which a tokenizer chooses its codes, found by trying on its first tokens.

    Args:
        tokenizer: of any method; codes of several parts have none.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.name = ""
        self._codebook = list_codes(tokenizer)
        # With unit vectors every ruler finds the codes, and only the cosine's distances are those that the method saw.
        unit_vectors = getattr(tokenizer.quantizer.config, "unit_vectors", False)
        self._rulers = {COSINE: RULERS[COSINE]} if unit_vectors else RULERS
        self._codes: Tensor | None = None
        self._tried, self._right, self._all = False, 0, 0

    def measure(self, features: Float[Tensor, "N D"], codes: Int[Tensor, " N"]) -> Measured:
        """Distances and second codes of some tokens."""
        if not self._tried:
            self._choose(features[:_SAMPLE], codes[:_SAMPLE])
        if self._codes is None:
            nothing = torch.full((len(features),), torch.nan)
            return Measured(nothing, torch.full((len(features),), -1), nothing)
        best, seconds, distances = _two_best(RULERS[self.name](features, None), self._codes)
        self._right += int((best == codes).sum())
        self._all += len(codes)
        near, far = distances[:, 0], distances[:, 1]
        if self.name == DOT:
            near, far = (-(features * self._codebook[which]).sum(1) for which in (best, seconds))
        # Where rounding turns a near tie round, the second is the code that the ruler finds first.
        seconds = torch.where(best == codes, seconds, best)
        largest = torch.maximum(near.abs(), far.abs()).clamp_min(1e-12)
        return Measured(near, seconds, ((far - near) / largest).clamp(0, 1))

    @property
    def is_right(self) -> bool:
        """Whether it found nearly all codes that it was shown."""
        return self._codes is not None and self._right >= _SURE * self._all

    def _choose(self, features: Tensor, codes: Tensor) -> None:
        self._tried = True
        if self._codebook is None:
            return
        squares = self._codebook.square().sum(1)
        for name, prepare in self._rulers.items():
            prepared = prepare(self._codebook, squares)
            best, _, _ = _two_best(prepare(features, None), prepared)
            if (best == codes).float().mean() >= _SURE:
                self.name, self._codes = name, prepared
                return


def list_codes(tokenizer: Tokenizer) -> Float[Tensor, "K D"] | None:
    """All code vectors, where they are few enough to be listed; None where they are not, as of many parts."""
    config = tokenizer.quantizer.config
    if config.codebook_size * config.code_dim > LISTED:
        return None
    try:
        codebook = tokenizer.quantizer.codebook.detach().float()
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


def read_pictures(subject: Subject, images: int, progress: bool) -> dict[str, np.ndarray]:
    """The arrays `PICTURES` of a subject's first readable images.

    Args:
        subject: with images.
        images: how many at most.
        progress: show a line.
    Raises:
        UnreadableImages: no image can be read.
    """
    source, pictures, labels, numbers, broken = subject.source, [], [], [], []
    total = images if source.endless else min(images, len(source))
    with CountingLine(f"images of {subject.name}", total, "images", progress) as line:
        for batch in readable_batches(source, images):
            pictures.append(batch.images.permute(0, 2, 3, 1).contiguous())
            labels.append(batch.labels.int())
            numbers += batch.numbers
            broken += batch.broken
            line.advance(len(batch.images))
    arrays = {"pictures": torch.cat(pictures).numpy(), "labels": torch.cat(labels).numpy()}
    texts = {"broken": broken, "reasons": [getattr(name, "reason", "") for name in broken]}
    arrays |= {name: np.array([str(text) for text in some], dtype=np.str_) for name, some in texts.items()}
    return arrays | {"numbers": np.array(numbers, dtype=np.int64)}


def encode_pictures(
    subject: Subject, pictures: UInt8[np.ndarray, "N H W 3"], progress: bool = False
) -> dict[str, np.ndarray]:
    """The arrays `TOKENS` of pictures.

    Args:
        subject: with a network.
        pictures: of the size that it takes.
        progress: show a line.
    Raises:
        ViewError: features that are not finite.
    """
    ruler, parts = Ruler(subject.tokenizer), []
    size = max(1, min(_MOST_BATCH, _BATCH_PIXELS // (pictures.shape[1] * pictures.shape[2])))
    with CountingLine(f"patches of {subject.name}", len(pictures), "images", progress) as line:
        for start in range(0, len(pictures), size):
            images = torch.from_numpy(pictures[start : start + size]).permute(0, 3, 1, 2)
            parts.append(_encode(subject, ruler, images))
            line.advance(len(images))
    arrays = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    if not ruler.is_right:
        nothing = np.full(arrays["codes"].shape, np.nan, np.float32)
        arrays |= {"distance": nothing, "margin": nothing, "seconds": np.full_like(arrays["codes"], -1)}
    return arrays | {"ruler": np.array(ruler.name if ruler.is_right else "")}


def bring_to_size(subject: Subject, picture: Image.Image) -> UInt8[np.ndarray, "1 H W 3"]:
    """A picture of any size and mode as validation images are: its centre square, resized.

    Raises:
        ValueError: a strip more than 100 times as long as wide.
    """
    side = subject.side
    return np.array(resize_and_crop(picture.convert("RGB"), side, subject.resize), order="C")[None]


@torch.no_grad()
def _encode(subject: Subject, ruler: Ruler, images: UInt8[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
    tokenizer = subject.tokenizer
    features = tokenizer.quant_conv(tokenizer.encoder(to_model_range(images)))
    if not torch.isfinite(features).all():
        raise ViewError(
            f"{subject.name} cannot encode images: its network makes NaN or infinity of them, so training has diverged;"
            " look at an earlier checkpoint, or train again with a smaller learning rate"
        )
    codes = tokenizer.quantizer.encode(features)
    measured = ruler.measure(features.float().permute(0, 2, 3, 1).flatten(0, 2), codes.flatten())
    return {
        "codes": codes.int(),
        "seconds": measured.seconds.view(codes.shape).int(),
        "distance": measured.distance.view(codes.shape),
        "margin": measured.margin.view(codes.shape),
    }
