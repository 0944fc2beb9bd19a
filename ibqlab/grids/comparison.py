"""Measured tokenizers side by side and beside what papers printed: tables, and which columns may be compared."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from ibqlab.base.checks import require
from ibqlab.diagnostics.usage import measure_usage_of_counts, perplexity
from ibqlab.grids.evaluation_parameters import ComparisonParameters, split_labels
from ibqlab.grids.evaluation_results import EvaluationResult
from ibqlab.grids.evaluation_rules import EvaluationRules, find_tokenizer, prepare_tokenizer
from ibqlab.grids.evaluation_session import EvaluationSession
from ibqlab.grids.printed_numbers import PRINTED, Printed, find_published
from ibqlab.metrics import PROTOCOLS, MetricCard, Protocol
from ibqlab.recipes.published_files import NOT_STATED

COUNTED = ("any_hit", "above_uniform_8pct")
"""Definitions of usage that hits per code can answer; the others need the tokens in order."""
STARTS = {"vq": "uniform", "ibq": "normal"}
"""The runs that compare_published trains where no checkpoint is named, and the start of their codebooks."""


def open_comparison(parameters: ComparisonParameters) -> EvaluationSession:
    """What compare_published measures: several tokenizers under one protocol."""
    entries = [entry if "=" in entry else f"{Path(entry).stem}={entry}" for entry in parameters.checkpoints]
    paths = split_labels("checkpoints", entries)
    quantizers = split_labels("quantizers", parameters.quantizers)
    families = split_labels("families", parameters.families)
    for name, labels in (("quantizers", quantizers), ("families", families)):
        for label in labels:
            labels_text = ", ".join(paths) or "none"
            require(label in paths, f"{name} names {label!r}; the checkpoints' labels are {labels_text}")
    tokenizers = [
        find_tokenizer(label, path, quantizers.get(label, ""), families.get(label, "")) for label, path in paths.items()
    ]
    for name, start in STARTS.items() if not paths else ():
        settings = (f"tokenizer.quantizer.name={name}", f"tokenizer.quantizer.codebook_init={start}")
        tokenizers.append(prepare_tokenizer(name, parameters.preset, settings))
    session = EvaluationSession("compare_published", parameters, tokenizers)
    find_published(session.tokenizers, parameters.published)
    return session


def comparison_table(results: Sequence[EvaluationResult], published: dict[str, Printed]) -> pd.DataFrame:
    """One row per tokenizer: what was measured here, and what a paper printed for it.

    Returns:
        label, K, D, images, then a column per metric (NaN: left out), then printed rfid, lpips, psnr (dB), ssim,
        usage (share), where they stand and under which protocol; NaN and "" where nothing is published.
    """
    rows = []
    for result in results:
        quantizer = result.tokenizer.config.quantizer
        printed = published.get(result.tokenizer.label, Printed())
        rows.append(
            {
                "label": result.tokenizer.label,
                "K": quantizer.codebook_size,
                "D": quantizer.code_dim,
                "images": max(card.images for card in result.cards),
                **{column_of(card): card.value for card in result.cards},
                **{f"published_{name}": printed.number(name) for name in PRINTED},
                "published_in": "; ".join(numbers.source for numbers in printed.sets),
                "published_protocol": "; ".join(numbers.protocol or NOT_STATED for numbers in printed.sets),
            }
        )
    return pd.DataFrame(rows)


def dots_table(
    results: Sequence[EvaluationResult], published: dict[str, Printed], rules: EvaluationRules
) -> pd.DataFrame:
    """The same as rows for `plot_metric_dots`; printed values only where the rules are those they were printed under.

    LPIPS has none, because papers do not name its network.
    """
    fair = {label: one for label, one in published.items() if not reasons_against(rules, {label: one})}
    rows = []
    for result in results:
        printed = fair.get(result.tokenizer.label, Printed())
        values = {name: printed.number(name) for name in PRINTED if name != "lpips"}
        for card in result.cards:
            row = {"label": result.tokenizer.label, "key": column_of(card)}
            row |= {field: getattr(card, field) for field in ("metric", "value", "unit", "better")}
            rows.append(row | {"published": values.get(row["key"], math.nan)})
    return pd.DataFrame(rows)


def column_of(card: MetricCard) -> str:
    """A metric's column: a distance in the features of another network than Inception's bears that network's name."""
    if not card.metric.startswith("Fréchet distance"):
        return card.key
    return re.sub(r"\W+", "_", card.metric.replace("é", "e").lower()).strip("_")


def reasons_against(rules: EvaluationRules, published: dict[str, Printed]) -> list[str]:
    """Why printed numbers must not be compared with ones measured by these rules; none: nothing known forbids it."""
    return _reasons(rules.protocol, rules.images.count, rules, published)


def reasons_against_own(session: EvaluationSession, published: dict[str, Printed]) -> dict[str, list[str]]:
    """Label → why its printed numbers must not be compared with those under its own protocol, or the common one."""
    reasons = {}
    for label, printed in published.items():
        rules = session.own.get(label, session.rules)
        reasons[label] = _reasons(rules.protocol, rules.images.count, session.rules, {label: printed})
    return reasons


def _reasons(protocol: Protocol, count: int | None, rules: EvaluationRules, published: dict[str, Printed]) -> list[str]:
    reasons = []
    if protocol != PROTOCOLS.get(protocol.name):
        reasons.append(f"the protocol is {protocol.name!r}, which is not a published one")
    for label, printed in published.items():
        for numbers in printed.sets:
            if protocol.name in PROTOCOLS and protocol.name != numbers.protocol:
                made = f"were made under {numbers.protocol}" if numbers.protocol else "do not tell their protocol"
                reasons.append(f"those of {label} ({numbers.source}) {made}, these under {protocol.name}")
    if count != protocol.samples:
        reasons.append(f"{count:,} images were measured, the published numbers are from {protocol.samples:,}")
    if rules.weights != "ema" and not set(published) <= set(rules.as_given):
        reasons.append("these are weights as trained, the published numbers are from averaged ones")
    return reasons


def judge_comparison(rules: EvaluationRules, published: dict[str, Printed]) -> str:
    """Which of the columns may be compared, and why not; computed from the rules."""
    ours = "Our rows share protocol, images and networks and compare with each other."
    if not published:
        return f"{ours} Nothing is published for these tokenizers."
    reasons = reasons_against(rules, published)
    if reasons:
        return f"{ours} The printed columns must not be compared with them: {'; '.join(reasons)}."
    return (
        f"{ours} Protocol, number of images and kind of weights are the published ones, so the printed columns may be "
        "compared with them if the images are ImageNet's validation set, which cannot be told from here. "
        f"{rules.protocol.deviation}"
    )


def usage_table(result: EvaluationResult) -> pd.DataFrame:
    """Usage by every definition that hits per code can answer, each with its token count, and perplexity.

    Returns:
        One row per definition: definition, its name; usage, the sentence with codes and tokens.
    """
    counts = torch.as_tensor(result.counts)
    rows = [(name, str(measure_usage_of_counts(counts, name))) for name in COUNTED]
    rows.append(("perplexity", f"{perplexity(counts):,.1f} codes in {int(counts.sum()):,} tokens"))
    return pd.DataFrame(rows, columns=["definition", "usage"])
