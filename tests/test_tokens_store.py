"""Stored tokens: what is written, how it goes on after a kill, who may read it, and in which order."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from registry import SMALL_DIGITS
from test_files import dead_process

from ibqlab.base import locking
from ibqlab.base.files import temporary_beside
from ibqlab.base.processes import own_device, share_of_work
from ibqlab.cli import main
from ibqlab.data import DataConfig, open_data, training_batches, training_requests, validation_requests
from ibqlab.data.batches import seed_of_choices
from ibqlab.quantizers import quantizer_config
from ibqlab.runs import Run, RunError
from ibqlab.tokenizer import AutoencoderConfig, Tokenizer, TokenizerConfig
from ibqlab.tokens import pieces as pieces_module
from ibqlab.tokens import writing as token_writing
from ibqlab.tokens.manifest import TokenStoreError, token_dtype
from ibqlab.tokens.store import TokenStore
from ibqlab.tokens.writing import TokenSettings, write_tokens
from ibqlab.training import recipe_config, train, train_generator

DIGITS = DataConfig(source="digits", image_size=8)


def make_tokenizer(seed=0, size=32):
    torch.manual_seed(seed)
    autoencoder = AutoencoderConfig(
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        resolution=8,
        latent_channels=4,
    )
    quantizer = quantizer_config({"name": "ibq", "codebook_size": size, "code_dim": 4})
    return Tokenizer(TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    return write_tokens(tokenizer, DIGITS, tmp_path_factory.mktemp("store") / "digits", progress=False)


@pytest.fixture
def pictures(tmp_path):
    """Eleven pictures of two classes, wider than high, of which one cannot be read."""
    rng = np.random.default_rng(0)
    for number in range(11):
        folder = tmp_path / "pictures" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 14, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return DataConfig(source=str(tmp_path / "pictures"), image_size=8, validation_share=0.3)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is written ---


def test_tokens_are_those_of_the_tokenizer(store, tokenizer):
    for split in ("train", "validation"):
        source, stored = open_data(DIGITS, split), store.split(split)
        assert stored.indices.shape == (len(source), 1, 16) and stored.indices.dtype == np.uint8
        images = torch.stack([source.get(index, 0).image for index in range(len(source))])
        with torch.no_grad():
            wanted = tokenizer.encode_indices(images).flatten(1)
        assert np.array_equal(stored.indices[:, 0], wanted.numpy())
        assert stored.labels.tolist() == source.labels
    manifest = store.manifest
    assert (manifest.codebook_size, manifest.grid, manifest.tokens_per_image) == (32, (4, 4), 16)
    assert manifest.tokenizer == tokenizer.fingerprint() and not manifest.flips
    assert sorted(path.name for path in store.path.iterdir()) == [
        "manifest.json",
        "tokenizer.safetensors",
        *(f"{split}_{part}.npy" for split in ("train", "validation") for part in ("labels", "tokens")),
    ]
    store.verify()
    assert "1,437 images × 1 views, 22,992 tokens of 4 × 4" in store.describe()


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (2**16, "uint16"), (2**18, "uint32")])
def test_the_smallest_integers_are_taken(size, dtype):
    assert token_dtype(size) == np.dtype(dtype)


def test_crops_and_mirror_images_are_views(tmp_path, tokenizer, pictures):
    found = write_tokens(tokenizer, pictures, tmp_path / "store", TokenSettings(crops=2), progress=False)
    training, validation = found.split("train"), found.split("validation")
    assert training.views == 4 and validation.views == 1 and found.manifest.flips
    source = open_data(pictures, "train")
    first, mirrored, second, _ = training.indices[0]
    assert not np.array_equal(first, second) and not np.array_equal(first, mirrored)
    seed = seed_of_choices(0, 0, 0)
    plain = DataConfig(**{**vars(pictures), "flip": False})
    image = open_data(plain, "train").get(0, seed).image[None]
    with torch.no_grad():
        for tokens, picture in ((first, image), (mirrored, image.flip(-1))):
            assert np.array_equal(tokens, tokenizer.encode_indices(picture).flatten().numpy())
    assert list(found.manifest.classes) == source.classes


def test_unreadable_images_are_named_and_left_out(tmp_path, tokenizer, pictures):
    bad = tmp_path / "pictures" / "class0" / "2.png"
    bad.write_bytes(b"no picture")
    found = write_tokens(tokenizer, pictures, tmp_path / "store", progress=False)
    named = (*found.manifest.train.broken, *found.manifest.validation.broken)
    assert len(named) == 1 and named[0].endswith("2.png")
    sizes = {split: len(open_data(pictures, split)) for split in ("train", "validation")}
    here = {split: len(found.split(split)) for split in sizes}
    assert sum(here.values()) == sum(sizes.values()) - 1
    assert (found.manifest.train.images, found.manifest.validation.images) == (here["train"], here["validation"])
    assert f"1 of {sum(sizes.values())} images unreadable: class0/2.png, left out" in found.describe()


@pytest.mark.parametrize("crops", [1, 2])
def test_tokens_of_the_readable_images_are_what_they_are_without_the_others(tmp_path, tokenizer, pictures, crops):
    settings = TokenSettings(crops=crops)
    whole = write_tokens(tokenizer, pictures, tmp_path / "whole", settings, progress=False).split("train")
    source = open_data(pictures, "train")
    place = 2
    (tmp_path / "pictures" / source.name(place)).write_bytes(b"nothing")
    found = write_tokens(tokenizer, pictures, tmp_path / "store", settings, progress=False).split("train")
    assert np.array_equal(found.indices, np.delete(whole.indices, place, axis=0))
    assert np.array_equal(found.labels, np.delete(whole.labels, place))


# --- interrupted, shared out, done before ---


class Killed(Exception):
    pass


def test_a_killed_command_goes_on_where_it_stopped(tmp_path, monkeypatch, tokenizer, store):
    monkeypatch.setattr(pieces_module, "PIECE", 200)
    encode, calls = tokenizer.encode_indices, []

    def encode_some(images):
        calls.append(len(images))
        if sum(calls) > 700:
            raise Killed
        return encode(images)

    monkeypatch.setattr(tokenizer, "encode_indices", encode_some)
    with pytest.raises(Killed):
        write_tokens(tokenizer, DIGITS, tmp_path / "store", progress=False)
    with pytest.raises(TokenStoreError, match=r"is not finished: start the same command again"):
        TokenStore(tmp_path / "store")
    calls.clear()
    monkeypatch.setattr(tokenizer, "encode_indices", lambda images: (calls.append(len(images)), encode(images))[1])
    again = write_tokens(tokenizer, DIGITS, tmp_path / "store", TokenSettings(batch_size=50), progress=False)
    assert sum(calls) == 1437 + 360 - 600
    assert contents(again.path) == contents(store.path)


SHARED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_tokens_store import DIGITS, make_tokenizer
from ibqlab.tokens import pieces, writing
pieces.PIECE = 100
writing.write_tokens(make_tokenizer(), DIGITS, sys.argv[1], progress=False)
"""


