"""What a recipe costs, before anything is paid for: parameters, operations, memory, steps and disk.

Sizes are counted (see `meter`), speed is not: it is measured on the machine at hand and typed in (`time_and_price`).
Nothing here reads data or weight files, needs a GPU or takes memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ibqlab.base.resources import BUILT_IN
from ibqlab.costs.generator_step_cost import count_generator_step
from ibqlab.costs.meter import StepCost
from ibqlab.costs.tokenizer_step_cost import count_tokenizer_step
from ibqlab.pretrained.start_settings import recipe_config
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.recipes.published import PublishedRow, published_row
from ibqlab.recipes.recipe_files import recipe_name
from ibqlab.recipes.snapshots import SnapshotSchedule, snapshot_schedule
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs.checkpoints import CHECKPOINTS_KEPT

if TYPE_CHECKING:
    import pandas as pd

IMAGENET_IMAGES = 1_281_166
"""ImageNet's training images as published training uses them: all but one, which is damaged."""
PART_NAMES = {"convolutions": "1 × 1 convolutions", "perceptual": "LPIPS network (frozen)"}
"""Parts of a network whose names in the settings are too short for people."""


@dataclass(frozen=True, kw_only=True)
class RunCost(StepCost):
    """The cost of a recipe in everything but time: that of one step on one process, and what the run makes of it."""

    network: str
    """"tokenizer" or "generator": what the run trains."""
    name: str
    """Of the recipe."""
    published: PublishedRow | None
    """The numbers that a paper printed for it; None for recipes of our own."""
    tokens_per_image: int
    """Codes that stand for an image."""
    forward_operations: int
    """Operations of one image without gradients: to its reconstruction in evaluation, or to a generator's loss."""
    training_operations: int
    """Operations per image of a training step, forward and backward."""
    images_at_once: int
    """Images of one forward and backward pass on one process."""
    steps: int
    """Optimiser steps."""
    images: int
    """Images seen in all steps."""
    learning_rate: float
    """The highest of a step, at this run's batch size."""
    epochs: float | None
    """The same in passes over ImageNet's 1,281,166 training images; None for the built-in images."""
    processes: int
    """Processes, one GPU each, that the recipe asks for."""
    accelerator: str
    """"cuda", "cpu" or "auto", as the recipe says."""
    snapshots: SnapshotSchedule | None
    """What a tokenizer's run writes down of its codebook, and when; None for a generator's."""

    @property
    def storage_bytes(self) -> int:
        """Of the checkpoints that a run keeps and of all its snapshots; images and metrics come on top."""
        snapshots = self.snapshots.total_bytes if self.snapshots else 0
        return CHECKPOINTS_KEPT * self.checkpoint_bytes + snapshots

    @property
    def memory_bytes(self) -> int:
        """State and activations of one process. Work space of kernels and of the allocator comes on top."""
        return self.state_bytes + self.activations.of(self.images_at_once)

    def describe(self) -> str:
        """The cost as lines for people."""
        generator = self.network == "generator"
        parts = {name: value for name, value in self.parameters._asdict().items() if value}
        counted = "\n".join(f"  {PART_NAMES.get(name, name):<23}{value:>14,}" for name, value in parts.items())
        epochs = "" if self.epochs is None else f" = {self.epochs:,.1f} × ImageNet's {IMAGENET_IMAGES:,}"
        published = f"published: {self.published.describe()}" if self.published else "published: nothing"
        remarks = f"\n  {self.published.remarks}" if self.published and self.published.remarks else ""
        if generator:
            operations, forward = "matrix products and attention; the tokenizer's come on top", "loss"
            memory, state = "the tokenizer and kernels' work space come on top", "weights, gradients, Adam"
            sampling = f"sampling: {gibi(self.cache_bytes)} of keys and values per image, twice that with guidance\n"
        else:
            operations, forward = "convolutions, matrix products and attention", "image to reconstruction"
            memory, state = "kernels' work space comes on top", "weights, gradients, Adam, averages"
            sampling = ""
        return (
            f"{self.name}\n{published}{remarks}\n"
            f"parameters\n{counted}\n  {f'{self.network}, all':<23}{self.parameters.total:>14,}\n"
            f"tokens per image: {self.tokens_per_image:,}\n"
            f"operations per image (multiply-add = 2; {operations})\n"
            f"  {forward:<23}{giga(self.forward_operations):>16}\n"
            f"  training step          {giga(self.training_operations):>16}\n"
            f"memory of one process ({memory})\n"
            f"  {state:<34}{gibi(self.state_bytes):>12}\n"
            f"  for the backward pass{gibi(self.activations.of(self.images_at_once)):>25}, {self.images_at_once} "
            f"images at {gibi(self.activations.per_image)} each and {gibi(self.activations.fixed)} whatever their "
            "number\n"
            f"  together{gibi(self.memory_bytes):>38}\n"
            f"{sampling}"
            f"training: {self.steps:,} steps, {self.images:,} images{epochs}; processes: {self.processes}; learning "
            f"rate {self.learning_rate:g}\n"
            f"{self._describe_disk()}"
        )

    def _describe_disk(self) -> str:
        each = gibi(self.checkpoint_bytes)
        if self.snapshots is None:
            return (
                f"disk: {each} per checkpoint, of which a run keeps {CHECKPOINTS_KEPT}; the "
                "tokenizer, snapshots and metrics come on top"
            )
        return (
            f"disk: {gibi(self.storage_bytes)}, and metrics on top\n"
            f"  {CHECKPOINTS_KEPT} checkpoints of {each}: {gibi(CHECKPOINTS_KEPT * self.checkpoint_bytes)}\n"
            f"  {self.snapshots.describe()}, {gibi(self.snapshots.bytes_each)} each: "
            f"{gibi(self.snapshots.total_bytes)}"
        )


