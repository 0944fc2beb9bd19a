"""What an atlas shows, as plain data: facts, columns of the table, places of the map, and a card per code."""

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError
from ibqlab.base.progress import CountingLine
from ibqlab.views.atlas.moment import Moment
from ibqlab.views.cards import NEIGHBOURS, PATCHES, CardReader
from ibqlab.views.map_data import MapData, describe_frame, map_run_codes
from ibqlab.views.snapshot_arrays import NEVER, NOT_STORED
from ibqlab.views.subject import Subject, lacking

SHARD = 256
"""Cards of one file."""
NEAR_CODES = 65_536
"""Codes whose nearest codes are looked for, at most; beyond it only those in use."""
_BLOCK = 2**24
"""Distances that are computed at a time."""
_DIGITS = 5
"""Of a distance on a card."""
_STEPS = 65_535
"""Places of the map are stored as whole numbers up to this."""


@dataclass(kw_only=True)
class AtlasData:
    """A codebook's cards and map, read once; pictures apart."""

    reader: CardReader
    map: MapData | None
    is_moment: bool
    """Whether the map shows the checkpoint alone."""
    lacks: list[str]
    """What is not there, a sentence each."""
    progress: bool

    @property
    def codebook(self) -> Float[np.ndarray, "K D"] | None:
        """All code vectors; None where they cannot be listed."""
        book = self.reader.codebook
        return book if book is not None and len(book) == self.reader.codebook_size else None

    @cached_property
    def image_names(self) -> list[str]:
        """Of the images, as their folder or shards name them; of others their number."""
        index, source = self.reader.index, self.reader.subject.source
        if not hasattr(source, "name"):
            return [f"image {number}" for number in range(len(index.codes))]
        return [source.name(number) for number in index.numbers]

    @cached_property
    def near(self) -> dict[int, list[tuple[int, float]]]:
        """Code → its nearest codes and their distances, exact; empty where no codebook can be listed."""
        book, index = self.codebook, self.reader.index
        if book is None or not np.isfinite(book).all() or len(book) < 2:
            return {}
        asked = np.arange(len(book))
        if len(book) > NEAR_CODES:
            asked = np.flatnonzero(index.counts) if index is not None else asked[:0]
        if not len(asked):
            return {}
        key = hashlib.sha256(np.ascontiguousarray(book)).hexdigest()
        stored = self.reader.subject.store.get(
            "nearest",
            lambda: _nearest(book, asked, self.progress),
            codebook=key,
            asked=hashlib.sha256(asked).hexdigest(),
            version=1,
        )
        codes, distances = stored["codes"].tolist(), stored["distances"].astype(float).tolist()
        return {
            code: list(zip(others, far, strict=True))
            for code, others, far in zip(asked.tolist(), codes, distances, strict=True)
        }


def gather(reader: CardReader, method: str, progress: bool) -> AtlasData:
    """Read what an atlas shows.

    Args:
        reader: of the codes' cards.
        method: of the map.
        progress: show lines on the way.
    """
    why, is_moment, data = "", False, None
    try:
        data = map_run_codes(reader.subject, method)
    except (RunError, ValueError, OSError) as error:
        why = lacking(error)
        if reader.index is not None and reader.codebook is not None and np.isfinite(reader.codebook).all():
            data, is_moment = map_run_codes(Moment(reader), method), True
    # All that is read from files, before anything is written; what is missing is told as it is met.
    atlas = AtlasData(reader=reader, map=data, is_moment=is_moment, lacks=[], progress=progress)
    _ = reader.history, atlas.near, reader.index and atlas.image_names
    if atlas.codebook is not None and len(atlas.codebook) > NEAR_CODES:
        told = "are told of the codes in use alone" if reader.index is not None else "are not told"
        atlas.lacks.append(f"Nearest codes {told}: the codebook has more than {NEAR_CODES:,} codes.")
    if reader.history is not None and (reader.history[2] == NOT_STORED).all():
        atlas.lacks.append("When training last hit each code was not stored.")
    # A file has no training of which a map could be; of a run the reader wants to know.
    is_told = why and (data is None or reader.subject.steps)
    atlas.lacks += dict.fromkeys([*filter(None, [reader.step_note]), *reader.lacks, *([why] if is_told else [])])
    return atlas


