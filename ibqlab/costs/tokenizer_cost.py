"""What a recipe costs, before anything is paid for: parameters, operations, memory, steps, GPU-hours, disk.

Sizes are counted (see `accounting`), speed is not: it is measured on the machine at hand and typed in. Nothing here
reads data or weight files, needs a GPU or takes memory.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ibqlab.base.checks import PROCESSES, require, require_at_most
from ibqlab.base.names import BUILT_IN
from ibqlab.costs.step_cost import Cost, Parameters, count_step, weight_dtype
from ibqlab.recipes.recipe_files import EXPERIMENTS, PublishedRow
from ibqlab.recipes.snapshots import SnapshotSchedule, snapshot_schedule
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs.checkpoints import CHECKPOINTS_KEPT

if TYPE_CHECKING:
    import pandas as pd

SLOWEST, FASTEST = 1e-6, 1e9
"""Images per second that one GPU may be said to train on."""
IMAGENET_IMAGES = 1_281_166
"""ImageNet's training images as published training uses them: all but one, which is damaged."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What the plan of any run holds: a tokenizer's or a generator's."""

    name: str
    """Of the recipe."""
    tokens_per_image: int
    """Codes that stand for an image."""
    forward_operations: int
    """Operations of one image without gradients."""
    training_operations: int
    """Operations per image of a training step, forward and backward."""
    state_bytes: int
    """Memory per process for weights, gradients, Adam's averages and averaged weights, whatever the batch."""
    activations: Cost
    """Bytes kept for the backward pass."""
    images_at_once: int
    """Images of one forward and backward pass on one process."""
    steps: int
    """Optimiser steps."""
    images: int
    """Images seen in all steps."""
    epochs: float | None
    """The same in passes over ImageNet's 1,281,166 training images; None for the built-in images."""
    processes: int
    """Processes, one GPU each, that the recipe asks for."""
    accelerator: str
    """"cuda", "cpu" or "auto", as the recipe says."""
    checkpoint_bytes: int
    """One checkpoint on disk; a run keeps two."""

    @property
    def storage_bytes(self) -> int:
        """Of the checkpoints that a run keeps; images, metrics and a tokenizer's snapshots come on top."""
        return CHECKPOINTS_KEPT * self.checkpoint_bytes

    @property
    def memory_bytes(self) -> int:
        """State and activations of one process. Work space of kernels and of the allocator comes on top."""
        return self.state_bytes + self.activations.of(self.images_at_once)


