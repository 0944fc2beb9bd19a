"""Eight cells over one and over two local workers, with the same threads per worker: the study engine's speed-up.

    python experiments/benchmarks/study_workers.py --output workers.csv          # 8 minutes on two quiet cores

Each cell trains the bundled photographs' tokenizer for so many steps that it takes half a minute or more by itself.
Writes one row per number of workers: seconds from the first process to the last row, the share of one worker's time,
and the shortest and longest cell.
"""

import argparse
import tempfile
import time

import pandas as pd
from rows import origin_columns

from ibqlab.grids.cells import Cell, CellStore
from ibqlab.grids.engine import run_cells
from ibqlab.grids.local import LocalLauncher
from ibqlab.training import recipe_config

SETTINGS = {"record.validate_every": 1000, "record.early_snapshots": [], "record.log_every": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300, help="of each cell")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--output", required=True, help="CSV file")
    given = parser.parse_args()
    rows = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            seconds, per_cell = measure(given, workers, folder)
        rows.append(
            {
                "cells": given.cells,
                "workers": workers,
                "threads_per_worker": given.threads,
                "seconds": seconds,
                "share_of_one_worker": seconds / (rows[0]["seconds"] if rows else seconds),
                "shortest_cell_s": min(per_cell),
                "longest_cell_s": max(per_cell),
            }
        )
        print(rows[-1], flush=True)
    pd.DataFrame([row | origin_columns(0) for row in rows]).to_csv(given.output, index=False)


def measure(given: argparse.Namespace, workers: int, folder: str) -> tuple[float, list[float]]:
    """Seconds of all cells, imports included, and of each one's training."""
    cells = [
        Cell(f"seed{seed}", recipe_config("builtin/photos", {**SETTINGS, "seed": seed, "steps": given.steps}), {})
        for seed in range(given.cells)
    ]
    store, launcher = CellStore(folder), LocalLauncher(workers, given.threads)
    began = time.perf_counter()
    run_cells(cells, store, launcher, progress=False).check()
    return time.perf_counter() - began, store.table(cells)["seconds"].tolist()


if __name__ == "__main__":
    main()
