"""What views of a run show: tokens and patches, cards, the map, and one image's tokens."""

import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from registry import SMALL_DIGITS

from ibqlab.diagnostics.lab import World, run_lab
from ibqlab.runs import Run
from ibqlab.training import recipe_config, train
from ibqlab.views import encoding, patches
from ibqlab.views.card_page import card_html, life_svg
from ibqlab.views.cards import MEAN_OF, CardReader, Life
from ibqlab.views.map_data import FACTS, describe_frame, effective_rank, map_run_codes
from ibqlab.views.patches import index_patches
from ibqlab.views.store import KEPT, ViewStore, file_mark, store_of
from ibqlab.views.subject import ViewError, open_subject
from ibqlab.views.token_page import TokenImage, token_html

IMAGES = 24


def settings(name, **more):
    return {**SMALL_DIGITS, "tokenizer.quantizer.name": name, "steps": 4, "record.validate_every": 2, **more}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of four steps on digits, by method."""
    root = tmp_path_factory.mktemp("views")
    torch.set_num_threads(1)
    return {
        name: train(recipe_config("builtin/smoke", settings(name)), root / name, progress=False).path
        for name in ("ibq", "vq_cosine", "vq")
    }


@pytest.fixture
def subject(trained):
    return open_subject(trained["ibq"])


@pytest.fixture
def index(subject):
    return index_patches(subject, IMAGES, progress=False)


@pytest.fixture
def reader(subject):
    return CardReader(subject, IMAGES, progress=False)


class TestPatches:
    def test_are_the_tokenizers_own_tokens(self, subject, index):
        images = torch.from_numpy(index.pictures).permute(0, 3, 1, 2)
        codes = subject.tokenizer.encode_indices(images)
        assert np.array_equal(index.codes, codes.numpy())
        assert index.counts.sum() == index.tokens == IMAGES * 16 and len(index.counts) == 32
        assert index.classes == tuple("0123456789") and set(index.labels) <= set(range(10))

    @pytest.mark.parametrize(("method", "ruler"), [("ibq", "dot product"), ("vq_cosine", "cosine"), ("vq", "L2")])
    def test_are_measured_by_the_rule_that_chooses_their_codes(self, trained, method, ruler):
        index = index_patches(open_subject(trained[method]), IMAGES, progress=False)
        assert index.ruler == ruler
        assert (index.seconds != index.codes).mean() > 0.98  # rounding may turn near ties round
        assert ((index.margin >= 0) & (index.margin <= 1)).all() and np.isfinite(index.distance).all()

    def test_without_a_rule_that_finds_the_codes_there_is_no_margin(self, subject, monkeypatch):
        monkeypatch.setattr(encoding, "RULERS", {})
        arrays = encoding.encode_pictures(subject, index_patches(subject, IMAGES, progress=False).pictures[:4])
        assert str(arrays["ruler"]) == "" and np.isnan(arrays["margin"]).all() and (arrays["seconds"] == -1).all()

    def test_a_cut_holds_its_square_where_it_says(self, index):
        for token in (0, 5, index.tokens - 1):
            image, row, column = index.place(token)
            cut, (left, top, width, height) = index.cut(token)
            high, wide = index.patch
            assert cut.shape == (3 * high, 3 * wide, 3) and (height, width) == index.patch
            own = index.pictures[image, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
            assert np.array_equal(cut[top : top + height, left : left + width], own)
        assert (index.cut(0)[0][: index.patch[0]] == patches.EDGE).all() and not index.is_inside(0)

    def test_typical_tokens_are_the_codes_nearest_of_many_images(self, index):
        code = int(index.counts.argmax())
        tokens = index.typical([code], 5)
        assert (index.codes.flat[tokens] == code).all() and len(set(tokens)) == len(tokens)
        own = index.tokens_of(code)
        images = len(set(own // 16))
        assert len({index.place(int(t))[0] for t in index.typical([code], images)}) == images
        assert index.distance.flat[tokens[0]] == index.distance.flat[own].min()
        assert len(index.typical([], 5)) == 0

    def test_codes_beside_it_are_counted_in_all_four_directions(self, index):
        code = int(index.counts.argmax())
        seen = np.zeros(32)
        for grid in index.codes:
            for (row, column), here in np.ndenumerate(grid):
                for r, c in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                    if here == code and 0 <= r < 4 and 0 <= c < 4 and grid[r, c] != code:
                        seen[grid[r, c]] += 1
        codes, lift = index.beside(code)
        expected = seen.sum() * index.counts / (index.tokens - index.counts[code])
        assert set(codes) == set(np.flatnonzero((seen >= 3) & (seen > 1.005 * expected)))
        assert lift == pytest.approx(seen[codes] / expected[codes]) and (np.diff(lift) <= 0).all()

    def test_are_computed_once_and_anew_for_other_weights(self, subject, monkeypatch):
        index_patches(subject, IMAGES, progress=False)
        monkeypatch.setattr(encoding, "encode_pictures", lambda *_: pytest.fail("computed again"))
        again = open_subject(subject.path)
        assert index_patches(again, IMAGES, progress=False).tokens == IMAGES * 16
        monkeypatch.setattr(type(subject), "weights_mark", "others")
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            index_patches(open_subject(subject.path), IMAGES, progress=False)


class TestStore:
    def test_keeps_the_newest_entries_of_a_name(self, tmp_path):
        store = ViewStore(tmp_path / "views")
        for number in range(KEPT + 2):
            store.get("x", lambda number=number: {"a": np.array(number)}, number=number)
        assert len(list(store.folder.glob("x-*.npz"))) == KEPT
        built = []
        store.get("x", lambda: built.append(1) or {"a": np.array(0)}, number=KEPT + 1)
        assert not built

    @pytest.mark.parametrize("content", [b"no archive", b"", "other arrays", "cut"])
    def test_a_damaged_entry_is_computed_again(self, tmp_path, content):
        store = ViewStore(tmp_path)
        store.get("x", lambda: {"a": np.arange(100)}, needs=("a",))
        file = next(tmp_path.glob("x-*.npz"))
        if content == "other arrays":
            np.savez(file, b=np.array(1))
        else:
            file.write_bytes(file.read_bytes()[:300] if content == "cut" else content)
        assert store.get("x", lambda: {"a": np.array(2)}, needs=("a",))["a"] == 2
        assert store.get("x", lambda: pytest.fail("computed again"), needs=("a",))["a"] == 2

    def test_where_nothing_can_be_written_the_view_is_there_all_the_same(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.warns(UserWarning, match="cannot be written.*it is not kept"):
            assert ViewStore(tmp_path / "file" / "views").get("x", lambda: {"a": np.array(1)})["a"] == 1

    def test_what_a_run_cannot_keep_is_kept_in_the_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "cache"))
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "views").write_text("")
        with pytest.warns(UserWarning, match="cannot be written.*it is kept in .*cache"):
            store_of(tmp_path / "run").get("x", lambda: {"a": np.array(1)})
        assert store_of(tmp_path / "run").get("x", lambda: pytest.fail("computed again"))["a"] == 1

    def test_processes_that_build_at_once_do_no_harm(self, tmp_path):
        start = multiprocessing.get_context("fork")
        barrier, store = start.Barrier(4), ViewStore(tmp_path)

        def build(number):
            barrier.wait(60)
            return {"a": np.full(1000, number)}

        def work(number):
            for entry in range(KEPT + 3):
                values = store.get("x", lambda: build(number), entry=entry)["a"]
                assert len(set(values)) == 1
                barrier.wait(60)

        workers = [start.Process(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * 4
        assert len(list(tmp_path.iterdir())) == KEPT, "nothing half written stays"

    def test_a_mark_is_of_the_content(self, tmp_path):
        for name, value in (("a", 1), ("b", 1), ("c", 2)):
            np.savez(tmp_path / f"{name}.npz", x=np.full(9, value))
        a, b, c = (file_mark(tmp_path / f"{name}.npz") for name in "abc")
        assert a == b != c


class TestInvalidation:
    """What is stored of a run is used again for the same content alone."""

    @pytest.fixture
    def run(self, trained, tmp_path):
        shutil.copytree(trained["ibq"], tmp_path / "run", ignore=shutil.ignore_patterns("views"))
        (tmp_path / "images").mkdir()
        for number in range(3):
            Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)).save(tmp_path / "images" / f"{number}.bmp")
        return Run(tmp_path / "run")

    @staticmethod
    def change_weights(run):
        step, state = run.load_checkpoint()
        state["model"]["quant_conv.bias"] += 1
        run.save_checkpoint(step, state)

    @staticmethod
    def edit_an_image(run):
        file = run.path.parent / "images" / "1.bmp"
        size = file.stat().st_size
        Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(file)
        assert file.stat().st_size == size

    @pytest.mark.parametrize(
        ("change", "is_new"),
        [
            (lambda run: None, ""),
            (lambda run: run.log({"step": 9}), ""),
            (change_weights, "weights"),
            (edit_an_image, "images"),
            (lambda run: (run.path.parent / "images" / "2.bmp").unlink(), "images"),
            (lambda run: (run.path.parent / "images" / "2.bmp").rename(run.path.parent / "images" / "3.bmp"), "images"),
        ],
    )
    def test_of_patches(self, run, monkeypatch, change, is_new):
        encoded, read = [], []
        encode_pictures, read_pictures = encoding.encode_pictures, encoding.read_pictures
        monkeypatch.setattr(encoding, "encode_pictures", lambda *a: encoded.append(1) or encode_pictures(*a))
        monkeypatch.setattr(encoding, "read_pictures", lambda *a: read.append(1) or read_pictures(*a))
        images = run.path.parent / "images"
        for _ in range(2):
            index_patches(open_subject(run.path, images), 3, progress=False)
        assert len(encoded) == len(read) == 1
        change(run)
        index = index_patches(open_subject(run.path, images), 3, progress=False)
        assert (len(encoded), len(read)) == (1 + bool(is_new), 1 + (is_new == "images")) and index.pictures.shape[
            0
        ] == len(list(images.iterdir()))

    def test_of_older_versions(self, run, monkeypatch):
        images = run.path.parent / "images"
        index_patches(open_subject(run.path, images), 3, progress=False)
        monkeypatch.setattr(patches, "_VERSION", patches._VERSION + 1)
        monkeypatch.setattr(encoding, "encode_pictures", lambda *_: pytest.fail("computed again"))
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            index_patches(open_subject(run.path, images), 3, progress=False)

    def test_of_the_map(self, run):
        before = map_run_codes(open_subject(run.path))
        shot = run.snapshot()
        run.save_snapshot(run.snapshot_steps[-1], **shot | {"codebook": shot["codebook"] + 1})
        after = map_run_codes(open_subject(run.path))
        assert not np.allclose(before.norms[-1], after.norms[-1])


class TestMap:
    @pytest.fixture
    def data(self, subject):
        return map_run_codes(subject, "pca")

    def test_shows_every_code_in_use_at_every_snapshot(self, subject, data):
        assert list(data.steps) == subject.steps
        for frame, step in enumerate(data.steps):
            shot = subject.snapshot(step)
            assert set(np.flatnonzero(shot["counts"])) <= set(data.code_ids)
            assert np.array_equal(data.counts(frame), shot["counts"]) and data.tokens[frame] == shot["counts"].sum()
            assert data.norms[frame] == pytest.approx(np.linalg.norm(shot["codebook"][data.code_ids], axis=1))
        moved = subject.snapshot(data.steps[1])["codebook"] - subject.snapshot(data.steps[0])["codebook"]
        assert data.drift[1] == pytest.approx(np.linalg.norm(moved, axis=1)[data.code_ids], rel=1e-4)
        assert not data.drift[0].any() and data.codes.shape == (len(data.steps), len(data.code_ids), 2)

    def test_says_what_it_cannot_show(self, data):
        facts = dict(zip(FACTS, data.facts[-1], strict=True))
        assert 0 < facts["trustworthiness"] <= 1 and 0 <= facts["codes_among_neighbours"] <= 1
        assert 1 <= facts["code_rank"] <= 64 and facts["to_feature"] > 0
        words = describe_frame(data, 0)
        assert f"{len(data.code_ids):,} of 32 codes" in words and "Trustworthiness" in words

    def test_the_effective_rank_is_the_number_of_equal_directions(self):
        assert effective_rank(np.eye(5)) == pytest.approx(4)  # around their mean five corners span four directions
        assert effective_rank(np.outer(np.arange(9.0), np.ones(3))) == pytest.approx(1)
        assert effective_rank(np.ones((4, 3))) == 0

    def test_a_lab_run_has_a_map(self, tmp_path):
        run_lab(
            World(dim=2),
            ["vq"],
            codebook_size=8,
            steps=4,
            batch_size=16,
            snapshots=3,
            progress=False,
            folder=tmp_path / "lab",
        )
        data = map_run_codes(open_subject(tmp_path / "lab" / "vq"))
        assert data.codebook_size == 8 and len(data.steps) >= 3


class TestCards:
    def test_tell_a_codes_use_life_and_neighbours(self, reader):
        code = int(reader.index.counts.argmax())
        card = reader.read([code])
        assert card.hits == reader.index.counts[code] and card.title == f"Code {code} of 32"
        assert sum(count for _, count, _ in card.classes) == card.hits
        book = reader.codebook
        distances = np.linalg.norm(book - book[code], axis=1)
        assert [n.code for n in card.near] == list(np.argsort(distances)[1:7])
        shots = [reader.subject.snapshot(step)["counts"] for step in reader.subject.steps]
        assert card.life.hits.tolist() == [int(counts[code]) for counts in shots]
        page = card_html(card)
        assert f'data-code="{card.near[0].code}"' in page and page.count("data:image/png") > 8

    def test_a_set_says_what_its_patches_share(self, reader):
        codes = [int(code) for code in np.argsort(-reader.index.counts)[:4]]
        card = reader.read(codes)
        assert card.is_set and card.hits == reader.index.counts[codes].sum() and card.decoded is None
        inside = [t for code in codes for t in reader.index.tokens_of(code) if reader.index.is_inside(int(t))]
        cuts = np.stack([reader.index.cut(int(t))[0] for t in inside])
        assert (
            len(cuts) <= MEAN_OF
            and np.array_equal(card.mean_patch(), cuts.mean(0).round())
            and "What these patches share" in card_html(card)
        )

    def test_a_dead_code_and_no_code_have_a_card(self, reader):
        index = reader.index
        dead = int(np.flatnonzero(index.counts == 0)[0])
        assert "No token of these images takes it" in card_html(reader.read([dead]))
        assert "lasso" in card_html(reader.read([]))

    def test_decoding_is_the_networks(self, reader):
        code, network = 3, reader.subject.tokenizer
        decoded = reader.read([code]).decoded
        image, row, column = decoded.place
        tokens = torch.from_numpy(reader.index.codes[image].astype(np.int64))[None].clone()
        tokens[0, row, column] = code
        with torch.no_grad():
            expected = network.decode_indices(tokens)[0].clamp(-1, 1)
        assert np.abs(decoded.after.transpose(2, 0, 1) - (expected.numpy() + 1) * 127.5).max() <= 1
        assert (decoded.before != decoded.after).any()

    @pytest.mark.parametrize("codes", [[32], [-1], list(range(40))])
    def test_what_is_no_code_is_refused(self, reader, codes):
        with pytest.raises(ValueError, match="codes are 0 to 31"):
            reader.read(codes)

    def test_says_when_a_code_came_into_use_and_was_without_a_hit(self):
        life = Life(np.array([0, 5, 9]), np.array([3, 0, 2]), np.array([10, 10, 10]), 9)
        assert life.events == [(0, "in use"), (5, "without a hit"), (9, "in use again")]
        assert "in use by step 0; without a hit by step 5; in use again by step 9" in life_svg(life)

    def test_a_run_without_a_network_says_so_and_shows_the_rest(self, tmp_path):
        run_lab(
            World(dim=2),
            ["vq"],
            codebook_size=8,
            steps=4,
            batch_size=16,
            snapshots=3,
            progress=False,
            folder=tmp_path / "lab",
        )
        reader = CardReader(open_subject(tmp_path / "lab" / "vq"), progress=False)
        card = reader.read([1])
        assert "it has no images" in card.lacks[0] and card.near and card.life is not None
        assert "it has no images" in card_html(card)

    def test_names_from_outside_are_text(self, trained, tmp_path):
        folder = tmp_path / "images" / "<script>alert(1)<"
        other = tmp_path / "images" / "b"
        for number, place in enumerate((folder, other)):
            place.mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), 90 * number + 40, np.uint8)).save(place / "a.png")
        reader = CardReader(open_subject(trained["ibq"], tmp_path / "images"), 2, progress=False)
        page = card_html(reader.read([int(reader.index.counts.argmax())]))
        assert "<script" not in page and "&lt;script&gt;alert(1)&lt;" in page


class TestTokens:
    def test_one_or_all_tokens_of_a_code_are_replaced(self, subject, index):
        tokens = TokenImage(subject.tokenizer, index, 1)
        old = int(tokens.codes[2, 2])
        tokens.replace((2, 2), 7)
        assert tokens.codes[2, 2] == 7 and tokens.is_changed
        with torch.no_grad():
            expected = subject.tokenizer.decode_indices(tokens.codes[None].astype(np.int64))[0].clamp(-1, 1)
        assert np.abs(tokens.decode().transpose(2, 0, 1) - (expected.numpy() + 1) * 127.5).max() <= 1
        page = token_html(tokens, (2, 2))
        assert "1 token replaced" in page and 'data-token="2,2"' in page and page.count("<rect") == 16
        tokens.restore()
        assert not tokens.is_changed and tokens.replace_code(old, 7) == (tokens.original == old).sum()
        assert not (tokens.codes == old).any()

    def test_what_is_no_place_and_no_code_is_refused(self, subject, index):
        tokens = TokenImage(subject.tokenizer, index)
        with pytest.raises(ValueError, match="rows 0 to 3"):
            tokens.replace((4, 0), 1)
        with pytest.raises(ValueError, match="codes are 0 to 31"):
            tokens.replace((0, 0), 32)
        with pytest.raises(ValueError, match=f"images are 0 to {IMAGES - 1}"):
            TokenImage(subject.tokenizer, index, IMAGES)


class TestBadInput:
    def test_a_checkpoint_without_images_says_what_to_type(self, trained, tmp_path):
        file = Run(trained["ibq"]).last_checkpoint
        with pytest.raises((ViewError, ValueError)) as error:
            index_patches(open_subject(file), progress=False)
        assert "images=FOLDER" in str(error.value) or "checkpoint" in str(error.value)

    def test_a_run_without_snapshots_has_no_map(self, trained, tmp_path):
        folder = tmp_path / "young"
        folder.mkdir()
        for name in ("config.yaml", "provenance.json"):
            (folder / name).write_bytes((trained["ibq"] / name).read_bytes())
        with pytest.raises(ViewError, match="has no snapshot yet"):
            map_run_codes(open_subject(folder))
        with pytest.raises(ViewError, match="no cards of young"):
            CardReader(open_subject(folder), progress=False)

    def test_features_that_diverged_are_told(self, trained, tmp_path):
        run = Run(trained["ibq"])
        folder = tmp_path / "nan"
        (folder / "snapshots").mkdir(parents=True)
        (folder / "config.yaml").write_bytes((run.path / "config.yaml").read_bytes())
        shot = run.snapshot()
        shot["features"][:] = np.nan
        Run(folder).save_snapshot(4, **shot)
        with pytest.raises(ViewError, match="hold NaN or infinity: the run has diverged"):
            map_run_codes(open_subject(folder))

    def test_nothing_there(self):
        with pytest.raises(FileNotFoundError, match="no such run or checkpoint"):
            open_subject("nowhere")


def test_stored_views_do_not_make_a_run_another(trained):
    run = Run(trained["ibq"])
    assert (run.path / "views").is_dir() and run.status == "finished"
    assert run.snapshot_steps
