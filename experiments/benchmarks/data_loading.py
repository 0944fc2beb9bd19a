"""How fast images are loaded from a folder and from tar shards, and how many loader processes a training step needs.

    python experiments/benchmarks/data_loading.py --step-images-per-second 100 --output loading.csv

Made-up JPEG files of ImageNet's usual size in a temporary folder, resized, cropped and batched as for training; under a
minute. Everything lies in the system's file cache, so this measures decoding and the loader, and no disk: on a network
file system or a spinning disk the two differ far more. Prints a Markdown table of images per second, best of the
rounds, as ratios to the folder with 0 processes, and what one process loads against what a step takes: a step's own
speed is what training_speed.py measures. Processes are taken to add up as long as each has a core of its own.
"""

import argparse
import math
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
import torch
from PIL import Image
from rows import origin_columns

from ibqlab.data import RESIZERS, DataConfig, ImageSource, open_data, training_batches, write_shards

HEIGHT, WIDTH, QUALITY, SEED = 375, 500, 90, 0
IMAGE_SIZE, BATCH_SIZE = 256, 16
KINDS, WORKERS = ("folder", "shards"), (0, 1, 2)


def make_images(folder: Path, images: int) -> None:
    """Smooth noise as JPEG files, about 50 KB each, in four class folders."""
    rng = np.random.default_rng(SEED)
    for number in range(images):
        coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
        picture = (picture + rng.integers(-8, 9, picture.shape)).clip(0, 255).astype(np.uint8)
        place = folder / f"class{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number:05}.jpg", quality=QUALITY)


def measure(source: ImageSource, workers: int) -> float:
    """Images per second over one epoch in whole batches, starting the processes included."""
    steps = max(1, len(source) // BATCH_SIZE)
    batches = training_batches(source, batch_size=BATCH_SIZE, seed=SEED, start_step=0, steps=steps, workers=workers)
    start = time.perf_counter()
    count = sum(len(batch.images) for batch in batches)
    return count / (time.perf_counter() - start)


def measure_all(root: Path, workers: Sequence[int], rounds: int) -> pd.DataFrame:
    """The best of the rounds, which alternate between all combinations.

    Returns:
        Columns: resize, source, processes, images_per_second, ratio (to the folder with the fewest processes and the
        same resize), per_process (images per second that one of them loads; with 0 processes the training process).
    """
    sources, rates = {}, {}
    for resize in RESIZERS:
        for kind in KINDS:
            place = str(root / kind)
            config = DataConfig(source=place, validation_source=place, image_size=IMAGE_SIZE, resize=resize)
            sources[resize, kind] = open_data(config, "train")
    for _ in range(rounds):
        for (resize, kind), source in sources.items():
            for count in workers:
                key = (resize, kind, count)
                rates[key] = max(rates.get(key, 0.0), measure(source, count))
    return pd.DataFrame(
        {
            "resize": resize,
            "source": kind,
            "processes": count,
            "images_per_second": rate,
            "ratio": rate / rates[resize, KINDS[0], workers[0]],
            "per_process": rate / max(1, count),
        }
        for (resize, kind, count), rate in rates.items()
    )


def describe(table: pd.DataFrame, step_speed: float | None) -> str:
    """The table as Markdown, one per way to resize, each with a sentence on what a step needs."""
    lines = []
    for resize, part in table.groupby("resize", sort=False):
        counts = sorted(set(part["processes"]))
        ratios = part.set_index(["source", "processes"])["ratio"]
        base = part["images_per_second"].iloc[0]
        lines += [f"resize={resize!r}: 1.00 is {base:.0f} images per second", ""]
        lines += ["| | " + " | ".join(f"{count} processes" for count in counts) + " |", "|---|" + "---|" * len(counts)]
        lines += [f"| {kind} | " + " | ".join(f"{ratios[kind, n]:.2f}" for n in counts) + " |" for kind in KINDS]
        slowest = slowest_process(part)
        lines += ["", f"One process loads {slowest:.0f} images per second" + needs(slowest, step_speed), ""]
    return "\n".join(lines)


def slowest_process(part: pd.DataFrame) -> float:
    """Images per second of one loader process where it loads the fewest; the training process if there is no other."""
    loaders = part[part["processes"] > 0]
    return float((part if loaders.empty else loaders)["per_process"].min())


def needs(per_process: float, step_speed: float | None) -> str:
    """The rest of the sentence: how many processes keep up with a step."""
    if step_speed is None:
        return "; --step-images-per-second tells how many a training step needs."
    count = math.ceil(step_speed / per_process)
    return (
        f": a step that takes {step_speed:g} per second needs {count} of them (data.workers={count}) on as many cores."
    )


def main() -> None:
    """Make the images, measure every combination, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="JPEG files that are made and loaded once per round")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="numbers of loader processes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--step-images-per-second", type=float, help="what one training process takes, as measured")
    parser.add_argument("--output", help="CSV file")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["IBQLAB_CACHE"] = str(root / "cache")
        make_images(root / "folder", chosen.images)
        write_shards(root / "folder", root / "shards", images_per_shard=64, progress=False)
        table = measure_all(root, chosen.workers, chosen.rounds)
    print(describe(table, chosen.step_images_per_second))
    print(
        f"{chosen.images} JPEG files of {WIDTH} × {HEIGHT}, crops of {IMAGE_SIZE}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, Pillow {PIL.__version__}; {os.cpu_count()} CPU cores, "
        f"{platform.machine()}, {platform.system()}, load {os.getloadavg()[0]:.1f} at the end"
    )
    if chosen.output:
        if chosen.step_images_per_second is not None:
            table["step_images_per_second"] = chosen.step_images_per_second
            table["processes_needed"] = np.ceil(chosen.step_images_per_second / table["per_process"]).astype(int)
        table.assign(pillow=PIL.__version__, **origin_columns(SEED)).to_csv(chosen.output, index=False)


if __name__ == "__main__":
    main()