@dataclass(frozen=True, kw_only=True)
class Plan(RunPlan):
    """The cost of a tokenizer's recipe in everything but time; forward is to the reconstruction, in evaluation.

    Operations count a multiply-add as two.
    """

    published: PublishedRow | None
    """The numbers that a paper printed for it; None for recipes of our own."""
    parameters: Parameters
    """Learned numbers, part by part."""
    snapshots: SnapshotSchedule
    """What the run writes down of its codebook, and when."""

    @property
    def storage_bytes(self) -> int:
        """Of the checkpoints that a run keeps and of all its snapshots; images and metrics come on top."""
        return super().storage_bytes + self.snapshots.total_bytes

    def describe(self) -> str:
        """The plan as lines for people."""
        parts = {name: value for name, value in self.parameters._asdict().items() if value}
        names = {"convolutions": "1 × 1 convolutions", "perceptual": "LPIPS network (frozen)"}
        counted = "\n".join(f"  {names.get(name, name):<23}{value:>14,}" for name, value in parts.items())
        epochs = "" if self.epochs is None else f" = {self.epochs:,.1f} × ImageNet's {IMAGENET_IMAGES:,}"
        published = f"published: {self.published.describe()}" if self.published else "published: nothing"
        remarks = f"\n  {self.published.remarks}" if self.published and self.published.remarks else ""
        return (
            f"{self.name}\n{published}{remarks}\n"
            f"parameters\n{counted}\n  {'tokenizer, all':<23}{self.parameters.tokenizer:>14,}\n"
            f"tokens per image: {self.tokens_per_image:,}\n"
            "operations per image (multiply-add = 2; convolutions, matrix products and attention)\n"
            f"  image to reconstruction{giga(self.forward_operations):>16}\n"
            f"  training step          {giga(self.training_operations):>16}\n"
            "memory of one process (kernels' work space comes on top)\n"
            f"  weights, gradients, Adam, averages{gibi(self.state_bytes):>12}\n"
            f"  for the backward pass{gibi(self.activations.of(self.images_at_once)):>25}, {self.images_at_once} "
            f"images at {gibi(self.activations.per_image)} each and {gibi(self.activations.fixed)} whatever their "
            "number\n"
            f"  together{gibi(self.memory_bytes):>38}\n"
            f"training: {self.steps:,} steps, {self.images:,} images{epochs}; processes: {self.processes}\n"
            f"disk: {gibi(self.storage_bytes)}, and metrics on top\n"
            f"  {CHECKPOINTS_KEPT} checkpoints of {gibi(self.checkpoint_bytes)}: "
            f"{gibi(CHECKPOINTS_KEPT * self.checkpoint_bytes)}\n"
            f"  {self.snapshots.describe()}, {gibi(self.snapshots.bytes_each)} each: "
            f"{gibi(self.snapshots.total_bytes)}"
        )


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a plan costs in time and money at a measured speed."""

    gpu_hours: float
    """Hours of one GPU, for the training steps alone: validation, loading and restarts come on top."""
    gpus: int
    """GPUs that work at the same time."""
    price: float | None = None
    """Of all GPU-hours, in the currency of the price that was given."""

    @property
    def days(self) -> float:
        """From the first step to the last."""
        return self.gpu_hours / self.gpus / 24

    def describe(self) -> str:
        """One line."""
        price = "" if self.price is None else f", cost {self.price:,.0f}"
        return f"time: {self.gpu_hours:,.0f} GPU-hours = {self.days:,.2f} days on {self.gpus} GPUs{price}"


def plan_tokenizer(config: TrainConfig, name: str = "", published: PublishedRow | None = None) -> Plan:
    """Count what a recipe costs.

    Memory of the state is, per learned number, a weight, a gradient, Adam's two averages and (where ema_decay is above
    0) an averaged weight, with several processes also the gradient's copy in the buckets that they exchange; frozen
    weights and buffers once.

    Args:
        config: of the run.
        name: of the recipe, for tables.
        published: what a paper printed for it.
    Raises:
        ValueError: an image size that the networks cannot take.
    Cost: seconds; the numbers of the networks take no memory.
    """
    cost = count_step(config)
    item = weight_dtype(config).itemsize
    averages = 1 if config.ema_decay else 0
    buckets = 1 if config.processes > 1 else 0
    side = config.data.image_size // config.tokenizer.autoencoder.downsampling
    at_once = config.batch_size // (config.processes * config.accumulate)
    images = config.steps * config.batch_size
    return Plan(
        name=name,
        published=published,
        parameters=cost.parameters,
        tokens_per_image=side**2,
        forward_operations=cost.forward.of(1),
        training_operations=cost.training.of(at_once) // at_once,
        state_bytes=cost.parameters.trained * item * (4 + averages + buckets) + cost.frozen_bytes,
        activations=cost.activations,
        images_at_once=at_once,
        steps=config.steps,
        images=images,
        epochs=None if config.data.source in BUILT_IN else images / IMAGENET_IMAGES,
        processes=config.processes,
        accelerator=config.accelerator,
        checkpoint_bytes=cost.parameters.trained * item * (3 + averages),
        snapshots=snapshot_schedule(config),
    )


def cost_of_run(
    plan: RunPlan, images_per_second: float, gpus: int | None = None, gpu_hour_price: float | None = None
) -> RunCost:
    """Time and price of a plan.

    Args:
        plan: of the run.
        images_per_second: images that one GPU trains on per second, as measured there.
        gpus: that work together; None: as many as the recipe has processes. They are taken to lose no time to each
            other.
        gpu_hour_price: of one GPU for an hour, in any currency.
    Raises:
        ValueError: a speed, number or price that cannot be.
    """
    gpus = plan.processes if gpus is None else gpus
    fast = f"images per second must lie in {SLOWEST:g} to {FASTEST:g}, got {images_per_second}; measure them"
    require(SLOWEST <= images_per_second <= FASTEST, fast)
    require(gpus >= 1, f"gpus must be at least 1, got {gpus}")
    require_at_most("gpus", gpus, PROCESSES)
    has_price = gpu_hour_price is None or 0 <= gpu_hour_price < math.inf
    require(has_price, f"a GPU-hour's price must be ≥ 0 and finite, got {gpu_hour_price}")
    hours = plan.images / images_per_second / 3600
    return RunCost(gpu_hours=hours, gpus=gpus, price=None if gpu_hour_price is None else hours * gpu_hour_price)


PEAK_OPERATIONS = 989e12
"""Dense bfloat16 operations per second of an H100 or H200 SXM, by NVIDIA's data sheet. No step reaches them."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images per second of one GPU, and where the number is from."""

    images_per_second: float
    origin: str
    """"measured on …", "by operations from …", or "at least" for a bound."""

    @property
    def is_bound(self) -> bool:
        """No training is as fast: hours are at least those that follow from it."""
        return self.origin == BOUND


