"""Gathers what an atlas shows and writes its folder.

    write_atlas("mine", "mine_atlas", AtlasSettings(images="IMAGES"))     # → mine_atlas/index.html

Everything that grows with the codebook lies in columns or in shards of some hundred cards, which the page loads when it
shows them. Data are scripts, not JSON, because a page that is opened from disk may load scripts alone. Patches are cut
from the images by the page, so that every image is stored once.
"""

import base64
import io
import json
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ibqlab.base.checks import require_between, require_choice
from ibqlab.base.files import RunError, write_whole
from ibqlab.base.progress import CountingLine, notice
from ibqlab.pretrained.load_report import WEIGHTS
from ibqlab.runs import Run
from ibqlab.runs.finding import output_folder
from ibqlab.views.cards import NEIGHBOURS, PATCHES, CardReader
from ibqlab.views.decoding import SURROUNDINGS, grid_of
from ibqlab.views.map_data import METHODS, MapData, describe_frame, map_run_codes
from ibqlab.views.patches import MOST_IMAGES, PatchIndex
from ibqlab.views.subject import ViewError, lacking, open_subject

IMAGES = 2000
"""Images that an atlas looks at, at most, unless it is told."""
SHARD = 256
"""Cards of one file."""
NEAR_CODES = 65_536
"""Codes whose nearest codes are looked for, at most; beyond it only those in use."""
QUALITY = 90
"""Of the images' JPEG."""
PAGE = ("index.html", "atlas.css", "atlas.js")
_STEPS = 65_535
"""Places of the map are stored as whole numbers up to this."""


@dataclass(frozen=True, kw_only=True)
class AtlasSettings:
    """What an atlas looks at."""

    images: str = ""
    """A folder of images, shards, "photos" or "digits"; "": a run's own validation images."""
    count: int = IMAGES
    """Images, at most."""
    method: str = "pca"
    """Of the map, "pca" (a second) or "umap" (half a minute). A checkpoint, which holds one moment, has no map."""
    decode: bool = True
    """Whether to decode every code that the images use."""
    weights: str = ""
    """"raw" or "ema"; "": of a run raw, of a file its averages."""
    quantizer: str | None = None
    """Of a published file that does not tell its own: "ibq" or "vq"."""

    def __post_init__(self):
        require_between("count", self.count, 1, MOST_IMAGES)
        require_choice("method", self.method, METHODS)
        require_choice("weights", self.weights, ("", *WEIGHTS))


def write_atlas(
    what: str | Path | Run, output: str | Path = "", settings: AtlasSettings | None = None, *, progress: bool = True
) -> Path:
    """Write the atlas of a codebook.

    Args:
        what: a run, its name or folder, or a checkpoint's file.
        output: folder, new or an atlas that is written anew; "": NAME_atlas below the folder of all runs.
        settings: what it looks at.
        progress: show lines on the way.
    Returns:
        The page, index.html; it needs the folder beside it, and neither network nor kernel.
    Raises:
        ViewError: no codes to show; or the folder holds something else.
    """
    typed = settings or AtlasSettings()
    folder = output_folder(output, f"{Path(what.path if isinstance(what, Run) else what).stem}_atlas")
    if folder.exists() and not (folder / "data" / "facts.js").is_file() and any(folder.iterdir()):
        raise ViewError(f"{folder} holds something that is no atlas; give another folder: output=FOLDER")
    subject = open_subject(what, typed.images, weights=typed.weights, quantizer=typed.quantizer)
    reader = CardReader(subject, typed.count, progress=progress)
    _make_folders(folder)
    data, lacks = None, list(reader.lacks)
    try:
        data = map_run_codes(subject, typed.method)
    except (RunError, ValueError) as error:
        lacks.append(lacking(error))
    decoded = _write_decoded(folder, reader, progress) if typed.decode and reader.index is not None else 0
    _write_script(folder / "data" / "facts.js", "facts", _facts(reader, data, lacks, decoded))
    _write_script(folder / "data" / "columns.js", "columns", _columns(reader))
    if data is not None:
        _write_script(folder / "data" / "map.js", "data/map", _map_columns(data))
    if reader.index is not None:
        _write_images(folder, reader.index, progress)
    _write_cards(folder, reader, progress)
    for name in PAGE:
        write_whole(folder / name, resources.files(__package__).joinpath(name).read_bytes())
    return folder / "index.html"


