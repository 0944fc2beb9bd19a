"""Tar shards: the folder they were made of, read at random; exact resume; and every way a shard can be wrong."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_files import dead_process

from ibqlab.base.files import RunError, temporary_beside
from ibqlab.data import DataConfig, open_data, training_batches, validation_batches, write_shards
from ibqlab.data import shard_index as shard_index_module
from ibqlab.data.file_list import NO_CLASS
from ibqlab.data.shard_index import ShardList, index_shards
from ibqlab.data.shards import OpenFiles, find_shards
from ibqlab.data.tar_members import split_key

IMAGES = 23


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("IBQLAB_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in three class folders, of several formats and sizes."""
    root = tmp_path_factory.mktemp("pictures") / "train"
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        place = root / ("n01", "n02", "n03/deeper")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        picture = rng.integers(0, 256, (17 + number, 24, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"n_{number:03}.{('JPEG', 'png', 'webp')[number % 3]}")
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    """The folder as shards of five images."""
    target = tmp_path_factory.mktemp("sets") / "train"
    write_shards(folder, target, images_per_shard=5, progress=False)
    return target


def config(source: Path | str, **settings) -> DataConfig:
    return DataConfig(source=str(source), **{"image_size": 16, "validation_share": 0.3, **settings})


def names_of(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def train(source, steps: int, **settings):
    return list(training_batches(source, steps=steps, **({"batch_size": 4, "seed": 7, "start_step": 0} | settings)))


def assert_same(one, other) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def png(value: int = 0, size: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(stream, format="PNG")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def labelled(count: int, start: int = 0) -> dict[str, bytes]:
    members = {}
    for number in range(start, start + count):
        members |= {f"{number:04}.png": png(number), f"{number:04}.cls": b"%d" % (number % 3)}
    return members


# The same images as the folder


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("resize", ["pil", "opencv"])
def test_shards_are_the_folder(folder, shards, split, resize):
    ours, theirs = (open_data(config(place, resize=resize), split) for place in (shards, folder))
    assert isinstance(ours.files, ShardList)
    assert names_of(ours) == names_of(theirs)
    assert ours.classes == theirs.classes == ["n01", "n02", "n03"]
    assert ours.fingerprint == theirs.fingerprint
    for index in range(len(ours)):
        for seed in (0, 5):
            one, other = ours.get(index, seed), theirs.get(index, seed)
            assert torch.equal(one.image, other.image)
            assert one.label == other.label == ours.classes.index(ours.name(index).split("/")[0])
    assert_same(train(ours, 9), train(theirs, 9))


def test_webdataset_reads_what_is_written(folder, shards):
    from webdataset import WebDataset  # noqa: PLC0415 - optional

    urls = sorted(str(path) for path in shards.glob("*.tar"))
    assert [Path(url).name for url in urls] == [f"train-{number:06}.tar" for number in range(5)]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    samples = list(WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [name.rpartition(".")[0] for name in names]
    for sample, name in zip(samples, names, strict=True):
        extension = name.rpartition(".")[2].lower()
        assert sample[extension] == (folder / name).read_bytes()
        assert int(sample["cls"]) == ["n01", "n02", "n03"].index(name.split("/")[0])


def test_webdataset_writes_what_is_read(tmp_path):
    from webdataset import ShardWriter  # noqa: PLC0415 - optional

    with ShardWriter(str(tmp_path / "w-%04d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            pixels = np.full((16, 16, 3), number, dtype=np.uint8)
            writer.write({"__key__": f"key{number}", "png": pixels, "cls": number, "txt": "unused"})
    source = open_data(config(tmp_path, validation_source=str(tmp_path)), "train")
    assert source.classes == ["0", "1", "2", "3", "4"]
    got = [source.get(index, 0) for index in range(5)]
    assert [(int(sample.image.max()), sample.label) for sample in got] == [(n, n) for n in range(5)]


@pytest.mark.parametrize("source", ["photos", "digits"])
def test_built_in_images_become_shards(tmp_path, source):
    images = open_data(DataConfig(source=source, image_size=16), "validation")
    write_shards(images, tmp_path / "set", images_per_shard=1000, progress=False)
    ours = open_data(config(tmp_path / "set", validation_source=str(tmp_path / "set"), flip=False), "train")
    assert len(ours) == len(images)
    assert ours.classes == images.classes
    for index in (0, 7, len(ours) - 1):
        assert torch.equal(ours.get(index, 1).image, images.get(index, 0).image)
        assert ours.get(index, 1).label == images.get(index, 0).label


# Batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [1, 3])
def test_loader_processes_change_nothing(shards, workers):
    source = open_data(config(shards, resize="opencv"), "train")
    source.get(0, 0)  # an open shard goes into the fork
    assert_same(train(source, 6), train(source, 6, workers=workers))


def test_resume_in_the_middle_of_an_epoch_goes_on_exactly(shards):
    whole = train(open_data(config(shards), "train"), 12)
    assert_same(whole[5:], train(open_data(config(shards), "train"), 7, start_step=5))


def test_ranks_together_see_the_batches_of_one(shards):
    whole = train(open_data(config(shards), "train"), 6)
    ranks = [train(open_data(config(shards), "train"), 6, rank=rank, world_size=2) for rank in range(2)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own(tmp_path):
    write_tar(tmp_path / "a.tar", labelled(7))
    write_tar(tmp_path / "b.tar", labelled(5, start=7))
    source = open_data(config(tmp_path, validation_source=str(tmp_path)), "train")
    seen = [int(image.max()) for batch in train(source, 6) for image in batch.images]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]


def test_validation_of_shards_is_in_hash_order_whatever_the_shards(folder, shards, tmp_path):
    write_shards(folder, tmp_path / "other", images_per_shard=23, progress=False)
    orders = []
    for place in (shards, tmp_path / "other", folder):
        source = open_data(config(folder, validation_source=str(place)), "validation")
        assert sum(len(batch.labels) for batch in validation_batches(source, images=100, batch_size=4)) == IMAGES
        orders.append(names_of(source))
        assert [source.get(i, 0).label for i in range(IMAGES)] == [int(name[2]) - 1 for name in orders[-1]]
    assert orders[0] == orders[1] == orders[2]
    assert orders[0] != sorted(orders[0])


def test_excluded_images_are_left_out(shards):
    source = open_data(config(shards, exclude=("n_000.JPEG",), validation_source=str(shards)), "train")
    assert len(source) == IMAGES - 1
    assert "n01/n_000.JPEG" not in names_of(source)
    with pytest.raises(ValueError, match=r"exclude must fit an image; got 'n_000.jpeg'"):
        open_data(config(shards, exclude=("n_000.jpeg",)), "train")


# Labels


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"cls": b"2"}, 2),
        ({"cls": b" 2\n"}, 2),
        ({"cls": b"-1"}, -1),
        ({"json": b'{"label": 2, "url": "x"}'}, 2),
        ({"json": b'{"label": 7}', "cls": b"2"}, 2),
    ],
)
def test_labels_in_text_and_in_json(tmp_path, label, expected):
    members = {"a.jpg": png(), **{f"a.{extension}": content for extension, content in label.items()}}
    write_tar(tmp_path / "a.tar", members | labelled(3))
    write_tar(tmp_path / "b.tar", dict(reversed(members.items())) | {"b.png": png(), "b.cls": b"3"})
    assert index_shards([tmp_path / "a.tar"], "x").labels.tolist() == [expected, 0, 1, 2]
    assert index_shards([tmp_path / "b.tar"], "x").labels.tolist() == [expected, 3]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"", "a.cls": b"cat"}, r"must be an integer from -1.*got b'cat' in a.cls"),
        ({"a.png": b"", "a.cls": b"-2"}, "got b'-2'"),
        ({"a.png": b"", "a.cls": b"1.0"}, "got b'1.0'"),
        ({"a.png": b"", "a.cls": b"1_000"}, "got b'1_000'"),
        ({"a.png": b"", "a.cls": b"4294967297"}, r"from -1 to 1,048,575 .*got b'4294967297'"),
        ({"a.png": b"", "a.cls": b"100000000"}, "got b'100000000'"),
        ({"a.png": b"", "a.cls": b"9" * 5000}, "got b'9999"),
        ({"a.png": b"", "a.json": b'{"label": 18446744073709551617}'}, r"in a\.json"),
        ({"a.png": b"", "a.json": b"[" * 100_000}, r"in a\.json"),
        ({"a.png": b"", "a.json": b'{"label": ' + b"9" * 5000 + b"}"}, r"in a\.json"),
        ({"a.png": b"", "a.cls": b" " * 2**21 + b"1"}, r"may have 1,048,576 bytes; a\.cls of .* has 2,097,153"),
        ({"x/a.b.png": b"", "x/a.b.cls": b"1"}, r"first dot of its file name.*'x/a.b.png' has the key 'x/a' and the"),
        ({"a.png": b"", "a.json": b'{"label": "1"}'}, r"in a\.json"),
        ({"a.png": b"", "a.json": b'{"label": true}'}, r"in a\.json"),
        ({"a.png": b"", "a.json": b'{"label'}, r"in a\.json"),
        ({"a.png": b"", "a.jpg": b"", "a.cls": b"1"}, "a key must have one image; got 'a' twice"),
        ([("a.png", b""), ("a.cls", b"1"), ("a.png", b"")], "a key must have one image; got 'a' twice"),
        ({"a.cls": b"1"}, r"must hold at least one image.*1 files that hold none"),
        ({}, "must hold at least one image"),
    ],
)
def test_wrong_content_is_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        index_shards([write_tar(tmp_path / "a.tar", members)], "x")


