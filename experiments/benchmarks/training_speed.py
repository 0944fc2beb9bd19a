"""Images per second and peak memory of training steps of the paper's recipes on one device.

    python experiments/benchmarks/training_speed.py --output speed.csv          # minutes on one GPU
    ibqlab plan imagenet --images-per-second S                                  # GPU-hours at a measured speed
    python experiments/benchmarks/training_speed.py imagenet/ibq_262144 --images 16 --published-form --output ratio.csv

Whole steps as in training: tokenizer, discriminator, losses, Adam, averages; random pixels that lie on the device
already, so loading is left out. LPIPS' networks have fresh weights here, which changes its value and not its time.
Writes one row per recipe, number of images and form of the step, with device, versions and commit; a size that does not
fit is a row without a speed. start_seconds is the time from building the networks to the end of the first step, which
compiles.

Forms take turns in rounds. With --compile a step runs as written, compiled (speed.compile), or both. With
--published-form there is one form more: with the quantizer as the published code writes it, N × K matrices and all (see
published_form.py); everything else is as in the first form. The columns speed_ratio and memory_ratio hold each form's
images per second and peak memory over the published form's.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import published_form  # noqa: F401 - registers the quantizer of the published form
import torch
from rows import origin_columns

from ibqlab.costs.tokenizer_step_cost import Lpips
from ibqlab.training import TrainConfig, recipe_config
from ibqlab.training.launch import launch
from ibqlab.training.tokenizer.models import build_models
from ibqlab.training.tokenizer.step import Models, TokenizerStep

RECIPES = ["imagenet/ibq_16384", "imagenet/ibq_262144", "imagenet/vqgan_16384", "imagenet/lfq_262144"]
CONFIGURED, PUBLISHED = "as configured", "published form"
OF_PUBLISHED_FORM = {"tokenizer.quantizer.name": "ibq_published_form"}
COMPILES = {"off": [False], "on": [True], "both": [False, True]}
"""What --compile says → values of speed.compile."""
SEED = 0


class TimedStep:
    """A recipe's training step on its device, timed round by round.

    Args:
        recipe: name under experiments/.
        images: per step.
        settings: of the recipe, changed for this measurement.
    """

    def __init__(self, recipe: str, images: int, settings: dict[str, Any]):
        single = {"processes": 1, "accumulate": 1, "batch_size": images, "accelerator": "auto", "seed": SEED}
        self.perceptual = bool(recipe_config(recipe).loss.perceptual_weight)
        # The package lpips and its weight file are not asked for: the stand-in takes the same time.
        if "speed.compile" not in settings and not torch.cuda.is_available():
            # Minutes of compiling that a CPU does not win back.
            single["speed.compile"] = False
        self.config = recipe_config(recipe, single | settings | {"loss.perceptual_weight": 0.0})
        before, began = allocated(), time.perf_counter()
        self.networks = build(self.config, self.perceptual)
        self.device = self.networks.fabric.device
        shape = (images, 3, self.config.data.image_size, self.config.data.image_size)
        generator = torch.Generator().manual_seed(SEED)
        self.pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(self.device)
        self.steps = 0
        self.seconds: list[float] = []
        self.peak = 0
        self.take(1)
        self.start_seconds = time.perf_counter() - began
        self.state = allocated() - before
        """Bytes that stay between steps: weights, averages, and Adam's state, which the first step makes."""

    def take(self, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        seconds = []
        for _ in range(steps):
            self.steps += 1
            began = time.perf_counter()
            self.networks.learn(self.steps, self.pixels, lambda indices: None)
            self.networks.optimizer.zero_grad()
            synchronise(self.device)
            seconds.append(time.perf_counter() - began)
        return seconds

    def time_round(self, steps: int, others: int) -> None:
        """Keep the seconds of so many steps and their peak memory, less what other steps' networks hold (bytes)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.seconds += self.take(steps)
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)

    def row(self) -> dict[str, float | str | int]:
        """Median seconds of a step, images per second and peak memory."""
        losses, speed = self.config.loss.describe(), self.config.speed
        median = statistics.median(self.seconds)
        return {
            "losses": losses.replace("no LPIPS", "LPIPS' network") if self.perceptual else losses,
            "precision": self.config.precision,
            "channels_last": speed.channels_last,
            "compile": speed.compile,
            "activation_checkpointing": speed.activation_checkpointing,
            "start_seconds": self.start_seconds,
            "steps": len(self.seconds),
            "seconds_per_step": median,
            "images_per_second": len(self.pixels) / median,
            "peak_gib": self.peak / 2**30 if self.device.type == "cuda" else float("nan"),
        }


def build(config: TrainConfig, perceptual: bool) -> TokenizerStep:
    """The networks of a recipe on its device."""
    models, _ = build_models(config)
    lpips = Lpips(config.loss.perceptual_net) if perceptual else None
    return TokenizerStep(config, Models(models.tokenizer, models.discriminator, lpips), launch(config))


def allocated() -> int:
    """Bytes of tensors on the current CUDA device; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def synchronise(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    recipe: str, images: int, forms: dict[str, dict[str, Any]], *, warm_up: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per form of a recipe's step; the forms take turns, round by round.

    Args:
        recipe: name under experiments/.
        images: per step.
        forms: settings that each form changes, by its name.
        warm_up: steps of each form before the first round, at least 1, because the first one compiles.
        steps: timed steps in a round.
        rounds: of each form.
    """
    timed: dict[str, TimedStep] = {}
    for name, settings in forms.items():
        try:
            timed[name] = TimedStep(recipe, images, settings)
            timed[name].take(warm_up - 1)
        except torch.cuda.OutOfMemoryError:
            timed.pop(name, None)
    for _ in range(rounds):
        for name in list(timed):
            others = sum(step.state for other, step in timed.items() if other != name)
            try:
                timed[name].time_round(steps, others)
            except torch.cuda.OutOfMemoryError:
                del timed[name]
    return [
        {"recipe": recipe, "images": images, "quantizer": name.partition(",")[0]}
        | {key.removeprefix("speed."): value for key, value in settings.items() if key == "speed.compile"}
        | (timed[name].row() if name in timed else {})
        for name, settings in forms.items()
    ]


def forms_of(compile_choice: str, published: bool) -> dict[str, dict[str, Any]]:
    """Forms of a step, by name, with the settings that each changes.

    Args:
        compile_choice: of COMPILES; "recipe": as the recipe says.
        published: whether to add the published form of the quantizer, which is compiled or not as the first form is.
    """
    forms: dict[str, dict[str, Any]] = {CONFIGURED: {}}
    if compile_choice in COMPILES:
        choices = COMPILES[compile_choice]
        forms = {f"{CONFIGURED}, compile {choice}": {"speed.compile": choice} for choice in choices}
    first = next(iter(forms.values()))
    return forms | ({PUBLISHED: first | OF_PUBLISHED_FORM} if published else {})


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one measurement with their speed and memory over the published form's, where that was measured."""
    base = next((row for row in rows if row["quantizer"] == PUBLISHED and "peak_gib" in row), None)
    if base is None:
        return list(rows)
    ratios = {"speed_ratio": "images_per_second", "memory_ratio": "peak_gib"}
    return [row | {ratio: row[key] / base[key] for ratio, key in ratios.items() if key in row} for row in rows]


def main() -> None:
    """Measure what the command line names, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="names under experiments/")
    parser.add_argument(
        "--images",
        type=int,
        nargs="+",
        help="per step; on a GPU 16 with --published-form, else 4, 16 and 32; 1 elsewhere",
    )
    parser.add_argument("--steps", type=int, default=4, help="timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the first round, at least 1")
    parser.add_argument("--published-form", action="store_true", help="time the published quantizer code as well (IBQ)")
    parser.add_argument("--compile", choices=["recipe", *COMPILES], default="recipe", help="speed.compile")
    parser.add_argument("--output", help="CSV file")
    chosen = parser.parse_args()
    forms = forms_of(chosen.compile, chosen.published_form)
    for recipe in chosen.recipes if chosen.published_form else ():
        name = recipe_config(recipe).tokenizer.quantizer.config_name
        if name != "ibq":
            parser.error(f"--published-form needs recipes with the quantizer 'ibq'; {recipe} has {name!r}")
    on_gpu = [16] if chosen.published_form else [4, 16, 32]
    batches = chosen.images or (on_gpu if torch.cuda.is_available() else [1])
    origin, rows = origin_columns(SEED), []
    for recipe in chosen.recipes:
        for images in batches:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            found = measure(recipe, images, forms, warm_up=chosen.warm_up, steps=chosen.steps, rounds=chosen.rounds)
            rows += [row | origin for row in with_ratios(found)]
            print(pd.DataFrame(rows[-len(found) :]).T.to_string(header=False), flush=True)
            if chosen.output:
                # Written after each measurement: what was measured stays when a later one fails.
                pd.DataFrame(rows).to_csv(chosen.output, index=False)


if __name__ == "__main__":
    main()
