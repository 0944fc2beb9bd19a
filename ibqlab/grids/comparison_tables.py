"""Tables of a comparison: table 1 of the paper with our columns beside it, and what tokens are like."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from ibqlab.base.measures import is_measure, measure
from ibqlab.grids.comparison import column_of
from ibqlab.grids.evaluation_results import EvaluationResult
from ibqlab.grids.printed_numbers import PRINTED, Printed
from ibqlab.grids.token_statistics import HEADINGS
from ibqlab.metrics import PROTOCOLS

USAGE = "usage"
OF_TABLE_1 = ("rfid", "lpips", USAGE)
"""What table 1 prints, in its order."""


def table_1(results: Sequence[EvaluationResult], published: Mapping[str, Printed]) -> pd.DataFrame:
    """Table 1 of IBQ for the tokenizers at hand: its columns in its order, then the authors' numbers, then ours.

    Returns:
        One row per tokenizer: method, token_type ("2D", or "1D" without a grid), tokens ("16 × 16" or "32"; of the
        measured images), ratio (pixels along a token's side; NaN of 1D), train_resolution, codebook_size, codebook_dim
        (0 of lookup-free codes, as printed), table_1_rfid, table_1_lpips, table_1_usage (share); authors_rfid to
        authors_usage and authors_protocol; under_own_protocol (its name) and own_ with each metric; under_protocol and
        each metric under the common one. NaN and "" where there is nothing.
    """
    return pd.DataFrame([_row(result, published.get(result.tokenizer.label, Printed())) for result in results])


def _row(result: EvaluationResult, printed: Printed) -> dict[str, object]:
    rows, columns = result.grid
    is_grid = rows > 1
    quantizer = result.tokenizer.config.quantizer
    of_table, of_authors = Printed(table_1=printed.table_1), Printed(own=printed.own)
    own = result.own
    own_cards = {column_of(card): card.value for card in own.cards} if own else {}
    return {
        "method": result.tokenizer.label,
        "token_type": "2D" if is_grid else "1D",
        "tokens": f"{rows} × {columns}" if is_grid else f"{columns}",
        "ratio": result.originals.shape[1] / rows if is_grid else math.nan,
        "train_resolution": _train_resolution(result),
        "codebook_size": quantizer.codebook_size,
        "codebook_dim": 0 if quantizer.config_name.startswith("lfq") else quantizer.code_dim,
        **{f"table_1_{name}": of_table.number(name) for name in OF_TABLE_1},
        **{f"authors_{name}": of_authors.number(name) for name in PRINTED},
        "authors_protocol": printed.own.protocol if printed.own else "",
        "under_own_protocol": own.protocol.name if own else "",
        **{f"own_{column_of(card)}": own_cards.get(column_of(card), math.nan) for card in result.cards},
        "under_protocol": next(card.protocol for card in result.cards),
        **{column_of(card): card.value for card in result.cards},
    }


def _train_resolution(result: EvaluationResult) -> str:
    """What it was trained at, as far as its run, its system or its settings tell."""
    tokenizer = result.tokenizer
    side = tokenizer.config.autoencoder.resolution
    if tokenizer.data:
        side = tokenizer.data.image_size
    elif tokenizer.own_protocol:
        side = PROTOCOLS[tokenizer.own_protocol].image_size
    return f"{side} × {side}"


def table_1_markdown(table: pd.DataFrame) -> str:
    """The table for reading: columns in words, shares in %, empty cells for what is not there."""
    empty = [column for column in table if table[column].isna().all() or (table[column] == "").all()]
    kept = ["method", *(column for column in table if column not in empty and column != "method")]
    lines = [[_words(column) for column in kept], ["---"] * len(kept)]
    lines += [[_cell(column, row[column]) for column in kept] for _, row in table.iterrows()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _words(column: str) -> str:
    for start, words in (("table_1_", "{}, table 1"), ("authors_", "{}, its authors"), ("own_", "{}, own protocol")):
        if column.startswith(start):
            return words.format(_words(column.removeprefix(start)))
    if not is_measure(column):
        return column.replace("_", " ")
    quantity = measure(column)
    return f"{quantity.title} ({quantity.sign})" if quantity.sign else quantity.title


def _cell(column: str, value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if math.isnan(value):
        return ""
    return f"{100 * value:.3g}" if column.endswith(USAGE) else f"{value:,.4g}"


def token_table(results: Sequence[EvaluationResult]) -> pd.DataFrame:
    """What tokens and features are like under the common protocol, one row per tokenizer.

    Returns:
        label, K, D, images, then the keys of `token_statistics.HEADINGS`, which says what each is and its unit.
    """
    return pd.DataFrame(
        [
            {
                "label": result.tokenizer.label,
                "K": result.tokenizer.config.quantizer.codebook_size,
                "D": result.tokenizer.config.quantizer.code_dim,
                "images": max(card.images for card in result.cards),
                **result.tokens,
            }
            for result in results
        ]
    )


def show_tokens(table: pd.DataFrame) -> pd.DataFrame:
    """The same for reading: one column per tokenizer, rows in words with their unit, four digits."""
    shown = table.set_index("label").rename(columns=HEADINGS).T
    return shown.map(lambda value: "–" if pd.isna(value) else f"{value:,.4g}" if value % 1 else f"{value:,.0f}")
