"""Seconds per token of sampling with guidance, ours against the plainly written loop, on one device.

    python experiments/benchmarks/sampling.py --compiled --output cpu.csv                       # minutes on two cores
    python experiments/benchmarks/sampling.py --batches 64 --positions 256 --compiled --output gpu.csv      # on a GPU

The plain loop (plain_sampling.py) keeps keys and values, too, but masks a cache of full length, makes two passes per
token and computes the class's part in each. Ours is the step of `Generator.sample`: class and null class in one batch,
the class's part once per image, attention over what is there; with --compiled also its compiled step. They take turns,
round by round, and draw the same tokens (checked, but for rounding).

On a CPU the first --positions of 256 tokens are drawn. Both forms' time hardly depends on the place: their steps read
weights. The floor is the time to read the weights that a step cannot do without (all but embeddings and the class's
part) and the keys and values so far, at the speed at which this device sums a large tensor in the same run.

One row per batch and form: median seconds per token, ratio to the plain loop's, share of the floor.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from cross_entropy import synchronise
from plain_sampling import sample_plainly
from rows import origin_columns
from torch import Tensor

from ibqlab.generator import Generator, GeneratorConfig, SamplingConfig
from ibqlab.generator.sampling import choose_tokens, guide, uniform_numbers
from ibqlab.generator.transformer import Decoding
from ibqlab.studies.pages import to_markdown

PLAIN, OURS, COMPILED = "plain loop", "ours", "ours, compiled"
SEED = 0
SAMPLING = SamplingConfig(cfg_scale=2.25, temperature=1.1)
READ_BYTES = 2**30


@torch.no_grad()
def sample_fast(
    generator: Generator, labels: Tensor, config: SamplingConfig, positions: int, *, compiled: bool = False
) -> Tensor:
    """The first tokens of images, by the steps that `Generator.sample` takes."""
    most = generator.config.num_tokens
    numbers = uniform_numbers(len(labels), most, SEED).to(labels.device)
    null = torch.full_like(labels, generator.config.num_classes)
    decoding = Decoding(generator, torch.cat([labels, null]), compiled=compiled)
    tokens: list[Tensor] = []
    for place in range(positions):
        logits = decoding.next_logits(tokens[-1].repeat(2) if tokens else None)
        guided = guide(*logits.chunk(2), config.scale_at(place, most))
        tokens.append(choose_tokens(guided, numbers[:, place], config))
    return torch.stack(tokens, dim=1)


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


def bytes_of_step(generator: Generator, batch: int, positions: int) -> int:
    """What a step reads at least: weights, and keys and values of class and null class, half of the positions full."""
    left_out = ("tok_emb", "class_emb", "ada_lin")
    weights = sum(p.nbytes for n, p in generator.named_parameters() if not any(part in n for part in left_out))
    config = generator.config
    cache = 2 * 2 * batch * config.depth * config.width * positions // 2
    return weights + cache * generator.head.weight.element_size()


def time_in_turns(
    forms: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of every form in every round, and what each drew; one round more goes ahead, which compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
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
    given = (generator, labels, SAMPLING, chosen.positions)
    forms = {PLAIN: partial(sample_plainly, *given, seed=SEED), OURS: partial(sample_fast, *given)}
    if chosen.compiled:
        forms[COMPILED] = partial(sample_fast, *given, compiled=True)
    seconds, drawn = time_in_turns(forms, chosen.rounds, device)
    speed = read_speed(device)
    floor = bytes_of_step(generator, batch, chosen.positions) / speed
    facts = {"batch": batch, "positions": chosen.positions, "threads": torch.get_num_threads(), "rounds": chosen.rounds}
    base = statistics.median(seconds[PLAIN])
    rows = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        rows.append(
            facts
            | {
                "form": name,
                "seconds_per_token": median / chosen.positions,
                "fastest": min(taken) / chosen.positions,
                "slowest": max(taken) / chosen.positions,
                "speed_up": base / median,
                "images_per_second": batch * chosen.positions / generator.config.num_tokens / median,
                "read_gb_per_second": speed / 1e9,
                "floor_share": floor * chosen.positions / median,
                "same_tokens": float((drawn[name] == drawn[PLAIN]).double().mean()),
            }
        )
    return rows


def shown(table: pd.DataFrame) -> str:
    """The table as Markdown."""
    columns = {
        "batch": "{}",
        "form": "{}",
        "seconds_per_token": "{:.4f}",
        "speed_up": "{:.2f}",
        "floor_share": "{:.0%}",
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
    parser.add_argument("--compiled", action="store_true", help="measure the compiled step, too")
    parser.add_argument("--output", help="CSV file")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    changes = {name: value for name in ("width", "depth") if (value := getattr(chosen, name))}
    if chosen.width:
        changes["num_heads"] = max(1, chosen.width // 64)
    generator = make_generator(GeneratorConfig.preset(chosen.preset, **changes), device)
    origin, rows = origin_columns(SEED), []
    for batch in chosen.batches:
        rows += [row | {"preset": chosen.preset} | origin for row in measure(generator, batch, chosen, device)]
        if chosen.output:
            # Written after each measurement: what was measured stays when a later one fails.
            pd.DataFrame(rows).to_csv(chosen.output, index=False)
    print(shown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
