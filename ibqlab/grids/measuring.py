"""Tokenizers measured under one protocol, each once: results lie in a folder and are read again where they stand.

A result's key is made of everything that changes it (the checkpoint's content, weights, protocol, images, metrics and
the networks behind them), so a changed input is measured anew and an interrupted comparison does only what is missing.
"""

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int, UInt8

from ibqlab.base.cache import ENTRY_BYTES, content_key
from ibqlab.base.checks import require
from ibqlab.base.files import UnreadableFile, explained, parse_json, read_npz, replacing, sweep, write_whole
from ibqlab.base.progress import tell, why_too_short
from ibqlab.diagnostics.usage import measure_usage_of_counts, perplexity
from ibqlab.grids.subjects import (
    PRESETS,
    MeasuringParameters,
    Rules,
    Subject,
    command_of,
    find_rules,
    find_subject,
    plan_subject,
    split_labels,
)
from ibqlab.metrics import PROTOCOLS, MetricCard, cards_markdown, cards_table, evaluate_reconstruction
from ibqlab.metrics.weights import hash_file
from ibqlab.pretrained import load_tokenizer
from ibqlab.pretrained.report import WORDS
from ibqlab.recipes.recipe_files import PublishedRow, published_rows, recipe_config
from ibqlab.runs import Run, provenance
from ibqlab.runs.finding import output_folder
from ibqlab.training import train

COUNTED = ("any_hit", "above_uniform_8pct")
"""Definitions of usage that hits per code can answer; the others need the tokens in order."""
COMPARED = {"vq": ("uniform", "imagenet/vqgan_16384"), "ibq": ("normal", "imagenet/ibq_16384")}
"""The runs that compare_published trains where no checkpoint is named: start of the codebook, and whose row to show."""
RELEASED = tuple(f"imagenet/{name}" for name in ("ibq_1024", "ibq_8192", "ibq_16384", "ibq_262144", "lfq_262144"))
"""Rows whose checkpoints were published; a file without settings is taken for no other, though shapes may agree."""


@dataclass(frozen=True, kw_only=True)
class EvaluationParameters(MeasuringParameters):
    """What the `parameters` cell of evaluate_tokenizer may set."""

    checkpoint: str = ""
    """Published file, export or run folder; empty: the preset's own run, trained first."""
    quantizer: str = ""
    """Of a published file that does not tell IBQ from VQ: "ibq" or "vq"; empty: as the file tells."""


@dataclass(frozen=True, kw_only=True)
class ComparisonParameters(MeasuringParameters):
    """What the `parameters` cell of compare_published may set."""

    checkpoints: tuple[str, ...] = ()
    """"label=path" or a path each; empty: two runs of the preset, VQ and IBQ, trained first."""
    quantizers: tuple[str, ...] = ()
    """"label=vq" or "label=ibq" for published files that do not tell VQ from IBQ."""
    published: tuple[str, ...] = ()
    """"label=recipe" each, a key of experiments/published/tokenizers.yaml; empty: where a tokenizer is that of one."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of one tokenizer."""

    subject: Subject
    cards: tuple[MetricCard, ...]
    """One per metric; those left out for want of a weight file have no value and say what to fetch."""
    counts: Int[np.ndarray, " K"]
    """Hits per code on the images."""
    originals: UInt8[np.ndarray, "P H W 3"]
    """The first images."""
    reconstructions: UInt8[np.ndarray, "P H W 3"]
    """What the tokenizer made of them."""
    report: str
    """Account of the checkpoint's keys."""
    checkpoint: str
    """sha256 of the checkpoint's content."""

    @property
    def values(self) -> dict[str, float]:
        """Metric → value; NaN where it was left out."""
        return {card.key: card.value for card in self.cards}


