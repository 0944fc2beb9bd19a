"""Every door through which something from outside comes in, with every kind of hostile thing that fits it.

A door is a command (or a call) and the file, folder or setting that it takes. A new door is covered by listing it in
DOORS: every kind of its input is then tried. What must come back: one message that can be read, soon, with exit code 2,
or the work done without the hostile part; never a traceback, a hang, a file followed elsewhere, a program started.
"""

import io
import json
import os
import pickle
import shutil
import signal
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from test_sampling_runs import draw
from test_transformer import SMALL, make

from ibqlab.cli import main
from ibqlab.config import parse
from ibqlab.data import write_shards
from ibqlab.grids.cell_rows import measure_cell
from ibqlab.metrics.evaluated_images import open_images
from ibqlab.pretrained import export_generator, export_published, export_tokenizer
from ibqlab.runs import Run, RunError
from ibqlab.studies import StudyParameters, open_study
from ibqlab.tokens.store import TokenStore
from ibqlab.training import recipe_config, train

SECONDS = 60
"""No door may take longer for a hostile input, on a busy machine."""
LETTERS = 4000
"""No message is longer."""


@contextmanager
def time_limit(seconds=SECONDS):
    def ring(signum, frame):
        raise AssertionError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- hostile things, by the kind of input they pretend to be ---------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path)


def device(path):
    path.symlink_to("/dev/zero")


def hole(path):
    """A file of 1 TiB that holds nothing and takes no room."""
    path.write_bytes(b"")
    os.truncate(path, 2**40)


def empty(path):
    path.write_bytes(b"")


def noise(path):
    path.write_bytes(bytes(range(256)) * 8)


def text(content):
    def write(path):
        path.write_text(content, encoding="utf-8")

    return write


def binary(content):
    def write(path):
        path.write_bytes(content)

    return write


ANY_FILE = {"pipe": pipe, "folder": folder, "loop": loop, "device": device, "empty": empty, "noise": noise}
ANY_FILE |= {"hole": hole}

JSON = ANY_FILE | {
    "deep": text("[" * 5000 + "]" * 5000),
    "deep object": text('{"a":' * 3000 + "1" + "}" * 3000),
    "long number": text('{"format": ' + "9" * 5000 + "}"),
    "list": text("[1, 2]"),
    "null": text("null"),
    "surrogate": text('{"\\ud800": "\\ud800\\u001b[31m"}'),
    "types": text('{"format": {}, "status": [1], "step": null, "cells": 3, "metadata": [], "seeds": "x"}'),
}

