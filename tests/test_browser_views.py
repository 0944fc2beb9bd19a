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
from browsers import ERRORS, folders_of_its_own, opened, run_all, running_lab, write_settings
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
# What the kernel tells of errors in callbacks, which no cell shows.
LISTEN = """() => {
    window.told = [];
    window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.iopubMessage.connect((_, message) => {
        const { msg_type } = message.header, { ename, evalue, text, name } = message.content;
        if (msg_type === 'error') window.told.push(`${ename}: ${evalue}`);
        if (msg_type === 'stream' && name === 'stderr') window.told.push(text);
    });
}"""
ALL_SHOWN_OR_FAILED = f"""cells =>
    document.querySelectorAll('.jp-OutputArea-executeResult').length === cells || ({ERRORS})().length"""
HARMLESS = ("Ignoring draw call", "No such comm")
"""Of jupyter-scatter, while it has no points yet, and of a kernel that is asked for widgets before it has any."""
NEXT_FRAME = "() => new Promise(shown => requestAnimationFrame(() => setTimeout(shown, 20)))"
PLOT = "[...element.querySelectorAll('div')].find(part => part.api)?.api"
PLACES = f"""element => {{
    const plot = {PLOT};
    const {{ clientWidth: width, clientHeight: height }} = element.querySelector('canvas');
    const places = plot.get('points').map((_, number) => plot.getScreenPosition(number));
    return places.map(([x, y]) => [x / width, y / height]);
}}"""
"""Of all points on the canvas, from 0 at its left and top to 1."""
ALL_INSIDE = f"element => ({PLACES})(element).flat().every(share => share > 0 && share < 1)"
SELECTED = f"element => [...{PLOT}.get('selectedPoints')]"
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
def folder(browser, tmp_path_factory):
    """Of the notebook, settings and runs."""
    made = tmp_path_factory.mktemp("lab")
    write_settings(made)
    torch.set_num_threads(1)
    settings = {**SMALL_DIGITS, "tokenizer.quantizer.name": "ibq", "steps": STEPS[-1], "record.validate_every": 4}
    train(recipe_config("builtin/smoke", settings), made / "runs" / "ibq", progress=False)
    shutil.copytree(made / "runs" / "ibq", made / "runs" / "deleted")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (made / "work").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), made / "work" / "views.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in folders_of_its_own(made).items():
            patch.setenv(name, value)
        yield made


@pytest.fixture(scope="module")
def views(browser, folder):
    """The notebook, run to its end; nothing went wrong until the last test has ended."""
    with running_lab(folder) as address, opened(browser, address, "views") as shown:
        page = shown.page
        page.on("pageerror", lambda error: shown.errors.append(str(error)))
        page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel")
        page.evaluate(LISTEN)
        run_all(page)
        page.wait_for_function(ALL_SHOWN_OR_FAILED, arg=len(CELLS) - 1)
        assert page.evaluate(ERRORS) == []
        for name, maps in {"linked": 2, "deleted": 1}.items():
            for number in range(maps):
                drawn(code_map(page, name, number))
        yield page
        said = [*page.evaluate("() => window.told"), *shown.errors]
        assert [error for error in said if not any(text in error for text in HARMLESS)] == []
        assert shown.elsewhere == []


# --- hands ------------------------------------------------------------------------------------------------------------


def output_of(page, name):
    """What a cell shows."""
    return page.locator(".jp-Notebook .jp-Cell").nth(NAMES.index(name)).locator(".jp-OutputArea-executeResult")


def code_map(page, name, number=0):
    """A map of a cell."""
    return output_of(page, name).locator(".ibqlab-codebook-map").nth(number)


def until(view, condition, argument=None):
    """Wait until a function of an element and an argument is true."""
    view.page.wait_for_function(
        f"([element, argument]) => ({condition})(element, argument)",
        arg=[view.element_handle(), argument],
        polling=100,
    )


def drawn(view):
    """A map, once its points can be seen."""
    until(view, f"element => {PLOT}?.get('isPointsDrawn') && {PLOT}.get('points').length > {CODES}")
    return view


