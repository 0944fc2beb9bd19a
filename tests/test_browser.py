"""Notebooks as their readers see them: in JupyterLab, in a browser, with a hand on the controls.

Nothing here depends on how fast the machine is: every step waits for what it needs to see.
"""

import json
import re
import subprocess
import sys

import nbformat
import pytest
from browsers import (
    ERRORS,
    INTERRUPT,
    KERNEL_IDLE,
    OTHER_CELL,
    OUTPUTS_SHOWN,
    notebook_run,
    opened,
    run_all,
    running_lab,
)
from training_hands import LAST_CURVES, button, curves_up_to, last_step, paused_at, stopped_at, stopped_in_the_end

from ibqlab.notebooks.execution import execute
from ibqlab.runs import Run

NOTEBOOKS = {
    "explore_collapse": {"preset": "smoke", "projection": "pca", "methods": ["vq", "ibq"]},
    "train_tokenizer": {"preset": "smoke", "settings": ["steps=100000"], "output": "long"},
}
BELOW = ".jp-OutputArea-executeResult pre:text-is('42')"
"""What a cell says that stands below the one that trains."""
FIRST_CHOICE = ".widget-dropdown:not(.ibqlab-training *) select"
"""Of the explorer; the view of the training stands above it."""
INSERT_BELOW = """([above, source]) => {
    const { sharedModel } = window.jupyterapp.shell.currentWidget.content.model;
    const place = sharedModel.cells.findIndex(cell => cell.source.includes(above));
    sharedModel.insertCell(place + 1, { cell_type: 'code', source });
}"""

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("warm_start")]


# --- a JupyterLab without anything of its owner's ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(browser, notebooks):
    """Of notebooks, settings and runs."""
    return notebooks


@pytest.fixture(scope="module")
def lab(folder):
    """Address of a JupyterLab."""
    with running_lab(folder) as address:
        yield address


# --- the explorer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explored(browser, lab):
    """explore_collapse under its smallest preset, run to its end."""
    with notebook_run(browser, lab, "explore_collapse") as page:
        yield page


def numbers_change_to(page, text):
    """The line of numbers, once it speaks of another snapshot."""
    page.wait_for_function("text => document.querySelector('.ibqlab-numbers').innerText.includes(text)", arg=text)
    return page.locator(".ibqlab-numbers").inner_text()


def test_the_slider_moves_through_training(explored):
    page = explored
    code_map, histogram = page.locator(".ibqlab-code-map img"), page.locator(".ibqlab-histogram img")
    last = numbers_change_to(page, "VQ from U(±1/K), step 12: usage")
    shown = {"map": code_map.get_attribute("src"), "histogram": histogram.get_attribute("src")}
    boxes = code_map.bounding_box(), histogram.bounding_box()
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"], "the pictures stand side by side"

    page.locator(".widget-slider .noUi-handle").first.focus()
    page.keyboard.press("ArrowLeft")
    earlier = numbers_change_to(page, "VQ from U(±1/K), step 6: usage")
    assert code_map.get_attribute("src") != shown["map"]
    assert histogram.get_attribute("src") != shown["histogram"]
    assert "step 6" in code_map.get_attribute("alt")
    assert code_map.evaluate("picture => picture.complete && picture.naturalWidth") > 400
    assert earlier.split(":")[1] != last.split(":")[1]

    page.keyboard.press("ArrowRight")
    numbers_change_to(page, "step 12: usage")
    assert code_map.get_attribute("src") == shown["map"]

    page.locator(FIRST_CHOICE).first.select_option(label="IBQ")
    numbers_change_to(page, "IBQ from N(0, 1), step 12: usage")
    assert code_map.get_attribute("src") != shown["map"]


def require_pictures(browser, address, notebook, numbers):
    """A notebook that is opened shows the explorer's pictures and numbers, and nothing goes wrong."""
    with opened(browser, address, notebook) as shown:
        shown.page.wait_for_function(OUTPUTS_SHOWN)
        text = shown.page.inner_text("body")
        assert numbers in text
        assert "Error displaying widget" not in text
        for picture in ("map of codes", "hits per code"):
            assert shown.page.locator(f".jp-OutputArea-output img[alt^='{picture}']").count() == 1
        assert not [error for error in shown.errors if "widget" in error]


def test_a_saved_notebook_shows_what_was_looked_at_last(explored, browser, folder):
    """Saved in JupyterLab, opened in another server, whose kernel knows of no widget."""
    explored.locator(FIRST_CHOICE).first.select_option(label="VQ")
    numbers = numbers_change_to(explored, "VQ from U(±1/K), step 12: usage")
    explored.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    saved = (folder / "work" / "explore_collapse.ipynb").read_text()
    assert numbers in json.dumps(json.loads(saved)["metadata"]["widgets"], ensure_ascii=False)
    with running_lab(folder) as address:
        require_pictures(browser, address, "explore_collapse", numbers)


