"""Writes the folder of an atlas.

    write_atlas("mine", "mine_atlas", AtlasSettings(images="IMAGES"))     # → mine_atlas/index.html

Everything that grows with the codebook lies in columns or in shards of some hundred cards, which the page loads when it
shows them. Data are scripts, not JSON, because a page that is opened from disk may load scripts alone. Patches are cut
from the images by the page, so that every image is stored once.
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ibqlab.base.checks import IMAGE_SIDE, require_choice, whole_number
from ibqlab.base.escaping import for_terminal
from ibqlab.base.progress import CountingLine
from ibqlab.pretrained.load_report import WEIGHTS
from ibqlab.runs import Run
from ibqlab.runs.finding import output_folder
from ibqlab.views.atlas.building import PAGE, default_name, new_folder, require_free
from ibqlab.views.atlas.gather import (
    SHARD,
    AtlasData,
    facts,
    gather,
    map_facts,
    map_frames,
    shard_of_cards,
    table_columns,
)
from ibqlab.views.atlas.pictures import ACROSS, decoded_codes, write_images, write_sheets
from ibqlab.views.atlas.table import TABLE, require_map, require_pyarrow, write_table
from ibqlab.views.cards import CardReader
from ibqlab.views.map_data import METHODS
from ibqlab.views.patches import MOST_IMAGES
from ibqlab.views.subject import ViewError, lacking, open_subject

IMAGES = 2000
"""Images that an atlas looks at, at most, unless it is told."""


@dataclass(frozen=True, kw_only=True)
class AtlasSettings:
    """What an atlas looks at."""

    images: str = ""
    """A folder of images, shards, "photos" or "digits"; "": a run's own validation images."""
    count: int = IMAGES
    """Images, at most."""
    method: str = "pca"
    """Of the map, "pca" (a second) or "umap" (half a minute)."""
    decode: bool = True
    """Whether to decode every code that the images use."""
    parquet: bool = False
    """Whether to write the codes as a table for embedding-atlas as well."""
    weights: str = ""
    """"raw" or "ema"; "": of a run raw, of a file its averages."""
    image_size: int = 0
    """Pixels along one side of the images; 0: as the tokenizer was trained."""
    family: str | None = None
    """Of a published file that does not tell its own: "ibq", "vqgan" or "ldm"."""
    quantizer: str | None = None
    """Of a published file in their autoencoder, where it is another than the family's."""
    num_heads: int | None = None
    """Attention heads of a published file whose shapes do not tell them; None: the published ones."""

    def __post_init__(self):
        whole_number("count", self.count, 1, MOST_IMAGES)
        whole_number("image_size", self.image_size, 0, IMAGE_SIDE)
        require_choice("method", self.method, METHODS)
        require_choice("weights", self.weights, ("", *WEIGHTS))

    @property
    def of_subject(self) -> dict[str, Any]:
        """What `open_subject` is told beside the images."""
        words = ("weights", "image_size", "family", "quantizer", "num_heads")
        return {word: getattr(self, word) for word in words}


def write_atlas(
    what: str | Path | Run, output: str | Path = "", settings: AtlasSettings | None = None, *, progress: bool = True
) -> Path:
    """Write the atlas of a codebook.

    Args:
        what: a run, its name or folder, or a checkpoint's file.
        output: folder, new or an atlas of the same source, which is replaced; "": NAME_atlas below the folder of all
            runs, STUDY-NAME_atlas of a study's run.
        settings: what it looks at.
        progress: show lines on the way.
    Returns:
        The page, index.html; it needs the folder beside it, and neither network nor kernel. Where the work ends early
        the folder is as it was before.
    Raises:
        ViewError: no codes to show, no such images; or the folder holds something else, or another's atlas.
        RunError: the disk is full, or nothing may be written there.
    Cost: the encoder's pass over the images and the decoder's over the codes in use, both stored beside the run for
        the next atlas; then a millisecond per code in use.
    """
    typed = settings or AtlasSettings()
    subject = open_subject(what, typed.images, **typed.of_subject)
    if subject.run is None and not typed.images:
        raise ViewError(f"{for_terminal(subject.name)} is a checkpoint and brings no images; name some: images=FOLDER")
    folder = output_folder(output, default_name(subject))
    require_free(folder, subject)
    if typed.parquet:
        require_pyarrow()
    if typed.images:  # that were asked for: without them there is no atlas, while a run's own may be missing
        _ = subject.tokenizer, subject.source
    reader = CardReader(subject, typed.count, progress=progress)
    data = gather(reader, typed.method, progress)
    if typed.parquet:
        require_map(data)
    decoded = _decode(data, progress) if typed.decode else None
    with new_folder(folder) as part:
        _write_script(part / "data" / "facts.js", "facts", facts(data, ACROSS, decoded and decoded[0]))
        _write_script(part / "data" / "columns.js", "columns", table_columns(data))
        if data.map is not None:
            _write_script(part / "data" / "map.js", "data/map", map_facts(data.map))
            for number, frame in enumerate(map_frames(data.map)):
                _write_script(part / "data" / f"map-{number}.js", f"data/map-{number}", frame)
        if decoded is not None:
            write_sheets(part / "decoded", *decoded)
        if reader.index is not None:
            write_images(part / "images", reader.index, progress)
        _write_cards(part / "cards", data, progress)
        if typed.parquet:
            write_table(part / TABLE, data)
        for name in PAGE:
            (part / name).write_bytes(resources.files(__package__).joinpath(name).read_bytes())
    return folder / "index.html"


def _decode(data: AtlasData, progress: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Codes and what they decode to; what is missing of it is noted."""
    index = data.reader.index
    if index is None:
        return None
    try:
        decoded = decoded_codes(data.reader, progress)
    except ValueError as error:  # NaN has no colour
        data.lacks.append(f"No code is decoded: {lacking(error)}")
        return None
    codes = decoded[0]
    if len(codes) < (index.counts > 0).sum():
        data.lacks.append(
            f"Only the {len(codes):,} most used codes are decoded: each takes a whole image, because tokens lie on no "
            "grid."
        )
    return decoded


def _write_cards(folder: Path, data: AtlasData, progress: bool) -> None:
    """The cards of all codes, in shards."""
    size = data.reader.codebook_size
    with CountingLine("atlas: cards", size, "codes", progress) as line:
        for shard in range(-(-size // SHARD)):
            cards = shard_of_cards(data, shard)
            _write_script(folder / f"{shard}.js", f"cards/{shard}", cards)
            line.advance(len(cards))


def _write_script(file: Path, name: str, value: Any) -> None:
    """Data as a call of the page's `atlas`; a name from outside is text in it, never code."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    file.write_bytes(f"atlas.take({json.dumps(name)},{text});\n".encode())
