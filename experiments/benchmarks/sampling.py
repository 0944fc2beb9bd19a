"""Seconds per token of sampling with guidance, ours against the plainly written loop, on one device.

    python experiments/benchmarks/sampling.py --compiled --output cpu.csv                       # minutes on two cores
    python experiments/benchmarks/sampling.py --batches 64 --positions 256 --compiled --output gpu.csv      # on a GPU

The plain loop (plain_sampling.py) keeps keys and values, too, but masks a cache of full length, makes two passes per
token and computes the class's part in each. Ours is the plain way of `Generator.sample`: class and null class in one
batch, the class's part once per image, attention over what is there. With --compiled also its recorded step: on a CPU
compiled, on a GPU a CUDA graph of kernels, in float32 and in bfloat16. All take turns, round by round, and draw the
same tokens (checked, but for rounding; in bfloat16 they are others from the first rounding on that matters).

On a CPU the first --positions of 256 tokens are drawn. All forms' time hardly depends on the place: their steps read
weights. The floor is the time to read the weights that a step cannot do without (all but embeddings and the class's
part) and the keys and values so far, in the form's number type, at the speed at which this device sums a large tensor
in the same run.

One row per batch and form: median seconds per token, tokens and images per second, ratio to the plain loop's time,
share of the floor; on a GPU also the seconds that a fresh process waits for its first image.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from cross_entropy import synchronise
from plain_sampling import sample_plainly
from rows import origin_columns
from torch import Tensor

from ibqlab.generator import Generator, GeneratorConfig, SamplingConfig
from ibqlab.generator.recording import record
from ibqlab.generator.sampler import Request, Sampler, lanes_for
from ibqlab.generator.sampling_dtype import dtype_name
from ibqlab.generator.token_choice import uniform_numbers
from ibqlab.studies.pages import to_markdown

PLAIN, OURS, RECORDED = "plain loop", "ours", "ours, recorded"
SEED = 0
SAMPLING = SamplingConfig(cfg_scale=2.25, temperature=1.1)
READ_BYTES = 2**30


class Form(NamedTuple):
    """A way to draw, and the number type it draws in."""

    name: str
    dtype: torch.dtype


def make_request(generator: Generator, labels: Tensor, positions: int) -> Request:
    """The first tokens of images, as `Generator.sample` asks for them."""
    most = generator.config.num_tokens
    numbers = uniform_numbers(len(labels), most, SEED)[:, :positions, None]
    return Request(SAMPLING, labels, None, numbers, most)


def make_generator(config: GeneratorConfig, device: torch.device) -> Generator:
    """Random weights, the head's too: a head of zeros would draw every token alike."""
    torch.manual_seed(SEED)
    generator = Generator(config).to(device).eval()
    with torch.no_grad():
        generator.head.weight.normal_(std=0.02)
    return generator