@pytest.mark.usefixtures("warm_start")
def test_two_processes_write_what_one_writes(tmp_path, store):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(tmp_path / "store"), os.path.dirname(__file__)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for child in children:
        assert child.wait(timeout=120) == 0, child.stderr.read().decode()
    assert contents(tmp_path / "store") == contents(store.path)


def test_a_finished_store_is_returned_and_another_is_refused(tmp_path, monkeypatch, tokenizer, store, pictures):
    monkeypatch.setattr(tokenizer, "encode_indices", None)
    before = contents(store.path)
    assert write_tokens(tokenizer, DIGITS, store.path, progress=False).manifest == store.manifest
    for other, data, says in (
        (make_tokenizer(1), DIGITS, "tokenizer differ"),
        (tokenizer, DataConfig(source="digits", image_size=16), "grid, data"),
        (tokenizer, pictures, "train images"),
    ):
        with pytest.raises(TokenStoreError, match=says):
            write_tokens(other, data, store.path, progress=False)
    assert contents(store.path) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TokenStoreError, match="exists and holds no tokens"):
        write_tokens(tokenizer, DIGITS, tmp_path, progress=False)


def test_a_store_from_before_a_setting_was_added_is_the_same_store(tmp_path, tokenizer, store):
    folder = shutil.copytree(store.path, tmp_path / "store")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["data"]["unreadable"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = contents(folder)
    assert write_tokens(tokenizer, DIGITS, folder, progress=False).manifest == store.manifest
    assert contents(folder) == before
    TokenStore(folder).check_data(DIGITS)


HOLD = """
import os, sys, time
from pathlib import Path
from ibqlab.base.locking import holding
with holding(Path(sys.argv[1])) as ours:
    if not os.fork():
        time.sleep(600)  # a process that loads images and outlives its parent for a while
    print(ours, flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process_whatever_its_children_do(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as child:
        try:
            assert child.stdout.readline() == b"True\n"
            assert locking.is_held(tmp_path / "lock")
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            # The grandchild may only just have been forked, and closes its handle first thing.
            deadline = time.monotonic() + 20
            while locking.is_held(tmp_path / "lock"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def test_a_full_disk_is_told_and_leaves_what_was_finished(tmp_path, monkeypatch, tokenizer, store):
    monkeypatch.setattr(pieces_module, "PIECE", 500)
    savez, written = np.savez, []

    def full(stream, **arrays):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(1)
        savez(stream, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(RunError, match="disk or a quota is full"):
        write_tokens(tokenizer, DIGITS, tmp_path / "store", progress=False)
    assert len(list((tmp_path / "store" / "unfinished").glob("*.npz"))) == 2
    monkeypatch.setattr(np, "savez", savez)
    assert contents(write_tokens(tokenizer, DIGITS, tmp_path / "store", progress=False).path) == contents(store.path)


def test_two_at_once_are_told_apart_and_the_second_changes_nothing(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(pieces_module, "PIECE", 500)
    encode, seen = tokenizer.encode_indices, []

    def encode_and_start_again(images):
        if not seen:
            before = contents(tmp_path / "store")
            with pytest.raises(TokenStoreError, match=rf"another process \(process {os.getpid()} on .*; wait for it"):
                write_tokens(make_tokenizer(), DIGITS, tmp_path / "store", progress=False)
            seen.append(contents(tmp_path / "store") == before)
        return encode(images)

    monkeypatch.setattr(tokenizer, "encode_indices", encode_and_start_again)
    write_tokens(tokenizer, DIGITS, tmp_path / "store", progress=False)
    assert seen == [True]


def test_the_first_moment_and_the_last_leave_nothing_behind(tmp_path, monkeypatch, store, tokenizer):
    monkeypatch.setattr(os, "getpid", dead_process)
    part = temporary_beside(tmp_path / "store" / "train_tokens.npy")
    monkeypatch.undo()
    folder = tmp_path / "store"
    folder.mkdir()
    for name in (part.name, ".writing-0.lock"):
        (folder / name).touch()
    assert contents(write_tokens(tokenizer, DIGITS, folder, progress=False).path) == contents(store.path)
    # Killed after the manifest was written, before the pieces were deleted.
    (folder / "unfinished").mkdir()
    for name in (part.name, ".writing-0.lock", ".writing-5.lock", "unfinished/train_000000000.npz"):
        (folder / name).touch()
    write_tokens(tokenizer, DIGITS, folder, progress=False)
    assert contents(folder) == contents(store.path) and not (folder / "unfinished").exists()


def damaged_pieces():
    """What may stand in a piece's place."""
    good = {"tokens": np.zeros((500, 1, 16), np.uint8), "labels": np.zeros(500, np.int32), "broken": np.array([], "U")}
    return {
        "cut": None,
        "empty": b"",
        "no tokens": {"labels": good["labels"]},
        "of another shape": good | {"tokens": np.zeros((4, 1, 16), np.uint8)},
        "of another type": good | {"tokens": np.zeros((500, 1, 16), np.float32)},
        "no codes": good | {"tokens": np.full((500, 1, 16), 32, np.uint8)},
        "labels of another type": good | {"labels": np.zeros(500, np.float64)},
    }


@pytest.mark.parametrize("kind", damaged_pieces())
def test_a_damaged_piece_is_made_again(tmp_path, monkeypatch, tokenizer, store, kind):
    monkeypatch.setattr(pieces_module, "PIECE", 500)
    monkeypatch.setattr(token_writing, "_join", lambda pieces: None)
    with pytest.raises(TokenStoreError, match="not finished"):
        write_tokens(tokenizer, DIGITS, tmp_path / "store", progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(pieces_module, "PIECE", 500)
    piece, content = tmp_path / "store" / "unfinished" / "train_000000500.npz", damaged_pieces()[kind]
    if isinstance(content, dict):
        np.savez(piece, **content)
    else:
        piece.write_bytes(piece.read_bytes()[:-40] if content is None else content)
    assert contents(write_tokens(tokenizer, DIGITS, tmp_path / "store", progress=False).path) == contents(store.path)


def test_pieces_are_read_twice_to_be_joined(tmp_path, monkeypatch, tokenizer, store):
    monkeypatch.setattr(pieces_module, "PIECE", 500)
    reads, read, join = [], pieces_module.read_npz, token_writing._join
    monkeypatch.setattr(pieces_module, "read_npz", lambda file, limit: (reads.append(file.name), read(file, limit))[1])
    monkeypatch.setattr(token_writing, "_join", lambda pieces: (reads.clear(), join(pieces)))
    made = write_tokens(tokenizer, DIGITS, tmp_path / "store", progress=False)
    assert contents(made.path) == contents(store.path)
    assert len(set(reads)) == 4 and {reads.count(name) for name in reads} == {2}


def test_nobody_waits_for_the_dead(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(locking, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(locking, "POLL_SECONDS", 0.05)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="no sign of life"):
        write_tokens(tokenizer, DIGITS, tmp_path / "store", progress=False)


def test_names_that_are_not_utf8_are_escaped(tmp_path, tokenizer, pictures):
    os.rename(os.fsencode(pictures.source) + b"/class1", os.fsencode(pictures.source) + b"/class\xff")
    made = write_tokens(tokenizer, pictures, tmp_path / "store", progress=False)
    assert list(made.manifest.classes) == ["class0", "class\\udcff"]
    assert write_tokens(tokenizer, pictures, tmp_path / "store", progress=False).manifest == made.manifest
    moved = os.fsencode(tmp_path) + b"/\xff"
    os.rename(pictures.source, moved)
    elsewhere = DataConfig(**{**vars(pictures), "source": os.fsdecode(moved)})
    with pytest.raises(ValueError, match="must be a path in UTF-8"):
        write_tokens(tokenizer, elsewhere, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), os.mkfifo], ids=["file", "pipe"])
def test_output_in_place_of_something_else(tmp_path, tokenizer, make):
    make(tmp_path / "store")
    with pytest.raises(TokenStoreError, match="is no folder; nothing was changed"):
        write_tokens(tokenizer, DIGITS, tmp_path / "store", progress=False)
    with pytest.raises(RunError, match="cannot be written"):
        write_tokens(tokenizer, DIGITS, tmp_path / "store" / "below", progress=False)


def test_digits_have_one_view(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="digits are never cropped"):
        write_tokens(tokenizer, DIGITS, tmp_path / "store", TokenSettings(crops=2))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "settings",
    [{"crops": 0}, {"seed": -1}, {"batch_size": 0}, {"crops": 10**12}, {"seed": 10**30}, {"batch_size": 10**9}],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TokenSettings(**settings)


def test_each_process_of_a_machine_has_a_device_of_its_own(monkeypatch):
    assert share_of_work() == (0, 1) and own_device("cuda") == "cuda"
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert share_of_work() == (5, 8)
    assert [own_device(device) for device in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]


# --- reading ---


def token_batches(tokens, **which):
    return tokens.batches(training_requests(len(tokens), **which))


def stored_validation_batches(tokens, **which):
    return tokens.batches(validation_requests(len(tokens), **which))


def test_a_store_gives_the_batches_of_its_images(store):
    which = {"batch_size": 6, "seed": 3, "start_step": 2, "steps": 4}
    images = training_batches(open_data(DIGITS, "train"), **which)
    for batch, of_images in zip(token_batches(store.split("train"), **which), images, strict=True):
        rows = store.split("train").indices[list(of_images.numbers), 0]
        assert np.array_equal(batch.indices.numpy(), rows) and torch.equal(batch.labels, of_images.labels)


def test_batches_depend_on_seed_and_step_alone(store):
    stored = store.split("train")
    whole = list(token_batches(stored, batch_size=6, seed=3, start_step=0, steps=5))
    later = list(token_batches(stored, batch_size=6, seed=3, start_step=3, steps=2))
    assert all(torch.equal(one.indices, other.indices) for one, other in zip(whole[3:], later, strict=True))
    for rank in range(2):
        mine = token_batches(stored, batch_size=6, seed=3, start_step=0, steps=5, rank=rank, world_size=2)
        for part, batch in zip(mine, whole, strict=True):
            assert torch.equal(part.indices, batch.indices[rank * 3 : rank * 3 + 3])
            assert torch.equal(part.labels, batch.labels[rank * 3 : rank * 3 + 3])
    assert whole[0].indices.dtype == whole[0].labels.dtype == torch.int64
    epoch = list(token_batches(stored, batch_size=479, seed=3, start_step=0, steps=3))
    assert torch.cat([batch.labels for batch in epoch]).bincount().tolist() == np.bincount(stored.labels).tolist()
    with pytest.raises(ValueError, match="multiple of their number"):
        token_batches(stored, batch_size=5, seed=0, start_step=0, steps=1, world_size=2)


def test_all_views_are_drawn(tmp_path, tokenizer, pictures):
    stored = write_tokens(tokenizer, pictures, tmp_path / "store", TokenSettings(crops=2), progress=False).split(
        "train"
    )
    rows = {
        tuple(row)
        for batch in token_batches(stored, batch_size=len(stored), seed=0, start_step=0, steps=60)
        for row in batch.indices.tolist()
    }
    assert rows == {tuple(row) for row in stored.indices.reshape(-1, 16).tolist()}


def test_validation_comes_in_order_once(store):
    stored = store.split("validation")
    parts = [stored_validation_batches(stored, images=50, batch_size=8, rank=rank, world_size=2) for rank in range(2)]
    labels = [[batch.labels.tolist() for batch in part] for part in parts]
    slices = [part[n] for n in range(7) for part in labels if n < len(part)]
    assert [label for part in slices for label in part] == stored.labels[:50].tolist()
    assert sum(len(b.labels) for b in stored_validation_batches(stored, images=999, batch_size=8)) == 360
    with pytest.raises(ValueError, match="at least 1 image"):
        stored_validation_batches(stored, images=0, batch_size=8)


def test_another_tokenizer_or_other_images_are_refused(store, tokenizer, pictures):
    store.check_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=f"made by {tokenizer.fingerprint()}, this tokenizer is"):
        store.check_tokenizer(make_tokenizer(1))
    with pytest.raises(ValueError, match="made with 32 codes, this tokenizer has 64"):
        store.check_tokenizer(make_tokenizer(size=64))
    store.check_data(DataConfig(source="digits", image_size=8, workers=3, flip=False))
    with pytest.raises(ValueError, match=r"data\.image_size 8 there, 16 here"):
        store.check_data(DataConfig(source="digits", image_size=16))
    with pytest.raises(ValueError, match=r"data\.source"):
        store.check_data(pictures)