def count_recipe(name: str, assignments: Sequence[str] = (), plugins: Sequence[str] = ()) -> RunCost:
    """The cost of a recipe, of a tokenizer's run or a generator's.

    Args:
        name: path, or name under experiments/.
        assignments: keys to replace, as typed on a command line.
        plugins: files and modules to run besides those that the recipe names.
    Raises:
        ConfigError: no such recipe, or settings that do not fit it.
        ValueError: an image size that the networks cannot take.
    """
    config = recipe_config(name, assignments=assignments, plugins=plugins)
    return count_run(config, recipe_name(Path(name)), published_row(name))


def count_run(
    config: TrainConfig | GeneratorTrainConfig, name: str = "", published: PublishedRow | None = None
) -> RunCost:
    """Count what a run costs. What belongs to the memory is said where the network's step is counted.

    Args:
        config: of the run.
        name: of the recipe, for tables.
        published: what a paper printed for it.
    Raises:
        ValueError: an image size that the networks cannot take.
    Cost: seconds; the numbers of the networks take no memory.
    """
    if isinstance(config, GeneratorTrainConfig):
        network, step, tokens = "generator", count_generator_step(config), config.generator.num_tokens
        rate = config.optimizer.learning_rate
    else:
        network, step = "tokenizer", count_tokenizer_step(config)
        rate = config.scaled_optimizer.learning_rate
        tokens = prod(config.tokenizer.autoencoder.latent_grid(config.data.image_size, config.data.image_size))
    at_once = config.batch_size // (config.processes * config.accumulate)
    images = config.steps * config.batch_size
    return RunCost(
        **vars(step),
        network=network,
        name=name,
        published=published,
        tokens_per_image=tokens,
        forward_operations=step.forward.of(1),
        training_operations=step.training.of(at_once) // at_once,
        images_at_once=at_once,
        steps=config.steps,
        images=images,
        learning_rate=rate,
        epochs=None if config.data.source in BUILT_IN else images / IMAGENET_IMAGES,
        processes=config.processes,
        accelerator=config.accelerator,
        snapshots=snapshot_schedule(config) if network == "tokenizer" else None,
    )


def cost_table(costs: Sequence[RunCost]) -> "pd.DataFrame":
    """Costs as one row each.

    Returns:
        Columns: recipe; of tokenizers rfid, lpips, usage (published; share of codes), of generators gfid and
        inception_score (published); parameters_m (the network, millions); of tokenizers codebook_m (millions), of
        generators tokens (per image); forward_gflop and training_gflop (10⁹ operations per image); image_gib
        (activations per image, GiB); memory_gib (one process, GiB); steps; epochs (of ImageNet); storage_gib (kept
        checkpoints and all snapshots).
    """
    import pandas as pd  # noqa: PLC0415 - keeps `import ibqlab.costs.run_cost` quick

    return pd.DataFrame([_table_row(cost) for cost in costs])


def _table_row(cost: RunCost) -> dict[str, str | float | int | None]:
    generator = cost.network == "generator"
    published = ("gfid", "inception_score") if generator else ("rfid", "lpips", "usage")
    size = {"tokens": cost.tokens_per_image} if generator else {"codebook_m": cost.parameters.codebook / 1e6}
    return {
        "recipe": cost.name,
        **{name: getattr(cost.published, name, None) for name in published},
        "parameters_m": cost.parameters.total / 1e6,
        **size,
        "forward_gflop": cost.forward_operations / 1e9,
        "training_gflop": cost.training_operations / 1e9,
        "image_gib": cost.activations.per_image / 2**30,
        "memory_gib": cost.memory_bytes / 2**30,
        "steps": cost.steps,
        "epochs": cost.epochs,
        "storage_gib": cost.storage_bytes / 2**30,
    }


def giga(operations: int) -> str:
    """Operations in billions, for reading."""
    number = f"{operations / 1e9:,.4g}" if operations < 1e12 else f"{operations / 1e9:,.0f}"
    return f"{number} × 10⁹"


def gibi(size: int) -> str:
    """Bytes in GiB, or in MiB below half a GiB, for reading."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"
