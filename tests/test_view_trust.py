"""That views show what is there: of one network and one step, and of arrays that are what they should be."""

import base64
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from registry import SMALL_DIGITS

from ibqlab.base.files import RunError
from ibqlab.pretrained import export_published
from ibqlab.runs import Run
from ibqlab.runs.folder import step_file
from ibqlab.training import recipe_config, train
from ibqlab.views import map_data, map_fit
from ibqlab.views.atlas import AtlasSettings, write_atlas
from ibqlab.views.atlas.pictures import decoded_codes
from ibqlab.views.card_page import card_html
from ibqlab.views.cards import CardReader
from ibqlab.views.map_colors import color_codes
from ibqlab.views.map_data import describe_frame, map_run_codes
from ibqlab.views.patches import index_patches
from ibqlab.views.snapshot_arrays import NEVER, NOT_STORED
from ibqlab.views.subject import ViewError, open_subject
from ibqlab.widgets import CodebookMap, CodeCard
from ibqlab.widgets.map_canvas import describe_point

IMAGES = 12
SIZE, DIM, FEATURES = 40, 4, 60


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """IBQ on digits: four steps, snapshots at 0, 2 and 4, the checkpoint at 4."""
    torch.set_num_threads(1)
    settings = {**SMALL_DIGITS, "tokenizer.quantizer.name": "ibq", "steps": 4, "record.validate_every": 2}
    return train(recipe_config("builtin/smoke", settings), tmp_path_factory.mktemp("trust") / "run", progress=False)


@pytest.fixture
def run(trained, tmp_path):
    """The same, to be changed."""
    return Run(shutil.copytree(trained.path, tmp_path / "run", ignore=shutil.ignore_patterns("views")))


def monitored(folder, *, steps=(0, 10, 20), **changes):
    """A run of random snapshots without a network; even codes are in use. None leaves an array out."""
    draw = np.random.default_rng(0)
    run = Run.start(folder, {"kind": "monitored", "codebook_size": SIZE, "code_dim": DIM})
    for step in steps:
        counts = np.where(np.arange(SIZE) % 2 == 0, 20 + np.arange(SIZE), 0)
        arrays = {
            "codebook": draw.normal(size=(SIZE, DIM)).astype(np.float32),
            "features": draw.normal(size=(FEATURES, DIM)).astype(np.float32),
            "assignments": draw.integers(SIZE // 2, size=FEATURES) * 2,
            "counts": counts,
            "last_hit": np.where(counts > 0, step, -1),
        }
        run.save_snapshot(step, **{k: value for k, value in (arrays | changes).items() if value is not None})
    run.finish("finished")
    return run


def change(run, step, **changes):
    """A snapshot with other arrays; None leaves one out."""
    file = step_file(run.path, "snapshots", step, ".npz")
    with np.load(file) as stored:
        arrays = dict(stored) | changes
    np.savez(file, **{name: values for name, values in arrays.items() if values is not None})


def map_of(run, **settings):
    return map_run_codes(open_subject(run.path), **settings)


def card_of(run, code, **settings):
    return CardReader(open_subject(run.path), IMAGES, progress=False).read([code], **settings)


def words(html):
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL).split())


def atlas_of(what, folder, **settings):
    settings = {"count": IMAGES, "decode": False, **settings}
    return write_atlas(what, folder / "atlas", AtlasSettings(**settings), progress=False).parent


def taken(file):
    return json.loads(re.fullmatch(r'atlas\.take\("[^"]*",(.*)\);\n', file.read_text(), re.DOTALL)[1])


def column(packed):
    return np.frombuffer(base64.b64decode(packed["base64"]), f"<{packed['kind']}")