LAUGHS = "\n".join(
    ["a0: &a0 [ha, ha]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)), "steps: *a11"]
)
YAML = ANY_FILE | {
    "billion laughs": text(LAUGHS),
    "recursive": text("data: &a {source: *a}\n"),
    "deep": text("a: " + "[" * 3000 + "]" * 3000),
    "tag": text("steps: !!python/object/apply:os.system ['touch /tmp/executed']\n"),
    "long number": text("steps: " + "9" * 5000),
    "duplicate": text("steps: 1\nsteps: 2\n"),
    "list": text("- 1\n- 2\n"),
    "not finite": text("steps: .inf\n"),
    "hexadecimal": text("steps: 0x10\n"),
    "long key": text(f"{'k' * 5000}: 1\n"),
    "escape": text('"\\x1b[31mred": 1\n'),
    "large list": text(f"steps: [{'1,' * 900_000}1]\n"),
    "set": text("steps: !!set {a, b}\n"),
    "bytes": text("steps: !!binary aGVsbG8=\n"),
    "half a letter": text('steps: "\\ud800"\n'),
}

ROWS = ANY_FILE | {
    "deep": text('{"step": 1, "a": ' + "[" * 5000 + "]" * 5000 + "}\n"),
    "long number": text('{"step": ' + "9" * 5000 + "}\n"),
    "null step": text('{"step": null}\n'),
    "list step": text('{"step": [1]}\n'),
    "text step": text('{"step": "x"}\n'),
    "list value": text('{"step": 1, "usage": [0.1, 0.2], "loss": {"a": 1}}\n'),
    "large value": text('{"step": 1, "usage": ' + "9" * 400 + ', "usage_tokens": "many"}\n'),
    "escape": text('{"step": 1, "\\u001b[31mx": "\\u001b]0;title\\u0007"}\n'),
}


def network(held):
    return lambda path: torch.save({"step": 4, "state": held, "rows": {}}, path)


NETWORKS = {
    "no state": network({}),
    "no networks": network({"optimizer": {}, "\x1b[31m": 1}),
    "empty networks": network({"model": {}, "ema": {}, "seconds": 1.0}),
    "list of networks": network({"model": [1], "seconds": 1.0}),
    "other networks": network({"model": {"\x1b[31mlayer": torch.zeros(2)}, "ema": {}, "seconds": 1.0}),
    "numbers": network({"model": {"layer": 1}, "seconds": 1.0}),
}
"""A run's checkpoints, whole, with other networks than the run's."""


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def strided(path):
    torch.save({"state_dict": {"quantize.embedding.weight": torch.zeros(1).expand(2**33, 256)}}, path)


def safetensors_header(header: bytes, claimed: int | None = None):
    return binary(struct.pack("<Q", claimed if claimed is not None else len(header)) + header)


TENSORS = ANY_FILE | {
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "torch pickle": lambda path: torch.save({"state_dict": Bomb()}, path),
    "stride 0": strided,
    "other keys": lambda path: torch.save({"state_dict": {"\x1b[31mlayer": torch.zeros(2)}}, path),
    "no tensors": lambda path: torch.save({"state_dict": {"a": 1}}, path),
    "zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "json": text("{}"),
}
SAFETENSORS = ANY_FILE | {
    "long header": safetensors_header(b"{}", 2**62),
    "deep header": safetensors_header(b"[" * 9000 + b"]" * 9000),
    "no header": safetensors_header(b""),
    "no tensors": lambda path: save_file({}, path, {"ibqlab": "{}"}),
    "claims": safetensors_header(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,73786976294838206464]}}'
    ),
    "settings of depth": lambda path: save_file(
        {"a": torch.zeros(1)},
        path,
        {"ibqlab": json.dumps({"autoencoder": {"num_res_blocks": 10**6}, "generator": {"depth": 10**6}})},
    ),
}


