"""How long a counted run takes and what it costs, at a speed that was measured, or that no GPU can beat."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ibqlab.base.checks import PROCESSES, require, require_at_most
from ibqlab.costs.run_cost import RunCost
from ibqlab.recipes.recipe_files import EXPERIMENTS

SLOWEST, FASTEST = 1e-6, 1e9
"""Images per second that one GPU may be said to train on."""
PEAK_OPERATIONS = 989e12
"""Dense bfloat16 operations per second of an H100 or H200 SXM, by NVIDIA's data sheet. No step reaches them."""
BOUND = "at least"


@dataclass(frozen=True, kw_only=True)
class TrainingTime:
    """What a run costs in time and money at a measured speed."""

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
        gpus = f"on {self.gpus:,} GPU{'s' if self.gpus > 1 else ''}"
        if self.gpu_hours < 1:
            return f"time: {60 * self.gpu_hours:,.2g} GPU-minutes {gpus}{price}"
        return f"time: {self.gpu_hours:,.0f} GPU-hours = {self.days:,.2f} days {gpus}{price}"


def training_time(
    cost: RunCost, images_per_second: float, gpus: int | None = None, gpu_hour_price: float | None = None
) -> TrainingTime:
    """Time and price of a run.

    Args:
        cost: of the run.
        images_per_second: images that one GPU trains on per second, as measured there.
        gpus: that work together; None: as many as the recipe has processes. They are taken to lose no time to each
            other.
        gpu_hour_price: of one GPU for an hour, in any currency.
    Raises:
        ValueError: a speed, number or price that cannot be.
    """
    gpus = cost.processes if gpus is None else gpus
    fast = f"images per second must lie in {SLOWEST:g} to {FASTEST:g}, got {images_per_second}; measure them"
    require(SLOWEST <= images_per_second <= FASTEST, fast)
    require(gpus >= 1, f"gpus must be at least 1, got {gpus}")
    require_at_most("gpus", gpus, PROCESSES)
    has_price = gpu_hour_price is None or 0 <= gpu_hour_price < math.inf
    require(has_price, f"a GPU-hour's price must be ≥ 0 and finite, got {gpu_hour_price}")
    hours = cost.images / images_per_second / 3600
    return TrainingTime(gpu_hours=hours, gpus=gpus, price=None if gpu_hour_price is None else hours * gpu_hour_price)


@dataclass(frozen=True, kw_only=True)
class TrainingSpeed:
    """Images per second of one GPU, and where the number is from."""

    images_per_second: float
    origin: str
    """"measured on …", "by operations from …", "as given", or "at least" for a bound."""

    @property
    def is_bound(self) -> bool:
        """No training is as fast: hours are at least those that follow from it."""
        return self.origin == BOUND


def measured_speeds(folder: Path = EXPERIMENTS) -> dict[str, TrainingSpeed]:
    """The fastest measured training speed of each recipe on one GPU, from the CSV files of results/training_step.

    Rows of CPUs and of the published form of the quantizer are left out.
    """
    speeds: dict[str, TrainingSpeed] = {}
    for file in sorted((folder / "results" / "training_step").glob("*.csv")):
        with file.open(encoding="utf-8", newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["quantizer"] == "as configured"]
        for row in rows:
            # A size that did not fit is a row without a speed; a CPU is named with its cores.
            if not row["images_per_second"] or row["device"].endswith("cores"):
                continue
            speed = float(row["images_per_second"])
            if row["recipe"] not in speeds or speed > speeds[row["recipe"]].images_per_second:
                origin = f"measured on {row['device']}, {row['images']} images a step"
                speeds[row["recipe"]] = TrainingSpeed(images_per_second=speed, origin=origin)
    return speeds


def speed_of(cost: RunCost, speeds: Mapping[str, TrainingSpeed], measured: Sequence[RunCost] = ()) -> TrainingSpeed:
    """A speed for a run that was not measured itself: the nearest measured recipe's by operations, else a bound.

    Args:
        cost: of the run.
        speeds: recipe → measured speed.
        measured: costs of recipes that were measured.
    """
    known = [other for other in measured if other.name in speeds and other.network == cost.network]
    if known:
        # The nearest in operations wastes most alike.
        near = min(known, key=lambda other: abs(math.log(other.training_operations / cost.training_operations)))
        factor = near.training_operations / cost.training_operations
        speed = speeds[near.name].images_per_second * factor
        return TrainingSpeed(images_per_second=speed, origin=f"by operations from {near.name}")
    return TrainingSpeed(images_per_second=PEAK_OPERATIONS / cost.training_operations, origin=BOUND)
