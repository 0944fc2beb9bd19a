"""The atlas of a codebook: what its folder holds, and what its reader sees who opens it from disk."""

import base64
import errno
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from registry import SMALL_DIGITS

from ibqlab.base.files import RunError
from ibqlab.diagnostics.lab import World, run_lab
from ibqlab.pretrained import export_tokenizer
from ibqlab.runs import Run
from ibqlab.runs.folder import step_file
from ibqlab.training import recipe_config, train
from ibqlab.views.atlas import AtlasParameters, AtlasSettings, find_or_train, pictures, write_atlas
from ibqlab.views.atlas.gather import SHARD
from ibqlab.views.card_page import card_html
from ibqlab.views.cards import CardReader
from ibqlab.views.map_data import map_run_codes
from ibqlab.views.subject import ViewError, open_subject

IMAGES = 24
CLASSES = ('<script>alert(1)</script> & "one"', "'two'")
FILE = "a \"<img src=x>\" 'b'.png"


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
        assert facts["map_note"] == (
            "The map counts hits in the validation tokens of its step. The table's “tokens of all images” and the "
            "cards count those in the 384 tokens of all 24 images of the atlas."
        )
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

    def test_of_a_studys_run_carries_its_study(self, run, images, tmp_path, monkeypatch):
        monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
        for study in ("study_a", "study_b"):
            shutil.copytree(run.path, tmp_path / "runs" / study / "cell")
        shutil.copytree(run.path, tmp_path / "runs" / "lone")
        for name, folder in (("study_a/cell", "study_a-cell"), ("study_b/cell", "study_b-cell"), ("lone", "lone")):
            assert written(name, "") == tmp_path / "runs" / f"{folder}_atlas"
            facts = facts_of(tmp_path / "runs" / f"{folder}_atlas")
            assert facts["name"] == name and str(tmp_path) not in json.dumps(facts)
        file = export_tokenizer(run.path, tmp_path / "runs" / "study_a" / "x.safetensors", "raw")
        assert written(file, "", images=str(images)).name == "study_a-x_atlas"

    def test_of_another_runs_atlas_is_refused_and_of_its_own_is_not(self, run, tmp_path, monkeypatch):
        monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
        for name in ("study_a/cell", "study_b/cell", "../elsewhere/cell", "../third/cell"):
            shutil.copytree(run.path, tmp_path / "runs" / name)
        written("study_b/cell", "mine")
        message = "mine holds the atlas of study_b/cell, and this one is of study_a/cell: .*output=FOLDER"
        with pytest.raises(ViewError, match=message):
            written("study_a/cell", "mine")
        assert facts_of(written(tmp_path / "runs" / "study_b" / "cell", "mine"))["name"] == "study_b/cell"
        written(tmp_path / "elsewhere" / "cell", "other")
        with pytest.raises(ViewError, match="holds the atlas of cell, and this one is of another one of that name"):
            written(tmp_path / "third" / "cell", "other")
        facts = facts_of(written(tmp_path / "elsewhere" / "cell", "other"))
        # As earlier versions wrote it, which noted the last part of the name alone.
        text = json.dumps({"name": "cell", "codes": facts["codes"]})
        for name in ("study_a/cell", "study_b/cell"):
            (tmp_path / "runs" / "mine" / "data" / "facts.js").write_text(f'atlas.take("facts",{text});\n')
            written(name, "mine")

    def test_paths_of_this_machine_are_not_in_what_is_sent(self, copy, tmp_path):
        for step in copy.snapshot_steps:
            step_file(copy.path, "snapshots", step, ".npz").write_bytes(b"broken")
        folder = written(copy, tmp_path / "out")
        assert facts_of(folder)["lacks"]
        for file in folder.rglob("*.js"):
            assert str(tmp_path) not in file.read_text()

    def test_of_a_file_is_refused(self, run, tmp_path):
        (tmp_path / "mine").write_text("")
        with pytest.raises(ViewError, match="is a file; an atlas is a folder"):
            written(run, tmp_path / "mine")

    @pytest.mark.parametrize(
        ("error", "expected"), [(OSError(errno.ENOSPC, "full"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)]
    )
    def test_keeps_the_earlier_one_where_the_work_ends_early(self, run, tmp_path, monkeypatch, error, expected):
        folder = written(run, tmp_path / "out")
        before = sorted(file.name for file in folder.rglob("*"))

        def fail(*_):
            raise error

        monkeypatch.setattr(pictures, "jpeg", fail)
        for target in (folder, tmp_path / "new"):
            with pytest.raises(expected) as raised:
                written(run, target)
            assert expected is KeyboardInterrupt or "the disk or a quota is full" in str(raised.value)
        assert sorted(file.name for file in folder.rglob("*")) == before
        assert [file.name for file in tmp_path.iterdir()] == ["out"]


class TestSubjects:
    def test_a_checkpoint_has_a_map_of_its_moment(self, run, images, tmp_path):
        file = export_tokenizer(run.path, tmp_path / "x.safetensors", "raw")
        with pytest.raises(ViewError, match="brings no images; name some: images=FOLDER"):
            written(file, tmp_path / "out")
        folder = written(file, tmp_path / "out", images=str(images), weights="raw", parquet=True)
        facts = facts_of(folder)
        assert facts["is_moment"] and facts["map_steps"] == [] and "steps" not in facts and "map_note" not in facts
        _, frame = taken(folder / "data" / "map-0.js")
        assert len(column(frame["features"])) == 2 * facts["tokens"] and sum(column(frame["hits"])) == facts["tokens"]

    def test_images_that_are_asked_for_have_to_be_there(self, run, tmp_path):
        with pytest.raises((RunError, ValueError, OSError), match="nothing"):
            written(run, tmp_path / "out", images=str(tmp_path / "nothing"))
        assert not (tmp_path / "out").exists()

    def test_a_lab_run_has_cards_without_pictures(self, tmp_path):
        size = {"codebook_size": 8, "steps": 4, "batch_size": 16, "snapshots": 3}
        run_lab(World(dim=2), ["vq"], progress=False, folder=tmp_path / "lab", **size)
        folder = written(tmp_path / "lab" / "vq", tmp_path / "out")
        facts = facts_of(folder)
        assert facts["counted"] == "validation tokens"
        assert facts["has_map"] and "images" not in facts and "it has no images" in " ".join(facts["lacks"])
        assert any("near" in card for card in taken(folder / "cards" / "0.js")[1])

    @pytest.mark.parametrize(
        ("settings", "near"),
        [
            ({"name": "lfq", "codebook_size": 64, "code_dim": 6}, True),
            ({"name": "vq", "codebook_size": 600}, True),
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


class TestNotebook:
    """What it shows where no source is named."""

    def test_trains_where_no_tokenizer_run_has_finished(self, tmp_path, monkeypatch):
        monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))
        run_lab(World(dim=2), ["vq"], progress=False, folder=tmp_path / "lab", codebook_size=8, steps=2, batch_size=16)
        chosen = find_or_train(AtlasParameters(preset="smoke"))
        assert Run(chosen.source).status == "finished"
        assert "trained with preset smoke because no tokenizer run had finished" in chosen.words
        assert "too short to mean anything" in chosen.words and "source=RUN" in chosen.words

    def test_shows_the_newest_run_that_has_finished_and_how_to_name_another(self, run, tmp_path, monkeypatch):
        monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))
        for name, ended, status in (
            ("study/newer", "2026-02-01", "finished"),
            ("older", "2026-01-01", "finished"),
            ("stopped", "2026-03-01", "stopped"),
            ("emptied", "2026-04-01", "finished"),
        ):
            shutil.copytree(run.path, tmp_path / name)
            file = tmp_path / name / "provenance.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"ended": ended, "status": status}))
        shutil.rmtree(tmp_path / "emptied" / "checkpoints")
        chosen = find_or_train(AtlasParameters())
        assert chosen.source == tmp_path / "study" / "newer"
        assert chosen.words.startswith("codes of study/newer, the newest tokenizer run that has finished (4 steps: ")
        assert chosen.words.endswith("\nto see another: source=RUN; ibqlab runs lists them")
        assert find_or_train(AtlasParameters(source="older")) == ("older", "codes of older")


