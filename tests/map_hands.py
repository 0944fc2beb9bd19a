"""What a hand does to a map of a codebook and to a card in a browser, and what it sees there.

A `view` is the locator of the element that holds the map or the card. In a map features come first, then codes.
"""

import re

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


def until(view, condition, argument=None):
    """Wait until a function of an element and an argument is true."""
    view.page.wait_for_function(
        f"([element, argument]) => ({condition})(element, argument)",
        arg=[view.element_handle(), argument],
        polling=100,
    )


# --- maps -------------------------------------------------------------------------------------------------------------


def drawn(view, codes):
    """A map of so many codes, once its points can be seen."""
    until(view, f"element => {PLOT}?.get('isPointsDrawn') && {PLOT}.get('points').length > {codes}")
    return view


def points_move(view, before):
    """Where the points of a map are, once they are elsewhere than before."""
    until(view, f"(element, before) => JSON.stringify(({PLACES})(element)) !== JSON.stringify(before)", before)
    return view.evaluate(PLACES)


def selected_alone(view, code, codes):
    """Wait until a map of so many codes shows this one as selected."""
    point = len(view.evaluate(PLACES)) - codes + code
    until(view, f"(element, point) => String(({SELECTED})(element)) === String(point)", point)


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


def click_code(view, codes, besides=None):
    """Click the code that stands most alone, of all but one; its number."""
    places = view.evaluate(PLACES)
    features = len(places) - codes
    chosen = next(number for number in alone(places) if number >= features and number - features != besides)
    screen = canvas_of(view)
    view.page.mouse.move(*screen(places[chosen]))
    view.page.mouse.click(*screen(places[chosen]))
    return chosen - features


# --- cards ------------------------------------------------------------------------------------------------------------


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
    """Those on the card, once it has some and none is still being decoded."""
    until(view, "element => element.querySelector('.ibq-card img') && !element.innerText.includes('decoding …')")
    return view.locator(".ibq-card img").evaluate_all("all => all.map(picture => picture.src)")
