"""Settings of the lab, and of a single run in a world, complete, as its config.yaml holds them: a study names many."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from ibqlab.base.checks import BATCH, CODES, SEED, STEPS, check_numbers, require, require_between, require_choice
from ibqlab.diagnostics.lab.worlds import World
from ibqlab.diagnostics.recorder import FIRST_STEPS
from ibqlab.quantizers import CHOSEN_STARTS, QuantizerConfig
from ibqlab.recipes.plugins import import_named, plugin_copies, plugin_of


@dataclass(frozen=True, kw_only=True)
class LabSettings:
    """What all methods of a lab have in common."""

    codebook_size: int = 256
    """K of methods that do not say theirs, codes, at least 2."""
    codebook_init: str = ""
    """Start of the codebook of methods that do not say theirs: "uniform", "normal", "unit" or "kmeans"; empty: each
    method's own."""
    steps: int = 400
    """Steps of every run, at least 1."""
    batch_size: int = 512
    """Features of a step, at least 1."""
    learning_rate: float = 0.01
    """Adam's, of codes and of a learning encoder, > 0. Training of images: 0.0001; here a run has few steps."""
    snapshots: int = 24
    """How many steps leave a snapshot and are validated, at least 2; the early ones lie closer together, because
    collapse is decided there."""
    log_every: int = 10
    """Steps between two rows, behind the first 50, which have a row each."""
    seed: int = 0
    """Of codebooks and of a learning encoder, the same for all methods."""

    def __post_init__(self):
        check_numbers(self)
        require_between("codebook_size", self.codebook_size, 2, CODES)
        require_between("steps", self.steps, 1, STEPS)
        require_between("batch_size", self.batch_size, 1, BATCH)
        require_between("snapshots", self.snapshots, 2, 1000)
        require_between("log_every", self.log_every, 1, STEPS)
        require_between("seed", self.seed, 0, SEED)
        if self.codebook_init:
            require_choice("codebook_init", self.codebook_init, CHOSEN_STARTS)
        require(self.learning_rate > 0, f"learning_rate must be > 0, got {self.learning_rate}")

    @property
    def snapshot_steps(self) -> list[int]:
        """Steps with a snapshot, first and last included: half of them evenly spaced, half on a logarithmic scale."""
        half = self.snapshots // 2
        early = np.geomspace(1, self.steps, half + 1).round().astype(int)
        even = np.linspace(0, self.steps, self.snapshots - half).round().astype(int)
        return sorted({0, self.steps, *early.tolist(), *even.tolist()})

    def logs(self, step: int) -> bool:
        """Whether a step has a row."""
        return step <= FIRST_STEPS or step % self.log_every == 0 or step == self.steps


@dataclass(frozen=True, kw_only=True)
class LabSource:
    """Where the features come from."""

    label: str
    """What the run is called."""
    world: World
    """Points, and the encoder that stands between them and the codebook."""


@dataclass(frozen=True, kw_only=True)
class LabTokenizer:
    """What is between encoder and decoder; readers of runs look for it here."""

    quantizer: QuantizerConfig
    """Its code_dim may differ from the world's dimension where the encoder learns."""


@dataclass(frozen=True, kw_only=True)
class LabRunConfig:
    """One method in one world."""

    lab: LabSource
    tokenizer: LabTokenizer
    steps: int = 400
    """At least 1."""
    batch_size: int = 512
    """Points of a step, at least 1."""
    learning_rate: float = 0.01
    """Adam's, > 0."""
    snapshots: int = 4
    """How many steps leave a snapshot and are validated, at least 2."""
    log_every: int = 10
    """Steps between two rows, behind the first 50, which have a row each."""
    seed: int = 0
    """Of codebook and networks."""
    plugins: tuple[str, ...] = ()
    """Files and modules of your own that register quantizers, run before the settings are read."""

    processes: ClassVar[int] = 1
    accelerator: ClassVar[str] = "cpu"

    @classmethod
    def before_parsing(cls, settings: Mapping[str, Any]) -> None:
        """Run the plugins, which register what the settings name."""
        import_named(settings)

    def __post_init__(self):
        self.settings()  # refuses numbers that cannot be
        world, dim = self.lab.world, self.tokenizer.quantizer.code_dim
        require(
            world.encoder == "learning" or dim == world.dim,
            f"code_dim must be the dimension of the points, {world.dim}, where the encoder does not learn; got {dim}",
        )

    def settings(self) -> LabSettings:
        """What it has in common with the runs of a lab."""
        shared = {field.name: getattr(self, field.name) for field in fields(LabSettings) if hasattr(self, field.name)}
        return LabSettings(codebook_size=self.tokenizer.quantizer.codebook_size, **shared)


def plugin_fact(quantizer: QuantizerConfig) -> dict[str, str]:
    """What a lab's notebook notes of a plugin among a run's settings: with other code it is another run."""
    plugin = plugin_of(quantizer.config_name)
    return {"plugin": f"{plugin.file_name}, sha256 {plugin.sha256[:12]}"} if plugin else {}


def plugin_copy(quantizer: QuantizerConfig) -> dict[str, bytes]:
    """The copy that a run's folder keeps of the plugin that registers its quantizer; nothing of the library's own."""
    plugin = plugin_of(quantizer.config_name)
    return plugin_copies([plugin] if plugin else [])