def test_shards_without_labels_are_of_one_class(tmp_path):
    """As img2dataset writes them: picture, caption and facts."""
    members = {}
    for number in range(4):
        members |= {f"{number}.jpg": png(number), f"{number}.txt": b"a cat", f"{number}.json": b'{"url": "x"}'}
    path = write_tar(tmp_path / "a.tar", members)
    for _ in range(2):  # the second time from the cache
        listing = index_shards([path], "x")
        assert (listing.classes, listing.labels.tolist()) == ([NO_CLASS], [0, 0, 0, 0])
    source = open_data(config(tmp_path, validation_source=str(tmp_path)), "train")
    assert [source.get(index, 0).label for index in range(4)] == [0, 0, 0, 0]
    assert not any(source.get(index, 0).broken for index in range(4))


def test_unlabelled_images_among_labelled_ones_are_told_and_of_no_class(tmp_path):
    path = write_tar(tmp_path / "a.tar", labelled(3) | {"x.png": png()})
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of 4 images of x have no label and count as of no class, first x"):
            assert index_shards([path], "x").labels.tolist() == [0, 1, 2, -1]


def test_a_label_far_above_the_number_of_images_is_told(tmp_path):
    path = write_tar(tmp_path / "a.tar", labelled(3) | {"x.png": png(), "x.cls": b"440764"})
    with pytest.warns(UserWarning, match=r"largest label of x is 440,764, in x\.png, and there are only 4 images"):
        assert len(index_shards([path], "x").classes) == 440_765


