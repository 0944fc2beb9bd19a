"""The data of all examples: handwritten digits, 8 × 8 pixels, that ship with scikit-learn."""

import os
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digit_batches(steps: int, batch_size: int) -> Iterator[Tensor]:
    """Random batches (B, 1, 8, 8) in [0, 1], others in each process."""
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    for _ in range(steps):
        yield images[torch.randint(len(images), (batch_size,), generator=generator)]