def read_speed(device: torch.device) -> float:
    """Bytes per second at which a large tensor is summed, the fastest of five."""
    tensor = torch.ones(READ_BYTES // 4, device=device)
    seconds = []
    for _ in range(5):
        synchronise(device)
        began = time.perf_counter()
        tensor.sum().item()
        seconds.append(time.perf_counter() - began)
    return READ_BYTES / min(seconds)


def bytes_of_step(generator: Generator, dtype: torch.dtype, batch: int, positions: int) -> int:
    """What a step reads at least: weights, and keys and values of class and null class, half of the positions full."""
    left_out = ("tok_emb", "class_emb", "ada_lin")
    weights = sum(p.numel() for n, p in generator.named_parameters() if not any(part in n for part in left_out))
    config = generator.config
    cache = 2 * 2 * batch * config.depth * config.width * positions // 2
    return (weights + cache) * dtype.itemsize


def first_image_seconds(chosen: argparse.Namespace) -> float:
    """How long a process of its own waits for its first image, from the moment that the generator is on the GPU.

    NaN where that process fails, which says why: the other measurements do not depend on it.
    """
    settings = ["--first-image", "--preset", chosen.preset]
    for name in ("width", "depth"):
        settings += [f"--{name}", str(getattr(chosen, name))] if getattr(chosen, name) else []
    done = subprocess.run([sys.executable, __file__, *settings], stdout=subprocess.PIPE, text=True, check=False)
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else math.nan


def wait_for_first_image(generator: Generator) -> float:
    """Seconds of the first call of `sample` in this process."""
    device = next(generator.parameters()).device
    synchronise(device)
    began = time.perf_counter()
    generator.sample(torch.zeros(1, dtype=torch.int64), seed=SEED, **vars(SAMPLING)).cpu()
    return time.perf_counter() - began


def time_in_turns(
    forms: dict[Form, Callable[[], Tensor]], rounds: int, device: torch.device
) -> tuple[dict[Form, list[float]], dict[Form, Tensor]]:
    """Seconds of every form in every round, and what each drew; one round more goes ahead, which compiles."""
    seconds: dict[Form, list[float]] = {name: [] for name in forms}
    drawn = {}
    for number in range(rounds + 1):
        for name, form in forms.items():
            synchronise(device)
            began = time.perf_counter()
            drawn[name] = form()
            synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds, drawn


def measure(generator: Generator, batch: int, chosen: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row per form."""
    labels = torch.arange(batch, device=device) % generator.config.num_classes
    request = make_request(generator, labels, chosen.positions)
    plain = Form(PLAIN, torch.float32)
    forms = {
        plain: partial(sample_plainly, generator, labels, SAMPLING, chosen.positions, seed=SEED),
        Form(OURS, torch.float32): partial(generator.sample_plainly, request),
    }
    if chosen.compiled:
        types = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
        for dtype in types:
            sampler = Sampler(generator, dtype, lanes_for(dtype, device, batch), is_guided=True)
            forms[Form(RECORDED, dtype)] = partial(sampler.draw, generator, request, record)
    seconds, drawn = time_in_turns(forms, chosen.rounds, device)
    speed = read_speed(device)
    facts = {"batch": batch, "positions": chosen.positions, "threads": torch.get_num_threads(), "rounds": chosen.rounds}
    base = statistics.median(seconds[plain])
    rows = []
    for form, taken in seconds.items():
        median = statistics.median(taken)
        floor = bytes_of_step(generator, form.dtype, batch, chosen.positions) / speed
        rows.append(
            facts
            | {
                "form": form.name,
                "dtype": dtype_name(form.dtype),
                "seconds_per_token": median / chosen.positions,
                "fastest": min(taken) / chosen.positions,
                "slowest": max(taken) / chosen.positions,
                "speed_up": base / median,
                "tokens_per_second": batch * chosen.positions / median,
                "images_per_second": batch * chosen.positions / generator.config.num_tokens / median,
                "read_gb_per_second": speed / 1e9,
                "floor_share": floor * chosen.positions / median,
                "same_tokens": float((drawn[form] == drawn[plain]).double().mean()),
            }
        )
    return rows


def shown(table: pd.DataFrame) -> str:
    """The table as Markdown."""
    columns = {
        "batch": "{}",
        "form": "{}",
        "dtype": "{}",
        "seconds_per_token": "{:.4f}",
        "speed_up": "{:.2f}",
        "floor_share": "{:.0%}",
        "tokens_per_second": "{:,.0f}",
        "images_per_second": "{:.3f}",
        "same_tokens": "{:.1%}",
    }
    return to_markdown(pd.DataFrame({name: table[name].map(form.format) for name, form in columns.items()}))


def main() -> None:
    """Measure what the command line names, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="B", help="of IBQ's generators")
    parser.add_argument("--width", type=int, help="another width, for trying out")
    parser.add_argument("--depth", type=int, help="another depth, for trying out")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="images at once")
    parser.add_argument("--positions", type=int, default=24, help="tokens drawn of 256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="measure the recorded step, too")
    parser.add_argument("--first-image", action="store_true", help="print the seconds of this process's first image")
    parser.add_argument("--output", help="CSV file")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    changes = {name: value for name in ("width", "depth") if (value := getattr(chosen, name))}
    if chosen.width:
        changes["num_heads"] = max(1, chosen.width // 64)
    generator = make_generator(GeneratorConfig.preset(chosen.preset, **changes), device)
    if chosen.first_image:
        print(wait_for_first_image(generator))
        return
    origin, rows = origin_columns(SEED) | {"preset": chosen.preset}, []
    if device.type == "cuda" and chosen.compiled:
        origin["first_image_seconds"] = first_image_seconds(chosen)
        print(f"a fresh process has its first image after {origin['first_image_seconds']:.1f} s")
    for batch in chosen.batches:
        rows += [row | origin for row in measure(generator, batch, chosen, device)]
        if chosen.output:
            # Written after each measurement: what was measured stays when a later one fails.
            pd.DataFrame(rows).to_csv(chosen.output, index=False)
    print(shown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
