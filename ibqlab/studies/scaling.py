"""What codebook size and dimension do to each method: intervals at every setting, power laws, sentences.

Tables are made of `study.rows()`, one row per finished run.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ibqlab.base.escaping import for_markdown
from ibqlab.base.intervals import LEVEL, Interval, exponent_text, name_student_interval, student_interval
from ibqlab.base.measures import SHARE, measure
from ibqlab.plots import plot_scaling, save_figure, scaling_table
from ibqlab.plots.power_laws import exponent_title, plot_power_laws, supported_intervals
from ibqlab.plots.style import method_label
from ibqlab.studies.collapse import summary_table
from ibqlab.studies.comparisons import correct_holm, is_clear, name_correction, welch_p
from ibqlab.studies.figures import save_study_figure, save_study_table
from ibqlab.studies.method_grid import grid_study
from ibqlab.studies.pages import join_parts, picture, to_markdown, too_short_note
from ibqlab.studies.study import Study
from ibqlab.studies.table_files import read_table

FITTED = {"used_codes": "codes in use", "mse": "squared error (images of 0 to 1)"}
"""Quantities that power laws in K are fitted to."""
SETTINGS = ["method", "init", "codebook_size", "code_dim"]
LAW_COLUMNS = ["quantity", "method", "code_dim", "factor", "exponent", "low", "high", "points"]
SHOWN = ("usage", "perplexity", "psnr")


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """y = factor · x^exponent: least squares of log y on log x over all runs, and Student's interval of the slope.

    Args:
        x: above 0; one per run, seeds of a setting repeat it.
        y: above 0, else the point is left out.
    Returns:
        factor; exponent; low and high, the ends of its 95 % interval, NaN with fewer than three points; points, their
        number. None with fewer than two different x.
    """
    from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

    points = [(a, b) for a, b in zip(x, y, strict=True) if a > 0 and b is not None and np.isfinite(b) and b > 0]
    if len({a for a, _ in points}) < 2:
        return None
    logs = np.log(np.asarray(points, dtype=float))
    fit = stats.linregress(logs[:, 0], logs[:, 1])
    half = np.nan if len(points) < 3 else float(stats.t.ppf((1 + LEVEL) / 2, len(points) - 2) * fit.stderr)
    law = {"factor": float(np.exp(fit.intercept)), "exponent": float(fit.slope)}
    return law | {"low": law["exponent"] - half, "high": law["exponent"] + half, "points": len(points)}


def setting_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Means with 95 % intervals over seeds, tokens and costs, one row per setting.

    Args:
        rows: of finished runs.
    Returns:
        method, init, codebook_size, code_dim; usage, perplexity, psnr each as _mean, _low, _high; tokens (fewest),
        quantizer_ms, quantizer_mib (medians), seconds (mean), seeds.
    """
    lines = []
    for setting, runs in rows.groupby(SETTINGS, sort=False):
        line: dict[str, Any] = dict(zip(SETTINGS, setting, strict=True))
        for key in SHOWN:
            interval = student_interval(runs[key], measure(key).bounds)
            line |= {f"{key}_mean": interval.mean, f"{key}_low": interval.low, f"{key}_high": interval.high}
        line |= {"tokens": runs["tokens"].min(), "seconds": runs["seconds"].mean(), "seeds": len(runs)}
        line |= {key: runs[key].median() for key in ("quantizer_ms", "quantizer_mib")}
        lines.append(line)
    return pd.DataFrame(lines)


def show_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """`setting_table` for reading."""
    table = setting_table(rows)
    texts = {}
    for key in SHOWN:
        numbers = table[[f"{key}_mean", f"{key}_low", f"{key}_high", "seeds"]].itertuples(index=False)
        unit = " %" if measure(key).unit == SHARE else ""
        texts[key] = [Interval(*line).text(1, measure(key).scale, unit) for line in numbers]
    return pd.DataFrame(
        {
            "method": [method_label(name) for name in table["method"]],
            "start": table["init"],
            "K": table["codebook_size"],
            "D": table["code_dim"],
            measure("usage").heading: texts["usage"],
            "tokens": table["tokens"].map("{:,.0f}".format),
            measure("perplexity").heading: texts["perplexity"],
            measure("psnr").heading: texts["psnr"],
            "quantizer (ms)": table["quantizer_ms"].map("{:.1f}".format),
            "quantizer (MiB)": table["quantizer_mib"].map("{:.2f}".format),
            "s per run": table["seconds"].map("{:.0f}".format),
            "seeds": table["seeds"],
        }
    )


