"""What runs say of the gap between codes and features: a table, and sentences that are computed from it.

A direction ("the gap grows") and an order ("it ends larger under VQ") are written only where Student's 95 % interval
over seeds excludes 0. With one seed the numbers stand alone.
"""

from collections.abc import Sequence

import pandas as pd

from ibqlab.base.intervals import Interval, seed_range, student_interval
from ibqlab.base.measures import measure
from ibqlab.plots.style import method_label
from ibqlab.studies.method_grid import name_start

GROUP = ["method", "init", "published_init"]
_LAST = ("distribution_gap", "in_use_distance", "unused_distance", "code_similarity")
_HOW = (
    "Gap: energy distance between all codes and the features in the full space, over the largest it could be: 0 where "
    "both have one distribution, 1 where they are two points apart. It counts dead codes like any other. Changes are "
    "from the first to the last snapshot, with Student's 95 % interval over seeds; a direction or an order is named "
    "only where the interval excludes 0. It says what happened here, not why."
)


def gap_summary(metrics: pd.DataFrame, gaps: pd.DataFrame) -> pd.DataFrame:
    """What became of codes and features, per method and start.

    Args:
        metrics: rows of runs with method, init, published_init, seed, step, validation_usage and validation_tokens.
        gaps: one row per run and snapshot, as `FeatureCodeMap.gaps` holds them.
    Returns:
        One row per method and start: seeds, steps, codebook_size, tokens (fewest), usage_*, gap_first_* (first
        snapshot), gap_last_*, in_use_*, unused_*, similarity_first_*, similarity_last_*, each as mean, min and max.
    """
    ends = _ends(gaps)
    parts = {
        "gap_first": ends["distribution_gap_first"],
        "gap_last": ends["distribution_gap_last"],
        "in_use": ends["in_use_distance_last"],
        "unused": ends["unused_distance_last"],
        "similarity_first": ends["code_similarity_first"],
        "similarity_last": ends["code_similarity_last"],
    }
    validated = metrics.dropna(subset=["validation_usage"]) if "validation_usage" in metrics else metrics.iloc[:0]
    last = validated.sort_values("step", kind="stable").groupby([*GROUP, "seed"], sort=False).last()
    frame = pd.DataFrame(parts)
    frame["usage"] = last["validation_usage"].reindex(frame.index) if len(last) else float("nan")
    frame["tokens"] = last["validation_tokens"].reindex(frame.index) if len(last) else float("nan")
    groups = frame.groupby(level=GROUP, sort=False)
    columns = ["usage", *parts]
    table = pd.DataFrame({f"{name}_{how}": groups[name].agg(how) for name in columns for how in ("mean", "min", "max")})
    facts = gaps.groupby(GROUP, sort=False)
    table.insert(0, "seeds", facts["seed"].nunique())
    table.insert(1, "steps", facts["step"].max())
    table.insert(2, "codebook_size", facts["codebook_size"].first())
    table.insert(3, "tokens", groups["tokens"].min())
    return table.reset_index()


def show_gap_summary(summary: pd.DataFrame) -> pd.DataFrame:
    """`gap_summary` for reading: shares in %, lowest to highest in brackets where there are several seeds."""
    text = pd.DataFrame(
        {
            "method": [method_label(name) for name in summary["method"]],
            "start": [name_start(row["init"], row["published_init"]) for _, row in summary.iterrows()],
        }
    )
    columns = {
        "usage": (measure("usage").title, 1, 100, " %"),
        "gap_first": ("gap at the start", 2, 1, ""),
        "gap_last": ("gap at the end", 2, 1, ""),
        "in_use": ("codes in use to features", 2, 1, ""),
        "unused": ("codes not hit to features", 2, 1, ""),
        "similarity_last": (measure("code_similarity").title, 2, 1, ""),
    }
    for name, (heading, decimals, scale, unit) in columns.items():
        values = summary[[f"{name}_{how}" for how in ("mean", "min", "max")]].itertuples(index=False)
        text[heading] = [
            seed_range(*row, seeds).text(decimals, scale, unit) if row[0] == row[0] else "–"
            for row, seeds in zip(values, summary["seeds"], strict=True)
        ]
    text["validation tokens"] = ["–" if pd.isna(value) else f"{value:,.0f}" for value in summary["tokens"]]
    text["seeds"] = summary["seeds"]
    return text