class Measurement:
    """Tokenizers, images and rules of a notebook, checked; `measure` does the work.

    Args:
        notebook: its name.
        parameters: of its `parameters` cell.
        subjects: what to measure.
    Raises:
        ConfigError, FileNotFoundError, ValueError, ImportError: whatever is wrong with the request, before any work.
    """

    def __init__(self, notebook: str, parameters: MeasuringParameters, subjects: Sequence[Subject]) -> None:
        self.notebook, self.parameters, self.subjects = notebook, parameters, tuple(subjects)
        self.rules: Rules = find_rules(parameters, subjects)
        self.folder = output_folder(parameters.output, default=f"{notebook}-{parameters.preset}")

    @cached_property
    def images_key(self) -> str:
        """Content of the images as they are measured."""
        return self.rules.images.content()

    def measure(self, progress: bool = True) -> list[Measured]:
        """Every tokenizer's results, those that are missing computed; the folder gets cards and provenance."""
        measured = [self._measure(subject, progress) for subject in self.subjects]
        cards = [replace(card, metric=f"{one.subject.label}: {card.metric}") for one in measured for card in one.cards]
        if len(measured) == 1:
            cards = list(measured[0].cards)
        sweep(self.folder)
        _write(self.folder / "cards.csv", cards_table(cards).to_csv(index=False))
        facts = provenance() | {
            "command": command_of(self.notebook, self.parameters),
            "protocol": str(self.rules.protocol),
            "weights": self.rules.weights,
            "images": {"description": self.rules.images.description, "content": self.images_key},
            "checkpoints": {one.subject.label: one.checkpoint for one in measured},
        }
        _write(self.folder / "cards.md", f"Of {WORDS[self.rules.weights]}.\n\n{cards_markdown(cards)}\n")
        _write(self.folder / "keys.txt", "\n\n".join(f"{one.subject.label}\n{one.report}" for one in measured) + "\n")
        _write(self.folder / "provenance.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        result = describe_measured(measured, self.rules.weights, self.parameters.preset)
        tell(folder=str(self.folder.resolve()), result=result)
        return measured

    def figure_path(self, name: str) -> Path:
        """Where a figure of this measurement belongs."""
        return self.folder / "figures" / name

    def _measure(self, subject: Subject, progress: bool) -> Measured:
        if subject.run:
            train(subject.run, subject.path, progress=progress)
        rules, checkpoint = self.rules, hash_checkpoint(subject.path)
        key = content_key(
            checkpoint=checkpoint,
            weights=rules.weights,
            quantizer=subject.quantizer or "",
            protocol=str(rules.protocol),
            images=self.images_key,
            metrics=list(rules.metrics),
            networks=rules.weight_files,
        )
        stored = self.folder / "results" / f"{key[:16]}.npz"
        # A file that a full disk or another program damaged is measured anew.
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            return _read(stored, subject, rules.left_out, checkpoint)
        _store(stored, self._compute(subject, progress))
        return _read(stored, subject, rules.left_out, checkpoint)

    def _compute(self, subject: Subject, progress: bool) -> dict[str, Any]:
        rules = self.rules
        tokenizer = load_tokenizer(subject.path, rules.weights, quantizer=subject.quantizer)
        found = evaluate_reconstruction(
            tokenizer,
            rules.source,
            rules.protocol,
            metrics=rules.metrics,
            device=rules.device,
            lpips_weights=rules.lpips_weights,
            inception_weights=rules.inception_weights,
            limit=rules.limit,
            progress=progress,
            unreadable=subject.data.unreadable if subject.data else "skip",
        )
        return {
            "cards": json.dumps([asdict(card) for card in found.cards]),
            "report": str(tokenizer.load_report),
            "counts": found.counts.numpy(),
            "originals": found.originals.permute(0, 2, 3, 1).numpy(),
            "reconstructions": found.reconstructions.permute(0, 2, 3, 1).numpy(),
        }


def describe_measured(measured: Sequence[Measured], weights: str, preset: str) -> str:
    """All tokenizers' values, and of which weights they are, in a sentence."""
    values = {
        one.subject.label: [_value_of(card) for card in one.cards if card.value == card.value] for one in measured
    }
    texts = [f"{label}: {', '.join(shown)}" for label, shown in values.items()]
    images = max(card.images for one in measured for card in one.cards)
    reason = why_too_short(None, preset)
    told = f"{WORDS[weights]} on {images:,} images, {'; '.join(texts)}"
    return f"{told} ({reason}: too short to mean anything)" if reason else told


def _value_of(card: MetricCard) -> str:
    if card.unit == "share":
        return f"{card.metric} {card.value:.1%}"
    return f"{card.metric} {card.value:.4g} {card.unit}".rstrip()


def open_evaluation(parameters: EvaluationParameters) -> Measurement:
    """What evaluate_tokenizer measures: one tokenizer."""
    preset = PRESETS[parameters.preset]
    if not parameters.checkpoint:
        return Measurement("evaluate_tokenizer", parameters, [plan_subject("ibq", preset)])
    label = Path(parameters.checkpoint).stem
    return Measurement(
        "evaluate_tokenizer", parameters, [find_subject(label, parameters.checkpoint, parameters.quantizer)]
    )


def open_comparison(parameters: ComparisonParameters) -> Measurement:
    """What compare_published measures: several tokenizers under one protocol."""
    preset = PRESETS[parameters.preset]
    entries = [entry if "=" in entry else f"{Path(entry).stem}={entry}" for entry in parameters.checkpoints]
    named = split_labels("checkpoints", entries)
    kinds = split_labels("quantizers", parameters.quantizers)
    for label in kinds:
        require(label in named, f"quantizers names {label!r}; the checkpoints' labels are {', '.join(named) or 'none'}")
    subjects = [find_subject(label, path, kinds.get(label, "")) for label, path in named.items()]
    for name, (start, _) in COMPARED.items() if not named else ():
        settings = (f"tokenizer.quantizer.name={name}", f"tokenizer.quantizer.codebook_init={start}")
        subjects.append(plan_subject(name, preset, settings))
    measurement = Measurement("compare_published", parameters, subjects)
    find_published(measurement.subjects, parameters.published)
    return measurement


def find_published(subjects: Sequence[Subject], named: Sequence[str] = ()) -> dict[str, PublishedRow]:
    """Printed numbers to show beside tokenizers: those named as "label=recipe", else of the recipe that each is one of.

    Raises:
        ValueError: a label that no tokenizer has, or a recipe of which nothing was published.
    """
    rows, wanted = published_rows(), split_labels("published", named)
    labels = [subject.label for subject in subjects]
    for label, recipe in wanted.items():
        require(label in labels, f"published names the label {label!r}; the checkpoints' are {', '.join(labels)}")
        require(recipe in rows, f"nothing is published for {recipe!r}; there are {', '.join(rows)}")
    if wanted:
        return {label: rows[recipe] for label, recipe in wanted.items()}
    found = {subject.label: _fitting_recipe(subject, rows) for subject in subjects}
    return {label: rows[name] for label, name in found.items() if name}


def _fitting_recipe(subject: Subject, rows: dict[str, PublishedRow]) -> str | None:
    """The recipe that a tokenizer is one of; of a run that a preset trains, the one that it stands for."""
    if subject.run and subject.label in COMPARED:
        return COMPARED[subject.label][1]
    candidates = rows if subject.data else RELEASED
    return next((name for name in candidates if recipe_config(name).tokenizer == subject.config), None)


def comparison_table(measured: Sequence[Measured], published: dict[str, PublishedRow]) -> pd.DataFrame:
    """One row per tokenizer: what was measured here, and what a paper printed for it.

    Returns:
        label, K, D, images, then a column per metric (NaN: left out), then printed rfid, lpips, usage (share) and
        where they stand; NaN and "" where nothing is published.
    """
    rows = []
    for one in measured:
        quantizer, printed = one.subject.config.quantizer, published.get(one.subject.label)
        rows.append(
            {
                "label": one.subject.label,
                "K": quantizer.codebook_size,
                "D": quantizer.code_dim,
                "images": max(card.images for card in one.cards),
                **{_column_of(one, key): value for key, value in one.values.items()},
                "published_rfid": printed.rfid if printed else math.nan,
                "published_lpips": printed.lpips if printed and printed.lpips is not None else math.nan,
                "published_usage": printed.usage if printed and printed.usage is not None else math.nan,
                "published_in": f"{printed.source}, {printed.table}" if printed else "",
            }
        )
    return pd.DataFrame(rows)


def dots_table(measured: Sequence[Measured], published: dict[str, PublishedRow], rules: Rules) -> pd.DataFrame:
    """The same as rows for `plot_metric_dots`; printed values only where the rules are those they were printed under.

    LPIPS has none, because papers do not name its network.
    """
    published = {} if reasons_against(rules, published) else published
    printed = {
        (label, key): value
        for label, row in published.items()
        for key, value in {"rfid": row.rfid, "usage": row.usage}.items()
    }
    return pd.DataFrame(
        [
            {
                "label": one.subject.label,
                **{field: getattr(card, field) for field in ("key", "metric", "value", "unit", "better")},
                "key": _column_of(one, card.key),
                "published": printed.get((one.subject.label, _column_of(one, card.key)), math.nan),
            }
            for one in measured
            for card in one.cards
        ]
    )


def _column_of(measured: Measured, key: str) -> str:
    """A metric's column: a distance in the features of another network than Inception's bears that network's name."""
    name = next((card.metric for card in measured.cards if card.key == key), "")
    if not name.startswith("Fréchet distance"):
        return key
    return re.sub(r"\W+", "_", name.replace("é", "e").lower()).strip("_")


def reasons_against(rules: Rules, published: dict[str, PublishedRow]) -> list[str]:
    """Why printed numbers must not be compared with ones measured by these rules; none: nothing known forbids it."""
    reasons = []
    if rules.protocol != PROTOCOLS.get(rules.protocol.name):
        reasons.append(f"the protocol is {rules.protocol.name!r}, which is not a published one")
    for label, row in published.items():
        if rules.protocol.name in PROTOCOLS and rules.protocol.name != row.protocol:
            reasons.append(f"those of {label} were made under {row.protocol}, these under {rules.protocol.name}")
    count, wanted = rules.images.count, rules.protocol.samples
    if count != wanted:
        reasons.append(f"{count:,} images were measured, the published numbers are from {wanted:,}")
    if rules.weights != "ema":
        reasons.append("these are weights as trained, the published numbers are from averaged ones")
    return reasons


def judge_comparison(rules: Rules, published: dict[str, PublishedRow]) -> str:
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


def usage_table(measured: Measured) -> pd.DataFrame:
    """Usage by every definition that hits per code can answer, each with its token count, and perplexity.

    Returns:
        One row per definition: definition, its name; usage, the sentence with codes and tokens.
    """
    counts = torch.as_tensor(measured.counts)
    rows = [(name, str(measure_usage_of_counts(counts, name))) for name in COUNTED]
    rows.append(("perplexity", f"{perplexity(counts):,.1f} codes in {int(counts.sum()):,} tokens"))
    return pd.DataFrame(rows, columns=["definition", "usage"])


def hash_checkpoint(path: Path) -> str:
    """sha256 of a checkpoint: the file, or of a run folder its last checkpoint and settings."""
    if not path.is_dir():
        return hash_file(path)
    run = Run(path)
    return content_key(checkpoint=hash_file(run.last_checkpoint), config=run.config_hash)


def _store(target: Path, content: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    with replacing(target) as stream:
        np.savez_compressed(stream, **content)


def _read(stored: Path, subject: Subject, left_out: tuple[MetricCard, ...], checkpoint: str) -> Measured:
    content = read_npz(stored, ENTRY_BYTES)
    counts, pictures = content["counts"], (content["originals"], content["reconstructions"])
    if counts.shape != (subject.config.quantizer.codebook_size,) or counts.dtype.kind != "i":
        raise UnreadableFile(f"{stored}: counts must be whole numbers, one per code")
    if any(images.ndim != 4 or images.dtype != np.uint8 for images in pictures):
        raise UnreadableFile(f"{stored}: pictures must be arrays (P, H, W, 3) of uint8")
    cards = parse_json(str(content["cards"]), str(stored), list)
    return Measured(
        subject=subject,
        cards=(*(MetricCard(**card | {"remarks": tuple(card["remarks"])}) for card in cards), *left_out),
        counts=counts,
        originals=pictures[0],
        reconstructions=pictures[1],
        report=str(content["report"]),
        checkpoint=checkpoint,
    )


def _write(path: Path, text: str) -> None:
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode("utf-8", "backslashreplace"))
