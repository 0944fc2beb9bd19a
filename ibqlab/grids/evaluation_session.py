"""Tokenizers measured under one protocol, each once: results lie in a folder and are read again where they stand.

A result's key is made of everything that changes it (the checkpoint's content, weights, protocol, images, metrics and
the networks behind them), so a changed input is measured again and an interrupted comparison does only what is missing.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from ibqlab.base.cache import ENTRY_BYTES, content_key
from ibqlab.base.files import UnreadableFile, explained, parse_json, read_npz, replacing, sweep, write_whole
from ibqlab.base.progress import tell
from ibqlab.grids.evaluation_parameters import EvaluationParameters, MeasuringParameters, command_of
from ibqlab.grids.evaluation_rules import TokenizerUnderTest, find_rules, find_tokenizer, prepare_tokenizer
from ibqlab.metrics import MetricCard, cards_markdown, cards_table, evaluate_reconstruction
from ibqlab.metrics.weights import hash_file
from ibqlab.pretrained import load_tokenizer
from ibqlab.pretrained.load_report import AS_GIVEN, WORDS
from ibqlab.runs import Run, provenance
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import output_folder
from ibqlab.training import train


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What is known of one tokenizer."""

    tokenizer: TokenizerUnderTest
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


class EvaluationSession:
    """Tokenizers, images and rules of a notebook, checked; `measure` does the work.

    Args:
        notebook: its name.
        parameters: of its `parameters` cell.
        tokenizers: what to measure.
    Raises:
        ConfigError, FileNotFoundError, ValueError, ImportError: whatever is wrong with the request, before any work.
    """

    def __init__(
        self, notebook: str, parameters: MeasuringParameters, tokenizers: Sequence[TokenizerUnderTest]
    ) -> None:
        self.notebook, self.parameters, self.tokenizers = notebook, parameters, tuple(tokenizers)
        self.rules = find_rules(parameters, tokenizers)
        self.folder = output_folder(parameters.output, default=f"{notebook}-{parameters.preset}")

    @cached_property
    def images_key(self) -> str:
        """Content of the images as they are measured."""
        return self.rules.images.content()

    def measure(self, progress: bool = True) -> list[EvaluationResult]:
        """Every tokenizer's results, those that are missing computed; the folder gets cards and provenance."""
        results = [self._measure(tokenizer, progress) for tokenizer in self.tokenizers]
        cards = [
            card if len(results) == 1 else replace(card, metric=f"{result.tokenizer.label}: {card.metric}")
            for result in results
            for card in result.cards
        ]
        reports = [f"{result.tokenizer.label}\n{result.report}" for result in results]
        weights = describe_weights(self.tokenizers, self.rules.weights)
        facts = provenance() | {
            "command": command_of(self.notebook, self.parameters),
            "protocol": str(self.rules.protocol),
            "weights": self.rules.weights,
            "images": {"description": self.rules.images.description, "content": self.images_key},
            "checkpoints": {result.tokenizer.label: result.checkpoint for result in results},
        }
        files = {
            "cards.csv": cards_table(cards).to_csv(index=False),
            "cards.md": f"Of {weights}.\n\n{cards_markdown(cards)}\n",
            "keys.txt": "\n\n".join(reports) + "\n",
            "provenance.json": json.dumps(facts, indent=2, ensure_ascii=False) + "\n",
        }
        sweep(self.folder)
        for name, text in files.items():
            write_whole(self.folder / name, text.encode("utf-8", "backslashreplace"))
        sentence = describe_results(results, weights, self.parameters.preset)
        tell(folder=str(self.folder.resolve()), result=sentence)
        return results

    def figure_path(self, name: str) -> Path:
        """Where a figure of this session belongs."""
        return self.folder / "figures" / name

    def _measure(self, tokenizer: TokenizerUnderTest, progress: bool) -> EvaluationResult:
        if tokenizer.run:
            train(tokenizer.run, tokenizer.path, progress=progress)
        rules, checkpoint = self.rules, hash_checkpoint(tokenizer.path)
        key = content_key(
            checkpoint=checkpoint,
            weights=rules.weights,
            quantizer=tokenizer.quantizer or "",
            protocol=str(rules.protocol),
            images=self.images_key,
            metrics=list(rules.metrics),
            networks=rules.weight_files,
        )
        stored = self.folder / "results" / f"{key[:16]}.npz"
        # A file that a full disk or another program damaged is measured again.
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            return _read(stored, tokenizer, rules.left_out, checkpoint)
        content = self._compute(tokenizer, progress)
        with explained(stored):
            stored.parent.mkdir(parents=True, exist_ok=True)
        sweep(stored.parent)
        with replacing(stored) as stream:
            np.savez_compressed(stream, **content)
        return _read(stored, tokenizer, rules.left_out, checkpoint)

    def _compute(self, tokenizer: TokenizerUnderTest, progress: bool) -> dict[str, Any]:
        rules = self.rules
        network = load_tokenizer(tokenizer.path, rules.weights, quantizer=tokenizer.quantizer)
        scores = evaluate_reconstruction(
            network,
            rules.source,
            rules.protocol,
            metrics=rules.metrics,
            device=rules.device,
            lpips_weights=rules.lpips_weights,
            inception_weights=rules.inception_weights,
            limit=rules.limit,
            progress=progress,
            unreadable=tokenizer.data.unreadable if tokenizer.data else "skip",
        )
        return {
            "cards": json.dumps([asdict(card) for card in scores.cards]),
            "report": str(network.load_report),
            "counts": scores.counts.numpy(),
            "originals": scores.originals.permute(0, 2, 3, 1).numpy(),
            "reconstructions": scores.reconstructions.permute(0, 2, 3, 1).numpy(),
        }


