"""The paper's tables with ours beside them: means with intervals over seeds, the paper's column, and what follows.

    tables = AblationTables(open_study("ablations", AblationParameters(preset="laptop")))
    tables.shown("key_designs")          # for reading, partial while runs are missing
    tables.sentences("key_designs")      # whether the paper's ordering holds here, and how sure that is

Titles, units, bounds and directions are those of `ibqlab.base.measures`. Where a measure of the paper needs weights or
images that a preset has not, another one stands in its place and is called by its own name: PSNR for rFID, the distance
in another network's features for gFID.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from ibqlab.base.intervals import student_interval
from ibqlab.base.measures import SHARE, Quantity, measure
from ibqlab.grids.cells import column_of
from ibqlab.studies.ablation_grid import RowCells
from ibqlab.studies.comparisons import Ordering, compare_ordering, correct_orderings
from ibqlab.studies.study import Study
from ibqlab.studies.table_files import SHOWN_ON_REQUEST

PAPER = {"usage": "usage", "rfid": "rfid", "lpips": "lpips", "gfid": "gfid", "inception_score": "is"}
PAPER |= {"precision": "precision", "recall": "recall"}
"""The paper's measures, as in `PRINTED` → keys of `ibqlab.base.measures`."""
SAME = {"usage": "usage", "rfid": "rfid", "lpips_vgg": "lpips", "gfid": "gfid", "is": "inception_score"}
SAME |= {"precision": "precision", "recall": "recall"}
"""Ours → the paper's measure that it is compared with."""
STANDS_IN = {"psnr": "rfid", "bits_per_token": "gfid", "recognised": "inception_score"}
"""Ours → the paper's measure whose place it takes where that one was not measured."""
COLUMNS = ("usage", "rfid", "psnr", "lpips_vgg", "perplexity", "gfid", "bits_per_token", "is", "recognised")
COLUMNS += ("precision", "recall", *SHOWN_ON_REQUEST)
"""Ours, as tables show them. Costs have columns of their own."""
DECIMALS = {"lpips_vgg": 4, "bits_per_token": 3, "usage": 1, "perplexity": 1, "recognised": 1, "softmax_perplexity": 1}
"""Digits after the point; 2 for the others."""
OF_GENERATORS = ("gfid", "bits_per_token", "is", "recognised", "precision", "recall")


