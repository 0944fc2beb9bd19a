"""The views of a codebook as their readers use them: in JupyterLab, by mouse.

One notebook shows the map, the card, the tokens and two linked maps of small runs of digits. Nothing depends on how
fast the machine is: every step waits for what it needs to see. At the end pictures of the notebook are taken in two
themes and two widths; they lie in the folder that the variable IBQLAB_SCREENSHOTS names, else in pytest's own
(`--basetemp`), under screenshots0.
"""

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from browsers import drag_slider, notebook_run, running_lab
from map_hands import (
    ALL_INSIDE,
    NEXT_FRAME,
    PLACES,
    SELECTED,
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
from registry import SMALL_DIGITS

from ibqlab.training import recipe_config, train

CODES = SMALL_DIGITS["tokenizer.quantizer.codebook_size"]
STEPS = (0, 2, 4, 8, 12)
"""With a snapshot."""
CELLS = {
    "start": "from ibqlab.runs import Run\nfrom ibqlab.runs.finding import find_run\n"
    "from ibqlab.widgets import CodebookMap, CodeCard, TokenView, explore_run, link_maps",
    "linked": "left = CodebookMap('ibq', count=24)\nlink_maps(left, CodebookMap('ibq', step=0, with_card=False))",
    "card": "CodeCard(left.card.reader)",
    "tokens": "TokenView(left.card.reader)",
    "deleted": "CodebookMap('deleted', count=24)",
    "run": "explore_run(Run(find_run('deleted')))",
}
NAMES = list(CELLS)
NOTEBOOKS = {}
"""None of ours is copied."""
CUT_OFF = """element => {
    const cut = [];
    for (const part of element.querySelectorAll('img, svg, p, table, button, input, select')) {
        const box = part.getBoundingClientRect();
        const around = part.closest('.jp-OutputArea-output, .widget-vbox, .jupyter-widgets-output-area');
        const words = `${part.tagName} ${part.innerText ?? ''}`.trim();
        if (box.width && box.right > around.getBoundingClientRect().right + 2) cut.push(`${words} sticks out`);
        if (part.scrollWidth > part.clientWidth + 2) cut.push(`${words} is cut off`);
    }
    return cut;
}"""
WIDTHS, THEMES = (1400, 1000), ("Light", "Dark")
PICTURED = ("linked", "tokens", "deleted")

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("warm_start")]


@pytest.fixture(scope="module")
def folder(browser, notebooks):
    """Of the notebook, settings and runs."""
    torch.set_num_threads(1)
    settings = {**SMALL_DIGITS, "tokenizer.quantizer.name": "ibq", "steps": STEPS[-1], "record.validate_every": 4}
    train(recipe_config("builtin/smoke", settings), notebooks / "runs" / "ibq", progress=False)
    shutil.copytree(notebooks / "runs" / "ibq", notebooks / "runs" / "deleted")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), notebooks / "work" / "views.ipynb")
    return notebooks


@pytest.fixture(scope="module")
def views(browser, folder):
    """The notebook, run to its end; nothing went wrong until the last test has ended."""
    with running_lab(folder) as address, notebook_run(browser, address, "views") as page:
        for name, maps in {"linked": 2, "deleted": 1}.items():
            for number in range(maps):
                drawn(code_map(page, name, number), CODES)
        yield page


def output_of(page, name):
    """What a cell shows."""
    return page.locator(".jp-Notebook .jp-Cell").nth(NAMES.index(name)).locator(".jp-OutputArea-executeResult")


def code_map(page, name, number=0):
    """A map of a cell."""
    return output_of(page, name).locator(".ibqlab-codebook-map").nth(number)


# --- the map ----------------------------------------------------------------------------------------------------------