def describe_gaps(gaps: pd.DataFrame) -> str:
    """How the gap changed under each method, which of two methods ends with the larger one, and how alike Soft VQ's
    codes became, as Markdown.

    Args:
        gaps: as for `gap_summary`.
    """
    ends = _ends(gaps)
    lines = [_change(group, rows) for group, rows in ends.groupby(level=GROUP, sort=False)]
    for _, start in ends.groupby(level="init", sort=False):
        methods = list(dict.fromkeys(start.index.get_level_values("method")))
        lines += [_order(start, "ibq", other) for other in methods if "ibq" in methods and other != "ibq"]
    soft = ends[ends.index.get_level_values("method") == "soft_vq"]
    lines += [_likeness(group, rows) for group, rows in soft.groupby(level=GROUP, sort=False)]
    return f"{_HOW}\n\n" + "\n".join(f"- {line}" for line in lines)


def _ends(gaps: pd.DataFrame) -> pd.DataFrame:
    """The first and last snapshot of every run: one row per group and seed, columns *_first and *_last."""
    keys = [*GROUP, "seed"]
    runs = gaps.sort_values("step", kind="stable").groupby(keys, sort=False)
    # nth keeps a NaN, which first and last would skip over.
    first, last = (runs.nth(number).set_index(keys)[list(_LAST)] for number in (0, -1))
    both = first.add_suffix("_first").join(last.add_suffix("_last"))
    order = list(dict.fromkeys(zip(*(gaps[key] for key in keys), strict=True)))
    return both.loc[order]


def _name(group: Sequence[object]) -> str:
    method, init, published = group
    return f"{method_label(str(method))} from {name_start(str(init), bool(published))}"


def _change(group: Sequence[object], rows: pd.DataFrame) -> str:
    """How the gap of a method and start changed."""
    before, after = rows["distribution_gap_first"], rows["distribution_gap_last"]
    numbers = f"{before.mean():.2f} → {after.mean():.2f}"
    change = student_interval((after - before).tolist())
    verb = {1: "grew", -1: "shrank"}.get(_direction(change))
    return f"{_name(group)}: {_told('the gap', verb, numbers, change)}."


def _order(start: pd.DataFrame, method: str, other: str) -> str:
    """Whether one method ends with a larger gap than another from the same start, seed by seed."""
    last = start["distribution_gap_last"]
    levels = [last[last.index.get_level_values("method") == name].droplevel(GROUP) for name in (other, method)]
    difference = student_interval((levels[0] - levels[1]).dropna().tolist())
    init = start.index.get_level_values("init")[0]
    names = f"{method_label(other)} − {method_label(method)}, both from {init}"
    verb = {1: f"larger under {method_label(other)}", -1: f"larger under {method_label(method)}"}.get(
        _direction(difference)
    )
    if verb is None:
        why = "one seed" if difference.count < 2 else "not told apart"
        return f"{names}: gap at the end {difference.text(2, signed=True)}, {why}."
    return f"{names}: the gap at the end is {verb}, {difference.text(2, signed=True)}, {difference.count} seeds."


def _likeness(group: Sequence[object], rows: pd.DataFrame) -> str:
    """Whether codes became more alike, which the paper holds Soft VQ's averages to cause."""
    before, after = rows["code_similarity_first"], rows["code_similarity_last"]
    change = student_interval((after - before).tolist())
    verb = {1: "rose", -1: "fell"}.get(_direction(change))
    numbers = f"{_plain(before.mean())} → {_plain(after.mean())}"
    subject = f"the {measure('code_similarity').title}"
    return f"{_name(group)}: {_told(subject, verb, numbers, change)}."


def _told(subject: str, verb: str | None, numbers: str, change: Interval) -> str:
    """A change in words, with its direction where seeds tell it."""
    if change.count < 2:
        return f"{subject} {numbers}; one seed, so no direction is claimed"
    seeds = f"{change.text(2, signed=True)}, {change.count} seeds"
    if verb is None:
        return f"{subject} {numbers}, no direction told apart from 0: {seeds}"
    return f"{subject} {verb}, {numbers}: {seeds}"


def _plain(number: float) -> str:
    """Two digits, without a sign before nothing."""
    return f"{round(number, 2) + 0.0:.2f}"


def _direction(change: Interval) -> int:
    """1 or −1 where the interval over seeds lies above or below 0, else 0."""
    return int(change.low > 0) - int(change.high < 0)
