"""Each notebook with a view for the mouse: run in JupyterLab under its smallest preset, and the view answers.

Notebooks use what those before them have trained. Nothing depends on how fast the machine is: every step waits for what
it needs to see.
"""

import importlib
import re
from pathlib import Path

import pytest
from browsers import ROOT, drag_slider, notebook_run, opened, run_all, running_lab, visited
from map_hands import (
    PLACES,
    click_code,
    draw_lasso,
    drawn,
    pictures,
    points_move,
    rectangle,
    selected_alone,
    title,
    title_changes,
    until,
)
from training_hands import button, curves_up_to, last_step, paused_at, stopped_in_the_end

from ibqlab.runs import Run
from ibqlab.views.training_process import CONSOLE

CODES = 64
"""Of the runs of `feature_code_map` under smoke."""
DIGITS = "data.source=digits"
"""Far fewer images than photographs have crops."""
ONE_GALLERY = {"classes": [0, 1], "images_per_class": 1, "cfg_scales": [2.0], "temperatures": [1.0], "top_ps": [1.0]}
NOTEBOOKS = {
    "playground": {"preset": "smoke", "methods": ["vq"]},
    "features_lab": {"preset": "smoke", "methods": ["vq"]},
    "feature_code_map": {
        "preset": "smoke",
        "projection": "pca",
        "methods": ["vq", "ibq"],
        "initialisations": ["normal"],
    },
    "codebook_atlas": {"source": "explore_collapse-smoke/vq-normal-K64-D8-seed0", "count": 8},
    "train_generator": {
        **{"preset": "smoke", "output": "pair", "tokenizer_settings": [DIGITS]},
        "settings": ["steps=4", DIGITS, "generator.num_classes=10"],
    },
    "long/train_generator": {
        **{"preset": "smoke", "output": "long", "tokenizer": "pair/tokenizer"},
        "settings": ["steps=100000", DIGITS, "generator.num_classes=10"],
    },
    "generation_gallery": {"generator": "pair/generator", **ONE_GALLERY},
}
BROWSER_TESTS = ("test_browser", "test_browser_notebooks", "test_browser_runs")
LOADED = "element => element.complete && element.naturalWidth > 100"

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("warm_start")]


def test_every_notebook_with_a_view_is_opened_in_a_browser():
    run = {name for test in BROWSER_TESTS for name in importlib.import_module(test).NOTEBOOKS}
    files = (ROOT / "notebooks").glob("*.ipynb")
    assert run >= {file.stem for file in files if "from ibqlab.widgets import" in file.read_text()}


@pytest.fixture(scope="module")
def lab(browser, notebooks):
    """Address of a JupyterLab."""
    with running_lab(notebooks) as address:
        yield address


@pytest.mark.parametrize("notebook", ["playground", "features_lab"])
def test_the_lab_moves_through_its_steps(notebook, browser, lab):
    with notebook_run(browser, lab, notebook) as page:
        plane = page.locator(".ibqlab-lab-plane img")
        until(plane, LOADED)
        last = plane.get_attribute("src")
        assert ", step 12: vq " in plane.get_attribute("alt").lower()
        drag_slider(page.locator(".widget-slider"), 0)
        page.locator(".widget-html", has_text=re.compile("^step 0: vq ", re.IGNORECASE)).wait_for()
        until(plane, LOADED)
        assert ", step 0: vq " in plane.get_attribute("alt").lower()
        assert plane.get_attribute("src") != last


@pytest.fixture(scope="module")
def linked_maps(browser, lab):
    """Of the notebook `feature_code_map`: VQ's and IBQ's, and the element that holds both."""
    with notebook_run(browser, lab, "feature_code_map") as page:
        both = page.locator(".ibqlab-linked-maps")
        yield both, [drawn(both.locator(".ibqlab-codebook-map").nth(number), CODES) for number in (0, 1)]