def title(view):
    """What the card of a view says it is of."""
    return view.locator(".ibq-card h3").first.inner_text().split(" ·")[0]


def title_changes(view, before, pattern):
    """The title of the card, once it is another and of the kind that is expected."""
    until(view, "(element, before) => !element.querySelector('.ibq-card h3').innerText.startsWith(before)", before)
    after = title(view)
    assert re.fullmatch(pattern, after), after
    return after


def pictures(view):
    """Those on the card."""
    return view.locator(".ibq-card img").evaluate_all("all => all.map(picture => picture.src)")


def canvas_of(view):
    """Where the map's canvas lies on the screen."""
    canvas = view.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    return lambda place: (box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"])


def choose_mouse(view, mode):
    view.locator(f"button[title='Activate {mode}']").click()
    until(view, f"element => {PLOT}.get('mouseMode') === '{'lasso' if mode.startswith('lasso') else 'panZoom'}'")


def draw_lasso(view, corners):
    """Press the button at the first corner and let go at the last one, which must lie some way from the first."""
    choose_mouse(view, "lasso selection")
    screen, mouse = canvas_of(view), view.page.mouse
    mouse.move(*screen(corners[0]))
    mouse.down()
    for corner in corners[1:]:
        mouse.move(*screen(corner), steps=3)
        view.page.evaluate(NEXT_FRAME)
    mouse.up()
    choose_mouse(view, "pan & zoom")


def rectangle(left, right, top, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, (top + bottom) / 2)]


def alone(places):
    """Numbers of points that no other lies upon, those with the most room first."""
    rooms = [min((x - a) ** 2 + (y - b) ** 2 for a, b in places if (a, b) != (x, y)) for x, y in places]
    inside = [number for number, (x, y) in enumerate(places) if 0.1 < x < 0.95 and 0.05 < y < 0.95]
    return sorted(inside, key=lambda number: -rooms[number])


def click_code(view, besides=None):
    """Click the code that stands most alone, of all but one; its number."""
    places = view.evaluate(PLACES)
    codes = len(places) - CODES
    chosen = next(number for number in alone(places) if number >= codes and number - codes != besides)
    screen = canvas_of(view)
    view.page.mouse.move(*screen(places[chosen]))
    view.page.mouse.click(*screen(places[chosen]))
    return chosen - codes


# --- the map ----------------------------------------------------------------------------------------------------------


def test_the_slider_moves_the_points(views):
    view = code_map(views, "linked")
    handle, track = view.locator(".noUi-handle"), view.locator(".noUi-base")
    before = view.evaluate(PLACES)
    assert f"{len(STEPS)} snapshots" in view.locator("p", has_text="snapshots").inner_text()
    track.scroll_into_view_if_needed()
    grip, rail = handle.bounding_box(), track.bounding_box()
    middle = grip["y"] + grip["height"] / 2
    views.mouse.move(grip["x"] + grip["width"] / 2, middle)
    views.mouse.down()
    views.mouse.move(rail["x"] + 2, middle, steps=5)
    views.mouse.up()
    until(view, "element => element.querySelector('.widget-readout').innerText === '0'")
    until(view, f"(element, before) => JSON.stringify(({PLACES})(element)) !== JSON.stringify(before)", before)
    moved = [a != b for a, b in zip(before, view.evaluate(PLACES), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_clicked_code_shows_its_card(views):
    view = code_map(views, "linked")
    before = title(view)
    code = click_code(view)
    assert title_changes(view, before, rf"Code [\d,]+ of {CODES}") == f"Code {code} of {CODES}"
    assert pictures(view)


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
        code = click_code(one, besides=shown and int(shown[1]))
        assert title_changes(left, before, rf"Code \d+ of {CODES}") == f"Code {code} of {CODES}"
        for view in (one, other):
            features = len(view.evaluate(PLACES)) - CODES
            until(view, f"(element, point) => String(({SELECTED})(element)) === String(point)", features + code)


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

    code = click_code(view)
    assert title_changes(view, before, r"Code .*") == f"Code {code} of {CODES}"
    assert pictures(view)
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
