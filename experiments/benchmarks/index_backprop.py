"""Time and memory of the quantizers against the published forms written out, and against the matrix products alone.

    python experiments/benchmarks/index_backprop.py --output experiments/results/index_backprop/cpu.csv
    python experiments/benchmarks/index_backprop.py --methods index_backprop --tokens 4096 --codes 16384 262144 \\
        --encode "" --output gpu.csv

Each row is one method at one size, on a GPU for each promise about its products of float32 (--matmul). What it is
compared with, in rounds that alternate:
* written out: the same values by autograd through N × K matrices, as the published code has them, in IEEE float32;
* the floor: the matrix products that cannot be done without (10·N·K·D operations for index backpropagation forward and
  backward), in the parts that ours multiplies, at the rate at which these very products, written whole, run in between.
  `share_of_floor` is floor over time.
Times are medians over the rounds, forward and backward apart. Peak memory is what comes on top of the inputs, gradients
included; on a CPU each form gets a fresh process for it, because a process never gives its peak back. The written-out
form is left out where it would not fit, and a size where the floor alone would take longer than --seconds.
Accuracy: the gradients' distance from float64 at N = 256, K = 4,096, the largest over the largest gradient and root
mean squares over each other.

Beside the CSV file a figure is drawn, PNG of the same name, where Matplotlib is installed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from published_form import published_index_backprop
from quantizer_forms import METHODS, OURS, WRITTEN_OUT
from rows import origin_columns
from torch import Tensor

from ibqlab.quantizers.products import (
    MATMULS,
    ProductForm,
    add_product,
    multiplying,
    product,
    product_form,
    side_by_side,
    stacked,
)

SEED = 0
CPU_SIZES = ((1024, (1024, 16384, 262144, 1048576)), (2048, (16384,)), (4096, (1024, 16384, 262144)))
CPU_SIZES += ((16384, (1024, 16384)),)
CUDA_SIZES = tuple((tokens, (1024, 16384, 65536, 262144, 1048576)) for tokens in (1024, 4096, 16384))
ACCURACY_SIZES = (256, 4096)
"""N and K at which distances from float64 are taken."""
OTHER_CODES = (16384, 262144)
"""K at which methods other than the first are measured, at the first N."""


class Inputs:
    """Features N(0, scale²), a codebook N(0, 1) and a pull as a mean squared error has it.

    At scale 1 few codes are near a token's best one. At 0.02 all are: then the entropies need every code, and no share
    is too small for its type, which is what makes the written-out form slow at scale 1.

    Args:
        sizes: N, K and D.
        dtype: of features and codebook.
        device: where they lie.
        scale: of the features.
    """

    def __init__(self, sizes: tuple[int, int, int], dtype: torch.dtype, device: str, scale: float = 1.0):
        tokens, codes, dim = sizes
        generator = torch.Generator().manual_seed(SEED)
        self.scale = scale
        self.features = (torch.randn(tokens, dim, generator=generator) * scale).to(device, dtype).requires_grad_()
        self.codebook = torch.randn(codes, dim, generator=generator).to(device, dtype).requires_grad_()
        self.pull = (torch.randn(tokens, dim, generator=generator) / (tokens * dim)).to(device)

    def run(self, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[float, float]:
        """Seconds forward and backward; the second is 0 for indices."""
        synchronise(self.features)
        began = time.perf_counter()
        value = form(self.features, self.codebook, self.pull)
        synchronise(self.features)
        middle = time.perf_counter()
        if value.requires_grad:
            wanted = (self.features, self.codebook)
            gradients = torch.autograd.grad(value, wanted, allow_unused=True)
            synchronise(self.features)
            del gradients
        else:
            return middle - began, 0.0
        return middle - began, time.perf_counter() - middle

    @torch.no_grad()
    def floor(self, products: str, form: ProductForm) -> float:
        """Seconds of the products: s scores, g gains, f to features, c to codes; each written whole where it fits."""
        features, codebook = self.features, self.codebook
        limit = 2**30 // max(4, 2 * form.parts)  # numbers of scores, or of their gradient in parts
        rows = min(len(features), max(1, limit // len(codebook)))
        calls = floor_calls(features[:rows], codebook, form)
        total = 0.0
        with multiplying(form, features.device):
            calls["s"]()
            for name in products:
                synchronise(features)
                began = time.perf_counter()
                calls[name]()
                synchronise(features)
                total += time.perf_counter() - began
        return total * len(features) / rows


def floor_calls(features: Tensor, codebook: Tensor, form: ProductForm) -> dict[str, Callable[[], Any]]:
    """The products by their letters, as a form has them."""
    sums = torch.promote_types(features.dtype, torch.float32)
    (rows, dim), parts = features.shape, form.parts
    right = codebook if parts == 1 and codebook.dtype == form.dtype else side_by_side(form, codebook, form.right)
    left = side_by_side(form, features, form.left)
    scores = torch.empty(rows, len(codebook), dtype=sums, device=features.device)
    change = (
        scores if parts == 1 and form.dtype == sums else scores.new_ones(parts * rows, len(codebook), dtype=form.dtype)
    )
    against = stacked(form, features, form.against_change)
    grads = [torch.zeros(many, dim, dtype=sums, device=features.device) for many in (parts * rows, len(codebook))]

    def to_features() -> None:
        for number in range(parts):
            some = change[number * rows :]
            product(some, right[:, number * dim : (number + 1) * dim], grads[0][: len(some)])

    def to_codes() -> None:
        first = 0
        for number in form.change:
            some = change[number * rows :]
            add_product(grads[1], some.T, against[first : first + len(some)])
            first += len(some)

    fill = partial(product, left, right.T, scores)
    return {"s": fill, "g": fill, "f": to_features, "c": to_codes}


def synchronise(like: Tensor) -> None:
    """Wait for the tensor's device."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def fits(form: str, tokens: int, codes: int, device: str) -> bool:
    """Whether a form's N × K matrices fit: about fourteen of them, written out, into nine tenths of a GPU's
    memory, or a third of a machine's, where they take minutes long before they fill it."""
    if form == OURS:
        return True
    if device == "cuda":
        return 14 * 4 * tokens * codes < 0.9 * torch.cuda.get_device_properties(0).total_memory
    return 14 * 4 * tokens * codes < kernel_bytes("/proc/meminfo", "MemTotal") / 3


