"""Tokenizers measured under one protocol, each once: results lie in a folder and are read again where they stand.

A result's key is made of everything that changes it (the checkpoint's content, weights, protocol, images, metrics and
the networks behind them), so a changed input is measured again and an interrupted comparison does only what is missing.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ibqlab.base.cache import content_key
from ibqlab.base.files import sweep, write_whole
from ibqlab.base.progress import tell
from ibqlab.grids.evaluation_parameters import EvaluationParameters, MeasuringParameters, command_of
from ibqlab.grids.evaluation_results import (
    EvaluationResult,
    hash_checkpoint,
    read_own_result,
    read_result,
    write_own_result,
    write_result,
)
from ibqlab.grids.evaluation_rules import (
    EvaluationRules,
    TokenizerUnderTest,
    find_rules,
    find_tokenizer,
    prepare_tokenizer,
)
from ibqlab.grids.own_protocols import OwnRules, ResizingTokenizer, find_own_rules, own_cautions
from ibqlab.grids.token_statistics import TokenStatistics, statistics_row
from ibqlab.metrics import Evaluation, cards_markdown, cards_table, evaluate_reconstruction
from ibqlab.metrics.cautions import warn_of, without_cautions
from ibqlab.metrics.images import ImageSet
from ibqlab.pretrained import load_tokenizer
from ibqlab.pretrained.load_report import AS_GIVEN, WORDS
from ibqlab.runs import provenance
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import output_folder
from ibqlab.tokenizer import Tokenizer
from ibqlab.training import train


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
        self.own: dict[str, OwnRules] = {}
        if getattr(parameters, "own_protocols", False):
            self.own = find_own_rules(parameters, tokenizers, self.rules)
        self.cautions = list(dict.fromkeys([*self.rules.cautions, *own_cautions(self.own)]))
        """What must be known before the work begins, each with what to do; told when the session is made."""
        warn_of(self.cautions, stacklevel=4)
        self.folder = output_folder(parameters.output, default=f"{notebook}-{parameters.preset}")
        self._contents: dict[int, str] = {}

    @property
    def images_key(self) -> str:
        """Content of the images as they are measured under the common protocol."""
        return self._content(self.rules.images)

    def _content(self, images: ImageSet) -> str:
        """Hash of a set of images, read once."""
        if id(images) not in self._contents:
            self._contents[id(images)] = images.content()
        return self._contents[id(images)]

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
            "own_protocols": {label: str(own.protocol) for label, own in self.own.items()},
            "cautions": self.cautions,
        }
        files = {
            "cards.csv": cards_table(cards).to_csv(index=False),
            "cards.md": f"Of {weights}.\n\n{cards_markdown(cards)}\n",
            "keys.txt": "\n\n".join(reports) + "\n",
            "provenance.json": json.dumps(facts, indent=2, ensure_ascii=False) + "\n",
        }
        sweep(self.folder)
        for name, text in files.items():
            self.write_text(name, text)
        sentence = describe_results(results, weights, self.parameters.preset)
        tell(folder=str(self.folder.resolve()), result=sentence)
        return results

    def figure_path(self, name: str) -> Path:
        """Where a figure of this session belongs."""
        return self.folder / "figures" / name

    def write_text(self, name: str, text: str) -> None:
        """Write a text into the folder of results, whole or not at all."""
        write_whole(self.folder / name, text.encode("utf-8", "backslashreplace"))

    def _measure(self, tokenizer: TokenizerUnderTest, progress: bool) -> EvaluationResult:
        if tokenizer.run:
            train(tokenizer.run, tokenizer.path, progress=progress)
        rules, checkpoint = self.rules, hash_checkpoint(tokenizer.path)
        facts = {
            "checkpoint": checkpoint,
            "weights": rules.weights,
            "quantizer": tokenizer.quantizer or "",
            "family": tokenizer.family or "",
            "protocol": str(rules.protocol),
            "images": self.images_key,
            "metrics": list(rules.metrics),
            "networks": rules.weight_files,
        }
        stored = self.folder / "results" / f"{content_key(**facts)[:16]}.npz"
        result = None
        # A file that a full disk or another program damaged is measured again.
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            result = read_result(stored, tokenizer, rules.left_out, checkpoint)
        if result is None:
            write_result(stored, self._compute(tokenizer, progress))
            result = read_result(stored, tokenizer, rules.left_out, checkpoint)
        own = self.own.get(tokenizer.label)
        if own is None:
            return result
        key = content_key(**facts, own_protocol=str(own.protocol), own_images=self._content(own.images))
        stored = self.folder / "results" / f"{key[:16]}-own.json"
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            return replace(result, own=read_own_result(stored, own.protocol))
        second = {"remeasure": rules.protocol, "reference": rules.source}
        write_own_result(stored, self._evaluate(tokenizer, self._load(tokenizer), own, progress, **second))
        return replace(result, own=read_own_result(stored, own.protocol))

    def _compute(self, tokenizer: TokenizerUnderTest, progress: bool) -> dict[str, Any]:
        """A result under the common protocol, as it is stored."""
        rules, images = self.rules, self.rules.images
        network = loaded = self._load(tokenizer)
        if tokenizer.label in rules.sizes:
            network = ResizingTokenizer(loaded, rules.sizes[tokenizer.label])
        grid = network.latent_grid(*images.side)
        statistics = TokenStatistics(loaded, images.count, grid)
        scores = self._evaluate(tokenizer, network, rules, progress, observers=[statistics])
        return {
            "cards": json.dumps([asdict(card) for card in scores.cards]),
            "report": str(loaded.load_report),
            "counts": scores.counts.numpy(),
            "originals": scores.originals.permute(0, 2, 3, 1).numpy(),
            "reconstructions": scores.reconstructions.permute(0, 2, 3, 1).numpy(),
            "tokens": json.dumps(statistics_row(statistics)),
            "grid": np.array(grid),
        }

    def _load(self, tokenizer: TokenizerUnderTest) -> Tokenizer:
        return load_tokenizer(
            tokenizer.path, self.rules.weights, family=tokenizer.family, quantizer=tokenizer.quantizer
        )

    def _evaluate(
        self,
        tokenizer: TokenizerUnderTest,
        network: Tokenizer | ResizingTokenizer,
        images: EvaluationRules | OwnRules,
        progress: bool,
        **more: Any,
    ) -> Evaluation:
        """Scores under the protocol of some images; networks, weights and device are those of all."""
        rules = self.rules
        with without_cautions():  # told when the session was made
            return evaluate_reconstruction(
                network,
                images.source,
                images.protocol,
                metrics=rules.metrics,
                device=rules.device,
                lpips_weights=rules.lpips_weights,
                inception_weights=rules.inception_weights,
                limit=images.limit,
                progress=progress,
                unreadable=tokenizer.data.unreadable if tokenizer.data else "skip",
                **more,
            )


def open_evaluation(parameters: EvaluationParameters) -> EvaluationSession:
    """What evaluate_tokenizer measures: one tokenizer."""
    if parameters.checkpoint:
        label = Path(parameters.checkpoint).stem
        tokenizer = find_tokenizer(label, parameters.checkpoint, parameters.quantizer, parameters.family)
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