def _nearest(book: np.ndarray, asked: np.ndarray, progress: bool) -> dict[str, np.ndarray]:
    """The nearest codes of some codes, block by block."""
    vectors = torch.from_numpy(np.ascontiguousarray(book, dtype=np.float32))
    halves = vectors.square().sum(1) / 2
    count = min(NEIGHBOURS, len(book) - 1)
    codes, distances = [], []
    with CountingLine("atlas: nearest codes", len(asked), "codes", progress) as line:
        for rows in np.array_split(asked, max(1, len(asked) * len(book) // _BLOCK)):
            scores = torch.addmm(-halves, vectors[rows], vectors.T)  # (R, K): the nearest has the largest
            scores[torch.arange(len(rows)), torch.from_numpy(rows)] = -torch.inf
            best = scores.topk(count).indices
            # From the difference, because the expanded form loses small distances to rounding.
            far = (vectors[best] - vectors[rows][:, None]).square().sum(2).sqrt()
            far, order = far.sort(dim=1, stable=True)
            codes.append(best.gather(1, order).int())
            distances.append(far)
            line.advance(len(rows))
    return {"codes": torch.cat(codes).numpy(), "distances": torch.cat(distances).numpy()}


def packed(values: np.ndarray, kind: str) -> dict[str, str]:
    """A column as base64 of little-endian numbers."""
    return {"kind": kind, "base64": base64.b64encode(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()).decode()}


def without_paths(text: str, subject: Subject) -> str:
    """A sentence as it may be sent to others: what is looked at by its name, in place of its path on this machine."""
    for path in (subject.path.resolve(), subject.path.absolute()):
        text = text.replace(for_terminal(path, None), subject.full_name)
    return text


def facts(data: AtlasData, across: int, decoded: Int[np.ndarray, "U"] | None) -> dict[str, Any]:
    """What the page says once.

    Args:
        data: of the atlas.
        across: pictures side by side on a sheet of decoded codes.
        decoded: those codes; None: there are no sheets.
    """
    reader, index = data.reader, data.reader.index
    subject = reader.subject
    said: dict[str, Any] = {"name": for_terminal(subject.full_name, None), "mark": subject.place_mark}
    lacks = [without_paths(text, subject) for text in data.lacks]
    said |= {
        "codes": reader.codebook_size,
        "shard": SHARD,
        "lacks": lacks,
        "decoded": 0 if decoded is None else across,
        "has_map": data.map is not None,
    }
    if index is not None:
        (height, width), (rows, columns) = index.pictures.shape[1:3], index.codes.shape[1:]
        # Without a grid a token's patch is the whole image.
        grid = [rows, columns] if index.has_grid else [1, 1]
        said |= {"images": len(index.codes), "tokens": index.tokens, "size": [height, width], "grid": grid}
        said |= {"has_grid": index.has_grid}
        said |= {"classes": list(index.classes), "labels": index.labels.tolist(), "ruler": index.ruler}
        said |= {"in_use": int((index.counts > 0).sum()), "names": data.image_names}
        if decoded is not None and len(decoded) < said["in_use"]:
            said |= {"decoded_codes": decoded.tolist()}
    if reader.history is not None:
        steps, hits, _ = reader.history
        said |= {"steps": steps.tolist(), "step_tokens": hits.sum(1).tolist()}
    counted = subject.counted
    said |= {"counted": counted}
    if data.map is not None:
        frames = range(len(data.map.steps))
        said |= {"map_steps": [] if data.is_moment else list(data.map.steps)}
        said |= {"map_words": [describe_frame(data.map, frame) for frame in frames]}
        said |= {"most_hits": int(data.map.hits.max(initial=1)), "is_moment": data.is_moment}
        if index is not None and not data.is_moment:
            of = f"{counted} of its step" if "validation" in counted else "tokens of its step's snapshot"
            where = f"the {index.tokens:,} tokens of all {len(index.codes):,} images of the atlas"
            table = "The table's “tokens of all images” and the cards"
            said |= {"map_note": f"The map counts hits in the {of}. {table} count those in {where}."}
    return said


def table_columns(data: AtlasData) -> dict[str, Any]:
    """One number per code and column, for the table."""
    columns: dict[str, Any] = {}
    if data.reader.index is not None:
        columns["hits"] = packed(data.reader.index.counts, "i4")
    if data.codebook is not None:
        columns["norm"] = packed(np.linalg.norm(data.codebook, axis=1), "f4")
    if data.reader.history is not None:
        steps, hits, last = data.reader.history
        columns["validation"] = packed(hits[-1], "i4")
        if not (last == NOT_STORED).all():
            columns["idle"] = packed(np.where(last < 0, NEVER, np.maximum(steps[-1] - last, 0)), "i4")
    return columns


def map_frames(data: MapData) -> Iterator[dict[str, Any]]:
    """Places of codes and features as whole numbers, and each code's hits, snapshot by snapshot."""
    left, _, bottom, _ = data.bounds
    low, span = np.array([left, bottom]), _span(data)

    def places(points: np.ndarray) -> dict[str, str]:
        return packed(np.rint((points - low) / span * _STEPS).clip(0, _STEPS), "u2")

    for codes, features, hits in zip(data.codes, data.features, data.hits, strict=True):
        yield {"codes": places(codes), "features": places(features), "hits": packed(hits, "i4")}


def map_facts(data: MapData) -> dict[str, Any]:
    """What all snapshots share."""
    span = _span(data)
    return {"ids": packed(data.code_ids, "i4"), "aspect": float(span[0] / span[1])}


def _span(data: MapData) -> Float[np.ndarray, "2"]:
    """Width and height of the map; where all points lie on a line, wide enough to draw."""
    left, right, bottom, top = data.bounds
    widths = np.array([right - left, top - bottom])
    return np.maximum(widths, max(float(widths.max()) / 20, 1e-9))


def shard_of_cards(data: AtlasData, shard: int) -> list[dict[str, Any]]:
    """The cards of a file."""
    first = shard * SHARD
    last = min(data.reader.codebook_size, first + SHARD)
    lives = _lives(data.reader, first, last)
    return [_card(data, code, lives.get(code)) for code in range(first, last)]


def _lives(reader: CardReader, first: int, last: int) -> dict[int, list[int]]:
    """Code → hits at every snapshot, of codes that any snapshot has in use."""
    if reader.history is None:
        return {}
    hits = reader.history[1][:, first:last]
    return {first + int(code): hits[:, code].tolist() for code in np.flatnonzero(hits.any(0))}


def _card(data: AtlasData, code: int, life: list[int] | None) -> dict[str, Any]:
    """What the card of a code shows besides the columns; what it has nothing of is left out."""
    card: dict[str, Any] = {}
    index = data.reader.index
    if index is not None and index.counts[code]:
        typical, margin = index.typical([code], PATCHES), index.at_margin([code], PATCHES)
        card["typical"] = _places(index.codes.shape, typical)
        seconds = index.seconds.reshape(-1)[margin].tolist()
        card["margin"] = [[*place, s] for place, s in zip(_places(index.codes.shape, margin), seconds, strict=True)]
        codes, lift = index.beside(code)
        card["beside"] = list(zip(codes[:NEIGHBOURS].tolist(), lift[:NEIGHBOURS].round(2).tolist(), strict=True))
        if len(index.classes) > 1:
            here = index.class_counts([code])
            card["classes"] = [(int(i), int(here[i])) for i in np.argsort(-here, kind="stable")[:6] if here[i]]
    # Significant digits, not decimals: vectors of a small start lie 10⁻⁵ apart.
    card["near"] = [(other, float(f"{far:.{_DIGITS}g}")) for other, far in data.near.get(code, [])]
    card["life"] = life
    return {name: value for name, value in card.items() if value}


def _places(shape: tuple[int, ...], tokens: Int[np.ndarray, "n"]) -> list[list[int]]:
    """Image, row and column of tokens."""
    return np.stack(np.unravel_index(tokens, shape), axis=1).tolist()