def test_images_with_dots_in_their_keys_are_counted_beside_others(tmp_path):
    path = write_tar(tmp_path / "a.tar", labelled(3) | {"x.v2.png": png(), "0000.seg.png": png()})
    with pytest.warns(UserWarning, match=r"1 members of x are left out.*'x.v2.png' has the key 'x' and the suffix"):
        assert len(index_shards([path], "x")) == 3


def test_a_key_in_two_shards_is_refused(tmp_path):
    paths = [write_tar(tmp_path / "a.tar", labelled(3)), write_tar(tmp_path / "b.tar", labelled(3, start=2))]
    with pytest.raises(ValueError, match=r"once over all shards; got '0002' in .*a\.tar and in .*b\.tar"):
        index_shards(paths, "x")


def test_other_members_are_left_alone(tmp_path):
    extra = {"./x/0009.png": png(9), "./x/0009.cls": b"1", "x/0009.seg.png": png(), "x/._0009.png": b"", "README": b"x"}
    listing = index_shards([write_tar(tmp_path / "a.tar", extra)], "x")
    assert listing.names.all() == ["x/0009.png"]


def test_long_names_and_letters_of_every_language(tmp_path):
    root = tmp_path / ("d" * 90) / "äöü 日本"
    root.mkdir(parents=True)
    for name in ("x" * 150, "a.b.c", "%06d"):
        (root / f"{name}.png").write_bytes(png())
    write_shards(root.parent, tmp_path / "100%", progress=False)
    source = open_data(config(tmp_path / "100%", validation_source=str(tmp_path / "100%")), "train")
    assert [name.split("/")[1] for name in names_of(source)] == ["%06d.png", "a_b_c.png", "x" * 150 + ".png"]
    assert source.classes == ["äöü 日本"]
    assert all(source.get(index, 0).broken == () for index in range(3))