def _make_folders(folder: Path) -> None:
    """The folder's parts, empty: cards of an earlier, larger codebook would be found."""
    for name in ("data", "cards", "images", "decoded"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)


def _write_script(file: Path, name: str, value: Any) -> None:
    """Data as a call of the page's `atlas`; a name from outside is text in it, never code."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    write_whole(file, f"atlas.take({json.dumps(name)},{text});\n".encode())


def _packed(values: np.ndarray, kind: str) -> dict[str, str]:
    """A column as base64 of little-endian numbers."""
    return {"kind": kind, "base64": base64.b64encode(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()).decode()}


def _facts(reader: CardReader, data: MapData | None, lacks: list[str], decoded: int) -> dict[str, Any]:
    """What the page says once."""
    index = reader.index
    facts: dict[str, Any] = {"name": reader.subject.name, "codes": reader.codebook_size, "shard": SHARD, "lacks": lacks}
    facts |= {"has_map": data is not None, "decoded": decoded}
    if index is not None:
        (height, width), (rows, columns) = index.pictures.shape[1:3], index.codes.shape[1:]
        facts |= {"images": len(index.codes), "tokens": index.tokens, "size": [height, width], "grid": [rows, columns]}
        facts |= {"classes": list(index.classes), "labels": index.labels.tolist(), "ruler": index.ruler}
        facts |= {"in_use": int((index.counts > 0).sum())}
    if data is not None:
        facts |= {"steps": list(data.steps), "map_words": [describe_frame(data, f) for f in range(len(data.steps))]}
    return facts


def _columns(reader: CardReader) -> dict[str, Any]:
    """One number per code and column, for the table."""
    columns: dict[str, Any] = {}
    if reader.index is not None:
        columns["hits"] = _packed(reader.index.counts, "i4")
    if reader.codebook is not None:
        columns["norm"] = _packed(np.linalg.norm(reader.codebook, axis=1), "f4")
    life = reader.history
    if life is not None:
        steps, hits, last = life
        columns["validation"] = _packed(hits[-1], "i4")
        columns["idle"] = _packed(np.where(last < 0, -1, steps[-1] - last), "i4")
    return columns


def _map_columns(data: MapData) -> dict[str, Any]:
    """Places of codes and features at every snapshot, as whole numbers, and each code's hits."""
    left, right, bottom, top = data.bounds
    low, span = np.array([left, bottom]), np.maximum([right - left, top - bottom], 1e-9)

    def places(points: np.ndarray) -> dict[str, str]:
        return _packed(np.rint((points - low) / span * _STEPS).clip(0, _STEPS), "u2")

    return {
        "ids": _packed(data.code_ids, "i4"),
        "codes": [places(frame) for frame in data.codes],
        "features": [places(frame) for frame in data.features],
        "hits": [_packed(frame, "i4") for frame in data.hits],
        "aspect": float(span[0] / span[1]),
    }


def _write_images(folder: Path, index: PatchIndex, progress: bool) -> None:
    """Every image once."""
    with CountingLine("atlas: images", len(index.pictures), "images", progress) as line:
        for number, pixels in enumerate(index.pictures):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY, subsampling=0)
            (folder / "images" / f"{number}.jpg").write_bytes(stream.getvalue())
            line.advance()


