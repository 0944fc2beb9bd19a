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
from ibqlab.grids.evaluation_rules import EvaluationRules, TokenizerUnderTest, find_tokenizer, prepare_tokenizer
from ibqlab.grids.evaluation_session import EvaluationSession
from ibqlab.metrics import PROTOCOLS, MetricCard
from ibqlab.recipes.published import PublishedRow, published_rows
from ibqlab.recipes.recipe_files import recipe_config

COUNTED = ("any_hit", "above_uniform_8pct")
"""Definitions of usage that hits per code can answer; the others need the tokens in order."""
COMPARED = {"vq": ("uniform", "imagenet/vqgan_16384"), "ibq": ("normal", "imagenet/ibq_16384")}
"""The runs that compare_published trains where no checkpoint is named: start of the codebook, and whose row to show."""
RELEASED = tuple(f"imagenet/{name}" for name in ("ibq_1024", "ibq_8192", "ibq_16384", "ibq_262144", "lfq_262144"))
"""Rows whose checkpoints were published; a file without settings is taken for no other, though shapes may agree."""


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
    for name, (start, _) in COMPARED.items() if not paths else ():
        settings = (f"tokenizer.quantizer.name={name}", f"tokenizer.quantizer.codebook_init={start}")
        tokenizers.append(prepare_tokenizer(name, parameters.preset, settings))
    session = EvaluationSession("compare_published", parameters, tokenizers)
    find_published(session.tokenizers, parameters.published)
    return session


def find_published(tokenizers: Sequence[TokenizerUnderTest], named: Sequence[str] = ()) -> dict[str, PublishedRow]:
    """Printed numbers to show beside tokenizers: those named as "label=recipe", else of the recipe that each is one of.

    Raises:
        ValueError: a label that no tokenizer has, or a recipe of which nothing was published.
    """
    rows, recipes = published_rows(), split_labels("published", named)
    labels = [tokenizer.label for tokenizer in tokenizers]
    for label, recipe in recipes.items():
        require(label in labels, f"published names the label {label!r}; the checkpoints' are {', '.join(labels)}")
        require(recipe in rows, f"nothing is published for {recipe!r}; there are {', '.join(rows)}")
    if not recipes:
        recipes = {tokenizer.label: _fitting_recipe(tokenizer, rows) for tokenizer in tokenizers}
    return {label: rows[recipe] for label, recipe in recipes.items() if recipe}


def _fitting_recipe(tokenizer: TokenizerUnderTest, rows: dict[str, PublishedRow]) -> str | None:
    """The recipe that a tokenizer is one of; of a run that a preset trains, the one that it stands for."""
    if tokenizer.run and tokenizer.label in COMPARED:
        return COMPARED[tokenizer.label][1]
    candidates = rows if tokenizer.data else RELEASED
    return next((name for name in candidates if recipe_config(name).tokenizer == tokenizer.config), None)


def comparison_table(results: Sequence[EvaluationResult], published: dict[str, PublishedRow]) -> pd.DataFrame:
    """One row per tokenizer: what was measured here, and what a paper printed for it.

    Returns:
        label, K, D, images, then a column per metric (NaN: left out), then printed rfid, lpips, usage (share) and
        where they stand; NaN and "" where nothing is published.
    """
    rows = []
    for result in results:
        quantizer, printed = result.tokenizer.config.quantizer, published.get(result.tokenizer.label)
        rows.append(
            {
                "label": result.tokenizer.label,
                "K": quantizer.codebook_size,
                "D": quantizer.code_dim,
                "images": max(card.images for card in result.cards),
                **{_column_of(card): card.value for card in result.cards},
                "published_rfid": printed.rfid if printed else math.nan,
                "published_lpips": printed.lpips if printed and printed.lpips is not None else math.nan,
                "published_usage": printed.usage if printed and printed.usage is not None else math.nan,
                "published_in": f"{printed.source}, {printed.table}" if printed else "",
            }
        )
    return pd.DataFrame(rows)


def dots_table(
    results: Sequence[EvaluationResult], published: dict[str, PublishedRow], rules: EvaluationRules
) -> pd.DataFrame:
    """The same as rows for `plot_metric_dots`; printed values only where the rules are those they were printed under.

    LPIPS has none, because papers do not name its network.
    """
    published = {} if reasons_against(rules, published) else published
    rows = []
    for result in results:
        printed = published.get(result.tokenizer.label)
        values = {"rfid": printed.rfid, "usage": printed.usage} if printed else {}
        for card in result.cards:
            row = {"label": result.tokenizer.label, "key": _column_of(card)}
            row |= {field: getattr(card, field) for field in ("metric", "value", "unit", "better")}
            rows.append(row | {"published": values.get(row["key"], math.nan)})
    return pd.DataFrame(rows)


def _column_of(card: MetricCard) -> str:
    """A metric's column: a distance in the features of another network than Inception's bears that network's name."""
    if not card.metric.startswith("Fréchet distance"):
        return card.key
    return re.sub(r"\W+", "_", card.metric.replace("é", "e").lower()).strip("_")


def reasons_against(rules: EvaluationRules, published: dict[str, PublishedRow]) -> list[str]:
    """Why printed numbers must not be compared with ones measured by these rules; none: nothing known forbids it."""
    reasons = []
    if rules.protocol != PROTOCOLS.get(rules.protocol.name):
        reasons.append(f"the protocol is {rules.protocol.name!r}, which is not a published one")
    for label, row in published.items():
        if rules.protocol.name in PROTOCOLS and rules.protocol.name != row.protocol:
            reasons.append(f"those of {label} were made under {row.protocol}, these under {rules.protocol.name}")
    count, samples = rules.images.count, rules.protocol.samples
    if count != samples:
        reasons.append(f"{count:,} images were measured, the published numbers are from {samples:,}")
    if rules.weights != "ema":
        reasons.append("these are weights as trained, the published numbers are from averaged ones")
    return reasons


def judge_comparison(rules: EvaluationRules, published: dict[str, PublishedRow]) -> str:
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