def test_numbers_and_names_of_classes_meet(folder, shards, tmp_path):
    """Shards without class names count as sorted class folders do, if there are as many of both."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in shards.glob("*.tar"):
        (bare / path.name).write_bytes(path.read_bytes())
    for source, validation in ((bare, folder), (folder, bare), (bare, bare), (bare, shards)):
        ours = open_data(config(source, validation_source=str(validation)), "validation")
        labels = [ours.get(index, 0).label for index in range(IMAGES)]
        assert labels == [int(name[2]) - 1 for name in names_of(ours)]
    write_tar(tmp_path / "few" / "a.tar", labelled(2))
    with pytest.raises(ValueError, match=r"among the 2 classes of source; got n01, n02, n03 in"):
        open_data(config(tmp_path / "few", validation_source=str(folder)), "validation")
    with pytest.raises(ValueError, match=r"among the 2 classes of source; got 2 in"):
        open_data(config(tmp_path / "few", validation_source=str(bare)), "validation")


def test_class_names_must_suffice(tmp_path):
    path = write_tar(tmp_path / "a.tar", labelled(3))
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    with pytest.raises(ValueError, match=r"one for each label 0 to 2 \(1,048,576 at most\); got 2\. Complete it"):
        index_shards([path], "x")
    for text in ("cat", "{}", "[" * 100_000, '["a", "b", 3]', "[" + "9" * 5000 + "]"):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(ValueError, match=r"classes\.json.*must be a JSON list of class names.*Complete it"):
            index_shards([path], "x")
    (tmp_path / "classes.json").unlink()
    os.mkfifo(tmp_path / "classes.json")
    with pytest.raises(ValueError, match=r"classes\.json is a pipe"):
        index_shards([path], "x")


# Damage


def test_a_truncated_shard_is_named_wherever_it_is_cut(tmp_path):
    whole = write_tar(tmp_path / "a.tar", labelled(3)).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        used = max(info.offset_data + -(-info.size // 512) * 512 for info in tar)
    for length in range(0, used + 512, 100):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.tar.*Copy it again"):
            index_shards([tmp_path / "a.tar"], "x")
    (tmp_path / "a.tar").write_bytes(whole[: used + 512])
    assert len(index_shards([tmp_path / "a.tar"], "x")) == 3


def test_a_damaged_header_is_no_end(tmp_path):
    path = write_tar(tmp_path / "a.tar", labelled(3))
    with tarfile.open(path) as tar:
        header = tar.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[header + 3] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"none after byte {header}, so it is cut off or damaged"):
        index_shards([path], "x")


@pytest.mark.parametrize("content", [b"no tar" * 300, b"", b"x"])
def test_a_file_that_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"must be a whole, uncompressed tar file; got .*a\.tar"):
        open_data(config(tmp_path), "train")


def pax_tar(path: Path, headers: dict[str, str]) -> Path:
    """A shard whose first image has such extended headers."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(2):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(png())
            info.pax_headers = headers if number == 0 else {}
            tar.addfile(info, io.BytesIO(png()))
    return path


@pytest.mark.parametrize(
    "headers",
    [
        {"size": "-2048"},
        {"size": "-99999999999999999999"},
        {"size": "99999999999999999999"},
        {"size": "1000000000000"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.png", "GNU.sparse.realsize": "9"},
        {"GNU.sparse.map": "1,2,x", "GNU.sparse.size": "9"},
    ],
)
def test_headers_that_lead_back_or_on_for_ever_are_refused(tmp_path, headers):
    with pytest.raises(ValueError, match=r"whole, uncompressed tar file; got .*Copy it again"):
        index_shards([pax_tar(tmp_path / "a.tar", headers)], "x")


def test_a_header_longer_than_any_is_refused(tmp_path):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 2**40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(ValueError, match=r"a header says it has 1,099,511,\d+,\d+ bytes"):
        index_shards([tmp_path / "a.tar"], "x")


def test_extended_headers_in_a_row_are_no_recursion(tmp_path):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 11
    (tmp_path / "a.tar").write_bytes((info.tobuf() + b"11 path=ab\n".ljust(512, b"\0")) * 5000 + bytes(1024))
    with pytest.raises(ValueError, match="whole, uncompressed tar file"):
        index_shards([tmp_path / "a.tar"], "x")


def test_a_shard_that_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"a\.tar is a pipe; give an ordinary file"):
        open_data(config(tmp_path), "train")
    with pytest.raises(ValueError, match=r"1 of 1 are missing or no ordinary files, first .*a\.tar"):
        open_data(config(tmp_path / "a.tar"), "train")