@pytest.fixture(scope="module")
def short(folder):
    """The notebook without figures, as far as the explorer needs it."""
    notebook = nbformat.read(folder / "work" / "explore_collapse.ipynb", as_version=4)
    wanted = ("preset:", "open_study(", "train_study(", "explore_study(")
    cells = [cell for cell in notebook.cells if any(part in cell.source for part in wanted)]
    notebook.cells = [cell for cell in cells if cell.cell_type == "code"]
    assert len(notebook.cells) == len(wanted)
    nbformat.write(notebook, folder / "short.ipynb")
    return folder / "short.ipynb"


@pytest.mark.parametrize("how", ["papermill", "ibqlab run"])
def test_an_executed_copy_shows_the_explorer(how, browser, lab, folder, short):
    target = folder / "work" / f"{how.split()[0]}.ipynb"
    if how == "papermill":
        command = [sys.executable, "-m", "papermill", short, target, "--kernel", "python3", "--no-progress-bar"]
        subprocess.run(command, check=True, capture_output=True)
    else:
        assert execute(short, target, {})[0] is None
    output = nbformat.read(target, as_version=4).cells[-1].outputs[-1]
    numbers = output.data["text/plain"].splitlines()[0]
    assert re.fullmatch(r"VQ from U\(±1/K\), step 12: usage .* of 64 codes in 640 validation tokens, .*", numbers)
    assert output.data["text/html"].count("<img") == 2
    require_pictures(browser, lab, target.stem, numbers)


# --- live training ----------------------------------------------------------------------------------------------------


def test_a_training_is_watched_freed_paused_and_resumed_and_found_again(browser, lab, folder):
    """Curves grow while its cell waits and when the kernel is free, before and after the page is loaded again."""
    with opened(browser, lab, "train_tokenizer") as shown, stopped_in_the_end(folder / "runs" / "long"):
        page = shown.page
        page.wait_for_function(KERNEL_IDLE)
        page.evaluate(INSERT_BELOW, ["train_and_watch(", "6 * 7"])
        run_all(page)
        alt, first = last_step(page, None)
        alt, step = last_step(page, alt)
        assert step > first
        assert page.evaluate(ERRORS) == []
        stands = r"long: step [\d,]+ of 100,000 · loss [\d.]+ · window usage [\d.]+% · images/s \d+ · .* left"
        assert re.search(stands, page.inner_text("body"))

        run = Run(folder / "runs" / "long")
        assert page.locator(BELOW).count() == 0
        button(page, "free the kernel").click()
        page.locator(BELOW).wait_for()
        button(page, "free the kernel").wait_for(state="hidden")
        page.wait_for_function(f"() => ({ERRORS})().length")
        (error,) = page.evaluate(ERRORS)
        assert error.startswith("NotFinished: long is not finished, which this part of the notebook needs")
        assert run.status == "running"
        alt, step = last_step(page, alt)
        assert last_step(page, alt)[1] > step

        run_all(page)  # finds the training, and waits for it
        button(page, "free the kernel").wait_for(state="visible")
        button(page, "pause").click()  # heard while the cell runs
        step = paused_at(page, run)
        # The last row is the newest that was due: not every step logs one.
        logged = int(run.metrics["step"].iloc[-1])
        assert step - run.config["record"]["log_every"] < logged <= step
        alt = curves_up_to(page, logged)
        said = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']")
        assert said.all_inner_texts() == page.evaluate(ERRORS) == [], "the cell waits through the pause"
        button(page, "go on").click()
        alt, grown = last_step(page, alt)
        assert grown > logged
        button(page, "free the kernel").click()
        page.wait_for_function(f"() => ({ERRORS})().length")  # the cells below ask for a finished run
        page.wait_for_function(KERNEL_IDLE)
        assert page.evaluate(OTHER_CELL) == "ok"
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        page.wait_for_function(KERNEL_IDLE)
        page.wait_for_function(f"() => {LAST_CURVES}")
        assert last_step(page, page.evaluate(f"() => {LAST_CURVES}"))[1] > grown

        run_all(page)  # finds the training, and waits for it
        button(page, "free the kernel").wait_for(state="visible")
        page.evaluate(INTERRUPT)
        assert (step := stopped_at(page, run)) > grown
        assert [line.strip() for line in said.all_inner_texts()] == [
            f"stopped at step {step} of 100000, everything is saved; run this notebook cell again to go on"
        ]
        assert shown.errors == shown.elsewhere == []
