"""The paper's tables with ours beside them: means with intervals over seeds, the paper's column, and what follows.

    tables = AblationTables(open_ablations(AblationParameters(preset="laptop")))
    tables.shown("key_designs")          # for reading, partial while cells are missing
    tables.sentences("key_designs")      # whether the paper's ordering holds here, and how sure that is
    tables.figure("key_designs")         # saved with its numbers

Where a measure of the paper needs weights or images that a preset has not, another one stands in its place and is
called by its own name: PSNR for rFID, the distance in another network's features for gFID.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ibqlab.grids.cells import Cell, column_of
from ibqlab.plots import collapse_curve_table, norm_curve_table, plot_collapse_curves, plot_norm_curves, save_figure
from ibqlab.plots.ablation_dots import DOTS_KEY, DotPanel, plot_ablation
from ibqlab.plots.style import method_label
from ibqlab.quantizers import INITIALISATIONS
from ibqlab.runs import Run
from ibqlab.studies.ablation import Ablations, RowCells, Table
from ibqlab.studies.lead_lag import lead_lag, lead_lag_text
from ibqlab.studies.statistics import Ordering, compare_ordering, mean_interval, name_interval
from ibqlab.studies.table_files import SHOWN_ON_REQUEST


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column of ours, and the paper's that it is compared with."""

    key: str
    """Column of the rows."""
    title: str
    """For tables."""
    unit: str = ""
    """"share" is shown in %."""
    higher: bool = True
    """More is better."""
    printed: str = ""
    """The paper's measure; empty: none."""
    stands_in: bool = False
    """It is not the paper's measure, but what there is in its place; left out where that one was measured."""
    digits: int = 1
    """After the point."""

    @property
    def bounds(self) -> tuple[float, float]:
        """What no value of it can leave."""
        if self.unit == "share":
            return (0, 1)
        return (1, np.inf) if self.key.endswith("perplexity") else (0, np.inf)


MEASURES = (
    Measure(key="usage", title="usage", unit="share", printed="usage"),
    Measure(key="rfid", title="rFID", higher=False, printed="rfid", digits=2),
    Measure(key="psnr", title="PSNR (dB)", printed="rfid", stands_in=True, digits=2),
    Measure(key="lpips_vgg", title="LPIPS (VGG)", higher=False, printed="lpips", digits=4),
    Measure(key="perplexity", title="perplexity (codes)"),
    Measure(key="gfid", title="gFID", higher=False, printed="gfid", digits=2),
    Measure(key="bits_per_token", title="bits per token", higher=False, printed="gfid", stands_in=True, digits=3),
    Measure(key="is", title="Inception Score", printed="inception_score", digits=2),
    Measure(key="recognised", title="digits recognised", unit="share", printed="inception_score", stands_in=True),
    Measure(key="precision", title="precision", printed="precision", digits=2),
    Measure(key="recall", title="recall", printed="recall", digits=2),
    Measure(key="feature_norm", title="norm of features", digits=2),
    Measure(key="code_norm", title="norm of codes", digits=2),
    Measure(key="softmax_perplexity", title="codes in softmax(z·C)"),
)
"""What tables compare or, where a table asks for it, show as well. Costs have columns of their own."""
PRINTED = {
    "usage": ("usage", True, "share"),
    "rfid": ("rFID", False, ""),
    "lpips": ("LPIPS", False, ""),
    "gfid": ("gFID", False, ""),
    "inception_score": ("Inception Score", True, ""),
    "precision": ("precision", True, ""),
    "recall": ("recall", True, ""),
}
"""The paper's measures: title, more is better, unit."""
APART = ("gfid", "inception_score")
"""The paper's measures that have a panel of their own, since ours are of other images or another network."""
OF_GENERATORS = ("gfid", "bits_per_token", "is", "recognised", "precision", "recall")


