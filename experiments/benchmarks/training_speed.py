"""Images per second and peak memory of training steps of the paper's recipes on one device.

    python experiments/benchmarks/training_speed.py --output speed.csv          # minutes on one GPU
    ibqlab plan imagenet --images-per-second S                                  # GPU-hours at a measured speed

Whole steps as in training: tokenizer, discriminator, losses, Adam, averages; random pixels that lie on the device
already, so loading is left out. LPIPS' networks have fresh weights here, which changes its value and not its time.
Writes one row per recipe and number of images, with device, versions and commit; a size that does not fit is a row
without a speed.
"""

import argparse
import statistics
import time

import pandas as pd
import torch

from ibqlab.runs import provenance
from ibqlab.training import TrainConfig, recipe_config
from ibqlab.training.accounting import Lpips
from ibqlab.training.models import build_models
from ibqlab.training.processes import launch
from ibqlab.training.step import Models, TokenizerStep

RECIPES = ["imagenet/ibq_16384", "imagenet/ibq_262144", "imagenet/vqgan_16384", "imagenet/lfq_262144"]


def build(config: TrainConfig, perceptual: bool) -> TokenizerStep:
    """The networks of a recipe on its device."""
    models, _ = build_models(config)
    return TokenizerStep(
        config, Models(models.tokenizer, models.discriminator, Lpips() if perceptual else None), launch(config)
    )


def measure(recipe: str, images: int, warm_up: int, steps: int) -> dict[str, float | str | int]:
    """Median seconds of a step and peak memory."""
    wanted = recipe_config(recipe)
    settings = {"processes": 1, "accumulate": 1, "batch_size": images, "accelerator": "auto"}
    weight = wanted.loss.perceptual_weight
    config = recipe_config(recipe, settings | {"loss.perceptual_weight": 0.0})
    networks = build(config, bool(weight))
    cuda = networks.fabric.device.type == "cuda"
    size = config.data.image_size
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, device=networks.fabric.device)
    seconds = []
    for step in range(1, warm_up + steps + 1):
        began = time.perf_counter()
        networks.learn(step, pixels, lambda indices: None)
        networks.optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[warm_up:])
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    losses = config.loss.describe() if not weight else config.loss.describe().replace("no LPIPS", "LPIPS' network")
    return {
        "recipe": recipe,
        "images": images,
        "losses": losses,
        "precision": config.precision,
        "seconds_per_step": median,
        "images_per_second": images / median,
        "peak_gib": memory,
    }


def main() -> None:
    """Measure what the command line names, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="names under experiments/")
    parser.add_argument("--images", type=int, nargs="+", default=[4, 16, 32], help="per step")
    parser.add_argument("--steps", type=int, default=10, help="timed, after --warm-up")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--output", help="CSV file")
    chosen = parser.parse_args()
    facts = provenance()
    hardware = facts["hardware"]
    shared = {
        "device": ", ".join(hardware["gpu"]) or f"{hardware['cpu']}, {hardware['cores']} cores",
        "torch": facts["versions"]["torch"],
        "commit": facts["commit"],
        "dirty": facts["dirty"],
        "seed": 0,
        "command": " ".join(facts["command"]),
    }
    rows = []
    for recipe in chosen.recipes:
        for images in chosen.images:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                row = measure(recipe, images, chosen.warm_up, chosen.steps)
            except torch.cuda.OutOfMemoryError:
                row = {"recipe": recipe, "images": images}
            rows.append(row | shared)
            print(pd.DataFrame(rows[-1:]).T.to_string(header=False), flush=True)
    if chosen.output:
        pd.DataFrame(rows).to_csv(chosen.output, index=False)


if __name__ == "__main__":
    main()
