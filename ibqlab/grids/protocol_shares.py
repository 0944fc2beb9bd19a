"""Which part of the difference between a printed number and ours is the protocol's: computed, with the numbers.

    printed − common  =  (printed − own)  +  (own − same reconstructions)  +  (same reconstructions − common)
                         not explained       measuring                        preparing the images

`own_protocols` says what is held fixed in each. The last part of rFID has two: the images that reconstructions are
compared with, and those that the tokenizer was given.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from ibqlab.base.measures import SHARE, measure
from ibqlab.grids.evaluation_results import EvaluationResult
from ibqlab.grids.evaluation_rules import EvaluationRules
from ibqlab.grids.printed_numbers import PRINTED, Printed
from ibqlab.metrics import MetricCard

VALUES = ("printed", "own", "same_reconstructions", "common_reference", "common")
PARTS = ("unexplained", "measuring", "preparing", "reference")
_COLUMNS = [
    "label",
    "key",
    "metric",
    "unit",
    "better",
    "own_protocol",
    "common_protocol",
    *VALUES,
    "printed_in",
    "printed_protocol",
    *PARTS,
]


def protocol_shares(results: Sequence[EvaluationResult], published: Mapping[str, Printed]) -> pd.DataFrame:
    """Every metric of every tokenizer by both protocols, and what the difference is made of.

    Args:
        results: measured.
        published: label → what was printed.
    Returns:
        One row per tokenizer and metric: label, key, metric, unit, better, own_protocol, common_protocol; the values
        printed, own, same_reconstructions, common_reference (rFID alone) and common; printed_in and printed_protocol;
        and the differences unexplained (printed − own), measuring (own − same_reconstructions), preparing
        (same_reconstructions − common) and, as a part of the last, reference (same_reconstructions −
        common_reference). Usage is a share, NaN is what
        there is not. Without an own protocol, own is the common one.
    """
    rows = [
        _row(result, card, published.get(result.tokenizer.label))
        for result in results
        for card in result.cards
        if not math.isnan(card.value)
    ]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _row(result: EvaluationResult, card: MetricCard, printed: Printed | None) -> dict[str, object]:
    own = result.own
    by_own = {card.key: card.value for card in own.cards} if own else result.values
    remeasured = {card.key: card.value for card in own.remeasured} if own else {}
    values = {
        "printed": printed_value(card, printed),
        "own": by_own[card.key],
        "same_reconstructions": remeasured.get(card.key, by_own[card.key]),
        "common_reference": math.nan,
        "common": card.value,
    }
    if card.key == "rfid":
        has_other = own is not None and own.common_reference is not None
        values["common_reference"] = own.common_reference.value if has_other else card.value
    same = values["same_reconstructions"]
    numbers = None if math.isnan(values["printed"]) else printed.numbers_of(_printed_name(card.key))
    return {
        "label": result.tokenizer.label,
        **{field: getattr(card, field) for field in ("key", "metric", "unit", "better")},
        "own_protocol": own.protocol.name if own else card.protocol,
        "common_protocol": card.protocol,
        **values,
        "printed_in": numbers.source if numbers else "",
        "printed_protocol": numbers.protocol if numbers else "",
        "unexplained": values["printed"] - values["own"],
        "measuring": values["own"] - same,
        "preparing": same - card.value,
        "reference": same - values["common_reference"],
    }


def printed_value(card: MetricCard, row: Printed | None) -> float:
    """What was printed for a metric; NaN: nothing, or ours is of another network than the metric's name promises."""
    name = _printed_name(card.key)
    is_printed = row is not None and name in PRINTED and card.metric == _published_title(card.key)
    return row.number(name) if is_printed else math.nan


def _printed_name(key: str) -> str:
    """What papers call it. They do not say which network their LPIPS has; VGG is what their training code has."""
    return "lpips" if key == "lpips_vgg" else key


def _published_title(key: str) -> str:
    title = measure(key).title
    return f"{title} (any hit)" if key == "usage" else title


def describe_shares(table: pd.DataFrame, reasons: Mapping[str, Sequence[str]] | None = None) -> str:
    """A sentence per tokenizer and metric: which part of a difference is the protocol's.

    Args:
        table: of `protocol_shares`.
        reasons: label → why printed numbers must not be compared with those measured under its own protocol.
    """
    sentences = []
    for label, rows in table.groupby("label", sort=False):
        has_own = (rows["own_protocol"] != rows["common_protocol"]).any()
        has_printed = rows["printed"].notna().any()
        if has_own or has_printed:
            told = rows if has_own else rows[rows["printed"].notna()]
            sentences += [_sentence(row) for _, row in told.iterrows()]
            why = "; ".join((reasons or {}).get(label, ())) if has_printed else ""
            sentences += [f"{label}: what is not explained includes that {why}."] if why else []
        else:
            sentences.append(
                f"{label}: nothing is printed for it and no protocol of its own is known, so there is no difference "
                "to explain."
            )
    return "\n".join(sentences)


def _sentence(row: pd.Series) -> str:
    scale, unit = (100, " points") if row["unit"] == SHARE else (1, f" {row['unit']}".rstrip())
    sign = " %" if row["unit"] == SHARE else unit

    def value(name: str) -> str:
        return f"{scale * row[name]:.4g}{sign}"

    def signed(number: float) -> str:
        return f"{scale * number:+.3g}{unit}" if number else f"0{unit}"

    has_own = row["own_protocol"] != row["common_protocol"]
    own = f"{value('own')} under {row['own_protocol']}, " if has_own else ""
    text = f"{row['label']}, {row['metric']}: {own}{value('common')} under {row['common_protocol']}"
    share = (
        f"{signed(row['own'] - row['common'])} is the protocol's: {signed(row['measuring'])} by measuring the same "
        f"reconstructions otherwise, {signed(row['preparing'])} by preparing the images otherwise"
    )
    if has_own and pd.notna(row["common_reference"]):
        share += f" ({signed(row['reference'])} of it by the images compared with)"
    if pd.isna(row["printed"]):
        if row["own"] == row["common"] == row["same_reconstructions"]:
            return f"{text}: both protocols give the same."
        return f"{text}. Of own − common, all of it, {share}."
    printed = f"printed {value('printed')} ({row['printed_in']})"
    difference = signed(row["printed"] - row["common"])
    rest = f"{signed(row['unexplained'])} is of images, weights or implementation"
    if not has_own:
        is_same = row["printed_protocol"] == row["common_protocol"]
        why = f"the protocol is the same, so {rest}" if is_same else "no part of it is told by one protocol alone"
        return f"{text}, {printed}. Printed − common = {difference}: {why}."
    return f"{text}, {printed}. Of printed − common = {difference}, {share}; {rest}."


def caption_of(rules: EvaluationRules) -> str:
    """What a figure of both protocols must say: which is the common one, and of what printed numbers are."""
    text = f"common: {rules.protocol.name}; {rules.images.count:,} images"
    if rules.protocol.source:
        return text
    return f"{text}. A trial; printed numbers are of 50,000 images under published protocols"
