"""A feature extractor that every machine has: a small classifier of scanned digits, trained in seconds.

Its Fréchet distance orders pictures of digits sensibly and compares with nothing outside this library; that is why it
is never called FID.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ibqlab.base.cache import content_key, load_arrays, save_arrays
from ibqlab.base.checks import require
from ibqlab.data.digits import DigitsSource
from ibqlab.metrics.extractors import FeatureExtractor, Features, register_extractor

SIDE = 8
EPOCHS = 12
BATCH_SIZE = 48
LEARNING_RATE = 2e-3
SEED = 0


class Recognition(NamedTuple):
    """How many generated digits a classifier of real ones takes for what was asked for."""

    share: float
    """Of the generated digits, 0 to 1."""
    digits: int
    """How many were looked at."""
    real_share: float
    """The same classifier's share of the real validation scans, which it was not trained on."""
    real_digits: int
    """How many of those there are."""

    def describe(self) -> str:
        """Both shares in one sentence."""
        return (
            f"a classifier that recognises {self.real_share:.1%} of {self.real_digits:,} real validation scans "
            f"recognises {self.share:.1%} of {self.digits:,} generated digits as the class asked for"
        )


def recognise_digits(images: UInt8[Tensor, "B 3 H W"], labels: Int[Tensor, " B"]) -> Recognition:
    """Judge generated digits by the classifier of `DigitsExtractor`, and the classifier by real scans.

    High shares say that digits are legible, not that they are varied: a generator that repeats one good digit per class
    has them, too. `evaluate_generation` with extractor="digits-cnn" looks at both.

    Args:
        images: pictures of digits, at least 8 × 8 pixels.
        labels: classes asked for, 0 to 9.
    """
    classifier = DigitsExtractor()
    real = DigitsSource(image_size=SIDE, split="validation")
    scans = torch.stack([real.get(index, 0).image for index in range(len(real))])
    return Recognition(
        share=classifier.accuracy(images, labels),
        digits=len(images),
        real_share=classifier.accuracy(scans, torch.tensor(real.labels)),
        real_digits=len(real),
    )


class DigitsExtractor(nn.Module):
    """Three convolutions and two linear layers on 8 × 8 grey levels: 64 features, 10 logits.

    Trained on the 1,437 training digits with a fixed seed in one thread, then stored in the cache under the hash of its
    data and settings. Other processors may round otherwise; `weights` says which network it is.
    """

    name = "digits-cnn"
    dimension = 64
    smallest_side = SIDE

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.hidden = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(64, 64, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(64 * 16, self.dimension),
                nn.ReLU(),
            )
            self.classify = nn.Linear(self.dimension, 10)
        self._load_or_train()
        self.eval().requires_grad_(False)
        content = b"".join(np.ascontiguousarray(value.numpy()).tobytes() for value in self.state_dict().values())
        self.weights = f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        """Features of images in [0, 1], at least 8 × 8 pixels: mean over the channels, area mean to 8 × 8."""
        features = self.hidden(F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), SIDE))
        return Features(features, self.classify(features))

    def accuracy(self, images: UInt8[Tensor, "B 3 H W"], labels: Int[Tensor, " B"]) -> float:
        """Share of pictures that it takes for the digit of their label, 0 to 1.

        Raises:
            ValueError: no pictures, or not as many labels.
        """
        require(
            len(images) == len(labels) > 0,
            f"digits are recognised one label per picture, at least one; got {len(images)} and {len(labels)}",
        )
        recognised = self(images.float() / 255).logits.argmax(1)
        return float((recognised == labels).double().mean())

    def _load_or_train(self) -> None:
        source = DigitsSource(image_size=SIDE, split="train")
        settings = [str(self), EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED]
        key = content_key(data=source.fingerprint, settings=settings)
        weights = load_arrays("digits-cnn", key)
        state = self.state_dict()
        # A stored network of other shapes is damaged: it is trained again.
        if weights is not None and {name: value.shape for name, value in weights.items()} == {
            name: tuple(value.shape) for name, value in state.items()
        }:
            self.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=True)
        else:
            self._train(torch.from_numpy(source.images)[:, None], torch.tensor(source.labels))
            save_arrays("digits-cnn", key, {name: value.numpy() for name, value in self.state_dict().items()})

    def _train(self, scans: UInt8[Tensor, "N 1 8 8"], labels: Int[Tensor, " N"]) -> None:
        """Adam on the cross-entropy, a fixed order per epoch; one thread, so that sums have one order, too."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        images = scans.expand(-1, 3, -1, -1).float() / 255
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        generator = torch.Generator().manual_seed(SEED)
        try:
            with torch.enable_grad():
                for _ in range(EPOCHS):
                    for batch in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
                        loss = F.cross_entropy(self(images[batch]).logits, labels[batch])
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
        finally:
            torch.set_num_threads(threads)


@register_extractor("digits")
def digits() -> FeatureExtractor:
    """A small classifier of scanned digits, trained on the spot in seconds: for built-in data and tests."""
    return DigitsExtractor()