class AblationTables:
    """The tables of a study, read from the rows that are there by now.

    Args:
        study: the tables and their folder.
    """

    def __init__(self, study: Ablations):
        self.study = study
        self.measures = tuple(_by_network(measure, study.dial.extractor) for measure in MEASURES)
        self._drawn: dict[str, Figure | None] = {}

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Cell → its row, for all that are finished."""
        return {cell.name: row for cell in self.study.cells if (row := self.study.store.row(cell))}

    # --- numbers ---

    def values(self, name: str) -> dict[str, dict[str, list[float]]]:
        """Measure → row of a table → one value per finished seed."""
        found: dict[str, dict[str, list[float]]] = {}
        table = self._table(name)
        left_out = set(SHOWN_ON_REQUEST) - set(table.file.also)
        wanted = [measure for measure in self.measures if measure.key not in left_out]
        for label, cells in table.rows.items():
            for measure in wanted:
                values = self._values_of(cells, measure.key)
                if values:
                    found.setdefault(measure.key, {})[label] = values
        return found

    def data(self, name: str) -> pd.DataFrame:
        """A table's numbers, nothing rounded.

        Returns:
            One row per row of the table, measure and kind: row, method, measure, kind ("mean" with low and high, "seed"
            or "paper"), value, seed, seeds.
        """
        table, values, out = self._table(name), self.values(name), []
        for label, cells in table.rows.items():
            method = cells.tokenizers[0].labels["method"] if cells.tokenizers else ""
            shared = {"row": label, "method": method}
            for measure in self.measures:
                seeds = values.get(measure.key, {}).get(label, [])
                found = mean_interval(seeds, measure.bounds)
                if found.count:
                    one = {"measure": measure.key, "value": found.mean, "low": found.low, "high": found.high}
                    out.append({**shared, **one, "kind": "mean", "seeds": found.count})
                out += [
                    {**shared, "measure": measure.key, "kind": "seed", "value": value, "seed": place}
                    for place, value in enumerate(seeds)
                ]
            for key, value in asdict(cells.printed).items():
                if value is not None:
                    out.append({**shared, "measure": f"paper_{key}", "kind": "paper", "value": value})
        columns = ["row", "method", "measure", "kind", "value", "low", "high", "seed", "seeds"]
        return pd.DataFrame(out, columns=columns)

    def orderings(self, name: str) -> list[tuple[Measure, str, Ordering]]:
        """Our measures with the paper's that they are compared with, and how the two orders agree."""
        values, found, rows = self.values(name), [], self._table(name).rows
        for measure in self._compared(values):
            printed = {
                label: value
                for label, cells in rows.items()
                if (value := getattr(cells.printed, measure.printed)) is not None
            }
            higher = PRINTED[measure.printed][1]
            result = compare_ordering(printed, values[measure.key], printed_higher=higher, higher=measure.higher)
            if result.pairs:
                found.append((measure, PRINTED[measure.printed][0], result))
        return found

    def sentences(self, name: str) -> str:
        """Whether the paper's ordering holds here and how sure that is, one line per measure. Computed."""
        lines = [f"- {result.describe(measure.title, printed)}" for measure, printed, result in self.orderings(name)]
        absent = self._not_measured(name)
        if absent:
            lines.append(f"- Of the paper's measures not taken at preset {self.study.parameters.preset}: {absent}.")
        missing = self._missing(name)
        if missing:
            lines.append(f"- Not finished, and not in these numbers: {', '.join(missing)}.")
        return "\n".join(lines) or "- Nothing is finished yet."

    def shown(self, name: str) -> pd.DataFrame:
        """A table for reading: ours with intervals, the paper's column after each, tokens, costs, seeds."""
        table, values = self._table(name), self.values(name)
        measures = [measure for measure in self.measures if measure.key in values]
        lines = []
        for label, cells in table.rows.items():
            line: dict[str, str] = {"row": label, "here": _here(cells)}
            printed = cells.printed
            for measure in measures:
                seeds = values[measure.key].get(label, [])
                line[measure.title] = _written(seeds, measure)
                if measure.printed and not measure.stands_in:
                    line[f"paper's {PRINTED[measure.printed][0]}"] = _printed(printed, measure.printed)
            for key in self._only_printed(table, measures):
                line[f"paper's {PRINTED[key][0]}"] = _printed(printed, key)
            lines.append(line | self._costs(cells))
        return pd.DataFrame(lines)

    def _costs(self, cells: RowCells) -> dict[str, str]:
        tokens = self._values_of(cells, "tokens")
        of_quantizer = [self._values_of(cells, key) for key in ("quantizer_ms", "quantizer_mib")]
        last = cells.generators or cells.tokenizers
        seconds = [self.rows[cell.name]["seconds"] for cell in last if cell.name in self.rows]
        parameters = [self.rows[cell.name].get("parameters") for cell in last if cell.name in self.rows]
        line = {
            "tokens": f"{min(tokens):,.0f}" if tokens else "–",
            "quantizer (ms)": f"{np.median(of_quantizer[0]):.1f}" if of_quantizer[0] else "–",
            "quantizer (MiB)": f"{np.median(of_quantizer[1]):.2f}" if of_quantizer[1] else "–",
            "parameters (M)": f"{parameters[0] / 1e6:.2f}" if parameters and parameters[0] else "–",
            "s per run": f"{np.mean(seconds):.0f}" if seconds else "–",
        }
        return line | {"seeds": f"{len(seconds)} of {len(last)}" if last else "not run here"}

    def _only_printed(self, table: Table, measures: Sequence[Measure]) -> list[str]:
        """The paper's measures that no column of ours has beside it."""
        beside = {measure.printed for measure in measures if not measure.stands_in}
        rows = [asdict(cells.printed) for cells in table.rows.values()]
        return [key for key in PRINTED if key not in beside and any(row[key] is not None for row in rows)]

    def _compared(self, values: dict[str, Any]) -> list[Measure]:
        """Measures with a counterpart in the paper; a stand-in only where the real one was not measured."""
        real = {m.printed for m in self.measures if m.printed and not m.stands_in and m.key in values}
        return [m for m in self.measures if m.printed and m.key in values and not (m.stands_in and m.printed in real)]

    def _not_measured(self, name: str) -> str:
        """The paper's measures that this preset does not take."""
        values = self.values(name)
        taken = {measure.printed for measure in self.measures if not measure.stands_in and measure.key in values}
        if self.study.dial.extractor:
            taken -= {"gfid"}
        rows = [asdict(cells.printed) for cells in self._table(name).rows.values() if cells.tokenizers]
        absent = [key for key in PRINTED if key not in taken and any(row[key] is not None for row in rows)]
        return ", ".join(PRINTED[key][0] for key in absent)

    def _values_of(self, cells: RowCells, key: str) -> list[float]:
        of_generators = key in (*OF_GENERATORS, column_of("fid", self.study.dial.extractor))
        group = cells.generators if of_generators else cells.tokenizers
        if key == "psnr" and cells.row.inference == "soft":
            key = "soft_psnr"
        found = (self.rows[cell.name].get(key) for cell in group if cell.name in self.rows)
        return [float(value) for value in found if value is not None and np.isfinite(value)]

    def _missing(self, name: str) -> list[str]:
        table, missing = self._table(name), []
        for label, cells in table.rows.items():
            lost = [cell for cell in (*cells.tokenizers, *cells.generators) if cell.name not in self.rows]
            if lost:
                missing.append(f"{label} ({_seeds(lost)}{self._why(lost)})")
        return missing

    def _why(self, cells: Sequence[Cell]) -> str:
        failures = [failure for cell in cells if (failure := self.study.store.failure(cell))]
        return f"; failed: {failures[0]['error'][:160]}" if failures else ""

    def _table(self, name: str) -> Table:
        return self.study.tables[name]

    # --- figures ---

    def figure(self, name: str) -> Figure | None:
        """A table as a picture, saved under its name into the study's `figures/`; None before anything is finished."""
        if name not in self._drawn:
            self._drawn[name] = self._draw(name)
        return self._drawn[name]

    def _draw(self, name: str) -> Figure | None:
        values, data = self.values(name), self.data(name)
        panels = []
        for measure, _, _ in self.orderings(name):
            share = measure.unit == "share"
            label = f"{measure.title}, %" if share else measure.title
            panels.append(
                DotPanel(key=measure.key, label=label, scale=100 if share else 1, higher=measure.higher, share=share)
            )
            if measure.stands_in or measure.printed in APART:
                title, higher, _ = PRINTED[measure.printed]
                panels.append(DotPanel(key=f"paper_{measure.printed}", label=f"paper's {title}", higher=higher))
        if not values or not panels:
            return None
        # The paper's number of the same measure belongs into the same panel.
        same = {
            f"paper_{measure.printed}": measure.key
            for measure, _, _ in self.orderings(name)
            if not measure.stands_in and measure.printed not in APART
        }
        drawn = data.assign(measure=data["measure"].replace(same))
        drawn = drawn[drawn["measure"].isin([panel.key for panel in panels])]
        kept = [label for label, cells in self._table(name).rows.items() if cells.tokenizers]
        drawn = drawn[drawn["row"].isin(kept)]
        order = {label: place for place, label in enumerate(self._table(name).rows)}
        drawn = drawn.sort_values("row", key=lambda rows: rows.map(order), kind="stable")
        here = {label: _here(cells) for label, cells in self._table(name).rows.items()}
        drawn = drawn.assign(here=drawn["row"].map(here))
        file = self._table(name).file
        figure = plot_ablation(drawn, panels[:4], f"{file.title} ({file.table})", self.caption)
        save_figure(figure, self.study.folder / "figures" / name, drawn)
        return figure

    def figure_norms(self, name: str) -> Figure | None:
        """Norms, the softmax's spread, gradient reach and each step's usage against the step, for a table's rows.

        Saved as `<name>_norms`. None for tables that do not ask for these columns, or before anything is finished.
        """
        key = f"{name}_norms"
        if key not in self._drawn:
            self._drawn[key] = self._draw_norms(name) if self._table(name).file.also else None
        return self._drawn[key]

    def order_text(self, name: str) -> str:
        """What changes first in a table's rows, computed over seeds; "" where the table does not ask, with one seed,
        and for runs that did not record it."""
        metrics = self._row_metrics(name) if self._table(name).file.also and len(self.study.seeds) > 1 else None
        return "" if metrics is None else lead_lag_text(lead_lag(metrics, by=("row",)), by=("row",))

    def _row_metrics(self, name: str) -> pd.DataFrame | None:
        """All logged rows of the training steps of a table's runs."""
        frames = [
            self._curves(cell).assign(row=label)
            for label, cells in self._table(name).rows.items()
            for cell in cells.tokenizers
            if cell.name in self.rows
        ]
        if not frames:
            return None
        metrics = pd.concat(frames, ignore_index=True)
        return metrics[metrics["step"] > 0]

    def _draw_norms(self, name: str) -> Figure | None:
        metrics = self._row_metrics(name)
        if metrics is None:
            return None
        figure = plot_norm_curves(metrics)
        save_figure(figure, self.study.folder / "figures" / f"{name}_norms", norm_curve_table(metrics))
        return figure

    @property
    def caption(self) -> str:
        """What runs the figures show."""
        seeds = len(self.study.seeds)
        return f"preset {self.study.parameters.preset}: {name_interval(seeds)}; {DOTS_KEY}"

    def figure_collapse(self) -> Figure | None:
        """Usage, perplexity and gradient reach against the step, for all methods at one codebook size (figure 2).

        Saved as `collapse`. None before anything is finished.
        """
        if "collapse" not in self._drawn:
            self._drawn["collapse"] = self._draw_collapse()
        return self._drawn["collapse"]

    def _draw_collapse(self) -> Figure | None:
        frames = [self._curves(cell) for cell in self._comparable() if cell.name in self.rows]
        if not frames:
            return None
        metrics = pd.concat(frames, ignore_index=True)
        figure = plot_collapse_curves(metrics)
        save_figure(figure, self.study.folder / "figures" / "collapse", collapse_curve_table(metrics))
        return figure

    def compared_methods(self) -> str:
        """What `figure_collapse` shows: methods need not have the same number of residual blocks."""
        shown = dict.fromkeys(
            f"{method_label(cell.labels['method'])} in {cell.labels['num_res_blocks']} residual blocks"
            for cell in self._comparable()
        )
        return ", ".join(shown)

    def _comparable(self) -> list[Cell]:
        """The deepest setting of each method, at the codebook size and dimension that most methods share."""
        groups: dict[tuple[int, int], list[Cell]] = {}
        for cell in self.study.cells:
            if "depth" not in cell.labels:
                groups.setdefault((cell.labels["codebook_size"], cell.labels["code_dim"]), []).append(cell)
        largest = max(groups.values(), key=lambda cells: len({cell.labels["method"] for cell in cells}), default=[])
        chosen: dict[tuple[str, int], Cell] = {}
        for cell in sorted(largest, key=lambda cell: cell.labels["num_res_blocks"]):
            chosen[(cell.labels["method"], cell.labels["seed"])] = cell
        return list(chosen.values())

    def _curves(self, cell: Cell) -> pd.DataFrame:
        init = INITIALISATIONS[cell.config.tokenizer.quantizer.codebook_init]
        return Run(self.study.folder / cell.name).metrics.assign(**cell.labels, init=init)