class TestOneNetwork:
    """What is stored belongs to the network that is loaded, and not to its file alone."""

    @pytest.fixture
    def file(self, trained, tmp_path, monkeypatch):
        """A published file, which does not tell its method."""
        monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "cache"))
        return export_published(trained.path, tmp_path / "x.ckpt")

    @pytest.mark.parametrize("order", [("vq", "ibq"), ("ibq", "vq")])
    def test_one_file_read_as_two_methods_is_two_networks(self, file, order):
        for quantizer in order:
            subject = open_subject(file, "digits", weights="raw", quantizer=quantizer)
            reader = CardReader(subject, 1, progress=False)
            pictures = torch.from_numpy(reader.index.pictures).permute(0, 3, 1, 2)
            assert np.array_equal(reader.index.codes, subject.tokenizer.encode_indices(pictures).numpy())
            assert reader.index.ruler == {"vq": "L2", "ibq": "dot product"}[quantizer]
            decoded_codes(reader, False)
        assert len(list(subject.store.folder.glob("decoded-*"))) == 2

    def test_an_atlas_of_one_method_shows_nothing_of_the_other(self, file, tmp_path):
        for quantizer in ("vq", "ibq"):
            folder = tmp_path / quantizer
            settings = {"images": "digits", "count": 1, "weights": "raw", "quantizer": quantizer}
            facts = taken(atlas_of(file, folder, **settings) / "data" / "facts.js")
            shutil.rmtree(tmp_path / "cache")
            assert taken(atlas_of(file, folder, **settings) / "data" / "facts.js") == facts
            assert facts["ruler"] == {"vq": "L2", "ibq": "dot product"}[quantizer]

    def test_other_settings_of_a_run_are_another_network(self, run):
        before = index_patches(open_subject(run.path), IMAGES, progress=False)
        settings = dict(run.config)
        settings["tokenizer"] |= {"quantizer": {"name": "vq", "codebook_size": 32, "code_dim": 8}}
        (run.path / "config.yaml").write_text(json.dumps(settings))
        subject = open_subject(run.path)
        assert subject.tokenizer.quantizer.config.config_name == "vq"
        after = index_patches(subject, IMAGES, progress=False)
        pictures = torch.from_numpy(after.pictures).permute(0, 3, 1, 2)
        assert np.array_equal(after.codes, subject.tokenizer.encode_indices(pictures).numpy())
        assert (before.ruler, after.ruler) == ("dot product", "L2")

    def test_other_code_of_a_plugin_is_another_network(self, run, monkeypatch):
        marks = set()
        for code in ("", "a", "b"):
            plugin = SimpleNamespace(sha256=code) if code else None
            monkeypatch.setattr("ibqlab.views.subject.plugin_of", lambda _, plugin=plugin: plugin)
            marks.add(open_subject(run.path).weights_mark)
        assert len(marks) == 3

    def test_tokens_of_a_network_are_not_kept_as_those_of_a_newer_checkpoint(self, run):
        step, state = run.load_checkpoint()
        slow = open_subject(run.path)
        assert slow.network_step == step
        state["model"]["quant_conv.bias"] += 1
        run.save_checkpoint(step + 5, state)
        index_patches(slow, IMAGES, progress=False)
        newer = open_subject(run.path)
        index = index_patches(newer, IMAGES, progress=False)
        pictures = torch.from_numpy(index.pictures).permute(0, 3, 1, 2)
        assert index.step == step + 5
        assert np.array_equal(index.codes, newer.tokenizer.encode_indices(pictures).numpy())