def test_moved_images_are_recognised(tmp_path, tokenizer, pictures):
    found = write_tokens(tokenizer, pictures, tmp_path / "store", progress=False)
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    found.check_data(DataConfig(**{**vars(pictures), "source": str(tmp_path / "elsewhere")}))
    with pytest.raises(ValueError, match=r"data\.flip True there, False here.* tokenize TOKENIZER flip=false"):
        found.check_data(DataConfig(**{**vars(pictures), "flip": False}))


def test_damage_is_found(tmp_path, tokenizer, pictures):
    made = write_tokens(tokenizer, pictures, tmp_path / "store", progress=False)
    file = made.path / "train_tokens.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(TokenStoreError, match=r"train_tokens\.npy is damaged: its SHA-256"):
        TokenStore(made.path).verify()
    file.write_bytes(good[:-3])
    with pytest.raises(TokenStoreError, match="missing or damaged"):
        TokenStore(made.path)
    np.save(file, np.zeros((2, 2, 16), np.uint8))
    with pytest.raises(TokenStoreError, match="must hold uint8 of shape"):
        TokenStore(made.path)
    file.write_bytes(good)
    manifest = json.loads((made.path / "manifest.json").read_text())
    (made.path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(TokenStoreError, match="must have format 1; got 2"):
        TokenStore(made.path)
    (made.path / "manifest.json").write_text("{")
    with pytest.raises(TokenStoreError, match="is damaged"):
        TokenStore(made.path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        TokenStore(tmp_path / "nowhere")


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_archive(path):
    with open(path, "wb") as stream:
        np.savez(stream, tokens=np.zeros(3))


def make_huge(path):
    """An array that claims more than the file holds."""
    with open(path, "wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (2**50, 1, 16)}
        np.lib.format.write_array_header_1_0(stream, header)


def make_objects(path):
    np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("make", [make_pipe, make_folder, make_archive, make_huge, make_objects, os.unlink])
@pytest.mark.parametrize("name", ["train_tokens.npy", "validation_labels.npy"])
def test_what_is_no_array_is_refused(tmp_path, store, make, name):
    shutil.copytree(store.path, tmp_path / "store")
    make(tmp_path / "store" / name)
    with pytest.raises(TokenStoreError, match=f"{name} is missing or damaged"):
        TokenStore(tmp_path / "store")


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("codebook_size",), "many", "codebook_size"),
        (("codebook_size",), None, "codebook_size"),
        (("codebook_size",), 10**12, "at most"),
        (("grid",), [4], "grid"),
        (("grid",), [4, 0], "grid"),
        (("grid",), "4x4", "grid"),
        (("train",), [], "train"),
        (("train", "dtype"), "object", "dtype"),
        (("train", "images"), 1e300, "images"),
        (("train", "views"), -1, "views"),
        (("classes",), {"a": 1}, "classes"),
        (("data",), "digits", "data"),
        (("format",), "x" * 5000, "format"),
        (("format",), None, "format"),
    ],
)
def test_a_manifest_of_wrong_types_is_refused(tmp_path, store, keys, value, says):
    shutil.copytree(store.path, tmp_path / "store")
    file = tmp_path / "store" / "manifest.json"
    manifest = json.loads(file.read_text())
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(manifest))
    with pytest.raises(TokenStoreError, match=says):
        TokenStore(tmp_path / "store")
    with pytest.raises(TokenStoreError):
        write_tokens(make_tokenizer(), DIGITS, tmp_path / "store", progress=False)
    assert json.loads(file.read_text()) == manifest