def test_the_benchmark_runs(tmp_path, monkeypatch):
    script = Path(__file__).parents[1] / "experiments" / "benchmarks" / "atlas.py"
    monkeypatch.syspath_prepend(script.parent)
    options = ["--codes", "16", "--images", "1", "--page-codes", "0", "--output", str(tmp_path / "table.csv")]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.what) == ["build", "build again"] and table.commit.notna().all() and set(table.tokens) == {256}


# --- as its reader sees it --------------------------------------------------------------------------------------------

PATIENCE = 120_000
"""Milliseconds after which what was waited for is taken to be broken."""
TITLE = "() => document.querySelector('#card h2')?.textContent"

PLACE_OF = """first => {
  const [box, dots] = [document.querySelector('#map').getBoundingClientRect(), window.devicePixelRatio || 1];
  const alone = map.shownPlaces().find(({code, x, y}, place, all) =>
    code !== first && all.every(other => other.code === code || Math.hypot(other.x - x, other.y - y) > 14 * dots));
  return [box.left + alone.x / dots + 1, box.top + alone.y / dots + 1, alone.code];
}"""
"""Where on the screen a code of the map lies that stands alone."""
FRAMED = """() => {
  const canvas = document.querySelector('#map');
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const card = map.shownPlaces().find(({code}) => location.hash === `#code=${code}`);
  return map.shownPlaces().filter(({x, y}) => {
    if (Math.hypot(x - card.x, y - card.y) < 16) return false;
    for (let row = -4; row <= 4; row++) for (let column = -4; column <= 4; column++) {
      const at = 4 * ((Math.round(y) + row) * canvas.width + Math.round(x) + column);
      if (pixels[at] === 213 && pixels[at + 1] === 94 && pixels[at + 2] === 0) return true;
    }
    return false;
  }).length;
}"""
"""How many codes of the map have a frame, in the light theme; those near the card's, which has a ring, left out."""


