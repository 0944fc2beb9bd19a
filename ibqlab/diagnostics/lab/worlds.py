"""Where the lab's features come from when there is no file of them: clusters of points, and what an encoder makes of
them.

A world is a formula and a seed. The points of a step depend on both and on the step's number alone, so all methods see
the same ones, and a run that is made again is the same run.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.base.checks import CODE_DIM, SEED, check_numbers, require, require_between, require_choice

ENCODERS = ("fixed", "drifting", "learning")
_HIDDEN = 32
"""Width of the learning encoder and of its decoder."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Points in round clusters, and the encoder that stands between them and the codebook.

    "fixed": features are the points. "drifting": features are the points turned and shifted, further with every step;
    they do not know of the codebook. "learning": features are what a small network makes of the points. A second one
    rebuilds the points from the codes, and its loss moves encoder and codes, as in a tokenizer.
    """

    dim: int = 2
    """D, of points and codes, at least 1."""
    clusters: int = 12
    """How many clusters, equally likely, at least 1."""
    spread: float = 1.0
    """Standard deviation of the clusters' centres in every dimension, > 0. Codes that start at N(0, 1) lie among the
    features at 1."""
    width: float = 0.12
    """Standard deviation within a cluster in every dimension, ≥ 0."""
    encoder: str = "fixed"
    """"fixed", "drifting" or "learning"."""
    drift: float = 1.0
    """How far a drifting encoder goes over the whole run, ≥ 0: at 1 half a turn in the plane of the first two
    dimensions, and 2·spread along the first."""
    seed: int = 0
    """Of the centres and of every step's points."""

    def __post_init__(self):
        check_numbers(self)
        require_between("dim", self.dim, 1, CODE_DIM)
        require_between("clusters", self.clusters, 1, 10_000)
        require_between("seed", self.seed, 0, SEED)
        require_choice("encoder", self.encoder, ENCODERS)
        require(self.spread > 0, f"spread is a standard deviation and must be > 0, got {self.spread}")
        require(self.width >= 0, f"width is a standard deviation and must be ≥ 0, got {self.width}")
        require(self.drift >= 0, f"drift must be ≥ 0, got {self.drift}; 0 is encoder='fixed'")

    @property
    def centres(self) -> Float[np.ndarray, "clusters D"]:
        """Of the clusters."""
        draw = np.random.default_rng((self.seed, 0)).standard_normal((self.clusters, self.dim))
        return (self.spread * draw).astype(np.float32)

    def points(self, count: int, step: int, *, validation: bool = False) -> Float[Tensor, "count D"]:
        """The points of a step.

        Args:
            count: how many, at least 1.
            step: of the run, ≥ 0.
            validation: others than those of training.
        """
        generator = np.random.default_rng((self.seed, 2 if validation else 1, step))
        centres = self.centres[generator.integers(self.clusters, size=count)]
        noise = generator.standard_normal((count, self.dim), dtype=np.float32)
        return torch.from_numpy(centres + np.float32(self.width) * noise)

    def features(self, points: Float[Tensor, "N D"], progress: float) -> Float[Tensor, "N D"]:
        """What an encoder that does not learn makes of points.

        Args:
            points: of this world.
            progress: share of the run that is done, 0 to 1.
        """
        if self.encoder != "drifting":
            return points
        moved = points.clone()
        if self.dim > 1:
            angle = math.pi * self.drift * progress
            first, second = points[:, 0], points[:, 1]
            moved[:, 0] = math.cos(angle) * first - math.sin(angle) * second
            moved[:, 1] = math.sin(angle) * first + math.cos(angle) * second
        moved[:, 0] += 2 * self.spread * self.drift * progress
        return moved

    def networks(self, code_dim: int) -> tuple[nn.Module, nn.Module] | None:
        """Encoder and decoder that learn, from torch's random numbers; None where the encoder does not.

        Args:
            code_dim: channels between them; only an encoder that learns may have others than the points.
        """
        if self.encoder != "learning":
            return None
        return _network(self.dim, code_dim), _network(code_dim, self.dim)

    def settings(self) -> dict[str, Any]:
        """As a run's config.yaml holds them."""
        return {"world": vars(self) | {}}

    def describe(self) -> str:
        """In a few words, for captions."""
        moves = {"fixed": "a fixed", "drifting": "a drifting", "learning": "a learning"}[self.encoder]
        return f"{self.clusters} clusters, {moves} encoder"


def _network(inputs: int, outputs: int) -> nn.Module:
    """A small network that begins near the identity, so that every encoder begins with the points themselves; with
    fewer outputs than inputs, with the first of their numbers."""
    straight = nn.Linear(inputs, outputs)
    bent = nn.Sequential(nn.Linear(inputs, _HIDDEN), nn.Tanh(), nn.Linear(_HIDDEN, outputs))
    with torch.no_grad():
        straight.weight.copy_(torch.eye(outputs, inputs))
        straight.bias.zero_()
    return _Sum(straight, bent)


class _Sum(nn.Module):
    """A straight and a bent way from input to output, added."""

    def __init__(self, straight: nn.Module, bent: nn.Module):
        super().__init__()
        self.straight, self.bent = straight, bent

    def forward(self, inputs: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return self.straight(inputs) + self.bent(inputs)
