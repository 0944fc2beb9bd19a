"""The door for pictures: formats by content, ordinary files, bounded sizes, one exception that gives the reason."""

import io
import os
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from ibqlab.data.pictures import (
    FORMATS,
    READABLE,
    SUFFIXES,
    UnreadablePicture,
    is_picture_name,
    open_picture,
    picture_size,
    read_rgb,
)

DOORS = (open_picture, read_rgb, picture_size)


def content(kind: str, size: tuple[int, int] = (10, 8)) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(stream, format=kind)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a hundred bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("kind", READABLE)
def test_every_named_format_is_read_from_path_bytes_and_stream(tmp_path, kind):
    file = tmp_path / f"picture{FORMATS[kind][0]}"
    file.write_bytes(content(kind))
    assert is_picture_name(file.name)
    for door in (open_picture, read_rgb):
        for given in (file, str(file), file.read_bytes(), io.BytesIO(file.read_bytes())):
            picture = door(given, file.name)
            assert picture.size == (10, 8)
            assert np.abs(np.asarray(picture.convert("RGB")).mean((0, 1)) - (200, 100, 50)).max() < 6
    assert picture_size(file) == (8, 10)


def test_the_common_formats_are_read_here():
    assert {"JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "TGA"} <= set(READABLE)
    assert {".jpg", ".jfif", ".jpe", ".png", ".tga"} <= set(SUFFIXES)


@pytest.mark.parametrize("door", DOORS)
def test_a_postscript_file_named_as_a_picture_starts_no_program(tmp_path, monkeypatch, door):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **_: started.append(given))
    file = tmp_path / "x.jpg"
    file.write_bytes(content("EPS"))
    with pytest.raises(UnreadablePicture, match="its content is none of JPEG, PNG"):
        door(file)
    assert not started


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "SGI", "MSP", "PCX", "SPIDER"])
def test_formats_that_are_not_named_are_refused_whatever_the_suffix(tmp_path, kind):
    stream = io.BytesIO()
    mode = {"MSP": "1", "SPIDER": "F"}.get(kind, "RGB")
    Image.new(mode, (32, 32)).save(stream, format=kind)
    for suffix in (".jpg", ".tif", ".png"):
        with pytest.raises(UnreadablePicture):
            open_picture(stream.getvalue(), "x" + suffix)


def test_nothing_else_opens_pictures():
    root = Path(__file__).parents[1]
    door = root / "ibqlab/data/pictures.py"
    inside = [file for place in ("ibqlab", "experiments", "notebooks") for file in (root / place).rglob("*")]
    files = [file for file in inside if file.suffix in (".py", ".ipynb")]
    assert door in files
    opening = re.compile(r"\bImage\.open\(|\bimread\(|\bread_image\(|\bdecode_(image|jpeg|png)\(")
    others = [str(file) for file in files if file != door and opening.search(file.read_text(encoding="utf-8"))]
    assert not others, "open pictures with ibqlab.data.pictures"


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 16_000_000), "1 × 16,000,000 pixels; a side may have 131,072"),
        ((20_000, 20_000), "more than 178,956,970 pixels"),
        ((2**31 - 1, 2**31 - 1), "more than"),
    ],
)
def test_a_header_that_claims_too_much_is_refused_before_decoding(door, size, message):
    with pytest.raises(UnreadablePicture, match=message):
        door(png_header(*size))


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(UnreadablePicture):
        read_rgb(png_header(*size))


@pytest.mark.parametrize("kind", READABLE)
def test_a_cut_file_is_refused(kind):
    whole = content(kind, (64, 64))
    with pytest.raises(UnreadablePicture, match=r"^cut\.[a-z0-9]+ cannot be read as a picture: \S"):
        read_rgb(whole[: len(whole) // 2], "cut" + FORMATS[kind][0])


@pytest.mark.parametrize("door", DOORS)
def test_only_ordinary_files_are_opened(tmp_path, door):
    pipe, circle = tmp_path / "pipe.png", tmp_path / "circle.png"
    os.mkfifo(pipe)
    circle.symlink_to(circle)
    for file, reason in [
        (pipe, "is a pipe; give an ordinary file"),
        (tmp_path, "is a folder; give an ordinary file"),
        ("/dev/zero", "is a device; give an ordinary file"),
        (circle, "a link that leads back to itself"),
        (tmp_path / "none.png", "there is no such file"),
        (tmp_path / ("x" * 300 + ".png"), "the name is too long for this disk; choose a shorter one"),
        ("a\0b.png", "the name holds a zero byte; no file can be called so"),
    ]:
        with pytest.raises(UnreadablePicture) as refused:
            door(file)
        assert refused.value.reason.endswith(reason)


def test_a_file_without_signature_is_a_targa_only_by_its_suffix():
    whole = content("TGA")
    assert read_rgb(whole, "picture.TGA").size == (10, 8)
    with pytest.raises(UnreadablePicture, match="its content is none of"):
        read_rgb(whole, "picture.jpg")


def test_values_of_32_bits_are_refused_with_the_reason():
    stream = io.BytesIO()
    Image.new("F", (4, 4)).save(stream, format="TIFF")
    with pytest.raises(UnreadablePicture, match=r"32-bit values .* store 8 or 16 bits"):
        read_rgb(stream.getvalue(), "range.tif")


def test_the_message_is_one_line_whatever_the_name():
    with pytest.raises(UnreadablePicture) as refused:
        open_picture(b"nothing", "x\n\x1b[31m.png")
    assert str(refused.value).startswith("x\\x0a\\x1b[31m.png cannot be read as a picture: its content is none of")
    assert "\n" not in str(refused.value)


def test_the_exception_crosses_to_another_process():
    error = pickle.loads(pickle.dumps(UnreadablePicture("a.png", "image file is truncated")))
    assert (error.name, error.reason) == ("a.png", "image file is truncated")


def test_a_file_that_may_not_be_read_is_refused_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(content("PNG"))
    open_file = os.open

    def refuse(path, *arguments, **settings):
        if str(path).endswith("a.png"):
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments, **settings)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UnreadablePicture, match=r"a\.png cannot be read .*: permission denied; ask its owner"):
        read_rgb(tmp_path / "a.png")