@pytest.mark.parametrize("text", ["[" * 5000, "[]", '{"format": ' + "9" * 5000 + "}"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path, store, text):
    shutil.copytree(store.path, tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text(text)
    with pytest.raises(TokenStoreError, match="is damaged"):
        TokenStore(tmp_path / "store")


def test_tokens_beyond_the_codebook_are_not_trained_on(tmp_path, store):
    shutil.copytree(store.path, tmp_path / "store")
    file = tmp_path / "store" / "train_tokens.npy"
    file.write_bytes(file.read_bytes()[:-16] + bytes([200]) * 16)
    stored = TokenStore(tmp_path / "store").split("train")
    with pytest.raises(TokenStoreError, match="must lie in 0 to 31; got 200"):
        stored.batch([len(stored) - 1], [0])
    with pytest.raises(TokenStoreError, match="must lie in 0 to 31; got 200"):
        stored.count_codes()


# --- the command, and training on what it wrote ---


def test_the_command_writes_tokens_that_a_generator_trains_on(tmp_path):
    settings = SMALL_DIGITS | {"steps": 2}
    run = train(recipe_config("builtin/smoke", settings), tmp_path / "tok", progress=False)
    command = ["tokenize", str(run.path), "--weights", "raw", "--output", str(tmp_path / "tokens")]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0 and "of the codes occur" in done.output
    checked = CliRunner().invoke(main, [*command, "--verify"], catch_exceptions=False)
    assert "has its checksum" in checked.output
    other = CliRunner().invoke(main, [*command, "image_size=16"], catch_exceptions=False)
    assert other.exit_code == 2 and "tokens of other settings" in other.output
    sizes = {"vocabulary_size": 32, "num_classes": 10, "grid_size": 4, "width": 16, "depth": 1, "num_heads": 2}
    named = {"tokenizer": str(run.path), "tokenizer_weights": "raw"}
    training = {
        "data.image_size": 8,
        "generator": {"name": "ibq", "hidden_multiple": 8, **sizes},
        "steps": 3,
        "batch_size": 8,
    }
    stored, fly = (
        train_generator(recipe_config("builtin/digits_generator", training | source), tmp_path / name, progress=False)
        # The store brings its tokenizer.
        for name, source in (("stored", {"tokens": str(tmp_path / "tokens")}), ("fly", named))
    )
    # Digits are the same in every epoch, so tokens from the store train the same generator.
    assert stored.metrics["loss"].iloc[-1] == fly.metrics["loss"].iloc[-1]
    foreign = recipe_config(
        "builtin/digits_generator",
        training | {"tokens": str(tmp_path / "tokens"), "tokenizer": str(run.path), "tokenizer_weights": "ema"},
    )
    with pytest.raises(ValueError, match="averaged and raw weights differ"):
        train_generator(foreign, tmp_path / "foreign", progress=False)
    (tmp_path / "tokens" / "tokenizer.safetensors").unlink()
    earlier = recipe_config(
        "builtin/digits_generator", training | {"tokens": str(tmp_path / "tokens"), "tokenizer": ""}
    )
    with pytest.raises(ValueError, match="is of an earlier version and holds no tokenizer: tokenizer must name"):
        train_generator(earlier, tmp_path / "foreign", progress=False)
    assert not (tmp_path / "foreign").exists() and Run(tmp_path / "stored").status == "finished"
