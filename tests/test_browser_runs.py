"""The run browser as its readers use it: its notebook in JupyterLab, by mouse and keyboard.

Nothing depends on how fast the machine is: every step waits for what it needs to see.
"""

import os
import re
from pathlib import Path

import pytest
from browsers import notebook_run, running_lab
from test_run_browser import EVIL, make_run, row

from ibqlab.runs import read_note

NOTEBOOKS = {"browse_runs": {}}
pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("warm_start")]
ROWS = ".ibqlab-run-browser .dt-scroll-body tbody tr"
"""Of the table: the names stand in the first column, which stays in place while the others are moved."""
NAMES = f"() => [...document.querySelectorAll('{ROWS}')].map(row => row.cells[0].innerText)"
PICTURE = ".ibqlab-run-browser img[alt*='runs']"


@pytest.fixture(scope="module")
def folder(notebooks):
    """Of the notebook, settings and three runs, the one with an odd name last."""
    for number, (name, method, usage) in enumerate(
        [(EVIL, "ibq", 0.5), ("study/vq", "vq", 0.09), ("ibq", "ibq", 0.75)]
    ):
        rows = [row(step, usage, 9.0 + step) for step in (0, 5, 10)]
        made_at = f"2026-11-2{number}T12:00:00+00:00"
        settings = {"learning_rate": 0.001 * number}
        make_run(notebooks / "runs", name, method, started=made_at, rows=rows, optimizer=settings)
    return notebooks


@pytest.fixture(scope="module")
def page(browser, folder):
    """The notebook, run to its end; nothing went wrong, and nothing was asked elsewhere, until the last test ended."""
    with running_lab(folder) as address, notebook_run(browser, address, "browse_runs") as page:
        page.wait_for_selector(f"{ROWS} td")
        yield page


def rows_become(page, names):
    page.wait_for_function(f"names => JSON.stringify(({NAMES})()) === JSON.stringify(names)", arg=names)


def row_of(page, name):
    return page.locator(ROWS).filter(has_text=name).locator("td").nth(1)


def control(page, label):
    """The field behind a label."""
    return page.locator(".ibqlab-run-browser .widget-inline-hbox", has=page.get_by_text(label, exact=True)).locator(
        "input, select, textarea"
    )


def test_runs_are_found_compared_and_noted(page, folder):
    rows_become(page, ["ibq", "study/vq", EVIL])
    page.locator(".ibqlab-run-browser .dt-scroll-head th", has_text="usage").locator(".dt-column-order").click()
    rows_become(page, ["study/vq", EVIL, "ibq"])  # 9 % before 50 %: numbers, not letters

    row_of(page, "study/vq").click()
    page.wait_for_selector(f"{PICTURE}[alt$='selected runs: study/vq']")
    page.locator(ROWS).filter(has_text=re.compile(r"^ibq")).locator("td").nth(1).click(modifiers=["Control"])
    picture = page.wait_for_selector(f"{PICTURE}[alt*='selected runs: ibq, study/vq']")
    assert picture.evaluate("picture => picture.complete && picture.naturalWidth") > 400
    table = page.locator(".ibqlab-run-difference tbody tr")
    assert [line.split("\t") for line in table.all_inner_texts()] == [
        ["tokenizer.quantizer.name", "ibq", "vq"],
        ["optimizer.learning_rate", "0.002", "0.001"],
    ]
    control(page, "draw").select_option(label="loss")
    page.wait_for_selector(f"{PICTURE}[alt^='Loss of the selected runs']")

    filtered = control(page, "filter")
    filtered.fill("methd=vq")
    filtered.press("Enter")
    page.wait_for_selector("text=did you mean 'method'?")
    filtered.fill("method=vq|ibq usage>5% learning_rate>0")
    filtered.press("Enter")
    rows_become(page, ["ibq", "study/vq"])
    assert page.locator(f"{ROWS}.selected").count() == 2

    page.locator(ROWS).first.locator("td").nth(1).click()  # a table that has changed hears of clicks, too
    page.wait_for_selector(f"{PICTURE}[alt$='selected runs: ibq']")
    control(page, "note").fill(f"the good one {EVIL}")
    page.get_by_role("button", name="save note").click()
    page.wait_for_selector("text=is kept in its folder")
    assert read_note(folder / "runs" / "ibq") == f"the good one {EVIL}"
    assert page.locator(ROWS).first.locator("td").nth(1).inner_text() == f"the good one {EVIL}"[:39] + "…"
    assert page.locator("img[src='x']").count() == 0

    page.get_by_role("button", name="tokens of images").click()
    page.wait_for_selector("text=ibq has no ")

    make_run(folder / "runs", "new", "vq", started="2027-01-01T12:00:00+00:00", optimizer={"learning_rate": 0.1})
    filtered.fill("")
    filtered.press("Enter")
    page.get_by_role("button", name="refresh").click()
    rows_become(page, ["new", "ibq", "study/vq", EVIL])


@pytest.mark.parametrize(("theme", "dark"), [("Light", False), ("Dark", True)])
def test_pictures_in_both_themes_and_widths(page, tmp_path, theme, dark):
    """They lie in the folder that the variable IBQLAB_SCREENSHOTS names, else in the test's own."""
    kept = Path(os.environ.get("IBQLAB_SCREENSHOTS") or tmp_path)
    page.evaluate(
        "name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: name })", f"JupyterLab {theme}"
    )
    # The table follows the theme: light letters on a dark ground, or the other way round.
    page.wait_for_function("dark => document.documentElement.classList.contains('dark') === dark", arg=dark)
    for width in (1400, 1000):
        page.set_viewport_size({"width": width, "height": 1000})
        shown = page.locator(".ibqlab-run-browser")
        shown.screenshot(path=kept / f"runs-{width}-{theme.lower()}.png")
        box = shown.bounding_box()
        for part in page.locator(
            ".ibqlab-run-browser img, .ibqlab-run-browser button, .ibqlab-run-browser select"
        ).all():
            inside = part.bounding_box()
            assert inside is None or inside["x"] + inside["width"] <= box["x"] + box["width"] + 2
