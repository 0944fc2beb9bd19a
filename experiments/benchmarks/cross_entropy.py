"""Seconds and peak memory of a linear head's cross-entropy, forward and backward, on one device.

    python experiments/benchmarks/cross_entropy.py --output cross_entropy.csv              # minutes on one CPU core
    python experiments/benchmarks/cross_entropy.py --tokens 16384 --dim 1536 --output gpu.csv
    python experiments/benchmarks/cross_entropy.py --torch-rows auto --rounds 1 --output its_own_choice.csv

The forms: written out, cross_entropy(linear(hidden, weight).float(), targets), the baseline; ours,
ibqlab.generator.linear_cross_entropy, on CUDA in float32 also with lower promises about its products (--matmul); and,
where this torch has it, torch.nn.functional.linear_cross_entropy by blocks of as many rows as --torch-rows says
("auto": as many as it chooses itself). They take turns, round by round, together with the floor: the three matrix
products that no exact form does without, each written out whole.

One row per vocabulary, type and form: median seconds, their ratio to the baseline's, the floor's share of them, peak
memory above the inputs (gradients included) and its ratio to the baseline's. On CUDA bfloat16 is measured, too. On
a CPU each form's memory is that of a process of its own. A form that does not fit has a row without values.
"""

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from rows import origin_columns
from torch import Tensor
from torch.nn import functional

from ibqlab.generator import linear_cross_entropy
from ibqlab.quantizers.products import MATMULS

WRITTEN_OUT, OURS, FLOOR = "written out", "ours", "floor"
SEED = 0


class Size(NamedTuple):
    """What is measured: so many tokens of so many channels, against so many of the vocabulary."""

    tokens: int
    dim: int
    vocabulary: int
    dtype: torch.dtype


def written_out(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The baseline, with float32 statistics as in the other forms."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets)


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: str) -> Tensor:
    """PyTorch's form by blocks of so many rows."""
    chosen = {} if rows == "auto" else {"batch_chunk_size": min(int(rows), len(hidden)), "chunking_method": None}
    return functional.linear_cross_entropy(
        hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions(**chosen)
    )


def forms(torch_rows: list[str], matmuls: list[str]) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The forms that this torch has, by name."""
    found = {WRITTEN_OUT: written_out}
    for matmul in matmuls:
        name = OURS if matmul == MATMULS[0] else f"{OURS}, {matmul}"
        found[name] = partial(linear_cross_entropy, matmul=matmul)
    if hasattr(functional, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found |= {f"torch, rows {rows}": partial(torchs, rows=rows) for rows in torch_rows}
    return found


def make_inputs(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of unit scale, a weight that gives logits of unit scale, targets."""
    generator = torch.Generator(device).manual_seed(SEED)
    draw = partial(torch.randn, generator=generator, device=device)
    hidden = draw(size.tokens, size.dim).to(size.dtype)
    weight = draw(size.vocabulary, size.dim).mul_(size.dim**-0.5).to(size.dtype)
    targets = torch.randint(size.vocabulary, (size.tokens,), generator=generator, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def forward_backward(form: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """One pass in both directions; the loss."""
    inputs[0].grad = inputs[1].grad = None
    loss = form(*inputs)
    loss.backward()
    return loss.item()


class Products:
    """The floor: logits, and gradients of hidden states and weight from something of their size.

    On a CPU written into memory that is there already, because fresh pages would count as arithmetic.
    """

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor]):
        self.hidden, self.weight = inputs[0].detach(), inputs[1].detach()
        shapes = (len(self.hidden), len(self.weight)), self.hidden.shape, self.weight.shape
        kept = not self.hidden.is_cuda
        self.memory = [self.hidden.new_zeros(shape) if kept else None for shape in shapes]

    def __call__(self) -> float:
        """All three; one of their numbers."""
        scores = torch.mm(self.hidden, self.weight.T, out=self.memory[0])
        gradient = torch.mm(scores, self.weight, out=self.memory[1])
        torch.mm(scores.T, self.hidden, out=self.memory[2])
        return gradient[0, 0].item()


