"""What one GPU gives, beside what it must give: index backpropagation, the training step, sampling.

    make bench-gpu                                   # under 7 minutes on one H100 or H200
    make bench-gpu PARTS="sampling"                  # one part alone
    make bench-gpu PARTS="tests study"               # the tests that need a GPU, and a study for the README's figure

Each part runs scripts of this folder, each in a process of its own, so that compilation and the first step are timed
as a user meets them. What a script has measured stays when a later one fails or runs out of time. The table stands at
the end and in targets.csv; `before` is what was measured on an H200 at e3d173a, before the work on speed
(experiments/results/*/h200_first.csv).

Needs torch with CUDA, pandas and what ibqlab imports; neither Jupyter nor weights nor images from elsewhere.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# A machine with its own torch may have ibqlab as a checkout alone.
sys.path.insert(0, str(ROOT))

from rows import origin_columns  # noqa: E402

from ibqlab.studies.pages import to_markdown  # noqa: E402

SEED = 0
RECIPE = "imagenet/ibq_262144"
LARGE, SMALL = 262_144, 16_384
"""Codebook sizes of the targets."""


class Script(NamedTuple):
    """One process of a part."""

    arguments: tuple[str, ...]
    """Of Python."""
    output: str = ""
    """The file or folder that it writes, which `--output` names; empty: it writes none."""


class Part(NamedTuple):
    """What can be chosen on the command line."""

    scripts: tuple[Script, ...]
    seconds: int
    """After which its scripts are ended."""
    by_itself: bool = True
    """Whether it runs when no part is chosen."""


def _steps(output: str, *arguments: str) -> Script:
    """Training steps of some numbers of images, in a few rounds."""
    rounds = ("--steps", "3", "--rounds", "2", "--warm-up", "2")
    return Script((str(HERE / "training_speed.py"), RECIPE, *rounds, "--images", *arguments), output)


PARTS = {
    "index_backprop": Part(
        (
            Script(
                (
                    *(str(HERE / "index_backprop.py"), "--methods", "index_backprop", "--tokens", "4096"),
                    *("--codes", str(LARGE), str(SMALL), "--rounds", "5", "--encode", ""),
                ),
                "index_backprop.csv",
            ),
        ),
        seconds=100,
    ),
    "step": Part(
        (
            _steps("training_step.csv", "16", "--published-form", "--compile", "off"),
            _steps("training_step_large.csv", "32", "48", "--compile", "off"),
            # Last and by itself: where compiling takes too long, the others' numbers stay.
            _steps("training_step_compiled.csv", "16", "--compile", "on"),
        ),
        seconds=180,
    ),
    "sampling": Part(
        (
            Script(
                (
                    *(str(HERE / "sampling.py"), "--batches", "64", "--positions", "256", "--compiled"),
                    *("--rounds", "2"),  # of which the plain loop alone takes ten seconds each
                ),
                "sampling.csv",
            ),
        ),
        seconds=120,
    ),
    "tests": Part(
        (Script(("-m", "pytest", "-q", "-n", "6", str(ROOT / "tests" / "test_gpu.py"))),),
        seconds=240,
        by_itself=False,
    ),
    "study": Part((Script((str(HERE / "gpu_study.py"),), "explore_collapse_h200"),), seconds=540, by_itself=False),
}
"""By name, in their order."""

Tables = Mapping[str, pd.DataFrame]
"""What the scripts wrote, by the names of their files; a script that wrote nothing has none."""


class Target(NamedTuple):
    """One row of the table."""

    name: str
    must: str
    """In words, as "at least 4"."""
    before: str
    measured: Callable[[Tables], float]
    """May raise LookupError or ValueError where there is no such number."""


def index_row(codes: int, dtype: str, column: str) -> Callable[[Tables], float]:
    """A number of index backpropagation at a codebook size and a type of its inputs, by the best promise."""
    return lambda tables: float(_index_rows(tables, codes, dtype, "ibqlab")[column].iloc[0])


def error_ratio(tables: Tables) -> float:
    """How far the gradients are from float64, over how far IEEE float32's are: the larger one of both gradients."""
    ours, plain = (_index_rows(tables, LARGE, "float32", form).iloc[0] for form in ("ibqlab", "written out"))
    return max(ours[column] / plain[column] for column in ("features_rms_error", "codes_rms_error"))


def _index_rows(tables: Tables, codes: int, dtype: str, form: str) -> pd.DataFrame:
    table = tables["index_backprop"]
    chosen = {"form": form, "codes": codes, "dtype": dtype, "matmul": "float32"}
    return table[(table[list(chosen)] == pd.Series(chosen)).all(axis=1)]


def fastest_step(tables: Tables) -> float:
    """Images per second at the batch size and in the form that are fastest."""
    steps = pd.concat([table for name, table in tables.items() if name.startswith("training_step")])
    return float(steps[steps["quantizer"] == "as configured"]["images_per_second"].max())