class TestOneStep:
    """A training that goes on has snapshots of later steps than its last checkpoint."""

    @pytest.fixture
    def ahead(self, run):
        shot = run.snapshot()
        run.save_snapshot(9, **shot | {"codebook": 2 * shot["codebook"] + 1, "counts": np.roll(shot["counts"], 1)})
        return run

    def test_a_cards_numbers_are_of_the_network_that_encoded(self, ahead):
        subject = open_subject(ahead.path)
        book = subject.tokenizer.quantizer.codebook.detach().numpy()
        card = CardReader(subject, IMAGES, progress=False).read([3], decode=False)
        distances = np.linalg.norm(book - book[3], axis=1)
        nearest = np.argsort(distances)[1:7]
        assert card.norm == pytest.approx(np.linalg.norm(book[3]), rel=1e-5)
        assert [one.code for one in card.near] == list(nearest)
        assert [one.value for one in card.near] == pytest.approx(distances[nearest], rel=1e-4)

    def test_both_steps_are_named_where_its_use_goes_further(self, ahead, trained, tmp_path):
        sentence = "are of step 4, the last checkpoint; the use through training is of snapshots up to step 9."
        assert sentence in words(card_html(card_of(ahead, 3)))
        assert sentence in CodebookMap(ahead.path, count=IMAGES).card.static_html()
        assert sentence in " ".join(taken(atlas_of(ahead.path, tmp_path) / "data" / "facts.js")["lacks"])
        assert "Two steps" not in words(card_html(card_of(trained, 3)))

    def test_an_atlas_and_its_table_have_the_networks_norms(self, ahead, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        norms = np.linalg.norm(open_subject(ahead.path).tokenizer.quantizer.codebook.detach().numpy(), axis=1)
        folder = atlas_of(ahead.path, tmp_path, parquet=True)
        assert column(taken(folder / "data" / "columns.js")["norm"]) == pytest.approx(norms, rel=1e-5)
        for row in parquet.read_table(folder / "codes.parquet").to_pylist():
            assert row["norm"] == pytest.approx(norms[row["number"]], rel=1e-5)

    def test_class_colours_name_the_step_they_are_of(self, ahead):
        index = index_patches(open_subject(ahead.path), IMAGES, progress=False)
        assert "of step 4, the last checkpoint" in color_codes(map_of(ahead), "class", index).note

    def test_without_a_network_all_is_of_the_last_snapshot(self, ahead):
        shutil.rmtree(ahead.path / "checkpoints")
        card = card_of(ahead, 3)
        assert card.norm == pytest.approx(np.linalg.norm(ahead.snapshot()["codebook"][3]), rel=1e-5)
        assert not [lack for lack in card.lacks if "Two steps" in lack]

    def test_a_map_is_of_the_steps_that_its_snapshots_have_now(self, tmp_path):
        run = monitored(tmp_path / "run")
        assert map_of(run).steps == (0, 10, 20)
        step_file(run.path, "snapshots", 10, ".npz").rename(step_file(run.path, "snapshots", 12, ".npz"))
        assert map_of(run).steps == (0, 12, 20)
        assert list(CodebookMap(run.path).card.reader.history[0]) == [0, 12, 20]


class TestLastHits:
    """What a snapshot does not tell is not "never"."""

    @pytest.fixture
    def old(self, tmp_path):
        return monitored(tmp_path / "run", last_hit=None)

    @pytest.mark.parametrize("through_a_map", [False, True])
    def test_on_a_card(self, old, through_a_map):
        reader = CodebookMap(old.path).card.reader if through_a_map else CardReader(open_subject(old.path))
        for codes in ([2], [1], [1, 2]):
            page = words(card_html(reader.read(codes)))
            assert "its last hit in training was not stored" in page and "never hit" not in page

    def test_of_the_last_snapshot_alone(self, tmp_path):
        """An older one tells of an earlier moment."""
        run = monitored(tmp_path / "run")
        change(run, 20, last_hit=None)
        assert card_of(run, 2).life.last_hit == NOT_STORED and map_of(run).idle[-1][2] == NOT_STORED
        change(run, 20, last_hit=np.full(SIZE, -1))
        assert card_of(run, 2).life.last_hit == NEVER and "never hit in training" in words(card_html(card_of(run, 2)))

    def test_on_a_map(self, old, tmp_path):
        data = map_of(old)
        assert describe_point(data, 1, FEATURES + 2)["last hit"] == "not stored"
        with pytest.raises(ViewError, match="did not store when training last hit each code"):
            color_codes(data, "steps since last hit", None)
        some = monitored(tmp_path / "some")
        change(some, 10, last_hit=None)
        note = color_codes(map_of(some), "steps since last hit", None).note
        assert note == "Codes that training never hit have no value. Last hits were not stored at step 10."

    def test_in_an_atlas(self, old, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        folder = atlas_of(old.path, tmp_path, parquet=True)
        assert "idle" not in taken(folder / "data" / "columns.js")
        assert "When training last hit each code was not stored." in taken(folder / "data" / "facts.js")["lacks"]
        rows = parquet.read_table(folder / "codes.parquet").to_pylist()
        assert all(row["steps_since_hit"] is None for row in rows)


class TestNumbers:
    def test_shares_of_variance_are_of_all_points_shown(self, tmp_path):
        run = monitored(tmp_path / "run")
        still = run.snapshot(0)["codebook"]
        for step in run.snapshot_steps:  # copies of codes that never move count once in the fit
            change(run, step, codebook=still)
        data = map_of(run, max_points=30)
        shots = [run.snapshot(step) for step in data.steps]
        vectors = np.concatenate([np.concatenate([s["codebook"], s["features"]]) for s in shots]).astype(float)
        places = np.concatenate([*data.codes, *data.features]).astype(float)
        shares = places.var(0) / vectors.var(0).sum()
        assert data.explained == pytest.approx(shares, rel=1e-4)
        assert f"({100 * shares[0]:.0f} % and {100 * shares[1]:.0f} % of the variance of the points shown)" in (
            describe_frame(data, 0)
        )

    def test_facts_of_a_sample_say_so(self, tmp_path, monkeypatch):
        run = monitored(tmp_path / "run")
        assert "sample" not in describe_frame(map_of(run), 0)
        for module in (map_data, map_fit):
            monkeypatch.setattr(module, "FACT_POINTS", 30)
        assert "are measured on a sample of 30 codes and 30 features" in describe_frame(map_of(run), 0)
        monkeypatch.setattr(map_data, "FACT_POINTS", 50)
        assert "a sample of 40 codes and 50 features" in describe_frame(map_of(run), 0)

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_distances_of_an_atlas_keep_their_digits(self, tmp_path, scale):
        parquet = pytest.importorskip("pyarrow.parquet")
        book = (scale * np.random.default_rng(0).normal(size=(SIZE, DIM))).astype(np.float32)
        run = monitored(tmp_path / "run", codebook=book)
        folder = atlas_of(run.path, tmp_path, parquet=True)
        cards = taken(folder / "cards" / "0.js")
        rows = parquet.read_table(folder / "codes.parquet").to_pylist()
        for code in range(SIZE):
            near = card_of(run, code).near
            for stored in (cards[code]["near"], list(zip(*rows[code]["neighbors"].values(), strict=True))):
                assert [other for other, _ in stored] == [one.code for one in near]
                assert [far for _, far in stored] == pytest.approx([one.value for one in near], rel=1e-4)

    def test_what_stands_beside_a_code_by_chance_is_not_named(self, run):
        index = index_patches(open_subject(run.path), IMAGES, progress=False)
        object.__setattr__(index, "codes", (np.indices(index.codes.shape).sum(0) % 2).astype(np.int32))
        codes, lift = index.beside(0)
        assert not len(codes) and not len(lift), "with two codes in use each stands beside the other by chance"

    def test_hits_of_a_monitored_run_are_in_tokens_of_training(self, tmp_path, trained):
        run = monitored(tmp_path / "run")
        data = map_of(run)
        page = card_html(card_of(run, 2)) + card_html(card_of(run, 1))
        facts = taken(atlas_of(run.path, tmp_path) / "data" / "facts.js")
        for text in (color_codes(data, "hits", None).unit, describe_frame(data, 0), page, facts["counted"]):
            assert "tokens of training" in text and "validation" not in text
        data, page = map_of(trained), card_html(card_of(trained, 3))
        for text in (color_codes(data, "hits", None).unit, describe_frame(data, 0), page):
            assert "validation tokens" in text


class TestNames:
    @pytest.mark.parametrize(
        ("good", "damaged"),
        [(("a.png", "c.png"), ("a.png: b.png",)), (("x: y.png", "z.png"), ("x.png", "x: y.png: z.png", "none.png"))],
    )
    def test_of_images_are_those_of_their_pixels_whatever_the_damaged_are_called(
        self, trained, tmp_path, good, damaged
    ):
        folder = tmp_path / "images"
        folder.mkdir()
        for number, name in enumerate(good):
            Image.fromarray(np.full((8, 8, 3), 40 + 120 * number, np.uint8)).save(folder / name)
        for name in damaged:
            (folder / name).write_bytes(b"no picture")
        out = atlas_of(trained.path, tmp_path, images=str(folder))
        names = taken(out / "data" / "facts.js")["names"]
        assert sorted(names) == sorted(good)
        for number, name in enumerate(names):
            means = [np.asarray(Image.open(file)).mean() for file in (out / "images" / f"{number}.jpg", folder / name)]
            assert means[0] == pytest.approx(means[1], abs=2)
        broken = CardReader(open_subject(trained.path, folder), IMAGES, progress=False).index.broken
        assert {str(name) for name in broken} == set(damaged) and all(name.reason for name in broken)


DAMAGES = {
    "short last hits": {"last_hit": np.zeros(3, int)},
    "last hits of another kind": {"last_hit": np.full(SIZE, np.nan)},
    "counts in a row": {"counts": np.ones((1, SIZE), int)},
    "NaN counts": {"counts": np.full(SIZE, np.nan)},
    "half counts": {"counts": np.full(SIZE, 0.5)},
    "negative counts": {"counts": np.full(SIZE, -1)},
    "no counts at all": {"counts": np.zeros(0, int)},
    "a flat codebook": {"codebook": np.zeros(SIZE, np.float32)},
    "a codebook of text": {"codebook": np.full((SIZE, DIM), "a")},
    "more codes than counts": {"codebook": np.zeros((SIZE + 1, DIM), np.float32)},
    "features of another dimension": {"features": np.zeros((FEATURES, DIM + 1), np.float32)},
    "fewer assignments than features": {"assignments": np.zeros(3, int)},
    "assignments of NaN": {"assignments": np.full(FEATURES, np.nan)},
    "gradients of another codebook": {"gradient_norm": np.zeros(3, np.float32)},
    "parts without an axis": {"codebook": None, "summed_codebooks": np.zeros((4, DIM), np.float32)},
}


class TestDamagedArrays:
    """One sentence, which names the file and what to do, in every view."""

    @pytest.mark.parametrize("name", DAMAGES)
    @pytest.mark.parametrize("step", [0, 20])
    def test_are_told_and_never_raised(self, tmp_path, name, step):
        run = monitored(tmp_path / "run")
        change(run, step, **DAMAGES[name])
        file = f"step_{step:08d}.npz"
        with pytest.raises(RunError, match=rf"{file} is damaged: .*; delete {file} or train again"):
            map_of(run)
        shown = CodebookMap(run.path)
        assert shown.data is None and f"{file} is damaged" in shown.said.value
        try:
            folder = atlas_of(run.path, tmp_path)
            assert f"{file} is damaged" in " ".join(taken(folder / "data" / "facts.js")["lacks"])
        except ViewError as error:
            assert f"{file} is damaged" in str(error)
        page = words(CodeCard(run.path, 2).static_html())
        arrays = {"counts", "last_hit"} | ({"codebook", "summed_codebooks"} if step == 20 else set())
        assert page.count(f"{file} is damaged") == bool(arrays & set(DAMAGES[name])) and "Error" not in page

    def test_do_not_hide_what_the_others_hold(self, tmp_path):
        run = monitored(tmp_path / "run")
        change(run, 20, last_hit=np.zeros(3, int))
        page = words(CodeCard(run.path, 2).static_html())
        assert "Nearest codes" in page and "last hit in training at step 10" in page

    def test_a_file_that_is_cut_is_told_once(self, run):
        file = step_file(run.path, "snapshots", 4, ".npz")
        file.write_bytes(file.read_bytes()[:900])
        for has_network in (True, False):
            if not has_network:
                shutil.rmtree(run.path / "checkpoints")
            assert words(card_html(card_of(run, 1))).count(f"{file.name} is damaged") == 1

    def test_many_of_one_kind_are_one_sentence_and_a_number(self, run):
        for step in run.snapshot_steps:
            change(run, step, counts=None)
        page = words(card_html(card_of(run, 1)))
        assert page.count("holds no counts of hits") == 1
        assert f"{len(run.snapshot_steps) - 1} further snapshots are left out for reasons of this kind." in page
        with pytest.raises(ViewError, match="or no counts of hits, which a map is made of"):
            map_of(run)

    def test_a_folder_in_place_of_a_snapshot(self, tmp_path):
        run = monitored(tmp_path / "run")
        file = step_file(run.path, "snapshots", 20, ".npz")
        file.unlink()
        file.mkdir()
        for text in (CodebookMap(run.path).said.value, CodeCard(run.path, 2).static_html()):
            assert f"{file.name} is a folder" in text and f"delete {file.name}" in text and "Errno" not in text

    def test_assignments_to_no_code_are_none(self, tmp_path):
        """A monitor is given wrong indices at times, says so, and stores them."""
        run = monitored(tmp_path / "run", assignments=np.arange(FEATURES) - 5)
        codes = map_of(run).assignments[0]
        assert np.array_equal(codes, np.where(np.abs(np.arange(FEATURES) - 24.5) < 20, np.arange(FEATURES) - 5, -1))
        shown = CodebookMap(run.path)
        shown.canvas.plot.selection = np.array([FEATURES - 1], np.uint32)
        assert shown.selected == () and "whose codes this snapshot did not store" in shown.said.value

    def test_numbers_as_floats_are_read_as_what_they_are(self, tmp_path):
        run, other = monitored(tmp_path / "run"), monitored(tmp_path / "other")
        for step in run.snapshot_steps:
            shot = run.snapshot(step)
            change(run, step, **{name: shot[name].astype(float) for name in ("counts", "last_hit", "assignments")})
        one, two = map_of(run), map_of(other)
        for name in ("hits", "idle", "assignments", "tokens"):
            assert np.array_equal(getattr(one, name), getattr(two, name))
        atlas_of(run.path, tmp_path)


class TestOtherCodebooks:
    @pytest.mark.parametrize(("size", "dim"), [(SIZE, DIM + 2), (SIZE + 2, DIM)])
    def test_of_earlier_snapshots_are_left_out_and_told(self, tmp_path, size, dim):
        run = monitored(tmp_path / "run")
        draw = np.random.default_rng(1)
        arrays = {"codebook": draw.normal(size=(size, dim)), "features": draw.normal(size=(FEATURES, dim))}
        arrays |= {"counts": np.full(size, 9), "last_hit": np.full(size, 20)}
        change(run, 20, **arrays)
        data = map_of(run)
        assert data.steps == (20,) and data.left_out == (0, 2)
        assert "2 snapshots are left out: of another codebook size or dimension." in describe_frame(data, 0)
        assert taken(atlas_of(run.path, tmp_path) / "data" / "facts.js")["has_map"]


class TestInfinity:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("name", ["codebook", "features"])
    def test_is_not_called_nan_alone(self, tmp_path, name, value):
        run = monitored(tmp_path / "run")
        for number, step in enumerate(run.snapshot_steps):
            values = run.snapshot(step)[name].copy()
            values[0] = value
            change(run, step, **{name: values})
            if not number:
                assert "1 snapshot is left out: it holds NaN or infinity." in describe_frame(map_of(run), 0)
        with pytest.raises(ViewError, match="hold NaN or infinity: the run has diverged"):
            map_of(run)
        if name == "codebook":
            assert "The code vectors hold NaN or infinity" in CodeCard(run.path, 2).static_html()


class TestSettings:
    @pytest.mark.parametrize("code", [99_999, "abc", [1, -3]])
    def test_a_code_that_is_none_is_said_in_the_executed_copy(self, trained, code):
        card = CodeCard(trained.path, code, count=IMAGES)
        assert card.said.value and card.said.value in card.static_html()
        bundle = card._repr_mimebundle_()
        assert "codes are" in (bundle[0] if isinstance(bundle, tuple) else bundle)["text/html"]

    @pytest.mark.parametrize("count", [2.5, "many", 0, 10**9])
    def test_a_number_of_images_that_is_none_names_the_setting(self, trained, count):
        for view in (CodeCard(trained.path, 1, count=count), CodebookMap(trained.path, count=count)):
            assert "ount must be" in words(view.static_html()) and "batch_size" not in view.static_html()
        with pytest.raises(ValueError, match="count must be"):
            AtlasSettings(count=count)

    def test_images_that_are_nowhere_name_the_setting(self, trained):
        with pytest.raises(ViewError, match=r"^images must be .*got '/nowhere'"):
            _ = open_subject(trained.path, "/nowhere").source

    def test_a_quantizer_is_not_asked_of_a_run(self, trained, tmp_path):
        with pytest.raises(ViewError, match=r"run is a run, whose config\.yaml does: leave quantizer out"):
            atlas_of(trained.path, tmp_path, quantizer="ibq")