def synchronise(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(
    passes: dict[str, Callable[[], float]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Wall-clock seconds of each pass in each round, and what each gives back; passes that do not fit are left out.

    Args:
        passes: what is timed, by name; they take turns within a round.
        rounds: timed ones. On CUDA one more goes ahead, in which libraries choose their kernels.
        device: where they run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    given, ahead = {}, int(device.type == "cuda")
    for _ in range(rounds + ahead):
        for name in list(seconds):
            try:
                synchronise(device)
                began = time.perf_counter()
                given[name] = passes[name]()
                synchronise(device)
                seconds[name].append(time.perf_counter() - began)
            except torch.cuda.OutOfMemoryError:
                del seconds[name]
    return {name: taken[ahead:] for name, taken in seconds.items()}, given


def peak_memory(form: Callable[..., Tensor], size: Size, device: torch.device) -> int:
    """Bytes above the inputs at the peak of one pass."""
    if device.type == "cuda":
        inputs = make_inputs(size, device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(form, inputs)
        return torch.cuda.max_memory_allocated() - before
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(peak_of_this_process, (form, size))


def peak_of_this_process(form: Callable[..., Tensor], size: Size) -> int:
    """The same in this process on a CPU; it must be a fresh one, because its peak is never reset."""
    device = torch.device("cpu")
    # What the first call loads, libraries and threads, is not the form's.
    forward_backward(form, make_inputs(size._replace(vocabulary=8, tokens=8), device))
    inputs = make_inputs(size, device)
    before = kept_by_process("VmRSS")
    forward_backward(form, inputs)
    return max(0, kept_by_process("VmHWM") - before)


def kept_by_process(field: str) -> int:
    """A field of Linux's account of this process's memory, in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def distances_from_float64(form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """How far the gradients of 64 tokens are from float64's: root mean square of the difference over the gradient's."""
    given, targets = inputs[0].detach()[:64], inputs[2][:64]

    def gradients(form: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        values = [value.detach().to(dtype).requires_grad_() for value in (given, inputs[1])]
        return torch.autograd.grad(form(*values, targets), values)

    pairs = zip(gradients(form, given.dtype), gradients(linear_cross_entropy, torch.float64), strict=True)
    errors = [((ours - truth).square().mean() / truth.square().mean()).sqrt().item() for ours, truth in pairs]
    return dict(zip(("hidden_rms_error", "weight_rms_error"), errors, strict=True))


def measure(
    size: Size, found: dict[str, Callable[..., Tensor]], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row per form, without ratios."""
    inputs = make_inputs(size, device)
    passes = {name: partial(forward_backward, form, inputs) for name, form in found.items()}
    seconds, losses = time_in_turns({FLOOR: Products(inputs)} | passes, rounds, device)
    errors = {name: distances_from_float64(form, inputs) for name, form in found.items() if name in seconds}
    del inputs, passes
    facts = size._asdict() | {"dtype": str(size.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    rows = []
    for name, form in found.items():
        row = facts | {"form": name}
        if name in seconds:
            taken = statistics.median(seconds[name])
            row |= {"rounds": rounds, "seconds": taken, "fastest": min(seconds[name]), "slowest": max(seconds[name])}
            row |= {"loss": losses[name]} | errors[name]
            row["peak_mib"] = peak_memory(form, size, device) / 2**20
            if FLOOR in seconds:
                row["floor_share"] = statistics.median(seconds[FLOOR]) / taken
        rows.append(row)
    return rows


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one measurement with their time and memory over the baseline's, where both were measured."""
    base = next(row for row in rows if row["form"] == WRITTEN_OUT)
    ratios = {"time_ratio": "seconds", "memory_ratio": "peak_mib"}
    return [
        row | {ratio: row[key] / base[key] for ratio, key in ratios.items() if key in row and base.get(key)}
        for row in rows
    ]


def shown(table: pd.DataFrame) -> str:
    """The table as Markdown."""
    columns = {
        "vocabulary": "{:,}",
        "dtype": "{}",
        "form": "{}",
        "seconds": "{:.3f}",
        "time_ratio": "{:.2f}",
        "floor_share": "{:.0%}",
        "peak_mib": "{:,.0f}",
        "memory_ratio": "{:.2f}",
    }
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[form.format(row[name]) for name, form in columns.items()] for row in table.to_dict("records")]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure what the command line names, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16384, 262144], help="tokens of the vocabulary")
    parser.add_argument("--tokens", type=int, default=1024, help="N")
    parser.add_argument("--dim", type=int, default=256, help="C")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--torch-rows", nargs="+", default=["128", "512"], help="rows per block of torch's form, or auto"
    )
    parser.add_argument("--matmul", nargs="+", choices=MATMULS, help="promises about float32; all on a GPU")
    parser.add_argument("--output", help="CSV file")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    origin, rows = origin_columns(SEED), []
    for vocabulary in chosen.sizes:
        for dtype in dtypes:
            size = Size(chosen.tokens, chosen.dim, vocabulary, dtype)
            # Half types are multiplied as they are, and a CPU keeps every promise by the same products.
            several = device.type == "cuda" and dtype == torch.float32
            matmuls = chosen.matmul or (list(MATMULS) if several else [MATMULS[0]])
            found = measure(size, forms(chosen.torch_rows, matmuls), chosen.rounds, device)
            rows += [row | origin for row in with_ratios(found)]
            if chosen.output:
                # Written after each measurement: what was measured stays when a later one fails.
                pd.DataFrame(rows).to_csv(chosen.output, index=False)
    print(shown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
