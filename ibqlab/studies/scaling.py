"""What codebook size and dimension do to each method: intervals at every setting, power laws, one sentence."""

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.escaping import for_markdown
from ibqlab.base.files import write_whole
from ibqlab.base.progress import SHORTEST
from ibqlab.grids.cells import StudyError, as_json
from ibqlab.plots import save_figure
from ibqlab.plots.power_laws import exponent_text, exponent_title, plot_power_laws, supported_intervals
from ibqlab.plots.style import method_label
from ibqlab.studies.figures import figure_scaling
from ibqlab.studies.provenance import provenance_of, provenance_text
from ibqlab.studies.statistics import Interval, PowerLaw, fit_power_law, mean_interval, name_interval
from ibqlab.studies.study import Study
from ibqlab.studies.table_files import read_table
from ibqlab.studies.tables import TOO_SHORT, to_markdown

FITTED = {
    "used_codes": "codes in use",
    "mse": "squared error (images of 0 to 1)",
}
"""Quantities that power laws in K are fitted to."""
SETTINGS = ["method", "init", "codebook_size", "code_dim"]


class ScalingReport:
    """A scaling study, read from the rows that are there by now.

    Args:
        study: a grid over codebook sizes and dimensions.
    """

    def __init__(self, study: Study):
        self.study = study

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per finished run, with used_codes and mse (of images from 0 to 1).

        Raises:
            StudyError: nothing is finished.
        """
        rows = self.study.rows()
        if rows.empty:
            raise StudyError(f"no run of {self.study.name} is finished in {self.study.folder.name}; call train() first")
        used = rows["usage"] * rows["codebook_size"]
        return rows.assign(used_codes=used, mse=10 ** (-rows["psnr"] / 10))

    def table(self) -> pd.DataFrame:
        """One row per setting: means with 95 % intervals over seeds, tokens, costs.

        Returns:
            method, init, codebook_size, code_dim; usage, perplexity, psnr each as _mean, _low, _high; tokens (fewest),
            quantizer_ms, quantizer_mib (medians), seconds (mean), seeds.
        """
        out = []
        for setting, part in self.runs.groupby(SETTINGS, sort=False):
            line: dict[str, Any] = dict(zip(SETTINGS, setting, strict=True))
            for key, bounds in (("usage", (0, 1)), ("perplexity", (1, np.inf)), ("psnr", (-np.inf, np.inf))):
                found = mean_interval(part[key], bounds)
                line |= {f"{key}_mean": found.mean, f"{key}_low": found.low, f"{key}_high": found.high}
            line |= {"tokens": part["tokens"].min(), "seconds": part["seconds"].mean(), "seeds": len(part)}
            line |= {key: part[key].median() for key in ("quantizer_ms", "quantizer_mib")}
            out.append(line)
        return pd.DataFrame(out)

    def shown(self) -> pd.DataFrame:
        """The same for reading."""
        table = self.table()
        shown = pd.DataFrame(
            {
                "method": [method_label(name) for name in table["method"]],
                "start": table["init"],
                "K": table["codebook_size"],
                "D": table["code_dim"],
                "usage": [_with_interval(row, "usage", 100, " %") for _, row in table.iterrows()],
                "tokens": table["tokens"].map("{:,.0f}".format),
                "perplexity (codes)": [_with_interval(row, "perplexity", 1, "") for _, row in table.iterrows()],
                "PSNR (dB)": [_with_interval(row, "psnr", 1, "") for _, row in table.iterrows()],
                "quantizer (ms)": table["quantizer_ms"].map("{:.1f}".format),
                "quantizer (MiB)": table["quantizer_mib"].map("{:.2f}".format),
                "s per run": table["seconds"].map("{:.0f}".format),
                "seeds": table["seeds"],
            }
        )
        return shown

    @cached_property
    def laws(self) -> pd.DataFrame:
        """Power laws in K: one row per quantity, method and dimension.

        Returns:
            quantity, method, code_dim, factor, exponent, low, high (its 95 % interval), points (runs behind it).
        """
        out = []
        for (method, dim), part in self.runs.groupby(["method", "code_dim"], sort=False):
            for quantity in FITTED:
                law = fit_power_law(part["codebook_size"].tolist(), part[quantity].tolist())
                if law:
                    out.append({"quantity": quantity, "method": method, "code_dim": dim, **law._asdict()})
        return pd.DataFrame(out, columns=["quantity", "method", "code_dim", *PowerLaw._fields])

    def shown_laws(self) -> pd.DataFrame:
        """The same for reading; intervals only where there are seeds and sizes enough for them."""
        laws = supported_intervals(self.runs, self.laws)
        return pd.DataFrame(
            {
                "quantity": [FITTED[quantity] for quantity in laws["quantity"]],
                "method": [method_label(name) for name in laws["method"]],
                "D": laws["code_dim"],
                exponent_title(laws): [exponent_text(law) for _, law in laws.iterrows()],
                "runs": laws["points"],
            }
        )

    def figure_laws(self) -> Figure:
        """Codes in use and squared error against K, runs as points and the laws as lines; saved as `power_laws`."""
        figure = plot_power_laws(self.runs, self.laws, FITTED)
        keys = [*SETTINGS, "seed", "tokens", "usage", *FITTED]
        save_figure(figure, self.study.folder / "figures" / "power_laws", self.runs[keys])
        write_whole(self.study.folder / "figures" / "power_laws_fits.csv", self.laws.to_csv(index=False).encode())
        return figure

    def sentences(self) -> str:
        """What became of each method as K and D grow, and whether methods are told apart at the largest. Computed."""
        lines = []
        for method in dict.fromkeys(self.runs["method"]):
            for axis, other, name in (("codebook_size", "code_dim", "K"), ("code_dim", "codebook_size", "D")):
                lines.append(self._growth(method, axis, other, name))
        lines.append(self._at_the_largest())
        return "\n".join(f"- {line}" for line in lines if line)

    def _growth(self, method: str, axis: str, other: str, name: str) -> str:
        """Usage of a method from the smallest to the largest value of an axis, the other one at its largest."""
        runs = self.runs[self.runs["method"] == method]
        runs = runs[runs[other] == runs[other].max()]
        first, last = runs[axis].min(), runs[axis].max()
        if first == last:
            return ""
        small, large = (mean_interval(runs[runs[axis] == value]["usage"], (0, 1)) for value in (first, last))
        apart = small.overlaps(large)
        sure = (
            "one seed cannot say how sure that is"
            if apart is None
            else "the intervals overlap"
            if apart
            else "the intervals do not overlap"
        )
        change = "falls" if large.mean < small.mean else "rises"
        fixed = f"{'D' if name == 'K' else 'K'} = {runs[other].max():,}"
        label = method_label(method)
        return (
            f"{label}: usage {change} from {_share(small)} at {name} = {first:,} to {_share(large)} at {name} = "
            f"{last:,} ({fixed}); {sure}."
        )

    def _at_the_largest(self) -> str:
        """Whether the methods' intervals of usage overlap at the largest size and dimension."""
        runs = self.runs
        size, dim = runs["codebook_size"].max(), runs["code_dim"].max()
        runs = runs[(runs["codebook_size"] == size) & (runs["code_dim"] == dim)]
        found = {method: mean_interval(part["usage"], (0, 1)) for method, part in runs.groupby("method", sort=False)}
        if len(found) < 2:
            return ""
        told = ", ".join(f"{method_label(name)} {_share(value)}" for name, value in found.items())
        pairs = [(a, b) for a in found for b in found if a < b]
        overlaps = [found[a].overlaps(found[b]) for a, b in pairs]
        if None in overlaps:
            sure = "with one seed there are no intervals to compare"
        elif any(overlaps):
            sure = f"{sum(overlaps)} of {len(pairs)} pairs of intervals overlap"
        else:
            sure = "the intervals do not overlap"
        return f"At the largest setting, K = {size:,} and D = {dim:,}: {told}; {sure}."

    def markdown(self) -> str:
        """The whole study as Markdown; figures are saved by the way."""
        rows = self.runs.to_dict("records")
        figure_scaling(self.study)
        self.figure_laws()
        write_whole(self.study.folder / "figures" / "table.csv", self.table().to_csv(index=False).encode())
        facts = provenance_of(rows, self.study.command)
        write_whole(self.study.folder / "provenance.json", as_json(facts))
        parts = [
            f"# Scaling the codebook, {for_markdown(self.study.folder.name)}",
            f"{len(rows)} of {len(self.study.cells)} runs of {for_markdown(self.study.grid.base)} finished. "
            f"In brackets: {name_interval(self.runs['seed'].nunique())}. Usage: share of codes hit at least once in "
            "the tokens named. quantizer: one pass forward and backward over a step's tokens, float32, while other "
            "runs went on beside it; MiB: what autograd keeps for it.",
            *([TOO_SHORT] if self.runs["steps"].max() < SHORTEST else []),
            to_markdown(self.shown()),
            self.sentences(),
            "![Usage and PSNR against codebook size](figures/scaling.png)",
            "## Power laws\n\nLeast squares of logarithms over single runs, which are the points of the figure and the "
            "rows of figures/power_laws.csv.\n\n" + to_markdown(self.shown_laws()),
            "![Power laws](figures/power_laws.png)",
            "## The paper's column\n\nIBQ on ImageNet at 256 pixels. Orders can be compared, values cannot.\n\n"
            + to_markdown(self.printed()),
            provenance_text(rows, self.study.command, f"ibqlab report {self.study.folder.name}"),
        ]
        return "\n\n".join(parts) + "\n"

    def printed(self) -> pd.DataFrame:
        """The paper's numbers for IBQ over codebook sizes and dimensions, ImageNet at 256 pixels."""
        out = []
        for name in ("codebook_size", "code_dim"):
            file = read_table(name)
            for label, row in file.rows.items():
                given = row.printed()
                out.append(
                    {
                        "paper's row": f"IBQ, {label}",
                        "usage": f"{100 * given.usage:.3g} %",
                        "rFID": f"{given.rfid:.2f}",
                        "LPIPS": f"{given.lpips:.4f}",
                        "table": file.table,
                    }
                )
        return pd.DataFrame(out)


def _with_interval(row: pd.Series, key: str, scale: float, unit: str) -> str:
    mean, low, high = (row[f"{key}_{part}"] * scale for part in ("mean", "low", "high"))
    return f"{mean:,.1f}{unit}" + ("" if np.isnan(low) else f" ({low:,.1f}–{high:,.1f})")


def _share(value: Interval) -> str:
    text = f"{100 * value.mean:.1f} %"
    return text if value.count < 2 else f"{text} ({100 * value.low:.1f}–{100 * value.high:.1f})"