def _by_network(measure: Measure, extractor: str) -> Measure:
    """A Fréchet distance in another network's features is no FID, and bears that network's name."""
    if measure.key != "gfid" or not extractor:
        return measure
    return replace(measure, key=column_of("fid", extractor), title=f"Fréchet distance ({extractor})")


def _here(cells: RowCells) -> str:
    """What a row of the paper became at this preset."""
    if not cells.tokenizers:
        return "–"
    labels = cells.tokenizers[0].labels
    text = f"{labels['method']}, K {labels['codebook_size']:,}, D {labels['code_dim']}"
    if cells.generators:
        made = cells.generators[0].labels
        return f"{text}; generator of {made['depth']} block{'' if made['depth'] == 1 else 's'}, width {made['width']}"
    inference = ", averages" if cells.row.inference == "soft" else ""
    return f"{text}, {labels['num_res_blocks']} blocks{inference}"


def _written(values: Sequence[float], measure: Measure) -> str:
    """A mean with its interval, as a table shows it."""
    found = mean_interval(values, measure.bounds)
    if not found.count:
        return "–"
    scale, unit = (100, " %") if measure.unit == "share" else (1, "")
    text = f"{found.mean * scale:,.{measure.digits}f}{unit}"
    if found.count < 2:
        return text
    return f"{text} ({found.low * scale:,.{measure.digits}f}–{found.high * scale:,.{measure.digits}f})"


def _printed(row: Any, key: str) -> str:
    value = getattr(row, key)
    if value is None:
        return "–"
    return f"{100 * value:.3g} %" if PRINTED[key][2] == "share" else f"{value:g}"


def _seeds(cells: Sequence[Cell]) -> str:
    seeds = sorted({cell.labels["seed"] for cell in cells})
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
