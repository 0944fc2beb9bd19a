"""The map of codes without a browser: what it fits, colours, sends, says, and how two of them are linked."""

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import numpy as np
import pytest
import torch
from registry import SMALL_DIGITS

from ibqlab.diagnostics.recorder import Recorder
from ibqlab.monitor import CodebookMonitor
from ibqlab.quantizers import build_quantizer
from ibqlab.runs import Run
from ibqlab.training import recipe_config, train
from ibqlab.views import map_fit
from ibqlab.views.cards import CardReader
from ibqlab.views.map_colors import DEAD, FEATURE, IN_USE, LEVELS, LOOKS, PLAIN, color_codes, palette
from ibqlab.views.map_data import describe_frame, map_run_codes
from ibqlab.views.map_picture import MOST_DRAWN, draw_map
from ibqlab.views.patches import index_patches
from ibqlab.views.subject import ViewError, open_subject
from ibqlab.widgets import CodebookMap, LinkedMaps, link_maps
from ibqlab.widgets.map_canvas import MapCanvas, describe_point, places_of

SIZE, DIM, FEATURES = 40, 4, 60
STEPS = (0, 10, 20)


def make_run(folder, *, steps=STEPS, size=SIZE, seed=0, start_seed=None, status="finished", **changes):
    """A run of random snapshots: even codes are in use, odd ones never; code 0 falls out of use at the last step."""
    draw = np.random.default_rng(seed)
    start = np.random.default_rng(seed if start_seed is None else start_seed).normal(size=(size, DIM))
    run = Run.start(folder, {"kind": "monitored", "codebook_size": size, "code_dim": DIM})
    for step in steps:
        shot = snapshot(draw, start, step, size)
        run.save_snapshot(step, **{name: value for name, value in (shot | changes).items() if value is not None})
    if status == "finished":
        run.finish("finished")
    return folder


