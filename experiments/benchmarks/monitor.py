"""What a monitor costs somebody else's training: the share of a 50 ms step, over sizes of codebooks.

    python experiments/benchmarks/monitor.py --output monitor.csv

Every step hands over indices, features and codebook of one batch; nothing else is timed. The mean step holds its share
of logged ones; the first `--warm-up` steps, which have more rows than later ones, are left out. With two processes or
more (`torchrun --nproc-per-node 2 …`) hits are summed over them and the first one writes.
"""

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from rows import origin_columns

from ibqlab.monitor import CodebookMonitor

STEP_MS = 50.0
"""The training step that the share is of."""


def measure(codes: int, dim: int, tokens: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of an update: mean over all, also in processor time, over those without a row, and with one."""
    device = arguments.device
    generator = torch.Generator(device).manual_seed(arguments.seed)
    features = torch.randn(tokens // 256, dim, 16, 16, device=device, generator=generator)
    codebook = torch.nn.Parameter(torch.randn(codes, dim, device=device, generator=generator))
    plain, logged, processor_ms = [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        monitor = CodebookMonitor(Path(folder) / "run", codes, log_every=arguments.log_every, snapshot_every=10**6)
        monitor.watch(codebook)
        for step in range(1, arguments.warm_up + arguments.steps + 1):
            codebook.grad = None
            codebook.backward(codebook.detach())  # calls what `watch` has hooked
            indices = torch.randint(codes, (tokens,), device=device, generator=generator)
            before, seconds, cpu = monitor.schedule.logged, time.perf_counter(), time.process_time()
            monitor.update(step, indices=indices, features=features, codebook=codebook, loss=features[0, 0, 0, 0])
            if device != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - seconds
            if step > arguments.warm_up:
                processor_ms += 1000 * (time.process_time() - cpu)
                (plain if monitor.schedule.logged == before else logged).append(1000 * seconds)
        monitor.close()
    every = plain + logged
    return {
        "log_every": monitor.schedule.log_every,
        "mean_ms": sum(every) / len(every),
        "processor_ms": processor_ms / len(every),
        "plain_ms": sum(plain) / max(1, len(plain)),
        "logged_ms": sum(logged) / max(1, len(logged)),
    }


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--codes", type=int, nargs="+", default=[1024, 16384])
parser.add_argument("--dim", type=int, default=256)
parser.add_argument("--tokens", type=int, default=4096, help="of a step, a multiple of 256")
parser.add_argument("--log-every", type=int, help="steps between rows; by default the monitor's choice")
parser.add_argument("--steps", type=int, default=512)
parser.add_argument("--warm-up", type=int, default=50)
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", help="CSV file; none: print alone")
arguments = parser.parse_args()

warnings.filterwarnings("ignore", message=".*disk has no locks")
if "RANK" in os.environ:
    dist.init_process_group()
table = []
for codes in arguments.codes:
    times = measure(codes, arguments.dim, arguments.tokens, arguments)
    row = {"codes": codes, "dim": arguments.dim, "tokens": arguments.tokens, **times}
    row |= {"steps": arguments.steps, "processes": int(os.environ.get("WORLD_SIZE", "1")), "on": arguments.device}
    row |= {"step_ms": STEP_MS, "share_of_step": times["mean_ms"] / STEP_MS}
    table.append(row | origin_columns(arguments.seed))
    if os.environ.get("RANK", "0") == "0":
        print(
            f"K = {codes:,}, D = {arguments.dim}, {arguments.tokens:,} tokens: {times['mean_ms']:.2f} ms a step, "
            f"{row['share_of_step']:.1%} of {STEP_MS:.0f} ms; processor time alone {times['processor_ms']:.2f} ms, "
            f"{times['processor_ms'] / STEP_MS:.1%} ({times['plain_ms']:.2f} ms without a row, "
            f"{times['logged_ms']:.1f} ms with one, every {times['log_every']} steps)"
        )
if arguments.output and os.environ.get("RANK", "0") == "0":
    pd.DataFrame(table).to_csv(arguments.output, index=False)