class AblationTables:
    """The tables of a study, read from the rows that are there by now.

    Args:
        study: of the ablations.
    """

    def __init__(self, study: Study):
        self.study, self.grid = study, study.grid
        extractor = self.grid.preset.extractor
        # A Fréchet distance in another network's features is no FID, and bears that network's name.
        distance = column_of("fid", extractor)
        named = replace(measure("gfid"), key=distance, title=f"Fréchet distance ({extractor})")
        quantities = [named if key == "gfid" and extractor else measure(key) for key in COLUMNS]
        self.measures: dict[str, Quantity] = {quantity.key: quantity for quantity in quantities}
        self.same = {distance if key == "gfid" else key: paper for key, paper in SAME.items()}
        """Ours → the paper's, stand-ins left out."""
        self.of_generators = (*OF_GENERATORS, distance)

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Cell → its row, for all that are finished."""
        return {cell.name: row for cell in self.study.cells if (row := self.study.store.row(cell))}

    def values(self, name: str) -> dict[str, dict[str, list[float]]]:
        """Measure → row of a table → one value per finished seed."""
        values: dict[str, dict[str, list[float]]] = {}
        hidden = set(SHOWN_ON_REQUEST) - set(self.grid.files[name].also)
        for label, cells in self.grid.tables[name].items():
            for key in self.measures:
                seeds = [] if key in hidden else self._values_of(cells, key)
                if seeds:
                    values.setdefault(key, {})[label] = seeds
        return values

    def _values_of(self, cells: RowCells, key: str) -> list[float]:
        return list(self._values_by_seed(cells, key).values())

    def _values_by_seed(self, cells: RowCells, key: str) -> dict[int, float]:
        """Seed → value of a measure, of the finished runs that have a finite one."""
        group = cells.generators if key in self.of_generators else cells.tokenizers
        if key == "psnr" and cells.row.inference == "soft":
            key = "soft_psnr"
        numbers = {cell.labels["seed"]: self.rows[cell.name].get(key) for cell in group if cell.name in self.rows}
        return {seed: float(value) for seed, value in numbers.items() if value is not None and np.isfinite(value)}

    def data(self, name: str) -> pd.DataFrame:
        """A table's numbers, nothing rounded.

        Returns:
            One row per row of the table, measure and kind: row, method, measure, kind ("mean" with low and high, "seed"
            or "paper"), value, seed, seeds.
        """
        values, lines = self.values(name), []
        for label, cells in self.grid.tables[name].items():
            method = cells.tokenizers[0].labels["method"] if cells.tokenizers else ""
            shared = {"row": label, "method": method}
            for key, quantity in self.measures.items():
                seeds = values.get(key, {}).get(label, [])
                mean = student_interval(seeds, quantity.bounds)
                if mean.count:
                    interval = {"value": mean.mean, "low": mean.low, "high": mean.high, "seeds": mean.count}
                    lines.append({**shared, "measure": key, "kind": "mean", **interval})
                by_seed = self._values_by_seed(cells, key) if seeds else {}
                lines += [
                    {**shared, "measure": key, "kind": "seed", "value": value, "seed": seed}
                    for seed, value in by_seed.items()
                ]
            lines += [
                {**shared, "measure": f"paper_{key}", "kind": "paper", "value": value}
                for key, value in cells.printed.items()
            ]
        columns = ["row", "method", "measure", "kind", "value", "low", "high", "seed", "seeds"]
        return pd.DataFrame(lines, columns=columns)

    def compared(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Ours → the paper's measure that it is compared with; a stand-in only where the real one was not measured."""
        same = {key: self.same[key] for key in self.measures if key in values and key in self.same}
        stand_ins = {key: paper for key, paper in STANDS_IN.items() if key in values and paper not in same.values()}
        return {key: (same | stand_ins)[key] for key in self.measures if key in same or key in stand_ins}

    def orderings(self, name: str) -> dict[str, Ordering]:
        """Our measure → how the paper's order fares in it; all verdicts of a table are corrected together."""
        values, rows, orderings = self.values(name), self.grid.tables[name], {}
        for key, paper in self.compared(values).items():
            printed = {label: cells.printed[paper] for label, cells in rows.items() if paper in cells.printed}
            printed_higher = measure(PAPER[paper]).better == "higher"
            higher = self.measures[key].better == "higher"
            ordering = compare_ordering(printed, values[key], printed_higher=printed_higher, higher=higher)
            if ordering.pairs:
                orderings[key] = ordering
        return dict(zip(orderings, correct_orderings(list(orderings.values())), strict=True))

    def sentences(self, name: str) -> str:
        """Whether the paper's ordering holds here and how sure that is, one line per measure. Computed."""
        values = self.values(name)
        papers = self.compared(values)
        lines = [
            f"- {ordering.describe(self.measures[key].heading, paper_title(papers[key]))}"
            for key, ordering in self.orderings(name).items()
        ]
        # What this preset does not take. A distance in other features is none of the paper's measures.
        measured_keys = {self.same[key] for key in values if key in self.same}
        measured_keys -= {"gfid"} if self.grid.preset.extractor else set()
        printed = self._printed_measures(name, run_here=True)
        absent = ", ".join(paper_title(key) for key in printed if key not in measured_keys)
        if absent:
            lines.append(f"- Of the paper's measures not taken at preset {self.study.parameters.preset}: {absent}.")
        missing = self._missing(name)
        if missing:
            lines.append(f"- Not finished, and not in these numbers: {', '.join(missing)}.")
        return "\n".join(lines) or "- Nothing is finished yet."

    def shown(self, name: str) -> pd.DataFrame:
        """A table for reading: ours with intervals, the paper's column after each, tokens, costs, seeds."""
        table, values = self.grid.tables[name], self.values(name)
        quantities = [quantity for key, quantity in self.measures.items() if key in values]
        compared = {self.same.get(quantity.key) for quantity in quantities}
        alone = [key for key in self._printed_measures(name) if key not in compared]
        lines = []
        for label, cells in table.items():
            line: dict[str, str] = {"row": label, "here": describe_cells(cells)}
            for quantity in quantities:
                seeds, unit = values[quantity.key].get(label, []), " %" if quantity.unit == SHARE else ""
                interval = student_interval(seeds, quantity.bounds)
                line[quantity.heading] = interval.text(DECIMALS.get(quantity.key, 2), quantity.scale, unit)
                if quantity.key in self.same:
                    line |= _paper_column(cells, self.same[quantity.key])
            for key in alone:
                line |= _paper_column(cells, key)
            lines.append(line | self._costs(cells))
        return pd.DataFrame(lines)

    def _costs(self, cells: RowCells) -> dict[str, str]:
        tokens, milliseconds, mebibytes = (
            self._values_of(cells, key) for key in ("tokens", "quantizer_ms", "quantizer_mib")
        )
        last = cells.generators or cells.tokenizers
        rows = [self.rows[cell.name] for cell in last if cell.name in self.rows]
        parameters = rows[0].get("parameters") if rows else None
        line = {
            "tokens": f"{min(tokens):,.0f}" if tokens else "–",
            "quantizer (ms)": f"{np.median(milliseconds):.1f}" if milliseconds else "–",
            "quantizer (MiB)": f"{np.median(mebibytes):.2f}" if mebibytes else "–",
            "parameters (M)": f"{parameters / 1e6:.2f}" if parameters else "–",
            "s per run": f"{np.mean([row['seconds'] for row in rows]):.0f}" if rows else "–",
        }
        return line | {"seeds": f"{len(rows)} of {len(last)}" if last else "not run here"}

    def _printed_measures(self, name: str, run_here: bool = False) -> list[str]:
        """The paper's measures that any row of a table has; with `run_here` any row that is run."""
        rows = [cells.printed for cells in self.grid.tables[name].values() if cells.tokenizers or not run_here]
        return [key for key in PAPER if any(key in row for row in rows)]

    def _missing(self, name: str) -> list[str]:
        """Rows with runs that are not finished, with their seeds and the first failure."""
        missing = []
        for label, cells in self.grid.tables[name].items():
            lost = [cell for cell in (*cells.tokenizers, *cells.generators) if cell.name not in self.rows]
            failures = [failure for cell in lost if (failure := self.study.store.failure(cell))]
            seeds = sorted({cell.labels["seed"] for cell in lost})
            if lost:
                why = f"; failed: {failures[0]['error'][:160]}" if failures else ""
                missing.append(f"{label} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}{why})")
        return missing


def paper_title(key: str) -> str:
    """What a measure of the paper, one of `PAPER`, is called."""
    return measure(PAPER[key]).title


def describe_cells(cells: RowCells) -> str:
    """What a row of the paper became at this preset."""
    if not cells.tokenizers:
        return "–"
    labels = cells.tokenizers[0].labels
    text = f"{labels['method']}, K {labels['codebook_size']:,}, D {labels['code_dim']}"
    if cells.generators:
        generator = cells.generators[0].labels
        blocks = "block" if generator["depth"] == 1 else "blocks"
        return f"{text}; generator of {generator['depth']} {blocks}, width {generator['width']}"
    inference = ", averages" if cells.row.inference == "soft" else ""
    return f"{text}, {labels['num_res_blocks']} blocks{inference}"


def _paper_column(cells: RowCells, key: str) -> dict[str, str]:
    """A cell of the paper's column, by the column's title."""
    value = cells.printed.get(key)
    share = measure(PAPER[key]).unit == SHARE
    text = "–" if value is None else f"{100 * value:.3g} %" if share else f"{value:g}"
    return {f"paper's {paper_title(key)}": text}