def _write_decoded(folder: Path, reader: CardReader, progress: bool) -> int:
    """What each code in use decodes to where all tokens are this code: a sheet per shard. The side of one, pixels."""
    index, tokenizer = reader.index, reader.subject.tokenizer
    rows, columns = index.codes.shape[1:]
    side = min(2 * SURROUNDINGS + 1, rows, columns)
    height, width = index.patch
    used = np.flatnonzero(index.counts > 0)
    begin_y, begin_x = (side // 2) * height, (side // 2) * width
    across = int(SHARD**0.5)
    with CountingLine("atlas: decoding", len(used), "codes", progress) as line:
        for shard in np.unique(used // SHARD):
            sheet = np.full((across * height, across * width, 3), 128, np.uint8)
            codes = used[used // SHARD == shard]
            for some in np.array_split(codes, -(-len(codes) // 64)):
                tokens = torch.from_numpy(some)[:, None, None].repeat(1, side, side)
                with torch.no_grad():
                    pictures = grid_of(tokenizer, tokenizer.quantizer.decode(tokens))
                for code, picture in zip(some % SHARD, pictures, strict=True):
                    y, x = code // across * height, code % across * width
                    middle = picture[begin_y : begin_y + height, begin_x : begin_x + width]
                    sheet[y : y + height, x : x + width] = middle
                    line.advance()
            Image.fromarray(sheet).save(folder / "decoded" / f"{shard}.png")
    return across


def _write_cards(folder: Path, reader: CardReader, progress: bool) -> None:
    """The cards of all codes, in shards."""
    size = reader.codebook_size
    near = _nearest_of_all(reader, progress)
    shards = -(-size // SHARD)
    with CountingLine("atlas: cards", shards, "files", progress) as line:
        for shard in range(shards):
            codes = range(shard * SHARD, min(size, (shard + 1) * SHARD))
            _write_script(folder / "cards" / f"{shard}.js", f"cards/{shard}", [_card(reader, c, near) for c in codes])
            line.advance()


def _card(reader: CardReader, code: int, near: dict[int, list[tuple[int, float]]]) -> dict[str, Any]:
    """What the card of a code shows besides the columns; what it has nothing of is left out."""
    card: dict[str, Any] = {}
    index = reader.index
    if index is not None and index.counts[code]:
        card["typical"] = [index.place(int(token)) for token in index.typical([code], PATCHES)]
        margin = index.at_margin([code], PATCHES)
        card["margin"] = [(*index.place(int(token)), int(index.seconds.flat[token])) for token in margin]
        codes, lift = index.beside(code)
        card["beside"] = [(int(c), round(float(v), 2)) for c, v in zip(codes[:NEIGHBOURS], lift, strict=False)]
        if len(index.classes) > 1:
            here = index.class_counts([code])
            card["classes"] = [(int(i), int(here[i])) for i in np.argsort(-here, kind="stable")[:6] if here[i]]
    if code in near:
        card["near"] = near[code]
    if reader.history is not None:
        _, hits, _ = reader.history
        if hits[:, code].any():
            card["life"] = hits[:, code].tolist()
    return {name: value for name, value in card.items() if value}


def _nearest_of_all(reader: CardReader, progress: bool) -> dict[int, list[tuple[int, float]]]:
    """Code → its nearest codes and their distances, block by block."""
    if reader.codebook is None:
        return {}
    book = torch.from_numpy(np.ascontiguousarray(reader.codebook))
    asked = np.arange(len(book))
    if len(book) > NEAR_CODES:
        asked = np.flatnonzero(reader.index.counts > 0) if reader.index is not None else asked[:0]
    if not len(asked) or not torch.isfinite(book).all():
        return {}
    found = {}
    if progress:
        notice(f"atlas: nearest codes of {len(asked):,}")
    most = min(NEIGHBOURS + 1, len(book))
    for rows in np.array_split(asked, max(1, len(asked) * len(book) // 2**25)):
        values, codes = torch.cdist(book[rows], book).topk(most, largest=False)
        for code, others, distances in zip(rows.tolist(), codes.tolist(), values.tolist(), strict=True):
            pairs = [(o, round(d, 4)) for o, d in zip(others, distances, strict=True) if o != code]
            found[code] = pairs[:NEIGHBOURS]
    return found