def test_compressed_shards_are_refused_with_the_rule(tmp_path):
    for name in ("x.tar.gz", "y.tgz"):
        write_tar(tmp_path / name, labelled(3), mode="w:gz")
        with pytest.raises(ValueError, match=r"A shard must be an uncompressed \.tar, .*unpack it"):
            open_data(config(tmp_path / name), "train")
    with pytest.raises(ValueError, match=r"2 compressed shards; a shard must be an uncompressed \.tar: unpack"):
        open_data(config(tmp_path), "train")
    with pytest.raises(ValueError, match=r"A shard must be an uncompressed \.tar"):
        open_data(config(f"{tmp_path}/x-{{000..009}}.tar.gz"), "train")


def test_a_compressed_shard_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", labelled(3), mode="w:gz")
    with pytest.raises(ValueError, match=r"uncompressed.*unpack a compressed one"):
        open_data(config(tmp_path), "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_another_image_stands_in_for_an_unreadable_one(tmp_path, workers):
    members = labelled(6)
    members["0002.png"] = members["0002.png"][:40]
    write_tar(tmp_path / "a.tar", members)
    source = open_data(config(tmp_path, validation_source=str(tmp_path)), "train")
    samples = [source.get(2, seed) for seed in range(30)]
    assert {sample.broken for sample in samples} == {("0002.png",)}
    assert {int(sample.image.max()) for sample in samples} == {0, 1, 3, 4, 5}
    batches = train(source, 3, workers=workers)
    assert [name for batch in batches for name in batch.broken] == ["0002.png", "0002.png"]


def test_a_shard_cut_after_indexing_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", labelled(3))
    source = open_data(config(tmp_path, validation_source=str(tmp_path)), "train")
    os.truncate(path, 512)
    with pytest.raises(ValueError, match=r"all 3 train images in .* fail, the last with: .*it was cut after it was"):
        source.get(0, 0)


# The index


def test_the_index_is_kept_until_a_shard_changes(tmp_path, cache, monkeypatch):
    path = write_tar(tmp_path / "a.tar", labelled(3))
    read = []
    members = shard_index_module.read_members
    monkeypatch.setattr(shard_index_module, "read_members", lambda path: read.append(path) or members(path))
    first, second = index_shards([path], "x"), index_shards([path], "x")
    assert read == [path]
    for name in ("offsets", "sizes", "labels", "shards"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype
    assert first.names.all() == second.names.all() == ["0000.png", "0001.png", "0002.png"]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    index_shards([path], "x")
    write_tar(path, labelled(4))
    assert len(index_shards([path], "x")) == 4
    assert len(read) == 3
    assert {file.suffix for file in (cache / "shards").iterdir()} == {".npz"}, "nothing half-written stays"


@pytest.mark.parametrize("damage", [b"", b"PK no archive", None])
def test_a_damaged_index_is_made_anew(tmp_path, cache, damage):
    path = write_tar(tmp_path / "a.tar", labelled(3))
    index_shards([path], "x")
    (stored,) = (cache / "shards").iterdir()
    content = stored.read_bytes()
    stored.write_bytes(content[:-200] if damage is None else damage)
    assert len(index_shards([path], "x")) == 3
    assert stored.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("offsets", lambda values: values + 10**12),
        ("offsets", lambda values: values - 10**6),
        ("sizes", lambda values: -values),
        ("shards", lambda values: values + 1),
        ("labels", lambda values: values + 2**30),
        ("labels", lambda values: values[:2]),
        ("labels", lambda values: values.astype(float)),
        ("ends", lambda values: values + 1),
        ("letters", lambda values: values.reshape(1, -1)),
    ],
)
def test_an_index_that_does_not_fit_the_shards_is_made_again(tmp_path, cache, name, change):
    path = write_tar(tmp_path / "a.tar", labelled(3))
    whole = index_shards([path], "x")
    (stored,) = (cache / "shards").iterdir()
    arrays = dict(np.load(stored))
    np.savez(stored, **arrays | {name: change(arrays[name])})
    again = index_shards([path], "x")
    assert again.names.all() == whole.names.all()
    assert [array.tolist() for array in (again.offsets, again.sizes, again.labels, again.shards)] == [
        array.tolist() for array in (whole.offsets, whole.sizes, whole.labels, whole.shards)
    ]


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="IBQLAB_CACHE to a folder that you may write to"):
        assert len(index_shards([write_tar(tmp_path / "a.tar", labelled(3))], "x")) == 3