BOUND = "at least"


def measured_speeds(folder: Path = EXPERIMENTS) -> dict[str, Speed]:
    """The fastest measured training speed of each recipe on one GPU, from the CSV files of results/training_step.

    Rows of CPUs and of the published form of the quantizer are left out.
    """
    found: dict[str, Speed] = {}
    for file in sorted((folder / "results" / "training_step").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["quantizer"] == "as configured"]
        for row in rows:
            # A size that did not fit is a row without a speed; a CPU is named with its cores.
            if not row["images_per_second"] or row["device"].endswith("cores"):
                continue
            speed = float(row["images_per_second"])
            if row["recipe"] not in found or speed > found[row["recipe"]].images_per_second:
                found[row["recipe"]] = Speed(images_per_second=speed, origin=f"measured on {row['device']}")
    return found


def speed_of(plan: RunPlan, speeds: Mapping[str, Speed], others: Sequence[RunPlan] = ()) -> Speed:
    """A speed for a plan: its own measured one, else another recipe's scaled by operations, else a bound.

    Args:
        plan: of the run.
        speeds: recipe → measured speed.
        others: plans of recipes that may have been measured.
    """
    if plan.name in speeds:
        return speeds[plan.name]
    known = [other for other in others if other.name in speeds and type(other) is type(plan)]
    if known:
        # The nearest in operations wastes most alike.
        near = min(known, key=lambda other: abs(math.log(other.training_operations / plan.training_operations)))
        factor = near.training_operations / plan.training_operations
        speed = speeds[near.name].images_per_second * factor
        return Speed(images_per_second=speed, origin=f"by operations from {near.name}")
    return Speed(images_per_second=PEAK_OPERATIONS / plan.training_operations, origin=BOUND)


def plan_table(plans: Sequence[Plan]) -> "pd.DataFrame":
    """Plans as one row each.

    Returns:
        Columns: recipe; rfid, lpips, usage (published; share of codes); parameters_m (tokenizer, millions); codebook_m
        (millions); forward_gflop and training_gflop (10⁹ operations per image); image_gib (activations per image, GiB);
        memory_gib (one process, GiB); steps; epochs (of ImageNet); storage_gib (kept checkpoints and all snapshots).
    """
    import pandas as pd  # noqa: PLC0415 - keeps `import ibqlab.training` quick

    return pd.DataFrame([_table_row(plan) for plan in plans])


def _table_row(plan: Plan) -> dict[str, str | float | int | None]:
    printed = plan.published
    return {
        "recipe": plan.name,
        "rfid": printed.rfid if printed else None,
        "lpips": printed.lpips if printed else None,
        "usage": printed.usage if printed else None,
        "parameters_m": plan.parameters.tokenizer / 1e6,
        "codebook_m": plan.parameters.codebook / 1e6,
        "forward_gflop": plan.forward_operations / 1e9,
        "training_gflop": plan.training_operations / 1e9,
        "image_gib": plan.activations.per_image / 2**30,
        "memory_gib": plan.memory_bytes / 2**30,
        "steps": plan.steps,
        "epochs": plan.epochs,
        "storage_gib": plan.storage_bytes / 2**30,
    }


def giga(operations: int) -> str:
    """Operations in billions, for reading."""
    number = f"{operations / 1e9:,.4g}" if operations < 1e12 else f"{operations / 1e9:,.0f}"
    return f"{number} × 10⁹"


def gibi(size: int) -> str:
    """Bytes in GiB, or in MiB below half a GiB, for reading."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"
