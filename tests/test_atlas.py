"""The atlas of a codebook: what its folder holds, and what its reader sees who opens it from disk."""

import base64
import errno
import io
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from registry import SMALL_DIGITS

from ibqlab.base.files import RunError
from ibqlab.diagnostics.lab import World, run_lab
from ibqlab.runs import Run
from ibqlab.training import recipe_config, train
from ibqlab.views.atlas import AtlasSettings, pictures, write_atlas
from ibqlab.views.atlas.gather import SHARD, gather
from ibqlab.views.cards import CardReader
from ibqlab.views.map_data import map_run_codes
from ibqlab.views.subject import ViewError, open_subject

IMAGES = 24
CLASSES = ('<script>alert(1)</script> & "one"', "'two'")
FILE = 'a "<img src=x>" \'b\'.png'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of four steps on digits, with snapshots at three of them."""
    torch.set_num_threads(1)
    settings = {**SMALL_DIGITS, "tokenizer.quantizer.name": "ibq", "steps": 4, "record.validate_every": 2}
    folder = tmp_path_factory.mktemp("atlas") / "run"
    return train(recipe_config("builtin/smoke", settings), folder, progress=False)


@pytest.fixture
def copy(run, tmp_path):
    """The same run, to be changed."""
    return Run(shutil.copytree(run.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images whose names are what pages must not believe."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        folder = root / name.replace("/", "\u2215")
        folder.mkdir()
        for image in range(6):
            file = FILE if not image else f"{image}.png"
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8) // (number + 1)).save(folder / file)
    return root


@pytest.fixture(scope="module")
def atlas(run, images, tmp_path_factory):
    """Of a run, over these images."""
    folder = tmp_path_factory.mktemp("atlas") / "out"
    settings = AtlasSettings(images=str(images), parquet=True)
    return write_atlas(run, folder, settings, progress=False).parent


@pytest.fixture
def index(run, images):
    return CardReader(open_subject(run, images), 2000, progress=False).index


def written(what, folder, **settings):
    """The folder of an atlas."""
    return write_atlas(what, folder, AtlasSettings(count=4, **settings), progress=False).parent


def taken(file):
    name, value = re.fullmatch(r'atlas\.take\("([^"]*)",(.*)\);\n', file.read_text(), re.DOTALL).groups()
    return name, json.loads(value)


def facts_of(folder):
    return taken(folder / "data" / "facts.js")[1]


def column(packed):
    return np.frombuffer(base64.b64decode(packed["base64"]), f"<{packed['kind']}")


class TestFolder:
    def test_needs_nothing_else(self, atlas):
        page = {"index.html", "atlas.js", "table.js", "map.js", "atlas.css"}
        assert {file.name for file in atlas.iterdir()} == page | {"data", "cards", "images", "decoded", "codes.parquet"}
        assert len(list((atlas / "images").glob("*.jpg"))) == 12
        for name in page:
            text = (atlas / name).read_text().replace('"http://www.w3.org/2000/svg"', "")
            assert not re.search(r"https?:|//cdn|innerHTML|eval\(", text)

    def test_holds_what_the_cards_hold(self, run, tmp_path):
        folder = write_atlas(run, tmp_path / "out", AtlasSettings(count=IMAGES), progress=False).parent
        reader = CardReader(open_subject(run), IMAGES, progress=False)
        name, facts = taken(folder / "data" / "facts.js")
        assert name == "facts" and facts["codes"] == 32 and facts["tokens"] == IMAGES * 16
        assert facts["steps"] == run.snapshot_steps == facts["map_steps"]
        _, columns = taken(folder / "data" / "columns.js")
        assert np.array_equal(column(columns["hits"]), reader.index.counts)
        name, shard = taken(folder / "cards" / "0.js")
        assert name == "cards/0" and len(shard) == 32
        code = int(reader.index.counts.argmax())
        card = reader.read([code], decode=False)
        assert [other for other, _ in shard[code]["near"]] == [n.code for n in card.near]
        assert [far for _, far in shard[code]["near"]] == pytest.approx([n.value for n in card.near], abs=1e-3)
        assert [other for other, _ in shard[code]["beside"]] == [n.code for n in card.beside]
        assert [tuple(place) for place in shard[code]["typical"]] == [reader.index.place(int(t)) for t in card.typical]
        assert shard[code]["life"] == card.life.hits.tolist()

    def test_its_map_is_the_runs(self, atlas, run):
        data = map_run_codes(open_subject(run))
        name, stored = taken(atlas / "data" / "map.js")
        assert name == "data/map" and np.array_equal(column(stored["ids"]), data.code_ids)
        for frame in range(len(data.steps)):
            _, points = taken(atlas / "data" / f"map-{frame}.js")
            left, right, bottom, top = data.bounds
            expected = (data.codes[frame] - [left, bottom]) / [right - left, top - bottom]
            assert np.abs(column(points["codes"]).reshape(-1, 2) / 65535 - expected).max() < 1e-4
            assert np.array_equal(column(points["hits"]), data.hits[frame])

    def test_decodes_what_the_cards_decode(self, atlas, run, index):
        sheet = np.asarray(Image.open(atlas / "decoded" / "0.png"))
        code = int(index.counts.argmax())
        network = open_subject(run).tokenizer
        with torch.no_grad():
            picture = network.decode_indices(torch.full((1, 4, 4), code))[0].clamp(-1, 1)
        expected = (picture.permute(1, 2, 0).numpy() + 1) * 127.5
        high, wide = index.patch
        row, across = divmod(code, int(SHARD**0.5))
        square = sheet[row * high : (row + 1) * high, across * wide : (across + 1) * wide]
        assert np.abs(square - expected[2 * high : 3 * high, 2 * wide : 3 * wide]).max() <= 1

    def test_is_built_again_from_what_is_stored(self, atlas, run, images, tmp_path, monkeypatch):
        monkeypatch.setattr(pictures, "grid_of", lambda *_: pytest.fail("decoded again"))
        again = write_atlas(run, tmp_path / "out", AtlasSettings(images=str(images), parquet=True), progress=False)
        for file in ("data/facts.js", "cards/0.js", "decoded/0.png", "images/3.jpg"):
            assert (again.parent / file).read_bytes() == (atlas / file).read_bytes()


class TestTable:
    def test_is_one_row_per_code_as_embedding_atlas_reads_it(self, atlas, run, index):
        table = pytest.importorskip("pyarrow.parquet").read_table(atlas / "codes.parquet").to_pylist()
        data = map_run_codes(open_subject(run))
        assert [row["number"] for row in table] == data.code_ids.tolist()
        assert np.allclose([(row["x"], row["y"]) for row in table], data.codes[-1])
        code = int(index.counts.argmax())
        row = table[data.code_ids.tolist().index(code)]
        assert row["hits"] == index.counts[code] and row["in_use"] and row["image_name"].endswith(".png")
        assert row["class"] in index.classes and 0.5 <= row["class_share"] <= 1
        patch = Image.open(io.BytesIO(row["patch"]["bytes"]))
        assert patch.size == (6, 6) and row["patch"]["path"] == f"{code}.png"
        book = run.snapshot()["codebook"]
        for other, far in zip(row["neighbors"]["ids"], row["neighbors"]["distances"], strict=True):
            assert far == pytest.approx(np.linalg.norm(book[table[other]["number"]] - book[code]), abs=1e-3)

    def test_without_pyarrow_says_what_to_install(self, run, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(ViewError, match="pip install pyarrow"):
            written(run, tmp_path / "out", parquet=True)
        assert not (tmp_path / "out").exists()


class TestPlace:
    def test_takes_the_place_of_an_earlier_atlas_alone(self, run, tmp_path):
        folder = written(run, tmp_path / "out")
        (folder / "cards" / "9.js").write_text("")
        (folder / ".DS_Store").write_text("")
        written(run, folder, decode=False)
        assert not (folder / "cards" / "9.js").exists() and not list((folder / "decoded").iterdir())
        assert [file.name for file in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["thesis.txt"], "holds something that is no atlas \\(thesis.txt\\).*--output FOLDER"),
            (["images/cat.png"], "no atlas \\(images\\)"),
            (["index.html", "data/facts.js", "notes.md"], "no atlas \\(notes.md\\)"),
        ],
    )
    def test_never_takes_that_of_something_else(self, run, tmp_path, names, message):
        for name in names:
            file = tmp_path / "mine" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
        with pytest.raises(ViewError, match=message):
            written(run, tmp_path / "mine")
        assert all((tmp_path / "mine" / name).exists() for name in names)

    def test_of_a_file_is_refused(self, run, tmp_path):
        (tmp_path / "mine").write_text("")
        with pytest.raises(ViewError, match="is a file; an atlas is a folder"):
            written(run, tmp_path / "mine")

    @pytest.mark.parametrize(
        ("error", "expected", "message"),
        [
            (OSError(errno.ENOSPC, "full"), RunError, "the disk or a quota is full"),
            (KeyboardInterrupt(), KeyboardInterrupt, None),
        ],
    )
    def test_keeps_the_earlier_one_where_the_work_ends_early(
        self, run, tmp_path, monkeypatch, error, expected, message
    ):
        folder = written(run, tmp_path / "out")
        before = sorted(file.name for file in folder.rglob("*"))

        def fail(*_):
            raise error

        monkeypatch.setattr(pictures, "jpeg", fail)
        for target in (folder, tmp_path / "new"):
            with pytest.raises(expected, match=message):
                written(run, target)
        assert sorted(file.name for file in folder.rglob("*")) == before
        assert [file.name for file in tmp_path.iterdir()] == ["out"]


class TestSubjects:
    def test_a_checkpoint_has_a_map_of_its_moment(self, run, images, tmp_path):
        folder = written(run.last_checkpoint, tmp_path / "out", images=str(images), weights="raw", parquet=True)
        facts = facts_of(folder)
        assert facts["is_moment"] and facts["map_steps"] == [] and "steps" not in facts
        _, frame = taken(folder / "data" / "map-0.js")
        assert len(column(frame["features"])) == 2 * facts["tokens"] and sum(column(frame["hits"])) == facts["tokens"]

    def test_a_lab_run_has_cards_without_pictures(self, tmp_path):
        size = {"codebook_size": 8, "steps": 4, "batch_size": 16, "snapshots": 3}
        run_lab(World(dim=2), ["vq"], progress=False, folder=tmp_path / "lab", **size)
        folder = written(tmp_path / "lab" / "vq", tmp_path / "out")
        facts = facts_of(folder)
        assert facts["has_map"] and "images" not in facts and "it has no images" in " ".join(facts["lacks"])
        assert any("near" in card for card in taken(folder / "cards" / "0.js")[1])

    @pytest.mark.parametrize(
        ("settings", "near"),
        [
            ({"name": "lfq", "codebook_size": 64, "code_dim": 6}, True),
            ({"name": "vq", "codebook_size": 4096}, True),
        ],
    )
    def test_other_codebooks(self, settings, near, tmp_path):
        method = {f"tokenizer.quantizer.{key}": value for key, value in settings.items()}
        more = {"steps": 1, "record.validate_every": 1, "record.tokens_per_code": 1}
        config = recipe_config("builtin/smoke", {**SMALL_DIGITS, **method, **more})
        run = train(config, tmp_path / "run", progress=False)
        folder = written(run, tmp_path / "out")
        size = settings["codebook_size"]
        assert facts_of(folder)["codes"] == size
        assert len(list((folder / "cards").iterdir())) == -(-size // SHARD)
        assert ("near" in taken(folder / "cards" / "0.js")[1][0]) == near

    def test_a_run_that_has_diverged_has_cards_and_no_map(self, copy, tmp_path):
        for step in copy.snapshot_steps:
            shot = dict(copy.snapshot(step))
            shot["features"][:] = np.nan
            copy.save_snapshot(step, **shot)
        shutil.rmtree(copy.path / "checkpoints")
        facts = facts_of(written(copy, tmp_path / "out"))
        assert not facts["has_map"] and facts["steps"] == copy.snapshot_steps
        assert "hold NaN" in " ".join(facts["lacks"]) and "no checkpoint yet" in " ".join(facts["lacks"])
        with pytest.raises(ViewError, match="parquet=true writes the codes' places on the map"):
            written(copy, tmp_path / "out", parquet=True)

    def test_one_live_code(self, copy, tmp_path):
        for step in copy.snapshot_steps:
            shot = dict(copy.snapshot(step))
            shot["counts"] = np.eye(32, dtype=np.int64)[7] * 160
            copy.save_snapshot(step, **shot)
        shutil.rmtree(copy.path / "checkpoints")
        folder = written(copy, tmp_path / "out")
        cards = taken(folder / "cards" / "0.js")[1]
        assert [code for code, card in enumerate(cards) if "life" in card] == [7]

    def test_a_run_without_anything_is_told_before_a_folder_is_made(self, copy, tmp_path):
        for name in ("snapshots", "checkpoints"):
            shutil.rmtree(copy.path / name)
        with pytest.raises(ViewError, match="no cards of copy"):
            written(copy, tmp_path / "out")
        (tmp_path / "empty").mkdir()
        with pytest.raises((RunError, OSError, ValueError)):
            written(tmp_path / "empty", tmp_path / "out")
        assert not (tmp_path / "out").exists()