def test_an_index_is_compact(tmp_path):
    """Arrays only: 1.28 million images take 80 MB, and no loader process copies a million objects."""
    write_tar(tmp_path / "a.tar", {f"{n:05}.{e}": b"1" for n in range(1000) for e in ("png", "cls")})
    listing = index_shards([tmp_path / "a.tar"], "x")
    letters = 1000 * len("00000.png")
    assert len(pickle.dumps(listing)) < letters + 1000 * (8 + 8 + 8 + 4 + 4) + 3000


# Opening


def test_a_folder_of_images_means_no_shards(folder):
    assert find_shards(str(folder), "source") == []
    assert find_shards(str(folder / "nothing"), "source") == []


def test_shards_are_found_by_folder_file_and_pattern(shards, monkeypatch):
    expected = [shards / f"train-{number:06}.tar" for number in range(5)]
    assert find_shards(str(shards), "source") == expected
    assert find_shards(f"{shards}/train-{{000000..000004}}.tar", "source") == expected
    assert find_shards(f"{shards}/train-{{000003,000001}}.tar", "source") == [expected[3], expected[1]]
    assert find_shards(str(expected[2]), "source") == [expected[2]]
    assert len(open_data(config(expected[2], validation_source=str(shards)), "train")) == 5
    monkeypatch.setattr(Path, "home", lambda: shards)
    monkeypatch.setenv("HOME", str(shards))
    assert find_shards("~/train-{000000..000001}.tar", "source") == expected[:2]


def test_patterns_that_find_nothing_are_refused(shards):
    with pytest.raises(ValueError, match=r"every shard of source must exist.*95 of 100 are missing.*train-000005\.tar"):
        open_data(config(f"{shards}/train-{{000000..000099}}.tar"), "train")
    with pytest.raises(ValueError, match=r"validation_source must exist.*1 of 1 are missing"):
        open_data(config(shards, validation_source=f"{shards}/other.tar"), "validation")
    with pytest.raises(ValueError, match="must be named once"):
        open_data(config(f"{shards}/train-{{000000,000000}}.tar"), "train")


def test_a_folder_of_both_is_refused(folder, tmp_path):
    write_tar(tmp_path / "a.tar", labelled(3))
    (tmp_path / ".checkpoints").mkdir()
    assert find_shards(str(tmp_path), "source") == [tmp_path / "a.tar"]
    (tmp_path / "cat").mkdir()
    with pytest.raises(
        ValueError, match=r"either a folder of images or a folder of shards.*1 \.tar files and 1 images"
    ):
        open_data(config(tmp_path), "train")


def test_a_pattern_without_webdataset_names_the_extra(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    assert len(open_data(config(shards), "train")) > 0
    with pytest.raises(ImportError, match=r"braceexpand.*pip install 'ibqlab\[data\]'"):
        open_data(config(f"{shards}/train-{{000000..000004}}.tar"), "train")


def test_a_shard_source_can_be_sent_to_another_process(shards):
    source = open_data(config(shards), "train")
    expected = source.get(3, 5).image
    copy = pickle.loads(pickle.dumps(source))
    assert not copy.files.open_files.handles
    assert torch.equal(copy.get(3, 5).image, expected)


def test_only_so_many_files_are_open(tmp_path):
    paths = []
    for number in range(6):
        paths.append(str(tmp_path / str(number)))
        Path(paths[-1]).write_bytes(bytes(range(number, number + 10)))
    files = OpenFiles(paths, limit=2)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for number in (0, 1, 2, 3, 4, 5, 0, 5, 1, 0):
        assert files.read(number, 3, 2) == bytes([number + 3, number + 4])
        assert len(files.handles) <= 2
    if before:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    del files
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "pattern",
    [
        "x-{0..999999999}.tar",
        "x" + "{a,b}" * 40 + ".tar",
        "x{" + "{a,b}" * 40 + ",c}.tar",
        "{a..z}" * 9 + ".tar",
        "{0..99999999999999999999}.tar",
        "{a," * 400 + "}" * 400 + ".tar",
    ],
)
def test_a_pattern_of_too_many_shards_is_refused_before_it_is_expanded(pattern):
    with pytest.raises(ValueError, match="may stand for 1,000,000 shards at most"):
        open_data(config(pattern), "train")


