"""How fast images are loaded from a folder and from tar shards, with 0, 1 and 2 loader processes.

    python experiments/benchmarks/data_loading.py

Made-up JPEG files of ImageNet's usual size in a temporary folder, resized, cropped and batched as for training; under a
minute. Everything lies in the system's file cache, so this measures decoding and the loader, and no disk: on a network
file system or a spinning disk the two differ far more. Prints a Markdown table of images per second, best of the
rounds, as ratios to the folder with 0 processes.
"""

import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

from ibqlab.data import RESIZERS, DataConfig, ImageSource, open_data, training_batches, write_shards

IMAGES, HEIGHT, WIDTH, QUALITY = 256, 375, 500, 90
IMAGE_SIZE, BATCH_SIZE, STEPS, ROUNDS = 256, 16, 16, 2
WORKERS = (0, 1, 2)


def make_images(folder: Path) -> None:
    """Smooth noise as JPEG files, about 50 KB each, in four class folders."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
        picture = (picture + rng.integers(-8, 9, picture.shape)).clip(0, 255).astype(np.uint8)
        place = folder / f"class{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number:05}.jpg", quality=QUALITY)


def measure(source: ImageSource, workers: int) -> float:
    """Images per second over STEPS batches, starting the processes included; the best of ROUNDS."""
    settings = {"batch_size": BATCH_SIZE, "seed": 0, "start_step": 0, "steps": STEPS, "workers": workers}
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        count = sum(len(batch.images) for batch in training_batches(source, **settings))
        rates.append(count / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    """Make the images, measure every combination, print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["IBQLAB_CACHE"] = str(root / "cache")
        make_images(root / "folder")
        write_shards(root / "folder", root / "shards", images_per_shard=64, progress=False)
        rates = {}
        for resize in RESIZERS:
            for kind in ("folder", "shards"):
                place = str(root / kind)
                config = DataConfig(source=place, validation_source=place, image_size=IMAGE_SIZE, resize=resize)
                source = open_data(config, "train")
                rates |= {(resize, kind, workers): measure(source, workers) for workers in WORKERS}
    for resize in RESIZERS:
        base = rates[resize, "folder", 0]
        print(f"\nresize={resize!r}: 1.00 is {base:.0f} images per second\n")
        print("| | " + " | ".join(f"{workers} processes" for workers in WORKERS) + " |")
        print("|---|" + "---|" * len(WORKERS))
        for kind in ("folder", "shards"):
            print(f"| {kind} | " + " | ".join(f"{rates[resize, kind, w] / base:.2f}" for w in WORKERS) + " |")
    print(
        f"\n{IMAGES} JPEG files of {WIDTH} × {HEIGHT}, crops of {IMAGE_SIZE}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, Pillow {PIL.__version__}; {os.cpu_count()} CPU cores, "
        f"{platform.machine()}, {platform.system()}, load {os.getloadavg()[0]:.1f} at the end"
    )


if __name__ == "__main__":
    main()
