"""What is known of a measured tokenizer, and how it lies in the folder of results."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from ibqlab.base.cache import ENTRY_BYTES, content_key
from ibqlab.base.files import UnreadableFile, explained, parse_json, read_npz, replacing, sweep, write_whole
from ibqlab.grids.evaluation_rules import TokenizerUnderTest
from ibqlab.grids.own_protocols import OwnResult
from ibqlab.grids.token_statistics import COLUMNS
from ibqlab.metrics import Evaluation, MetricCard, Protocol
from ibqlab.metrics.weights import hash_file
from ibqlab.runs import Run


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
    tokens: Mapping[str, float]
    """What tokens and features are like, by the keys of `token_statistics.COLUMNS`; NaN where there was too little."""
    grid: tuple[int, int]
    """Rows and columns of an image's tokens; (1, T) of tokens without a grid."""
    own: OwnResult | None = None
    """The same under its own system's protocol; None where that is the common one, or there is none."""

    @property
    def values(self) -> dict[str, float]:
        """Metric → value; NaN where it was left out."""
        return {card.key: card.value for card in self.cards}


def hash_checkpoint(path: Path) -> str:
    """sha256 of a checkpoint: the file, all files of a published folder, or a run's last checkpoint and settings."""
    if not path.is_dir():
        return hash_file(path)
    if not (path / "config.yaml").is_file():
        return content_key(files={file.name: hash_file(file) for file in sorted(path.iterdir()) if file.is_file()})
    run = Run(path)
    return content_key(checkpoint=hash_file(run.last_checkpoint), config=run.config_hash)


def write_result(stored: Path, content: Mapping[str, Any]) -> None:
    """Keep a result under the common protocol: arrays, and texts of JSON."""
    with explained(stored):
        stored.parent.mkdir(parents=True, exist_ok=True)
    sweep(stored.parent)
    with replacing(stored) as stream:
        np.savez_compressed(stream, **content)


def read_result(
    stored: Path, tokenizer: TokenizerUnderTest, left_out: tuple[MetricCard, ...], checkpoint: str
) -> EvaluationResult:
    """What `write_result` kept.

    Raises:
        FileNotFoundError: nothing there; ValueError, KeyError, TypeError: something else, or damaged.
    """
    content = read_npz(stored, ENTRY_BYTES)
    counts, pictures = content["counts"], (content["originals"], content["reconstructions"])
    if counts.shape != (tokenizer.config.quantizer.codebook_size,) or counts.dtype.kind != "i":
        raise UnreadableFile(f"{stored}: counts must be whole numbers, one per code")
    if any(images.ndim != 4 or images.dtype != np.uint8 for images in pictures):
        raise UnreadableFile(f"{stored}: pictures must be arrays (P, H, W, 3) of uint8")
    tokens = parse_json(str(content["tokens"]), str(stored), dict)
    height, width = (int(number) for number in content["grid"])
    return EvaluationResult(
        tokenizer=tokenizer,
        cards=(*_cards(parse_json(str(content["cards"]), str(stored), list)), *left_out),
        counts=counts,
        originals=pictures[0],
        reconstructions=pictures[1],
        report=str(content["report"]),
        checkpoint=checkpoint,
        tokens={key: float("nan") if tokens[key] is None else float(tokens[key]) for key in COLUMNS},
        grid=(height, width),
    )


def write_own_result(stored: Path, scores: Evaluation) -> None:
    """Keep a result under a tokenizer's own protocol."""
    other = scores.other_reference
    content = {
        "cards": [asdict(card) for card in scores.cards],
        "remeasured": [asdict(card) for card in scores.remeasured],
        "common_reference": [asdict(other)] if other else [],
    }
    write_whole(stored, json.dumps(content, ensure_ascii=False).encode())


def read_own_result(stored: Path, protocol: Protocol) -> OwnResult:
    """What `write_own_result` kept; errors are those of `read_result`."""
    content = parse_json(stored.read_text("utf-8"), str(stored), dict)
    return OwnResult(
        protocol=protocol,
        cards=_cards(content["cards"]),
        remeasured=_cards(content["remeasured"]),
        common_reference=next(iter(_cards(content["common_reference"])), None),
    )


def _cards(rows: list[dict[str, Any]]) -> tuple[MetricCard, ...]:
    return tuple(MetricCard(**row | {"remarks": tuple(row["remarks"])}) for row in rows)