@pytest.fixture(scope="module")
def shown(browser, atlas):
    """Opens an atlas from disk; at the end nothing was asked of the network, and the console told no error."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, offline=True)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    told = SimpleNamespace(errors=[], elsewhere=[])
    page.on("console", lambda message: told.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: told.errors.append(str(error)))
    page.on("dialog", lambda dialog: (told.errors.append(dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else told.elsewhere.append(request.url),
    )
    yield SimpleNamespace(page=page, told=told)
    assert not told.errors and not told.elsewhere
    context.close()


@pytest.fixture
def page(shown, atlas):
    """The atlas, opened anew."""
    shown.page.goto("about:blank")
    return opened(shown.page, atlas)


def opened(page, folder, link=""):
    page.goto(f"{(folder / 'index.html').as_uri()}{link}")
    page.wait_for_function("() => document.querySelector('#map-words').textContent")
    page.wait_for_selector("#card h2")
    return page


def card_of(page):
    return int(re.match(r"Code ([\d,]+) of", page.text_content("#card h2"))[1].replace(",", ""))


def await_card(page, code):
    page.wait_for_function(
        "text => document.querySelector('#card h2')?.textContent.startsWith(text)", arg=f"Code {code:,} of"
    )


def rows(page):
    return [int(code) for code in page.eval_on_selector_all(".line", "lines => lines.map(line => line.dataset.code)")]


@pytest.mark.browser
class TestPage:
    def test_opens_with_the_most_used_code_and_shows_names_as_text(self, page, index, atlas):
        code = int(np.flatnonzero(index.counts == index.counts.max())[-1])
        assert card_of(page) == code == rows(page)[0]
        assert f"{index.counts[code]} of {index.tokens} tokens" in page.text_content("#card")
        page.wait_for_function("() => document.querySelectorAll('#card .patch').length > 1")
        shown = page.eval_on_selector_all(".classes span", "cells => cells.map(cell => cell.textContent)")
        assert set(shown[::2]) <= set(index.classes) and any("alert(1)" in name for name in index.classes)
        titles = page.eval_on_selector_all(".patch", "patches => patches.map(patch => patch.title)")
        assert titles and any(FILE in name for name in facts_of(atlas)["names"])

    def test_a_click_on_the_map_opens_the_codes_card_and_the_way_back_is_kept(self, page):
        first = card_of(page)
        x, y, code = page.evaluate(PLACE_OF, first)
        page.mouse.move(x, y)
        page.wait_for_selector("#hover:not([hidden])")
        assert page.text_content("#hover").startswith(f"code {code}: ")
        page.mouse.click(x, y)
        await_card(page, code)
        assert code != first and page.url.endswith(f"#code={code}")
        neighbour = int(page.get_attribute("#card .chip", "data-code"))
        page.click("#card .chip")
        await_card(page, neighbour)
        page.go_back()
        await_card(page, code)
        page.go_back()
        await_card(page, first)
        page.go_forward()
        await_card(page, code)

    def test_a_link_opens_a_code_and_a_wrong_one_says_so(self, page, atlas):
        page.goto("about:blank")
        opened(page, atlas, "#code=5")
        assert card_of(page) == 5
        page.evaluate("() => { location.hash = 'code=99' }")
        page.wait_for_function("() => document.querySelector('#card').textContent.includes('Codes are 0 to 31')")

    def test_the_table_sorts_and_filters_by_hand_and_by_key(self, page, index):
        counts = index.counts
        assert [counts[code] for code in rows(page)] == sorted(counts[counts > 0], reverse=True)[: len(rows(page))]
        page.click("#head button[data-by=code]")
        assert rows(page)[0] == np.flatnonzero(counts)[0]
        page.uncheck("#used")
        assert page.text_content("#count") == "32 of 32 codes" and rows(page)[:3] == [0, 1, 2]
        page.click("#head button[data-by=norm]")
        norms = page.evaluate("() => [...table.order].map(code => table.columns.norm[code])")
        assert norms == sorted(norms, reverse=True)
        page.focus("#table")
        for key, code in (("Home", rows(page)[0]), ("ArrowDown", rows(page)[1]), ("End", None)):
            page.keyboard.press(key)
            await_card(page, page.evaluate("() => table.order.at(-1)") if code is None else code)
        page.fill("#find", "17")
        await_card(page, 17)

    def test_a_typed_code_is_scrolled_to(self, page):
        page.uncheck("#used")
        last, first = page.evaluate("() => [table.order.at(-1), table.order[0]]")
        for code in (last, first):
            page.fill("#find", str(code))
            await_card(page, code)
            page.wait_for_function(
                """code => {
                  const row = document.querySelector(`.line.chosen[data-code="${code}"]`)?.getBoundingClientRect();
                  const all = document.querySelector('#scroll').getBoundingClientRect();
                  return row && row.top >= all.top - 1 && row.bottom <= all.bottom + 1;
                }""",
                arg=code,
            )

    def test_says_which_tokens_each_count_is_of(self, page, atlas, run):
        facts, last = facts_of(atlas), run.snapshot_steps[-1]
        assert page.text_content("#map-words").startswith("The map counts hits in the validation tokens of its step. ")
        assert page.text_content("#head button[data-by=hits]") == "tokens of all images ▼"
        assert page.text_content("#head button[data-by=validation]") == f"validation tokens, step {last}"
        titles = [page.get_attribute(f"#head button[data-by={name}]", "title") for name in ("hits", "validation")]
        assert titles == [
            f"of the {facts['tokens']} tokens of the atlas's 12 images those that take the code",
            f"of the {facts['step_tokens'][-1]} validation tokens at step {last} those that take the code",
        ]

    def test_a_codes_life_is_told_in_the_cards_words(self, shown, copy, tmp_path):
        first, second, third = copy.snapshot_steps
        for step, hits in ((first, 5), (second, 0), (third, 3)):
            shot = dict(copy.snapshot(step))
            shot["counts"] = np.eye(32, dtype=np.int64)[8] * 160
            shot["counts"][7] = hits
            copy.save_snapshot(step, **shot)
        page = opened(shown.page, written(copy, tmp_path / "out"), "#code=7")
        words = f"in use by step {first}; without a hit by step {second}; in use again by step {third}"
        assert page.text_content("#card .life + p") == words
        assert words in card_html(CardReader(open_subject(copy), 4, progress=False).read([7], decode=False))

    def test_the_slider_moves_the_points_and_a_lasso_fills_the_table(self, page, run):
        before = page.evaluate("() => document.querySelector('#map').toDataURL()")
        page.focus("#step")
        page.keyboard.press("Home")
        page.wait_for_function(
            "text => document.querySelector('#step-words').textContent === text", arg=str(run.snapshot_steps[0])
        )
        page.wait_for_function("before => document.querySelector('#map').toDataURL() !== before", arg=before)
        box = page.locator("#map").bounding_box()
        corners = [(2, 2), (box["width"] - 2, 2), (box["width"] - 2, box["height"] - 2), (2, box["height"] - 2)]

        def draw(corners):
            page.mouse.move(box["x"] + corners[0][0], box["y"] + corners[0][1])
            page.mouse.down()
            for x, y in corners[1:]:
                page.mouse.move(box["x"] + x, box["y"] + y)
            page.mouse.up()

        page.keyboard.down("Shift")
        draw(corners)
        page.keyboard.up("Shift")
        page.wait_for_function(
            "text => document.querySelector('#count').textContent.includes(text)", arg="of the lasso's 32"
        )
        assert page.is_visible("#lassoed")
        page.wait_for_function(f"() => ({FRAMED})() > 3")
        page.click("#clear")
        page.wait_for_function(f"() => ({FRAMED})() < 1")
        assert not page.is_visible("#lassoed")
        page.click("#lasso")
        draw([(2, 2), (8, 2), (8, 8)])
        page.wait_for_function("() => document.querySelector('#count').textContent.endsWith('the lasso held none')")

    def test_follows_the_systems_theme_and_fits_a_phone(self, page):
        page.emulate_media(color_scheme="dark")
        dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="light")
        assert dark != page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        for width in (1000, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("() => document.documentElement.scrollWidth") == width
        page.click(".line >> nth=2")
        page.wait_for_function("() => document.querySelector('#card').getBoundingClientRect().top < 400")
        page.set_viewport_size({"width": 1400, "height": 1000})

    def test_without_a_map_and_without_its_files_every_click_is_answered(self, shown, atlas, tmp_path):
        broken = shutil.copytree(atlas, tmp_path / "broken")
        (broken / "data" / "map-0.js").unlink()
        (broken / "cards" / "0.js").write_text("atlas.take(")
        page, told = shown.page, shown.told
        page.goto((broken / "index.html").as_uri())
        page.wait_for_function("() => document.querySelector('#card').textContent.includes('is missing or damaged')")
        page.focus("#step")
        page.keyboard.press("Home")
        page.wait_for_function(
            "() => document.querySelector('#map-words').textContent.includes('is missing or damaged')"
        )
        (broken / "data" / "facts.js").unlink()
        page.reload()
        page.wait_for_function(
            "() => document.querySelector('#summary').textContent.includes('The data are not there')"
        )
        told.errors.clear()  # of the files that are not there