class TestFeatureCodeMap:
    def test_one_slider_moves_the_points_of_both_maps(self, linked_maps):
        both, maps = linked_maps
        before = [view.evaluate(PLACES) for view in maps]
        drag_slider(both.locator(".widget-slider:visible").first, 0)
        for view, places in zip(maps, before, strict=True):
            points_move(view, places)
        assert both.locator(".widget-readout:visible").first.inner_text() == "0"

    def test_a_clicked_code_shows_its_card_and_is_marked_in_both(self, linked_maps):
        _, maps = linked_maps
        for view in maps:
            before = title(view)
            shown = re.match(r"Code (\d+) ", before)
            code = click_code(view, CODES, besides=shown and int(shown[1]))
            assert title_changes(view, before, r"Code .*") == f"Code {code} of {CODES}"
            pictures(view)
            for one in maps:
                selected_alone(one, code, CODES)

    def test_a_lasso_selects_a_set(self, linked_maps):
        view = linked_maps[1][0]
        before = title(view)
        draw_lasso(view, rectangle(0.12, 0.97, 0.03, 0.97))
        title_changes(view, before, rf"\d+ codes of {CODES}")


@pytest.mark.usefixtures("linked_maps")  # whose run it shows
def test_the_atlas_that_is_named_answers(browser, lab):
    with notebook_run(browser, lab, "codebook_atlas") as page:
        assert page.locator(".ibq-card h3").count() >= 3
        assert page.locator(".jp-OutputArea-output button").count() == 0, "nobody would answer"
        folder = re.search(r"It lies in the folder (\S+)", page.inner_text("body"))[1]
        with visited(browser, (Path(folder) / "index.html").as_uri()) as atlas:
            atlas.page.wait_for_selector("#card h2")
            row = atlas.page.locator(".line").nth(2)
            code = row.get_attribute("data-code")
            assert not atlas.page.text_content("#card h2").startswith(f"Code {code} of")
            row.click()
            atlas.page.locator("#card h2", has_text=f"Code {code} of").wait_for()
            assert atlas.errors == atlas.elsewhere == []


@pytest.fixture(scope="module")
def generator(browser, lab):
    """The notebook `train_generator`, run to its end: a tokenizer and a generator are there."""
    with notebook_run(browser, lab, "train_generator") as page:
        yield page


def test_a_tokenizer_and_its_generator_train_apart_and_in_sight(generator, notebooks):
    curves = generator.locator(".jp-OutputArea-output img[alt*='up to step']")
    words = curves.evaluate_all("all => all.map(image => image.alt)")
    assert words == ["curves of tokenizer, up to step 12", "curves of generator, up to step 4"]
    assert all((notebooks / "runs" / "pair" / name / CONSOLE).is_file() for name in ("tokenizer", "generator"))
    assert button(generator, "pause").is_disabled() and button(generator, "go on").is_disabled()


@pytest.mark.usefixtures("generator")  # whose tokenizer it takes
def test_a_generator_is_paused_and_resumed(browser, lab, notebooks):
    folder = notebooks / "runs" / "long" / "generator"
    with opened(browser, lab, "long/train_generator") as shown, stopped_in_the_end(folder):
        page = shown.page
        run_all(page)
        last_step(page, None)
        button(page, "pause").click()  # heard while the cell runs
        run = Run(folder)
        step = paused_at(page, run)
        alt = curves_up_to(page, int(run.metrics["step"].iloc[-1]))
        button(page, "go on").click()
        assert last_step(page, alt)[1] > step
        button(page, "pause").click()
        assert paused_at(page, run) > step
        assert "Error displaying widget" not in page.inner_text("body")
        assert shown.errors == shown.elsewhere == []


@pytest.mark.usefixtures("generator")  # which it draws from
def test_an_image_is_drawn_by_hand(browser, lab):
    with notebook_run(browser, lab, "generation_gallery") as page:
        image = page.locator(".ibqlab-sample img")
        until(image, LOADED)
        first, words = image.get_attribute("src"), image.get_attribute("alt")
        drag_slider(page.locator(".widget-slider", has_text="temperature"), 0)
        page.locator(".ibqlab-sample", has_text="press draw").wait_for()
        assert image.get_attribute("src") == first
        page.get_by_role("button", name="draw", exact=True).click()
        drawn_by_hand = words.replace("temperature 1", "temperature 0")
        page.wait_for_selector(f".ibqlab-sample img[alt='{drawn_by_hand}']")
        assert drawn_by_hand != words and image.get_attribute("src") != first
