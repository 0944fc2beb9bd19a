"""A module trained by two processes of this machine, to see whether both learn the same."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from ibqlab.base.processes import average_over_processes

SECONDS = 60
"""Longest wait for each other."""
STEPS = 2


def difference_of_two(build: Callable[[], nn.Module], batch: Callable[[int, int], Tensor]) -> str:
    """Train a quantizer in two processes, each on half of every batch, and compare what they have learned.

    Args:
        build: makes the quantizer, the same in both.
        batch: step and process (0 or 1) → its features.
    Returns:
        What differs, or why they did not end; "" where nothing does, and where this system cannot fork processes.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return ""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ibqlab-") as folder:
        workers = [context.Process(target=_work, args=(build, batch, rank, folder)) for rank in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(SECONDS)
            if worker.is_alive():
                worker.kill()
                worker.join()
        failures = [file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("*.txt"))]
        if failures:
            return failures[0]
        files = [Path(folder) / f"{rank}.pt" for rank in (0, 1)]
        if not all(file.is_file() for file in files):
            return f"one of two processes did not end within {SECONDS} s"
        first, second = (torch.load(file, weights_only=True) for file in files)
    differing = [key for key, value in first.items() if not torch.equal(value, second[key])]
    return f"after {STEPS} steps of two processes they have another {', '.join(differing[:4])}" if differing else ""


def _work(build: Callable[[], nn.Module], batch: Callable[[int, int], Tensor], rank: int, folder: str) -> None:
    """One process: its steps, and its state or its error as a file."""
    try:
        torch.set_num_threads(1)
        wait = timedelta(seconds=SECONDS // 2)
        store = torch.distributed.FileStore(f"{folder}/meet", 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
        quantizer = build()
        for step in range(STEPS):
            torch.manual_seed(2 * step + rank)
            out = quantizer(batch(step, rank).requires_grad_())
            (out.loss + out.quantized.square().mean()).backward()
            with torch.no_grad():
                for parameter in quantizer.parameters():
                    if parameter.grad is not None:
                        average_over_processes(parameter.grad)  # as data-parallel training does
                        parameter.sub_(0.1 * parameter.grad)
                        parameter.grad = None
        torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        Path(folder, f"{rank}.txt").write_text(f"{type(error).__name__}: {first_line}", encoding="utf-8")
    os._exit(0)  # nothing of the process that this one was forked from is to be cleaned up here