def step_number(column: str, *, compiled: bool) -> Callable[[Tables], float]:
    """A number of the step of 16 images as configured."""

    def read(tables: Tables) -> float:
        rows = tables["training_step_compiled" if compiled else "training_step"]
        rows = rows[(rows["quantizer"] == "as configured") & (rows["compile"] == compiled)]
        return float(rows[column].iloc[0])

    return read


def sampling_number(column: str) -> Callable[[Tables], float]:
    """A number of the fastest form of sampling."""

    def read(tables: Tables) -> float:
        table = tables["sampling"]
        return float(table.loc[table["images_per_second"].idxmax(), column])

    return read


PUBLISHED = "times the published form's speed"
TARGETS = (
    Target("training step, images/s", "at least 100", "40.3", fastest_step),
    Target(f"training step, {PUBLISHED}", "at least 2", "1.19", step_number("speed_ratio", compiled=False)),
    Target("seconds to the end of the first step", "at most 60", "", step_number("start_seconds", compiled=False)),
    Target("the same, compiled", "at most 60", "above 145", step_number("start_seconds", compiled=True)),
    Target(
        f"index_backprop, K = 262,144, float32, {PUBLISHED}",
        "at least 4",
        "1.70",
        index_row(LARGE, "float32", "times_faster"),
    ),
    Target("its memory, of the published form's", "at most 0.05", "0.081", index_row(LARGE, "float32", "memory_share")),
    Target("its distance from float64, of IEEE float32's", "at most 1.05", "", error_ratio),
    Target(
        f"index_backprop, K = 262,144, bfloat16, {PUBLISHED}",
        "at least 5",
        "2.13",
        index_row(LARGE, "bfloat16", "times_faster"),
    ),
    Target("its share of the products' floor", "at least 0.6", "0.29", index_row(LARGE, "bfloat16", "share_of_floor")),
    Target(
        f"index_backprop, K = 16,384, float32, {PUBLISHED}",
        "at least 2",
        "1.18",
        index_row(SMALL, "float32", "times_faster"),
    ),
    Target(
        f"index_backprop, K = 16,384, bfloat16, {PUBLISHED}",
        "at least 2",
        "0.84",
        index_row(SMALL, "bfloat16", "times_faster"),
    ),
    Target(
        "sampling IBQ-B, 64 images with guidance, images/s",
        "at least 400",
        "32.8",
        sampling_number("images_per_second"),
    ),
    Target("its share of the bandwidth floor", "at least 0.6", "", sampling_number("floor_share")),
    Target("its seconds to a first image", "at most 30", "", sampling_number("first_image_seconds")),
)


def reaches(target: Target, value: float) -> bool:
    """Whether a number is what the target wants."""
    word, limit = re.fullmatch(r"at (least|most) ([\d.]+)", target.must).groups()
    return value >= float(limit) if word == "least" else value <= float(limit)


def table_of_targets(tables: Tables) -> pd.DataFrame:
    """Target, must reach, before, measured, reached; "not measured" where a script gave no number."""
    rows = []
    for target in TARGETS:
        try:
            value = target.measured(tables)
        except (LookupError, ValueError):
            value = math.nan
        is_number = not math.isnan(value)
        rows.append(
            {
                "target": target.name,
                "must reach": target.must,
                "before": target.before,
                "measured": f"{value:.3g}" if is_number else "not measured",
                "reached": ("yes" if reaches(target, value) else "no") if is_number else "",
            }
        )
    return pd.DataFrame(rows)


def run_part(name: str, folder: Path, environment: Mapping[str, str]) -> None:
    """Run a part's scripts one after another, all of them within its seconds."""
    ends = time.monotonic() + PARTS[name].seconds
    for script in PARTS[name].scripts:
        output = ("--output", str(folder / script.output)) if script.output else ()
        left = ends - time.monotonic()
        began = time.monotonic()
        try:
            code = subprocess.run(
                [sys.executable, *script.arguments, *output], env=dict(environment), timeout=max(left, 1), check=False
            ).returncode
            how = "done" if code == 0 else f"ended with code {code}"
        except subprocess.TimeoutExpired:
            how = "ended, its time was up"
        print(f"{name}, {Path(script.arguments[0]).stem}: {how} after {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    """Measure the parts chosen, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="by itself: all but tests and study")
    parser.add_argument("--output", default="runs/bench/gpu", help="folder")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; `make bench` measures a CPU")
    folder = Path(chosen.output)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for name in chosen.parts or [name for name, part in PARTS.items() if part.by_itself]:
        run_part(name, folder, environment)
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv") if path.stem != "targets"}
    targets = table_of_targets(tables)
    targets.assign(**origin_columns(SEED)).to_csv(folder / "targets.csv", index=False)
    print(to_markdown(targets))
    print(f"tables: {folder}")


if __name__ == "__main__":
    main()