def test_the_slider_moves_the_points(views):
    view = code_map(views, "linked")
    before = view.evaluate(PLACES)
    assert f"{len(STEPS)} snapshots" in view.locator("p", has_text="snapshots").inner_text()
    drag_slider(view, 0)
    until(view, "element => element.querySelector('.widget-readout').innerText === '0'")
    moved = [a != b for a, b in zip(before, points_move(view, before), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_clicked_code_shows_its_card(views):
    view = code_map(views, "linked")
    before = title(view)
    code = click_code(view, CODES)
    assert title_changes(view, before, rf"Code [\d,]+ of {CODES}") == f"Code {code} of {CODES}"
    pictures(view)


def test_a_lasso_selects_a_set(views):
    view = code_map(views, "linked")
    before = title(view)
    draw_lasso(view, rectangle(0.12, 0.97, 0.03, 0.97))
    words = title_changes(view, before, rf"\d+ codes of {CODES}")
    features, codes = len(view.evaluate(PLACES)) - CODES, int(words.split()[0])
    assert codes > 1
    marked = f"(element, [first, codes]) => ({SELECTED})(element).filter(point => point >= first).length === codes"
    until(view, marked, [features, codes])


def test_a_lasso_over_nothing_says_so(views):
    view = code_map(views, "linked")
    before = title(view)
    places = view.evaluate(PLACES)
    side = 0.05
    corner = next(
        (left, top)
        for left in (0.92, 0.12, 0.8, 0.3)
        for top in (0.03, 0.9)
        if not any(left - 0.01 < x < left + side + 0.01 and top - 0.01 < y < top + side + 0.01 for x, y in places)
    )
    draw_lasso(view, rectangle(corner[0], corner[0] + side, corner[1], corner[1] + side))
    title_changes(view, before, "No code is selected")
    assert view.locator(".ibq-card .lack").inner_text().endswith(".")


def test_linked_maps_select_together(views):
    """Two steps of one run; the card beside the first map follows both."""
    left, right = code_map(views, "linked", 0), code_map(views, "linked", 1)
    for one, other in ((left, right), (right, left)):
        before = title(left)
        shown = re.match(r"Code (\d+) ", before)
        code = click_code(one, CODES, besides=shown and int(shown[1]))
        assert title_changes(left, before, rf"Code \d+ of {CODES}") == f"Code {code} of {CODES}"
        for view in (one, other):
            selected_alone(view, code, CODES)


# --- the card ---------------------------------------------------------------------------------------------------------


def test_a_neighbours_card_is_a_click_away_and_back(views):
    view = output_of(views, "card")
    first, shown = title(view), pictures(view)
    neighbour = view.locator("button[data-code]").first
    number = neighbour.get_attribute("data-code")
    neighbour.click()
    assert title_changes(view, first, r"Code .*") == f"Code {number} of {CODES}"
    assert pictures(view) != shown
    view.get_by_role("button", name="back").click()
    assert title_changes(view, f"Code {number} ", r"Code .*") == first
    assert pictures(view) == shown


# --- the tokens -------------------------------------------------------------------------------------------------------


def test_a_replaced_token_changes_the_picture(views):
    view = output_of(views, "tokens")
    page = view.locator(".ibqlab-token-view")
    decoded = page.locator("figure img").nth(1).get_attribute("src")
    square = page.locator("[data-token='1,2']")
    old = int(re.search(r"code (\d+)", square.get_attribute("aria-label"))[1])
    square.click()
    until(view, "element => element.querySelector('.ibq-card rect.chosen')")
    until(view, "(element, words) => element.innerText.includes(words)", f"Code {old} of {CODES}")
    view.get_by_placeholder("a code").fill(str((old + 7) % CODES))
    view.get_by_role("button", name="this token").click()
    until(view, "element => element.innerText.includes('1 token replaced')")
    assert page.locator("figure img").nth(3).get_attribute("src") != decoded
    assert page.locator("rect.changed").count() == 1
    view.get_by_role("button", name="undo all").click()
    until(view, "element => !element.querySelector('rect.changed')")


# --- at the end -------------------------------------------------------------------------------------------------------


def test_a_run_that_is_deleted_while_shown_is_told_of(views, folder):
    """What is in memory goes on to answer; what is not says in a sentence that it is gone."""
    view, run = code_map(views, "deleted"), output_of(views, "run")
    before = title(view)
    numbers = run.locator(".widget-html-content").first
    assert numbers.inner_text().startswith("deleted, step 12: ")
    shutil.rmtree(folder / "runs" / "deleted")

    code = click_code(view, CODES)
    assert title_changes(view, before, r"Code .*") == f"Code {code} of {CODES}"
    pictures(view)
    run.locator(".noUi-handle").focus()
    views.keyboard.press("ArrowLeft")
    until(numbers, "element => element.innerText.includes('has no snapshot')")
    assert numbers.inner_text().startswith(str(folder / "runs" / "deleted"))


def test_screenshots(views, tmp_path_factory):
    """No point and no word is cut off, whatever the window's width; what else looks wrong is seen on the pictures."""
    given = os.environ.get("IBQLAB_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        name = f"JupyterLab {theme}"
        views.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: name })", name)
        views.wait_for_function("name => document.body.dataset.jpThemeName === name", arg=name)
        for width in WIDTHS:
            views.set_viewport_size({"width": width, "height": 2900})
            views.evaluate(NEXT_FRAME)
            for number in range(2):
                until(code_map(views, "linked", number), ALL_INSIDE)
            for view in PICTURED:
                assert (view, width, output_of(views, view).evaluate(CUT_OFF)) == (view, width, [])
                output_of(views, view).screenshot(path=folder / f"{view}-{width}-{theme.lower()}.png")