def large_png(path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 16_000_000, 1_000_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(executed) (w) file closefile\nshowpage\n"
PICTURE = {
    "pipe": pipe,
    "loop": loop,
    "device": device,
    "empty": empty,
    "noise": noise,
    "postscript": binary(POSTSCRIPT),
    "large": large_png,
}


def pax_loop(path):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": "-1024"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)


def large_label(path):
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    with tarfile.open(path, "w") as tar:
        for name, content in (("a.png", picture.getvalue()), ("a.cls", b"4294967297")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def cut_tar(path):
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 10**6
        tar.addfile(info, io.BytesIO(bytes(10**6)))
    os.truncate(path, 5000)


SHARD = ANY_FILE | {"pax loop": pax_loop, "label of 2³² + 1": large_label, "cut": cut_tar}


def npz(**arrays):
    def write(path):
        content = io.BytesIO()
        np.savez(content, **arrays)
        path.write_bytes(content.getvalue())

    return write


def archive_of(name):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x")

    return write


def npy(shape, dtype="<i4", body=b""):
    header = str({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117).encode() + b"\n"
    return binary(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body)


ARRAY = ANY_FILE | {
    "claims": npy((2**40, 2**20)),
    "objects": npy((4,), "|O", b"x" * 32),
    "archive": npz(a=np.zeros(3)),
    "other shape": npy((3,), "<i4", bytes(12)),
}
ARCHIVE = ANY_FILE | {
    "objects": npz(arr_0=np.array([{}], dtype=object)),
    "no array": archive_of("arr_0"),
    "no images": npz(arr_0=np.zeros((0, 8, 8, 3), np.uint8)),
    "no side": npz(arr_0=np.zeros((4, 0, 8, 3), np.uint8)),
    "other type": npz(arr_0=np.full((4, 8, 8, 3), np.nan)),
}


# --- honest things, made once ----------------------------------------------------------------------------------------


CELL = "ibq-normal-K16-D8-seed0"
"""The only run of the honest study."""


@pytest.fixture(scope="session")
def honest(tmp_path_factory):
    """A run, its exports, images, shards, tokens, a generator, a study: what doors are honestly opened with."""
    root = tmp_path_factory.mktemp("honest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQLAB_RUNS", str(root))
        patch.chdir(root)
        train(recipe_config("builtin/smoke", {"steps": 4, "record.checkpoint_every": 2}), root / "run", progress=False)
        export_published(root / "run", root / "run.ckpt")
        export_tokenizer(root / "run", root / "run.safetensors")
        export_generator(make(SMALL), root / "generator.safetensors")
        images = root / "images"
        for number in range(12):
            (images / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
            Image.fromarray(pixels).save(images / f"class{number % 2}" / f"{number:02}.png")
        write_shards(images, root / "shards")
        np.savez(root / "samples.npz", arr_0=np.zeros((12, 24, 24, 3), np.uint8))
        command(["tokenize", str(root / "run"), "--output", str(root / "tokens"), "--weights", "raw"])
        shutil.copy(Path(__file__).parents[1] / "notebooks" / "explore_collapse.ipynb", root / "notebook.ipynb")
        (root / "recipe.yaml").write_text("extends: builtin/smoke\nsteps: 2\n")
        draw(root / "drawn")
        (root / "drawn" / "samples.npz").unlink()
        small = {"methods": ("ibq",), "initialisations": ("normal",), "codebook_sizes": (16,), "seeds": (0,)}
        study = open_study(
            "explore_collapse", StudyParameters(preset="smoke", steps=2, output=f"{root}/study", **small)
        )
        study.store.prepare(study.cells[0])
        run = train(study.cells[0].config, study.folder / CELL, progress=False)
        study.store.write_row(study.cells[0], measure_cell(study.cells[0], run))
        study.run(progress=False)
    return root


def command(words):
    """A command in this process; its result must be one message or success."""
    with time_limit(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{words}: a traceback instead of a message: {result.exception!r}") from result.exception
    shown = result.output
    assert "Traceback" not in shown
    assert not any(ord(letter) < 32 and letter not in "\n\r\t" for letter in shown), repr(shown)
    return result


def refused(words):
    result = command(words)
    require_message(result)
    return result


def require_message(result):
    assert result.exit_code == 2, result.output
    (message,) = [line for line in result.output.split("\n") if line.startswith("Error: ")]
    assert len(result.output[result.output.index(message) :]) <= LETTERS


def attempt(door, at):
    """Whether a door's command or call did its work; otherwise it has said why not in one message."""
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            words = door.words(at)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        # JSON's, Unicode's and torch's own errors are of these kinds, too, and no messages.
        assert type(error) in (ValueError, FileNotFoundError) or type(error).__module__.startswith("ibqlab")
        assert str(at) in str(error) and str(error).isprintable() and len(str(error)) <= LETTERS
        return False
    result = words and command(words)
    if not result or result.exit_code == 0:
        return True
    require_message(result)
    return False


def every_image(images):
    for _ in images.batches(4):
        pass


def study_of(at):
    parameters = json.loads((at / "study" / "parameters.json").read_text()) | {"output": str(at / "study")}
    return open_study(parameters.pop("study"), parse(StudyParameters, parameters, source="parameters"))


def row_of(at):
    study = study_of(at)
    if study.store.row(study.cells[0]) is None:
        raise RunError(f"{at}: passed over")


# --- doors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Door:
    """One way in: what is opened, which of its files a hostile one stands for, what must come of it."""

    words: Callable[[Path], list | None]
    """The command, given the folder with the copy of what is honest; or the call itself, which returns None."""
    needs: tuple[str, ...]
    """What of the honest things is copied into the folder."""
    file: str
    """That is replaced."""
    kinds: dict[str, Callable[[Path], object]]
    survives: bool = False
    """The rest is usable: the command succeeds and names what it left out."""
    harmless: tuple[str, ...] = ()
    """Kinds that may be taken as well as refused: a metrics file without rows, say."""


def in_the_folder(at):
    """Commands look for the checkout around them, and so at everybody's pyproject.toml."""
    os.chdir(at)
    os.environ.pop("IBQLAB_RUNS", None)
    return ["runs"]


PROJECT = {"text": text('project = "x"\n'), "deep": text(f"a = {'[' * 3000}{']' * 3000}\n")}
RESUME = ["train", "builtin/smoke", "steps=6", "record.checkpoint_every=2", "--no-report", "--output"]
GENERATOR = ["train", "builtin/smoke_generator", "steps=1", "generator.depth=1", "--no-report"]
TRAIN = ["accelerator=cpu", "record.validate_every=100", "record.early_snapshots=[]"]
NEWEST = "run/checkpoints/step_00000004.pt"
DOORS = {
    "show: settings": Door(
        lambda at: ["show", at / "run"],
        ("run",),
        "run/config.yaml",
        YAML,
        harmless=("not finite", "hexadecimal", "escape", "long key"),
    ),
    "show: provenance": Door(
        lambda at: ["show", at / "run"], ("run",), "run/provenance.json", JSON, harmless=("surrogate", "types")
    ),
    "show: metrics": Door(
        lambda at: ["show", at / "run"],
        ("run",),
        "run/metrics.jsonl",
        ROWS,
        harmless=("empty", "list value", "large value", "escape"),
    ),
    "runs: settings": Door(lambda at: ["runs", at], ("run",), "run/config.yaml", YAML, survives=True),
    "runs: provenance": Door(lambda at: ["runs", at], ("run",), "run/provenance.json", JSON, survives=True),
    "runs: metrics": Door(lambda at: ["runs", at], ("run",), "run/metrics.jsonl", ROWS, survives=True),
    "train: recipe": Door(
        lambda at: ["train", at / "recipe.yaml", "--output", at / "new"], ("recipe.yaml",), "recipe.yaml", YAML
    ),
    "plan: recipe": Door(lambda at: ["plan", at / "recipe.yaml"], ("recipe.yaml",), "recipe.yaml", YAML),
    "inspect: published": Door(lambda at: ["inspect", at / "run.ckpt"], ("run.ckpt",), "run.ckpt", TENSORS),
    "inspect: export": Door(
        lambda at: ["inspect", at / "run.safetensors"], ("run.safetensors",), "run.safetensors", SAFETENSORS
    ),
    "export: published": Door(
        lambda at: ["export", at / "run.ckpt", at / "x.safetensors"], ("run.ckpt",), "run.ckpt", TENSORS
    ),
    "tokenize: published": Door(
        lambda at: ["tokenize", at / "run.ckpt", "--output", at / "t", f"source={at}/images", "image_size=16"],
        ("run.ckpt", "images"),
        "run.ckpt",
        TENSORS,
    ),
    "sample: generator": Door(lambda at: ["sample", at / "run.ckpt", "--output", at / "s"], (), "run.ckpt", TENSORS),
    "train: an image": Door(
        lambda at: ["train", "builtin/smoke", f"data.source={at}/images", "steps=2", *TRAIN, "--output", at / "new"],
        ("images",),
        "images/class0/00.png",
        PICTURE,
        survives=True,
    ),
    "train: a shard": Door(
        lambda at: ["train", "builtin/smoke", f"data.source={at}/shards", "steps=2", *TRAIN, "--output", at / "new"],
        ("shards",),
        "shards/shards-000000.tar",
        SHARD,
    ),
    "train: names of classes": Door(
        lambda at: ["train", "builtin/smoke", f"data.source={at}/shards", "steps=2", *TRAIN, "--output", at / "new"],
        ("shards",),
        "shards/classes.json",
        {name: kind for name, kind in JSON.items() if name != "folder"},
    ),
    "train: manifest of tokens": Door(
        lambda at: [*GENERATOR, f"tokens={at}/tokens", "--output", at / "new"],
        ("tokens",),
        "tokens/manifest.json",
        JSON,
    ),
    "train: tokens": Door(
        lambda at: [*GENERATOR, f"tokens={at}/tokens", "--output", at / "new"],
        ("tokens",),
        "tokens/train_tokens.npy",
        ARRAY,
    ),
    "store: labels": Door(
        lambda at: TokenStore(at / "tokens") and None, ("tokens",), "tokens/validation_labels.npy", ARRAY
    ),
    "resume: settings": Door(lambda at: [*RESUME, at / "run"], ("run",), "run/config.yaml", YAML),
    "resume: provenance": Door(
        lambda at: [*RESUME, at / "run"], ("run",), "run/provenance.json", JSON, harmless=("surrogate", "types")
    ),
    "resume: metrics": Door(lambda at: [*RESUME, at / "run"], ("run",), "run/metrics.jsonl", ROWS),
    "resume: checkpoint": Door(
        lambda at: [*RESUME, at / "run"], ("run",), NEWEST, TENSORS, survives=True, harmless=("folder",)
    ),
    "resume: networks": Door(lambda at: [*RESUME, at / "run"], ("run",), NEWEST, NETWORKS),
    "inspect: checkpoint of a run": Door(lambda at: ["inspect", at / "run"], ("run",), NEWEST, TENSORS, survives=True),
    "inspect: networks of a run": Door(lambda at: ["inspect", at / "run"], ("run",), NEWEST, NETWORKS),
    "resume: lock": Door(
        lambda at: [*RESUME, at / "run"], ("run",), "run/lock", ANY_FILE, harmless=("empty", "noise", "hole")
    ),
    "resume: folder of snapshots": Door(
        lambda at: [*RESUME, at / "run"], ("run",), "run/snapshots", ANY_FILE, harmless=("folder",)
    ),
    "resume: folder of checkpoints": Door(
        lambda at: [*RESUME, at / "run"], ("run",), "run/checkpoints", ANY_FILE, harmless=()
    ),
    "inspect: export of a generator": Door(
        lambda at: ["inspect", at / "generator.safetensors"],
        ("generator.safetensors",),
        "generator.safetensors",
        SAFETENSORS,
    ),
    "export: export": Door(
        lambda at: ["export", at / "run.safetensors", at / "x.ckpt"],
        ("run.safetensors",),
        "run.safetensors",
        SAFETENSORS,
    ),
    "report: metrics of a run": Door(
        lambda at: ["report", at / "run"],
        ("run",),
        "run/metrics.jsonl",
        ROWS,
        harmless=("list value", "large value", "escape"),
    ),
    "report: snapshot of a run": Door(
        lambda at: ["report", at / "run"], ("run",), "run/snapshots/step_00000004.npz", ARCHIVE, survives=True
    ),
    "report: page": Door(
        lambda at: ["report", at / "run"], ("run",), "run/report.html", ANY_FILE, survives=True, harmless=("folder",)
    ),
    "runs: project file": Door(in_the_folder, ("run",), "pyproject.toml", ANY_FILE | PROJECT, survives=True),
    "report: parameters of a study": Door(
        lambda at: ["report", at / "study"], ("study",), "study/parameters.json", JSON
    ),
    "report: metrics of a study's run": Door(
        lambda at: ["report", at / "study"], ("study",), f"study/{CELL}/metrics.jsonl", ROWS
    ),
    "study: what it is of": Door(
        lambda at: study_of(at).run(progress=False).check(),
        ("study",),
        "study/study.json",
        JSON,
        harmless=tuple(JSON),
    ),
    "study: a cell": Door(
        lambda at: study_of(at).store.request(CELL) and None, ("study",), f"study/cells/{CELL}.json", JSON
    ),
    "study: a row": Door(row_of, ("study",), f"study/rows/{CELL}.json", JSON),
    "sample: a shard on restart": Door(
        lambda at: draw(at / "drawn") and None,
        ("drawn",),
        "drawn/samples-000000.tar",
        SHARD,
        harmless=tuple(SHARD),
    ),
    "sample: what was drawn": Door(lambda at: draw(at / "drawn") and None, ("drawn",), "drawn/manifest.json", JSON),
    "evaluate: an image": Door(
        lambda at: every_image(open_images(at / "images", resize="pil", image_size=16)),
        ("images",),
        "images/class0/00.png",
        PICTURE,
        survives=True,
    ),
    "evaluate: an archive": Door(
        lambda at: every_image(open_images(at / "samples.npz")), ("samples.npz",), "samples.npz", ARCHIVE
    ),
    "evaluate: a shard": Door(
        lambda at: every_image(open_images(at / "shards", resize="pil", image_size=16)),
        ("shards",),
        "shards/shards-000000.tar",
        SHARD,
        harmless=("label of 2³² + 1",),
    ),
    "run: notebook": Door(
        lambda at: ["run", at / "notebook.ipynb", "--output", at / "OUT.ipynb"],
        ("notebook.ipynb",),
        "notebook.ipynb",
        JSON,
    ),
}
CASES = [(name, kind) for name, door in DOORS.items() for kind in door.kinds]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}".replace(" ", "_") for name, kind in CASES])
def test_every_door_withstands_every_kind(honest, tmp_path, monkeypatch, name, kind):
    door, at = DOORS[name], tmp_path / "at"
    at.mkdir()
    monkeypatch.chdir(tmp_path)
    for thing in door.needs:
        (shutil.copytree if (honest / thing).is_dir() else shutil.copy)(honest / thing, at / thing)
    remove = shutil.rmtree if (at / door.file).is_dir() else partial(Path.unlink, missing_ok=True)
    remove(at / door.file)
    door.kinds[kind](at / door.file)
    did = attempt(door, at)
    assert kind in door.harmless or did == door.survives
    assert not (tmp_path / "executed").exists()
    assert not Path("/tmp/executed").exists()


@pytest.mark.parametrize("name", [name for name in DOORS if name not in ("sample: generator", "run: notebook")])
def test_every_door_opens_for_what_is_honest(honest, tmp_path, monkeypatch, name):
    """Or the test above would pass for the wrong reason. (Generators and kernels are started in other files.)"""
    door, at = DOORS[name], tmp_path / "at"
    at.mkdir()
    monkeypatch.chdir(tmp_path)
    for thing in door.needs:
        (shutil.copytree if (honest / thing).is_dir() else shutil.copy)(honest / thing, at / thing)
    assert attempt(door, at)


# --- devices, outputs, settings --------------------------------------------------------------------------------------

WITH_DEVICE = {
    "tokenize": lambda root: ["tokenize", root / "run", "--output", "t"],
    "sample": lambda root: ["sample", root / "run", "--output", "s"],
}


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:99", "", "cpu:7\x1b[31m"])
@pytest.mark.parametrize("name", WITH_DEVICE)
def test_devices(honest, tmp_path, monkeypatch, name, device):
    monkeypatch.chdir(tmp_path)
    assert "--device" in refused([*WITH_DEVICE[name](honest), "--device", device]).output


WITH_OUTPUT = {
    "train": lambda root, out: ["train", "builtin/smoke", "steps=1", "--output", out],
    "tokenize": lambda root, out: ["tokenize", root / "run", "--output", out],
    "export": lambda root, out: ["export", root / "run", f"{out}.safetensors"],
    "export published": lambda root, out: ["export", root / "run", f"{out}.ckpt"],
    "run": lambda root, out: ["run", "explore_collapse", "preset=smoke", "--output", f"{out}.ipynb"],
}


def unwritable(tmp_path):
    return "/proc/nobody/here"


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file" / "x")


def too_long(tmp_path):
    return str(tmp_path / ("n" * 5000))


@pytest.mark.parametrize("output", [unwritable, below_a_file, too_long])
@pytest.mark.parametrize("name", WITH_OUTPUT)
def test_outputs(honest, tmp_path, monkeypatch, name, output):
    monkeypatch.chdir(tmp_path)
    target = output(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    refused(WITH_OUTPUT[name](honest, target))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_an_export_never_replaces_a_file(honest, tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / f"there{suffix}"
    target.write_text("somebody's")
    refused(["export", honest / "run", target])
    assert target.read_text() == "somebody's"


DATA = ["data.source=/dev/zero", "data.source=nowhere\x1b[31m", f"data.source={'n' * 5000}"]
SETTINGS = [
    "steps=0x10",
    "steps=0o17",
    "steps=1_000",
    "steps=1000000000000",
    "steps=.inf",
    "steps=1e400",
    "steps=-1",
    f"steps={'9' * 5000}",
    "batch_size=1000000000",
    "data.workers=100000",
    "data.image_size=1000000000000",
    "tokenizer.quantizer.codebook_size=1000000000000",
    "tokenizer.quantizer.code_dim=1000000000000",
    "tokenizer.autoencoder.num_res_blocks=100000",
    "tokenizer.autoencoder.base_channels=1000000000",
    "record.snapshot_images=1000000000",
    "record.snapshot_features=1000000000000",
    "optimizer.learning_rate=.nan",
    "optimizer.learning_rate=.inf",
    "optimizer.betas=[0.9, 0.95, 0.99]",
    "accelerator=gpu",
    "precision=16",
    f"{'.'.join('k' * 5000)}=1",
]


@pytest.mark.parametrize(
    ("verb", "setting"),
    # A plan opens no data.
    [("train", setting) for setting in DATA] + [(verb, setting) for verb in ("train", "plan") for setting in SETTINGS],
    ids=lambda word: word[:45].replace("\x1b", "ESC"),
)
def test_settings(tmp_path, monkeypatch, verb, setting):
    monkeypatch.chdir(tmp_path)
    refused([verb, "builtin/smoke", setting, *(["--output", "new"] if verb == "train" else [])])
    assert not Path("new").exists()


def test_the_run_of_the_table_is_a_run(honest):
    assert Run(honest / "run").status == "finished"