def open_evaluation(parameters: EvaluationParameters) -> EvaluationSession:
    """What evaluate_tokenizer measures: one tokenizer."""
    if parameters.checkpoint:
        label = Path(parameters.checkpoint).stem
        tokenizer = find_tokenizer(label, parameters.checkpoint, parameters.quantizer)
    else:
        tokenizer = prepare_tokenizer("ibq", parameters.preset)
    return EvaluationSession("evaluate_tokenizer", parameters, [tokenizer])


def describe_weights(tokenizers: Sequence[TokenizerUnderTest], weights: str) -> str:
    """Which weights ("ema" or "raw") are measured, in words; an export that does not tell which it holds is named."""
    unlabelled = [tokenizer.label for tokenizer in tokenizers if tokenizer.weights == AS_GIVEN]
    if not unlabelled:
        return WORDS[weights]
    if len(unlabelled) == len(tokenizers):
        return WORDS[AS_GIVEN]
    return f"{WORDS[weights]}; of {', '.join(unlabelled)}: {WORDS[AS_GIVEN]}"


def describe_results(results: Sequence[EvaluationResult], weights: str, preset: str) -> str:
    """All tokenizers' values in a sentence, and of which weights, given in words, they are."""
    texts = []
    for result in results:
        values = [
            f"{card.metric} {card.value:.1%}"
            if card.unit == "share"
            else f"{card.metric} {card.value:.4g} {card.unit}".rstrip()
            for card in result.cards
            if card.value == card.value  # no NaN: what was left out
        ]
        texts.append(f"{result.tokenizer.label}: {', '.join(values)}")
    images = max(card.images for result in results for card in result.cards)
    reason = why_too_short(None, preset)
    sentence = f"{weights} on {images:,} images, {'; '.join(texts)}"
    return f"{sentence} ({reason}: too short to mean anything)" if reason else sentence


def hash_checkpoint(path: Path) -> str:
    """sha256 of a checkpoint: the file, or of a run folder its last checkpoint and settings."""
    if not path.is_dir():
        return hash_file(path)
    run = Run(path)
    return content_key(checkpoint=hash_file(run.last_checkpoint), config=run.config_hash)


def _read(
    stored: Path, tokenizer: TokenizerUnderTest, left_out: tuple[MetricCard, ...], checkpoint: str
) -> EvaluationResult:
    content = read_npz(stored, ENTRY_BYTES)
    counts, pictures = content["counts"], (content["originals"], content["reconstructions"])
    if counts.shape != (tokenizer.config.quantizer.codebook_size,) or counts.dtype.kind != "i":
        raise UnreadableFile(f"{stored}: counts must be whole numbers, one per code")
    if any(images.ndim != 4 or images.dtype != np.uint8 for images in pictures):
        raise UnreadableFile(f"{stored}: pictures must be arrays (P, H, W, 3) of uint8")
    cards = parse_json(str(content["cards"]), str(stored), list)
    return EvaluationResult(
        tokenizer=tokenizer,
        cards=(*(MetricCard(**card | {"remarks": tuple(card["remarks"])}) for card in cards), *left_out),
        counts=counts,
        originals=pictures[0],
        reconstructions=pictures[1],
        report=str(content["report"]),
        checkpoint=checkpoint,
    )