def snapshot(draw, start, step, size):
    used = np.arange(size) % 2 == 0
    counts = np.where(used, 20 + np.arange(size), 0)
    if step == STEPS[-1]:
        counts[0] = 0
    return {
        "codebook": (start + 0.1 * step * used[:, None]).astype(np.float32),
        "features": draw.normal(size=(FEATURES, DIM)).astype(np.float32),
        "assignments": draw.integers(size // 2, size=FEATURES) * 2,
        "counts": counts,
        "last_hit": np.where(counts > 0, step, -1),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("map") / "run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """IBQ on digits, two steps: images with classes, snapshots with gradients."""
    torch.set_num_threads(1)
    changes = {**SMALL_DIGITS, "tokenizer.quantizer.name": "ibq", "steps": 2, "record.validate_every": 2}
    return train(recipe_config("builtin/smoke", changes), tmp_path_factory.mktemp("map") / "ibq", progress=False).path


def map_of(folder, **settings):
    return map_run_codes(open_subject(folder), progress=False, **settings)


class TestFit:
    @pytest.mark.parametrize(("dead_codes", "shown"), [(None, SIZE), (5, SIZE // 2 + 5), (0, SIZE // 2)])
    def test_shows_all_codes_in_use_and_as_many_dead_ones_as_asked(self, run, dead_codes, shown):
        data = map_of(run, dead_codes=dead_codes)
        assert len(data.code_ids) == shown and set(range(0, SIZE, 2)) <= set(data.code_ids)
        assert f"{shown:,} of {SIZE} codes" in describe_frame(data, 0)

    def test_codes_outside_the_fit_stand_where_the_plane_puts_them(self, run):
        """PCA is linear: three points of the plane fix the place of any other."""
        data = map_of(run, dead_codes=None, max_points=30)
        books = np.concatenate([Run(run).snapshot(step)["codebook"] for step in data.steps])
        places = data.codes.reshape(-1, 2)
        lines, *_ = np.linalg.lstsq(np.c_[books, np.ones(len(books))], places, rcond=None)
        assert np.abs(np.c_[books, np.ones(len(books))] @ lines - places).max() < 1e-4
        assert np.array_equal(data.codes[0][1::2], data.codes[2][1::2]), "codes that never moved stay"

    def test_umap_places_what_it_did_not_fit(self, run, monkeypatch):
        fitted = []

        def fit(points, neighbours, seed):
            fitted.append(len(points))
            return points[:, :2].copy(), 3

        monkeypatch.setattr(map_fit, "fit_umap", fit)
        data = map_of(run, method="umap", dead_codes=None, max_points=30)
        assert fitted[0] <= 30 < data.codes.size // 2 and np.isfinite(data.codes).all() and data.explained is None

    def test_snapshots_with_nan_are_left_out_and_counted(self, tmp_path):
        folder = make_run(tmp_path / "nan")
        shot = Run(folder).snapshot(10)
        shot["features"][3] = np.nan
        Run(folder).save_snapshot(10, **shot)
        data = map_of(folder)
        assert data.steps == (0, 20) and data.left_out == (1, 0)
        assert "1 snapshot is left out: it holds NaN or infinity." in describe_frame(data, 0)

    def test_too_few_tokens_call_no_code_dead(self, tmp_path, run):
        counts = np.zeros(SIZE, int)
        counts[3] = 7
        data = map_of(make_run(tmp_path / "few", counts=counts))
        words = describe_frame(data, 0)
        assert "7 tokens are too few to call the other codes dead" in words and "1 code in use" in words
        assert "too few" not in describe_frame(map_of(run), 0)
        assert "(no hit)" in describe_point(data, 0, FEATURES)["point"]


class TestColors:
    @pytest.mark.parametrize("name", ["hits", "steps since last hit", "norm", "drift"])
    def test_one_scale_holds_for_all_steps(self, run, name):
        data = map_of(run, dead_codes=None)
        coloring = color_codes(data, name, None)
        values = {"hits": data.hits, "norm": data.norms, "drift": data.drift}.get(name, data.idle)
        known = values[1:] if name == "drift" else values[data.hits > 0] if name == "hits" else values[values >= 0]
        assert (coloring.least, coloring.most) == pytest.approx((known.min(), known.max()))
        assert coloring.levels.shape == data.hits.shape and coloring.levels.max() < LOOKS
        used = data.hits > 0
        assert (
            not ((coloring.levels >= DEAD) & used).any()
            and not ((coloring.levels - IN_USE < LEVELS) & ~used)[coloring.levels != PLAIN].any()
        )
        if name == "norm":
            top = np.unravel_index(np.where(used, data.norms, 0).argmax(), used.shape)
            assert coloring.levels[top] - IN_USE == int(LEVELS * (values[top] - known.min()) / np.ptp(known)) - (
                values[top] == known.max()
            )

    def test_gradient_reach_is_a_share_of_the_steps_largest(self, trained):
        data = map_of(trained, dead_codes=None)
        coloring = color_codes(data, "gradient reach", None)
        assert np.isnan(data.reach[0]).all() and (coloring.levels[0] == PLAIN).all()
        assert "No gradient was stored at step 0." in coloring.note
        frame = len(data.steps) - 1
        top = int(np.argmax(data.reach[frame]))
        assert (coloring.levels[frame][top] - IN_USE) % LEVELS == LEVELS - 1
        share = data.reach[frame] / data.reach[frame].max()
        expected = (LEVELS * (np.log(share.clip(1e-4, 1)) + np.log(1e4)) / np.log(1e4)).astype(int).clip(0, LEVELS - 1)
        shown = share > 0
        assert np.array_equal(((coloring.levels[frame] - IN_USE) % LEVELS)[shown], expected[shown])

    def test_classes_are_those_of_most_of_a_codes_tokens(self, trained):
        subject = open_subject(trained)
        index = index_patches(subject, 24, progress=False)
        data = map_of(trained, dead_codes=None)
        coloring = color_codes(data, "class", index)
        labels = np.repeat(index.labels, index.codes[0].size)
        for code in range(data.codebook_size):
            own = labels[index.codes.ravel() == code]
            look = coloring.levels[-1][code]
            if not len(own):
                assert look == PLAIN
                continue
            most = np.bincount(own, minlength=10)
            assert most[index.classes.index(coloring.names[look - IN_USE])] == most.max()

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [("gradient reach", "stored no gradient per code"), ("class", "Classes are read from the tokens of images")],
    )
    def test_what_a_run_lacks_is_a_sentence(self, run, name, sentence):
        with pytest.raises(ViewError, match=sentence):
            color_codes(map_of(run), name, None)

    @pytest.mark.parametrize("dark", [False, True])
    def test_dead_codes_differ_from_features_and_used_ones_by_more_than_hue(self, run, dark):
        coloring = color_codes(map_of(run), "hits", None)
        colors, sizes, _ = palette(dark, coloring, SIZE)
        assert len(colors) == len(sizes) == LOOKS
        assert sizes[FEATURE] < sizes[PLAIN] < sizes[IN_USE] and sizes[DEAD] < sizes[IN_USE]
        light = [sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in colors]
        ground = 0 if dark else 765
        assert abs(light[FEATURE] - light[PLAIN]) > 200 and abs(light[PLAIN] - ground) > abs(light[FEATURE] - ground)


class TestRecordedGradients:
    def test_are_the_norms_of_the_last_backward_pass(self, trained):
        run = Run(trained)
        assert "gradient_norm" not in run.snapshot(0)
        norms = run.snapshot(2)["gradient_norm"]
        assert norms.shape == (32,) and norms.dtype == np.float32 and norms.max() > 0
        reach = run.metrics.set_index("step")["gradient_reach"][2]
        assert (norms > 1e-3 * norms.max()).mean() == pytest.approx(reach)

    @pytest.mark.parametrize(("name", "has_gradient"), [("vq", True), ("vq_ema", False)])
    def test_are_there_where_codes_take_gradients(self, name, has_gradient):
        quantizer = build_quantizer(name, codebook_size=8, code_dim=DIM, codebook_init="normal")
        recorder = Recorder(quantizer, 100, 8)
        out = quantizer(torch.randn(1, DIM, 3, 3, requires_grad=True))
        (out.loss + out.quantized.sum()).backward()
        norms = recorder.gradient_norms()
        assert (norms is not None) == has_gradient
        if has_gradient:
            torch.testing.assert_close(norms, quantizer.codebook_gradient.norm(dim=1))
            quantizer.codebook_gradient[0, 0] = torch.nan
            assert recorder.gradient_norms() is None

    @pytest.mark.parametrize("watched", [True, False])
    def test_a_monitor_stores_them_where_it_watches_a_parameter(self, tmp_path, watched):
        codebook = torch.nn.Parameter(torch.randn(8, DIM))
        monitor = CodebookMonitor(tmp_path / "run", 8, log_every=1, snapshot_every=2)
        if watched:
            monitor.watch(codebook)
        for step in (1, 2):
            codebook.grad = None
            (codebook * torch.arange(8.0)[:, None]).sum().backward()
            monitor.update(step, indices=torch.arange(8), features=torch.randn(8, DIM), codebook=codebook)
        monitor.close()
        shot = Run(tmp_path / "run").snapshot(2)
        assert ("gradient_norm" in shot) == watched
        if watched:
            assert shot["gradient_norm"] == pytest.approx(np.arange(8) * DIM**0.5)


class TestCanvas:
    @pytest.fixture
    def shown(self, run):
        made = CodebookMap(run, dead_codes=None)
        made.sent = []
        made.canvas.painter.send = lambda message, buffers=None: made.sent.append((message, buffers))
        return made

    def test_sends_a_step_once_as_plain_numbers(self, shown):
        canvas, data = shown.canvas, shown.data
        canvas._hear(None, {"want": 1, "coloring": "hits", "places": True}, [])
        canvas._hear(None, {"want": 1, "coloring": "norm", "places": False}, [])
        canvas._hear(None, {"want": 99, "coloring": "norm"}, [])
        (first, buffers), (second, looks_alone) = shown.sent
        points = FEATURES + SIZE
        places = np.frombuffer(buffers[1], np.float32).reshape(points, 2)
        assert first["places"] and not second["places"] and len(looks_alone) == 1
        assert len(buffers[0]) == points and np.abs(places).max() <= 1
        # One unit for both axes: distances on the map are those of the plane.
        gaps = np.linalg.norm(np.diff(places, axis=0), axis=1)
        plane = np.concatenate([data.features[1], data.codes[1]])
        ratio = gaps / np.linalg.norm(np.diff(plane, axis=0), axis=1)
        assert ratio == pytest.approx(ratio[0], rel=1e-3)
        assert set(np.frombuffer(buffers[0], np.uint8)[:FEATURES]) == {FEATURE}

    def test_a_feature_is_heard_again_at_another_step(self, shown):
        """It has another code there."""
        plot, data = shown.canvas.plot, shown.data
        shown.step.value = 0
        feature = int(np.flatnonzero(data.assignments[0] != data.assignments[1])[0])
        plot.selection = np.array([feature], np.uint32)
        assert shown.selected == (int(data.assignments[0][feature]),)
        shown.step.value = 1
        plot.selection = np.array([feature], np.uint32)
        assert shown.selected == (int(data.assignments[1][feature]),)

    def test_a_click_and_a_lasso_select_codes_and_features_their_codes(self, shown):
        told = []
        shown.on_select(told.append)
        plot, data = shown.canvas.plot, shown.data
        plot.selection = np.array([FEATURES + 3], np.uint32)
        assert shown.selected == (3,) and "Code 3 of 40" in shown.card.static_html()
        plot.selection = np.array([0, 1], np.uint32)
        assert shown.selected == tuple(sorted(set(map(int, data.assignments[-1][:2]))))
        plot.selection = np.array([0, FEATURES + 5, FEATURES + 7], np.uint32)
        assert shown.selected == (5, 7) == told[-1] and len(told) == 3

    def test_a_lasso_over_nothing_says_so(self, shown):
        shown.canvas.plot.set_trait("lasso_selection_polygon", np.zeros((3, 2)))
        assert "Nothing is selected: no point lies there." in shown.said.value
        shown.canvas.plot.selection = np.array([FEATURES], np.uint32)
        assert shown.said.value == ""

    def test_hovering_tells_number_hits_last_hit_and_norm(self, shown):
        sent = []
        shown.canvas.plot.send = sent.append
        shown.canvas.plot._handle_custom_msg({"type": "tooltip", "index": FEATURES + 2}, [])
        properties = sent[0]["properties"]
        assert properties["point"] == "code 2 (in use)" and properties["hits"].startswith("22 of")
        assert properties["last hit"] == "0 training steps ago"
        assert float(properties["norm"]) == pytest.approx(shown.data.norms[-1][2], rel=1e-2)
        assert describe_point(shown.data, 2, FEATURES + 1)["point"] == "code 1 (dead)"

    def test_follows_the_theme(self, shown):
        light = list(shown.canvas.plot.color), shown.scale.value
        shown.canvas._hear(None, {"dark": True}, [])
        assert shown.canvas.plot.background_color == "#111111"
        assert list(shown.canvas.plot.color) != light[0] and shown.scale.value != light[1]

    def test_a_colouring_that_the_run_lacks_leaves_the_one_before(self, shown):
        shown.coloring.value = "norm"
        shown.coloring.value = "gradient reach"
        assert shown.coloring.value == "norm" == shown.canvas.painter.coloring
        assert "stored no gradient per code" in shown.said.value

    def test_the_card_goes_on_and_the_map_marks_it(self, shown):
        shown.select([4])
        shown.card.show(9)
        assert shown.selected == (9,) and list(shown.canvas.plot.selection) == [FEATURES + 9]

    def test_the_map_of_a_step_moves_with_the_slider(self, shown):
        shown.step.value = 0
        assert shown.canvas.painter.frame == 0
        assert "21 codes in use" not in shown.facts.value and "20 codes in use" in shown.facts.value
        shown.step.value = 2
        assert "19 codes in use" in shown.facts.value

    def test_its_cards_history_is_the_maps(self, run, shown):
        read = CardReader(open_subject(run), progress=False).history
        for own, other in zip(shown.card.reader.history, read, strict=True):
            assert np.array_equal(own, other)


class TestPlane:
    def test_another_plane_is_fitted_and_the_selection_stays(self, run):
        made = CodebookMap(run, step=10)
        made.select([3])
        made.plane.value = "umap"
        assert made.data.method == "umap" and "UMAP over" in made.facts.value and made.said.value == ""
        assert made.selected == (3,) and made.data.steps[made.step.value] == 10

    def test_one_that_cannot_be_fitted_leaves_the_one_before(self, run, monkeypatch):
        made = CodebookMap(run)

        def refuse(*_, **__):
            raise ValueError("too few points")

        monkeypatch.setattr("ibqlab.widgets.codebook_map.map_run_codes", refuse)
        made.plane.value = "umap"
        assert (made.plane.value, made.data.method, made._method) == ("pca", "pca", "pca")
        assert "oo few points" in made.said.value and "The map shows what was read before." in made.said.value


class TestStatic:
    def test_an_executed_copy_holds_the_last_map_and_its_facts(self, run):
        made = CodebookMap(run, step=10)
        bundle = made._repr_mimebundle_()
        page = (bundle[0] if isinstance(bundle, tuple) else bundle)["text/html"]
        assert "map of codes and features of run, step 10" in page and "data:image/png" in page
        assert made.facts.value in page

    def test_a_picture_shows_a_sample_of_a_large_map_and_says_so(self, run, monkeypatch):
        assert MOST_DRAWN > SIZE
        monkeypatch.setattr("ibqlab.views.map_picture.MOST_DRAWN", 10)
        figure = draw_map(map_of(run, dead_codes=None), 2, "run, step 20")
        caption = " ".join(figure.get_supxlabel().split())
        assert "of 19 codes in use (a picture shows no more)" in caption and "10 of 60 encoder features" in caption
        assert "19 in use, 21 dead" in figure.axes[0].get_title().replace("\n", " ")


class TestBadInput:
    """A sentence in place of the map, and a button that reads again."""

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"steps": ()}, "has no snapshot yet"),
            ({"features": np.full((FEATURES, DIM), np.nan, np.float32)}, "hold NaN or infinity: the run has diverged"),
            ({"features": None}, "hold no codebook and features"),
        ],
    )
    def test_of_a_run_that_lacks_what_a_map_is_made_of(self, tmp_path, changes, sentence):
        made = CodebookMap(make_run(tmp_path / "run", **changes))
        assert sentence in made.said.value and made.data is None and made.body.layout.display == "none"
        assert made.static_html() == made.said.value and made.again.layout.display != "none"
        made.select([1])

    def test_of_an_empty_folder_and_a_checkpoint(self, tmp_path, trained):
        (tmp_path / "empty").mkdir()
        assert CodebookMap(tmp_path / "empty").said.value
        file = Run(trained).last_checkpoint
        assert "one step of a run, without its settings" in CodebookMap(file, images="digits").said.value

    def test_of_nothing_there(self):
        with pytest.raises(FileNotFoundError, match="no such run or checkpoint"):
            CodebookMap("nowhere")

    @pytest.mark.parametrize("live", [0, 1])
    def test_of_one_live_code_and_none(self, tmp_path, live):
        counts = np.zeros(SIZE, int)
        counts[:live] = 1000
        made = CodebookMap(make_run(tmp_path / "run", counts=counts))
        for name in made.coloring.options[:4]:
            made.coloring.value = name
            assert made.coloring.value == name and made.said.value == ""
        assert f"{live} code{'' if live == 1 else 's'} in use" in made.facts.value

    def test_of_a_run_that_is_still_written(self, tmp_path):
        folder = make_run(tmp_path / "run", steps=STEPS[:1], status="running")
        made = CodebookMap(folder)
        assert made.canvas.painter.watching
        made.canvas._hear(None, {"look": True}, [])
        assert made.again.description == "read the run again"
        shot = Run(folder).snapshot(0)
        Run(folder).save_snapshot(30, **shot)
        made.canvas._hear(None, {"look": True}, [])
        assert made.again.description == "show step 30"
        version = made.canvas.painter.version
        made.again.click()
        assert made.data.steps == (0, 30) and made.step.value == 1 and made.canvas.painter.version > version

    def test_of_a_last_snapshot_with_nan_while_the_run_goes_on(self, tmp_path):
        """The button offers what is new, not what was left out."""
        folder = make_run(tmp_path / "run", steps=STEPS[:1], status="running")
        broken = Run(folder).snapshot(0)
        broken["features"] = np.full_like(broken["features"], np.nan)
        Run(folder).save_snapshot(10, **broken)
        made = CodebookMap(folder)
        assert made.data.steps == (0,) and "of step 10, is left out" in made.said.value
        made.canvas._hear(None, {"look": True}, [])
        assert made.again.description == "read the run again"

    def test_of_a_run_whose_facts_are_damaged(self, tmp_path):
        folder = make_run(tmp_path / "run")
        (folder / "provenance.json").write_text('{"status": 3')
        made = CodebookMap(folder)
        assert made.data is not None and made.canvas.data is made.data and made.canvas.painter.watching
        made.coloring.value = "norm"
        assert "norm" in made.scale.value and "<img" in made.static_html()

    def test_of_a_run_whose_first_snapshot_comes_later(self, tmp_path, run):
        folder = make_run(tmp_path / "run", steps=(), status="running")
        made = CodebookMap(folder)
        assert made.canvas.painter.watching and made.data is None
        made.canvas._hear(None, {"dark": True}, [])
        made.canvas._hear(None, {"want": 0, "coloring": "hits"}, [])
        Run(folder).save_snapshot(0, **Run(run).snapshot(0))
        made.canvas._hear(None, {"look": True}, [])
        assert made.again.description == "show step 0"
        made.again.click()
        assert made.data.steps == (0,) and made.said.value == "" and made.body.layout.display is None

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [({"method": "tsne"}, "method must be one of"), ({"dead_codes": -1}, "dead_codes must be")],
    )
    def test_of_settings(self, run, settings, sentence):
        assert sentence in CodebookMap(run, **settings).said.value

    def test_of_a_run_that_is_deleted_while_it_is_shown(self, tmp_path):
        made = CodebookMap(make_run(tmp_path / "run", status="running"))
        shutil.rmtree(tmp_path / "run")
        made.canvas._hear(None, {"look": True}, [])
        assert "is gone" in made.said.value and "what was read before" in made.said.value
        made.step.value = 0
        made.canvas.plot.selection = np.array([FEATURES + 3], np.uint32)
        assert made.selected == (3,)
        made.again.click()
        assert "is gone" in made.said.value and made.data is not None

    @pytest.mark.parametrize("step", ["abc", 1.5])
    def test_of_a_step_that_is_none(self, run, step):
        with pytest.raises(ValueError, match="step must be a whole number"):
            CodebookMap(run, step=step)

    def test_of_features_without_their_codes(self, tmp_path):
        made = CodebookMap(make_run(tmp_path / "run", assignments=None))
        made.canvas.plot.selection = np.array([2], np.uint32)
        assert "whose codes this snapshot did not store" in made.said.value and made.selected == ()


class TestLinked:
    def test_maps_keep_the_steps_that_were_asked_for(self, run, tmp_path):
        other = make_run(tmp_path / "other", seed=1)
        pair = link_maps(CodebookMap(run, step=0), CodebookMap(other, step=10))
        assert [one.data.steps[one.step.value] for one in pair.maps] == [0, 10] and pair.step.value == 0
        pair.step.value = 2
        assert [one.data.steps[one.step.value] for one in pair.maps] == [20, 20]
        two = link_maps(CodebookMap(run), CodebookMap(run, step=0))
        two.maps[0].plane.value = "umap"
        assert [one.data.steps[one.step.value] for one in two.maps] == [20, 0]

    def test_titles_are_two(self, run):
        with pytest.raises(ValueError, match="titles must be two, one above each map; got 1"):
            link_maps(run, run, ["one"])

    @pytest.mark.parametrize(
        ("changes", "linked", "sentence"),
        [
            ({"seed": 1, "start_seed": 0}, True, "K = 40 and began with the same codebook"),
            ({"seed": 1}, False, "they began with different codebooks"),
            ({"size": 20}, False, "the runs have 40 and 20 codes"),
            ({"steps": (10, 20), "start_seed": 0}, False, "their codebooks at step 0 were not stored"),
        ],
    )
    def test_codes_correspond_where_runs_share_size_and_start(self, run, tmp_path, changes, linked, sentence):
        pair = link_maps(run, make_run(tmp_path / "other", **changes))
        assert sentence in pair.said.value and pair.codes_correspond == linked
        first, second = pair.maps
        first.canvas.plot.selection = np.array([FEATURES + 6], np.uint32)
        assert first.selected == (6,) and second.selected == ((6,) if linked else ())
        assert list(second.canvas.plot.selection) == ([FEATURES + 6] if linked else [])

    def test_one_slider_moves_both_over_the_steps_they_share(self, run, tmp_path):
        pair = link_maps(run, make_run(tmp_path / "other", steps=(0, 20), seed=1))
        assert [label for label, _ in pair.step.options] == ["0", "20"]
        pair.step.value = 0
        assert [one.data.steps[one.step.value] for one in pair.maps] == [0, 0]
        pair.step.value = 1
        assert [one.data.steps[one.step.value] for one in pair.maps] == [20, 20]

    def test_two_steps_of_one_run_keep_their_own_sliders(self, run):
        pair = link_maps(CodebookMap(run, step=0, with_card=False), CodebookMap(run, step=20, with_card=False))
        assert pair.controls.layout.display == "none" and "of one run" in pair.said.value
        pair.maps[1].select([8])
        assert pair.maps[0].selected == (8,)
        bundle = pair._repr_mimebundle_()
        page = (bundle[0] if isinstance(bundle, tuple) else bundle)["text/html"]
        assert "run, step 0" in page and "run, step 20" in page and pair.said.value in page

    def test_a_run_without_a_map_links_nothing(self, run, tmp_path):
        pair = link_maps(run, make_run(tmp_path / "empty", steps=()))
        assert "One of the two has no map" in pair.said.value
        pair.maps[0].select([2])


def test_the_benchmarks_run_has_a_map_of_all_its_codes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments" / "benchmarks")
    benchmark = importlib.import_module("codebook_map")
    given = SimpleNamespace(codes=50, dim=3, features=20, snapshots=2, in_use=0.5, seed=0)
    benchmark.make_run(tmp_path / "run", given)
    numbers = benchmark.fit(tmp_path / "run", "pca")
    assert numbers["fit_peak_mib"] > 10 and numbers["fit_s"] > 0
    assert map_of(tmp_path / "run", dead_codes=None).steps == (0, 100)


@pytest.mark.parametrize("widget", [CodebookMap, LinkedMaps, MapCanvas])
def test_no_method_takes_the_place_of_one_of_ipywidgets(widget):
    own = {name for name in vars(widget) if callable(getattr(widget, name)) and not name.startswith("__")}
    assert own & set(dir(ipywidgets.VBox)) <= {"_repr_mimebundle_"}


def test_both_axes_of_the_canvas_hold_all_steps(run):
    data = map_of(run, dead_codes=None)
    assert max(np.abs(places_of(data, frame)).max() for frame in range(3)) == pytest.approx(1 / 1.05, rel=1e-4)