def measure(job: "Job", inputs: Inputs, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row per form that fits: medians over rounds in which floor and forms take turns."""
    method, (tokens, dim), codes = job.method, inputs.features.shape, len(inputs.codebook)
    chosen, device, dtype = METHODS[job.method], inputs.features.device.type, inputs.features.dtype
    multiplied = product_form(dtype, inputs.features.device, job.matmul)
    if chosen.products and inputs.floor(chosen.products, multiplied) > seconds:
        return []
    forms = {name: form for name, form in forms_of(job).items() if fits(name, tokens, codes, device)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    floors: list[float] = []
    for number in range(rounds + 1):
        if all(sum(map(sum, taken)) > seconds for taken in times.values()):
            break
        if chosen.products:
            floors.append(inputs.floor(chosen.products, multiplied))
        for name, form in forms.items():
            if sum(map(sum, times[name])) > seconds:
                continue
            taken = inputs.run(form)
            # The first round warms up, unless it takes so long that nothing is left to warm.
            if number or sum(taken) > seconds / 4:
                times[name].append(taken)
    rows = []
    for name, taken in times.items():
        forward, backward = (statistics.median(part) for part in zip(*taken, strict=True))
        row = {"method": method, "form": name, "tokens": tokens, "codes": codes, "dim": dim, "dtype": str(dtype)[6:]}
        row |= {"scale": inputs.scale, "matmul": job.matmul if name == OURS else "float32"}
        row |= {"forward_s": forward, "backward_s": backward, "seconds": statistics.median(map(sum, taken))}
        row |= {"rounds": len(taken), "floor_s": statistics.median(floors[1:] or floors) if floors else None}
        rows.append(row)
    for row in rows:
        row["share_of_floor"] = row["floor_s"] / row["seconds"] if floors else None
        row["peak_mb"] = peak_memory(job, row["form"], inputs)
        row.update(distances_from_float64(job, row["form"], inputs))
    base = next((row for row in rows if row["form"] == WRITTEN_OUT), None)
    for row in rows if base else ():
        row["times_faster"] = base["seconds"] / row["seconds"]
        # A few tokens fit into memory that the process had touched before.
        row["memory_share"] = row["peak_mb"] / base["peak_mb"] if base["peak_mb"] else None
    return rows


def forms_of(job: "Job") -> dict[str, Callable[..., Tensor]]:
    """The forms of a method, ours with its promise about products."""
    forms = METHODS[job.method].forms
    return forms | {OURS: partial(forms[OURS], matmul=job.matmul)}


def distances_from_float64(job: "Job", form: str, inputs: Inputs) -> dict[str, float]:
    """How far both gradients are from those of float64; nothing for methods without."""
    (tokens, codes), dim, device = ACCURACY_SIZES, inputs.features.shape[1], inputs.features.device.type
    small = Inputs((tokens, codes, dim), inputs.features.dtype, device, inputs.scale)

    def gradients(call: Callable[..., Tensor], *values: Tensor) -> list[Tensor]:
        values = [value.detach().clone().requires_grad_() for value in values]
        value = call(*values, small.pull.to(values[0].dtype))
        wanted = torch.autograd.grad(value, values, allow_unused=True) if value.requires_grad else (None, None)
        return [gradient.double() for gradient in wanted if gradient is not None]

    given = small.features, small.codebook
    exact = gradients(METHODS[job.method].forms[OURS], *(value.double() for value in given))
    found = {}
    for name, value, truth in zip(("features", "codes"), gradients(forms_of(job)[form], *given), exact, strict=False):
        difference = value - truth
        found[f"{name}_max_error"] = (difference.abs().max() / truth.abs().max()).item()
        found[f"{name}_rms_error"] = (difference.square().mean() / truth.square().mean()).sqrt().item()
    return found


def peak_memory(job: "Job", form: str, inputs: Inputs) -> float:
    """Peak memory of one forward and backward pass above the inputs, in MB (10⁶ bytes)."""
    tokens, dim = inputs.features.shape
    if inputs.features.is_cuda:
        inputs.run(forms_of(job)[form])
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        inputs.run(forms_of(job)[form])
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    sizes = [str(size) for size in (tokens, len(inputs.codebook), dim)]
    command = [sys.executable, __file__, "--peak-of", job.method, form, *sizes, str(inputs.scale)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_own_peak(method: str, form: str, *numbers: str) -> None:
    """What the child process does: one pass, and how far it went above the inputs."""
    call, sizes = METHODS[method].forms[form], tuple(int(number) for number in numbers[:3])
    # Libraries take their own memory at their first call.
    Inputs((8, 64, sizes[2]), torch.float32, "cpu").run(call)
    inputs = Inputs(sizes, torch.float32, "cpu", float(numbers[3]))
    before = kernel_bytes("/proc/self/status", "VmRSS")
    inputs.run(call)
    print(json.dumps((kernel_bytes("/proc/self/status", "VmHWM") - before) / 1e6))


def kernel_bytes(file: str, field: str) -> int:
    """A size that Linux states in kB."""
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(field)) * 1024


def measure_encoding(recipe: str, images: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Images per second to indices: alone, and through the published quantizer, which computes losses, too."""
    from ibqlab.tokenizer import Tokenizer  # noqa: PLC0415 - needs more than the other measurements
    from ibqlab.training import recipe_config  # noqa: PLC0415 - likewise

    config = recipe_config(recipe)
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_config(config.tokenizer).to(device).eval()
    size = config.data.image_size
    pictures = torch.rand(images, 3, size, size, device=device) * 2 - 1

    @torch.no_grad()
    def written_out() -> Tensor:
        features = tokenizer.quant_conv(tokenizer.encoder(pictures)).permute(0, 2, 3, 1).flatten(0, 2)
        return published_index_backprop(features.float(), tokenizer.quantizer.codebook)[1]

    forms = {OURS: lambda: tokenizer.encode_indices(pictures), WRITTEN_OUT: written_out}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in forms.items():
            synchronise(pictures)
            began = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                form()
            synchronise(pictures)
            if number:
                times[name].append(time.perf_counter() - began)
    rows = []
    for name, taken in times.items():
        row = {"method": f"encode, {recipe}", "form": name, "tokens": images * (size // tokenizer.downsampling) ** 2}
        row |= {"codes": len(tokenizer.quantizer.codebook), "dim": config.tokenizer.quantizer.code_dim}
        row |= {"dtype": "float32" if device == "cpu" else "bfloat16 encoder", "seconds": statistics.median(taken)}
        row |= {"images_per_second": images / statistics.median(taken), "rounds": len(taken)}
        rows.append(row | {"times_faster": statistics.median(times[WRITTEN_OUT]) / statistics.median(taken)})
    return rows


class Job(NamedTuple):
    """One measurement."""

    method: str
    tokens: int
    codes: int
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    matmul: str = "float32"


def jobs(sizes: tuple[tuple[int, tuple[int, ...]], ...], device: str, matmuls: list[str]) -> list[Job]:
    """All measurements on a device."""
    kinds = [(torch.float32, matmul) for matmul in matmuls] + (
        [(torch.bfloat16, "float32")] if device == "cuda" else []
    )
    pairs = [(n, k) for n, codes in sizes for k in codes]
    found = [Job("index_backprop", n, k, dtype, matmul=matmul) for n, k in pairs for dtype, matmul in kinds]
    found += [
        Job("index_backprop", n, OTHER_CODES[0], scale=0.02) for n, codes in sizes[1:3] if OTHER_CODES[0] in codes
    ]
    tokens, codes = sizes[0]
    some = [size for size in codes if size in OTHER_CODES] or codes
    found += [Job(name, tokens, k, matmul=matmul) for name in list(METHODS)[1:] for k in some for matmul in matmuls]
    return [job for job in found if job.codes <= METHODS[job.method].largest]


def show(rows: list[dict[str, Any]]) -> None:
    """Rows on the terminal."""
    for row in rows:
        facts = ", ".join(f"{key} {row[key]:.3g}" for key in row if isinstance(row[key], float))
        print(
            f"{row['method']}, {row['form']}, N = {row['tokens']:,}, K = {row['codes']:,}, {row['dtype']}, "
            f"products {row.get('matmul', 'float32')}: {facts}",
            flush=True,
        )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="all if left out")
    parser.add_argument("--tokens", type=int, nargs="+", help="N; with --codes, in place of the device's own sizes")
    parser.add_argument("--codes", type=int, nargs="+", help="K")
    parser.add_argument("--dim", type=int, default=256, help="D")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10, help="longest floor, and longest sum over a form's rounds")
    parser.add_argument("--encode", default="imagenet/ibq_262144", help="recipe whose encoder is timed; '' for none")
    parser.add_argument("--matmul", nargs="+", choices=MATMULS, help="promises about float32; all on a GPU")
    parser.add_argument("--images", type=int, help="encoded at a time; 16 on a GPU, 1 elsewhere")
    parser.add_argument("--output", help="CSV file; the figure goes beside it")
    parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak_of:
        return print_own_peak(*chosen.peak_of)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = CUDA_SIZES if device == "cuda" else CPU_SIZES
    # On a CPU they are one and the same.
    matmuls = chosen.matmul or (list(MATMULS) if device == "cuda" else ["float32"])
    if chosen.tokens and chosen.codes:
        sizes = tuple((tokens, tuple(chosen.codes)) for tokens in chosen.tokens)
    origin, rows = origin_columns(SEED) | {"threads": torch.get_num_threads()}, []
    for job in jobs(sizes, device, matmuls):
        if job.method not in chosen.methods:
            continue
        inputs = Inputs((job.tokens, job.codes, chosen.dim), job.dtype, device, job.scale)
        found = measure(job, inputs, rounds=chosen.rounds, seconds=chosen.seconds)
        rows += [row | origin for row in found]
        show(found)
        write(rows, chosen.output)
    if chosen.encode:
        images = chosen.images or (16 if device == "cuda" else 1)
        encoded = measure_encoding(chosen.encode, images, chosen.rounds, device)
        show(encoded)
        write(rows + [row | origin for row in encoded], chosen.output)
    several = (
        len({row["codes"] for row in rows if row["method"] == "index_backprop" and row["matmul"] == "float32"}) > 1
    )
    if chosen.output and several and find_spec("matplotlib"):
        from figure import plot_against_codebook_size  # noqa: PLC0415 - needs Matplotlib, measurements do not

        from ibqlab.plots import save_figure  # noqa: PLC0415 - likewise

        table = pd.DataFrame(rows)
        drawn = (table["method"] == "index_backprop") & (table["scale"] == 1) & (table["matmul"] == "float32")
        figure = plot_against_codebook_size(table[drawn])
        save_figure(figure, Path(chosen.output).with_suffix("").as_posix() + "_figure", table)
    return None


def write(rows: list[dict[str, Any]], path: str | None) -> None:
    """The table so far: what was measured stays when a later size fails."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False)


if __name__ == "__main__":
    main()
