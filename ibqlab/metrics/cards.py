"""A number with everything that is needed to compare it, and tables of such numbers."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

ENOUGH_IMAGES = 10_000
"""Below, Fréchet distances are mostly bias."""


@dataclass(frozen=True, kw_only=True)
class MetricCard:
    """One result."""

    key: str
    """Short name, as in `metrics=`: "rfid"."""
    metric: str
    """Name for tables: "rFID"; "Fréchet distance (digits-cnn)" when the features are not Inception's."""
    value: float
    """In `unit`."""
    unit: str
    """"dB", "share", "codes" or "" for a plain number."""
    better: str
    """"higher" or "lower"."""
    images: int
    """How many went into it."""
    protocol: str
    """Name of the protocol; `PROTOCOLS[name]` prints in full."""
    resize: str
    """How the images were brought to their size."""
    crop: str
    """How they were cut."""
    rounding: str
    """How float pictures became what the metric sees."""
    reference: str = ""
    """What was compared with."""
    extractor: str = ""
    """Network behind it, with its own resize; empty for none."""
    weights: str = ""
    """Hash of that network's weights."""
    tokens: int | None = None
    """Tokens behind usage and perplexity."""
    remarks: tuple[str, ...] = ()
    """What a reader must know before comparing."""

    def __str__(self) -> str:
        """One line: "PSNR 21.35 dB (higher is better), 50,000 images, protocol seed-voken-ibq"."""
        text = f"{self.metric} {self.value:.4g} {self.unit}".rstrip() + f" ({self.better} is better)"
        text += f", {self.images:,} images, protocol {self.protocol}"
        return text + "".join(f"; {remark}" for remark in self.remarks)


def cards_table(cards: Iterable[MetricCard]) -> "pd.DataFrame":
    """One row per card, one column per field; remarks joined by semicolons. Ready for `to_csv`."""
    import pandas as pd  # noqa: PLC0415 - evaluation itself needs no tables

    return pd.DataFrame([asdict(card) | {"remarks": "; ".join(card.remarks)} for card in cards])


def cards_markdown(cards: Iterable[MetricCard]) -> str:
    """The cards as a Markdown table: value first, then what it was measured on and with."""
    head = ("metric", "value", "images", "protocol", "preparation", "reference", "extractor", "remarks")
    rows = [head, ("---",) * len(head), *map(_markdown_row, cards)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def few_images_remarks(images: int, dimension: int) -> tuple[str, ...]:
    """What must be said about a Fréchet distance from so many images."""
    remarks = ()
    if images < ENOUGH_IMAGES:
        remarks += (f"fewer than {ENOUGH_IMAGES:,} images: biased upward",)
    if images <= dimension:
        remarks += (f"no more images than the {dimension:,} feature dimensions: covariance is singular",)
    return remarks


def _markdown_row(card: MetricCard) -> tuple[str, ...]:
    preparation = ", ".join(text for text in (card.resize, card.crop, card.rounding) if text and text != "none")
    extractor = f"{card.extractor}, {card.weights}" if card.weights else card.extractor
    remarks = card.remarks if card.tokens is None else (f"{card.tokens:,} tokens", *card.remarks)
    return (
        f"{card.metric} {'↑' if card.better == 'higher' else '↓'}",
        "–" if math.isnan(card.value) else f"{card.value:.4g} {card.unit}".rstrip(),
        f"{card.images:,}",
        card.protocol,
        preparation,
        card.reference,
        extractor,
        "; ".join(remarks),
    )
