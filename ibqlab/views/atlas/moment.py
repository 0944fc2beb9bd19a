"""The map of a single moment: codes and encoder features of images, where no snapshot shows a training."""

import hashlib
from functools import cached_property

import numpy as np
import torch

from ibqlab.data import to_model_range
from ibqlab.quantizers.codebooks import as_compared
from ibqlab.views.cards import CardReader
from ibqlab.views.subject import Subject

FEATURES = 2048
"""Encoder features that are shown, at most."""


class Moment(Subject):
    """A checkpoint, or a run without usable snapshots, as if it were a run with one snapshot.

    Args:
        reader: of its cards, with images and a codebook that can be listed.
    """

    def __init__(self, reader: CardReader):
        subject = reader.subject
        super().__init__(subject.path, subject.run, subject.images, subject.weights, image_size=subject.side, told={})
        self._subject, self._index, self._codebook = subject, reader.index, reader.codebook

    @property
    def steps(self) -> list[int]:
        """One, without a meaning of its own."""
        return [0]

    def require_run(self) -> None:
        """A moment needs none."""

    @property
    def counted(self) -> str:
        """All of the images' tokens."""
        return "tokens of the images"

    def snapshot_marks(self) -> list[str]:
        """The content of weights and tokens."""
        return [self._subject.weights_mark, hashlib.sha256(np.ascontiguousarray(self._index.codes)).hexdigest()]

    def snapshot(self, step: int = -1) -> dict[str, np.ndarray]:
        """Codebook, counts over all images, and features of some images, spread evenly over them."""
        return self._arrays

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        index, network = self._index, self._subject.tokenizer
        squares = index.codes.shape[1] * index.codes.shape[2]
        images = min(len(index.codes), -(-FEATURES // squares))
        chosen = np.linspace(0, len(index.codes) - 1, images).round().astype(int)
        features = []
        for some in np.array_split(chosen, -(-images // 4)):
            pictures = torch.from_numpy(index.pictures[some]).permute(0, 3, 1, 2)
            with torch.no_grad():
                encoded = network.quant_conv(network.encoder(to_model_range(pictures))).float()
            encoded = as_compared(network.quantizer, encoded)
            features.append(encoded.permute(0, 2, 3, 1).flatten(0, 2))  # (images · h · w, D)
        thinned = slice(None, None, -(-images * squares // FEATURES))
        return {
            "codebook": self._codebook,
            "features": torch.cat(features)[thinned].numpy(),
            "assignments": index.codes[chosen].ravel()[thinned].astype(np.int64),
            "counts": index.counts,
        }
