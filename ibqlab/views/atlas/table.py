"""The codes of an atlas as a Parquet table for embedding-atlas: one row per code of the map.

    embedding-atlas mine_atlas/codes.parquet --x x --y y --neighbors neighbors

Pictures are {"bytes", "path"} as Hugging Face's datasets store them, which embedding-atlas shows as images; neighbours
are {"ids", "distances"} with rows of this table as ids. Source: embedding-atlas 0.26, its command line and viewer.
"""

import io
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ibqlab.views.atlas.gather import AtlasData
from ibqlab.views.snapshot_arrays import NOT_STORED
from ibqlab.views.subject import ViewError

if TYPE_CHECKING:
    import pyarrow as arrow

TABLE = "codes.parquet"
"""Its name in the folder of an atlas."""
ROWS = 4096
"""Codes that are written at a time."""


def require_pyarrow() -> None:
    """Refuse where no Parquet can be written.

    Raises:
        ViewError: the message says what to install.
    """
    try:
        import pyarrow.parquet  # noqa: F401, PLC0415 - only this table needs it
    except ImportError:
        raise ViewError("parquet=true needs pyarrow: pip install pyarrow. Or leave it out") from None


def require_map(data: AtlasData) -> None:
    """Refuse a codebook without a map, whose places the table holds.

    Raises:
        ViewError: the message says why there is none.
    """
    if data.map is None:
        why = " ".join(data.lacks) or "its codes cannot be listed."
        raise ViewError(f"parquet=true writes the codes' places on the map, and there is no map: {why} Leave it out")


def table_command(file: Path) -> str:
    """What to type to look at the table."""
    return f"embedding-atlas {shlex.quote(str(file))} --x x --y y --neighbors neighbors"


def write_table(file: Path, data: AtlasData) -> None:
    """Write the table.

    Args:
        file: new.
        data: of the atlas, with a map.
    """
    import pyarrow as arrow  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    schema = _schema(arrow, data)
    rows_of = {int(code): row for row, code in enumerate(data.map.code_ids)}
    with parquet.ParquetWriter(file, schema) as writer:
        for first in range(0, len(rows_of), ROWS):
            rows = range(first, min(first + ROWS, len(rows_of)))
            writer.write_table(arrow.Table.from_pylist([_row(data, row, rows_of) for row in rows], schema))


def _schema(arrow: Any, data: AtlasData) -> "arrow.Schema":
    picture = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    columns = [("code", arrow.string()), ("number", arrow.int32()), ("x", arrow.float32()), ("y", arrow.float32())]
    columns += [("norm", arrow.float32()), (_hits_name(data), arrow.int64()), ("in_use", arrow.bool_())]
    if not data.is_moment:
        columns += [("steps_since_hit", arrow.int64()), ("drift", arrow.float32())]
    if data.reader.index is not None:
        columns += [("hits", arrow.int64()), ("patch", picture), ("image_name", arrow.string())]
        if len(data.reader.index.classes) > 1:
            columns += [("class", arrow.string()), ("class_share", arrow.float32())]
    ids = [("ids", arrow.list_(arrow.int32())), ("distances", arrow.list_(arrow.float32()))]
    return arrow.schema([*columns, ("neighbors", arrow.struct(ids))])


def _hits_name(data: AtlasData) -> str:
    """Of the column of a code's tokens on the map: by what they are."""
    return {"validation tokens": "validation_tokens", "tokens of training": "training_tokens"}.get(
        data.map.counted, "map_tokens"
    )


def _row(data: AtlasData, row: int, rows_of: dict[int, int]) -> dict[str, Any]:
    plane, index = data.map, data.reader.index
    code = int(plane.code_ids[row])
    x, y = plane.codes[-1, row].tolist()
    near = [(rows_of[other], far) for other, far in data.near.get(code, []) if other in rows_of]
    told = {
        "code": f"code {code}",
        "number": code,
        "x": x,
        "y": y,
        "norm": float(np.linalg.norm(data.codebook[code]) if data.codebook is not None else plane.norms[-1, row]),
        _hits_name(data): int(plane.hits[-1, row]),
        "in_use": bool(plane.hits[-1, row] > 0),
        "steps_since_hit": None if plane.idle[-1, row] == NOT_STORED else int(plane.idle[-1, row]),
        "drift": float(plane.drift[-1, row]),
        "neighbors": {"ids": [other for other, _ in near], "distances": [far for _, far in near]},
    }
    if index is not None:
        told["hits"] = int(index.counts[code])
        told["in_use"] |= told["hits"] > 0
        typical = index.typical([code], 1)
        if len(typical):
            token = int(typical[0])
            told["patch"] = {"bytes": _png(index.cut(token)[0]), "path": f"{code}.png"}
            told["image_name"] = data.image_names[index.place(token)[0]]
            here = index.class_counts([code])
            if len(index.classes) > 1 and here.any():
                told["class"] = index.classes[int(here.argmax())]
                told["class_share"] = float(here.max() / here.sum())
    return told


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG")
    return stream.getvalue()