def with_fitted(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the columns that power laws are fitted to: used_codes, and mse of images from 0 to 1."""
    return rows.assign(used_codes=rows["usage"] * rows["codebook_size"], mse=10 ** (-rows["psnr"] / 10))


def power_laws(rows: pd.DataFrame) -> pd.DataFrame:
    """Power laws in K, one row per quantity, method and dimension.

    Args:
        rows: of finished runs.
    Returns:
        quantity, method, code_dim, factor, exponent, low, high (its 95 % interval), points (runs behind it).
    """
    laws = []
    for (method, dim), runs in with_fitted(rows).groupby(["method", "code_dim"], sort=False):
        for quantity in FITTED:
            law = fit_power_law(runs["codebook_size"].tolist(), runs[quantity].tolist())
            if law:
                laws.append({"quantity": quantity, "method": method, "code_dim": dim, **law})
    return pd.DataFrame(laws, columns=LAW_COLUMNS)


def show_laws(rows: pd.DataFrame) -> pd.DataFrame:
    """`power_laws` for reading; intervals only where there are seeds and sizes enough for them."""
    laws = supported_intervals(rows, power_laws(rows))
    return pd.DataFrame(
        {
            "quantity": [FITTED[quantity] for quantity in laws["quantity"]],
            "method": [method_label(name) for name in laws["method"]],
            "D": laws["code_dim"],
            exponent_title(laws): [exponent_text(law) for _, law in laws.iterrows()],
            "runs": laws["points"],
        }
    )


def figure_scaling(study: Study) -> Figure:
    """Validation usage and PSNR against codebook size, per method and dimension; saved as `scaling`."""
    table = scaling_table(summary_table(study))
    return save_study_figure(study, "scaling", plot_scaling(table), table)


def figure_laws(study: Study) -> Figure:
    """Codes in use and squared error against K, runs as points and the laws as lines; saved as `power_laws`."""
    rows, laws = with_fitted(study.rows()), power_laws(study.rows())
    figure = plot_power_laws(rows, laws, FITTED)
    save_figure(figure, study.folder / "figures" / "power_laws", rows[[*SETTINGS, "seed", "tokens", "usage", *FITTED]])
    save_study_table(study, "power_laws_fits", laws)
    return figure


def scaling_sentences(rows: pd.DataFrame) -> str:
    """What became of each method as K and D grow, and whether methods are told apart at the largest. Computed.

    All verdicts together are corrected for their number.

    Args:
        rows: of finished runs.
    """
    lines, pairs = [], []
    for method, runs in rows.groupby("method", sort=False):
        for axis, other_axis, name, other_name in (
            ("codebook_size", "code_dim", "K", "D"),
            ("code_dim", "codebook_size", "D", "K"),
        ):
            largest = runs[runs[other_axis] == runs[other_axis].max()]
            first, last = largest[axis].min(), largest[axis].max()
            if first == last:
                continue
            small, large = (largest[largest[axis] == value]["usage"].tolist() for value in (first, last))
            change = "falls" if np.mean(large) < np.mean(small) else "rises"
            lines.append(
                f"{method_label(method)}: usage {change} from {_usage(small)} at {name} = {first:,} to {_usage(large)} "
                f"at {name} = {last:,} ({other_name} = {runs[other_axis].max():,})"
            )
            pairs.append([(small, large)])
    size, dim = rows["codebook_size"].max(), rows["code_dim"].max()
    largest = rows[(rows["codebook_size"] == size) & (rows["code_dim"] == dim)]
    usages = {method: runs["usage"].tolist() for method, runs in largest.groupby("method", sort=False)}
    if len(usages) > 1:
        values = ", ".join(f"{method_label(method)} {_usage(usage)}" for method, usage in usages.items())
        lines.append(f"At the largest setting, K = {size:,} and D = {dim:,}: {values}")
        pairs.append([(usages[a], usages[b]) for a in usages for b in usages if a < b])
    corrected = correct_holm([welch_p(*pair) for line in pairs for pair in line])
    comparisons = int(np.isfinite(corrected).sum())
    remaining = iter(corrected)
    verdicts = [_verdict([next(remaining) for _ in line_pairs]) for line_pairs in pairs]
    lines = [f"{line}; {verdict}." for line, verdict in zip(lines, verdicts, strict=True)]
    if comparisons:
        lines.append(f"Told apart: by Welch's test at 5 %, {name_correction(comparisons)}.")
    return "\n".join(f"- {line}" for line in lines)


def _usage(values: Sequence[float]) -> str:
    return student_interval(values, measure("usage").bounds).text(1, 100, " %")


def _verdict(p_values: Sequence[float]) -> str:
    """Whether settings are told apart, of one pair or of several."""
    if np.isnan(p_values).any():
        return "one seed cannot say how sure that is"
    clear = sum(map(is_clear, p_values))
    if len(p_values) == 1:
        return "told apart" if clear else "not told apart"
    return f"{clear} of {len(p_values)} pairs are told apart"


def published_scaling() -> pd.DataFrame:
    """The paper's numbers for IBQ over codebook sizes and dimensions, ImageNet at 256 pixels."""
    lines = []
    for name in ("codebook_size", "code_dim"):
        file = read_table(name)
        for label, row in file.rows.items():
            printed = row.printed()
            lines.append(
                {
                    "paper's row": f"IBQ, {label}",
                    "usage": f"{100 * printed['usage']:.3g} %",
                    "rFID": f"{printed['rfid']:.2f}",
                    "LPIPS": f"{printed['lpips']:.4f}",
                    "table": file.table,
                }
            )
    return pd.DataFrame(lines)


def _report(study: Study, redraw: bool) -> str:
    rows = study.rows()
    save_study_table(study, "table", setting_table(rows))
    title = "Usage and PSNR against codebook size"
    return join_parts(
        f"# Scaling the codebook, {for_markdown(study.folder.name)}",
        f"{len(rows)} of {len(study.cells)} runs of {for_markdown(study.grid.base)} finished. "
        f"In brackets: {name_student_interval(rows['seed'].nunique())}. Usage: share of codes hit at least once in "
        "the tokens named. quantizer: one pass forward and backward over a step's tokens, float32, while other "
        "runs went on beside it; MiB: what autograd keeps for it.",
        too_short_note(rows["steps"].max()),
        to_markdown(show_settings(rows)),
        scaling_sentences(rows),
        picture(study.folder, "scaling", title, partial(figure_scaling, study), redraw),
        "## Power laws\n\nLeast squares of logarithms over single runs, which are the points of the figure and the "
        "rows of figures/power_laws.csv.\n\n" + to_markdown(show_laws(rows)),
        picture(study.folder, "power_laws", "Power laws", partial(figure_laws, study), redraw),
        "## The paper's column\n\nIBQ on ImageNet at 256 pixels. Orders can be compared, values cannot.\n\n"
        + to_markdown(published_scaling()),
    )


SCALE_CODEBOOK = grid_study("scale_codebook", _report)