def test_an_unbalanced_pattern_is_refused():
    with pytest.raises(ValueError, match=r"must have a } for every {; source got 'x-{000..009\.tar'"):
        open_data(config("x-{000..009.tar"), "train")


def test_more_shards_than_files_may_be_open(tmp_path):
    for number in range(260):
        write_tar(tmp_path / "set" / f"{number:03}.tar", {f"{number}.png": png(number % 256), f"{number}.cls": b"0"})
    script = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from ibqlab.data import DataConfig, open_data
source = open_data(DataConfig(source=sys.argv[1], validation_source=sys.argv[1], image_size=16), "train")
samples = [source.get(index, 0) for _ in range(2) for index in range(len(source))]
assert [int(sample.image[0, 0, 0]) for sample in samples] == [number % 256 for number in range(260)] * 2
assert not any(sample.broken for sample in samples) and len(source.files.open_files.handles) == 16
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "set")], check=True)


def test_keys_are_cut_as_in_webdataset():
    assert split_key("a/b.c/d.e.PNG") == ("a/b.c/d", "e.png")
    assert split_key("d.JPEG") == ("d", "jpeg")
    assert split_key("d") == ("d", "")


# Writing


def test_the_same_folder_gives_the_same_bytes(folder, shards, tmp_path):
    paths = write_shards(str(folder), tmp_path / "deep" / "train", images_per_shard=5, progress=False)
    assert [path.read_bytes() for path in paths] == [(shards / path.name).read_bytes() for path in paths]
    assert json.loads((tmp_path / "deep/train/classes.json").read_text()) == ["n01", "n02", "n03"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["train"]


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "set").mkdir()
    write_shards(folder, tmp_path / "set", progress=False)
    before = (tmp_path / "set" / "set-000000.tar").read_bytes()
    with pytest.raises(ValueError, match=r"new or empty folder; .*set holds something"):
        write_shards(folder, tmp_path / "set", progress=False)
    assert (tmp_path / "set" / "set-000000.tar").read_bytes() == before


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    for name in ("cat/a.png", "cat/a.jpg", "cat/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png())
    with pytest.raises(ValueError, match=r"'cat/a' stands for two images\. Rename"):
        write_shards(tmp_path / "in", tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_a_killed_writer_left_is_deleted_and_a_full_disk_is_said(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", dead_process)
        left = temporary_beside(tmp_path / "set{0}")
    left.mkdir()
    (left / "set-000000.tar").write_bytes(b"half")

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="disk or a quota is full"):
            write_shards(folder, tmp_path / "set{0}", progress=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set{0}").mkdir()
    paths = write_shards(folder, tmp_path / "set{0}", progress=False)
    assert paths[0].name == "set{0}-000000.tar" and paths[0].is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["set{0}"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have names on POSIX only")
def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png())
    os.mkfifo(tmp_path / "in" / "b.png")
    with pytest.raises(ValueError, match=r"b\.png.*a pipe"):
        write_shards(tmp_path / "in", tmp_path / "out", progress=False)
    (tmp_path / "in" / "b.png").unlink()
    with (tmp_path / "in" / "b.png").open("wb") as hole:
        hole.truncate(2**40)
    with pytest.raises(ValueError, match=r"b\.png.*larger than 1,024 MiB"):
        write_shards(tmp_path / "in", tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_cannot_be_written_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="images_per_shard must be at least 1, got 0"):
        write_shards(folder, tmp_path / "set", images_per_shard=0)
    with pytest.raises(FileNotFoundError, match="there is none at missing"):
        write_shards("missing", tmp_path / "set")
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.png").write_bytes(png())
    source = open_data(replace(config(tmp_path / "in"), validation_source=str(tmp_path / "in")), "train")
    (tmp_path / "in" / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be readable; b\.png cannot be read"):
        write_shards(source, tmp_path / "set", progress=False)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"pip install 'ibqlab\[data\]'"):
        write_shards(folder, tmp_path / "set")
    assert not (tmp_path / "set").exists()
