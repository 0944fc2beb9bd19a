"""The start page and the notebooks without code, as their readers see them in a browser."""

import re
from pathlib import Path

import pytest
from browsers import LAB, OURS, PATIENCE, ROOT, opened, run_all, running_lab, serving, visited

from ibqlab.notebooks.app import JUPYTER

NOTEBOOKS = {f"notebooks/{file.stem}": {} for file in (ROOT / "notebooks").glob("*.ipynb")}
LISTED = sorted(Path(name).stem for name in NOTEBOOKS if name != "notebooks/index")
CARDS = """() => [...document.querySelectorAll('.ibq-start article')].map(card => ({
    opens: card.querySelector('h3 a').getAttribute('href'),
    picture: card.querySelector('img')?.naturalWidth ?? card.querySelector('.blank').innerText,
    text: card.innerText }))"""
OPENED = "() => window.jupyterapp?.shell?.currentWidget?.context?.path"

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("warm_start")]


@pytest.fixture(scope="module")
def folder(notebooks):
    """Of copied notebooks, settings and runs."""
    with pytest.MonkeyPatch.context() as patch:
        # As `make lab` does it.
        patch.setenv("JUPYTER_PATH", str(JUPYTER))
        patch.setenv("JUPYTER_CONFIG_PATH", str(JUPYTER))
        yield notebooks


def cards_of(page):
    """What the start page shows, once it is there."""
    page.wait_for_selector(".ibq-start article")
    page.wait_for_function("() => [...document.querySelectorAll('.ibq-start img')].every(image => image.complete)")
    return page.evaluate(CARDS)


def test_the_start_page_opens_first_and_leads_into_jupyterlab(browser, folder):
    settings = f"--LabApp.app_settings_dir={folder / Path(OURS).parents[1]}"
    start = "--LabApp.default_url=/voila/render/notebooks/index.ipynb"
    with (
        serving([*LAB, settings, start], folder, "api") as address,
        visited(browser, address) as shown,
    ):
        cards = cards_of(shown.page)
        assert sorted(Path(card["opens"]).stem for card in cards) == LISTED
        assert all(card["picture"] for card in cards)
        assert sum(isinstance(card["picture"], int) for card in cards) >= 8
        assert sum("not run yet" in card["text"] for card in cards) == len(LISTED) - 1  # one leaves nothing to tell
        assert all("without code" in card["text"] for card in cards)
        assert shown.elsewhere == shown.errors == []
        shown.page.locator("h3 a[href$='/playground.ipynb']").click()
        assert shown.page.wait_for_function(OPENED).json_value() == "notebooks/playground.ipynb"


def test_notebooks_open_without_code_and_their_widgets_answer(browser, folder):
    with (
        serving(["-m", "ibqlab", "app", "notebooks", "--no-browser"], folder, "voila/static/voila.js") as address,
        visited(browser, address) as start,
    ):
        assert sorted(Path(card["opens"].partition("?")[0]).stem for card in cards_of(start.page)) == LISTED
        with visited(browser, f"{address}/voila/render/playground.ipynb") as shown:
            page = shown.page
            page.locator(".widget-html", has_text="step 12: vq").wait_for()
            text = page.inner_text("body")
            assert "Preset smoke, too short to mean anything" in text and "read_parameters" not in text
            picture = page.locator(".ibqlab-lab-plane img").get_attribute("src")
            page.locator(".widget-slider .noUi-handle").focus()
            page.keyboard.press("ArrowLeft")
            page.locator(".widget-html", has_text=re.compile(r"step (?!12:)\d+: vq")).wait_for()
            assert page.locator(".ibqlab-lab-plane img").get_attribute("src") != picture
            assert shown.elsewhere == shown.errors == []
        with visited(browser, f"{address}/voila/render/nowhere.ipynb") as lost:
            assert "404" in lost.page.inner_text("h1") and lost.elsewhere == []
            lost.page.get_by_role("link", name="All notebooks").click()
            cards_of(lost.page)
        assert start.elsewhere == start.errors == []


def atlas_opened(page):
    """Whether an atlas's own scripts have drawn a card with a patch that is there."""
    page.wait_for_selector("#card h2")
    page.wait_for_function("() => document.querySelector('#map-words').textContent")
    image = page.get_attribute("#card .patch", "style")
    address = re.search(r'url\("([^"]+)"\)', image)[1]
    return page.evaluate("async address => (await fetch(address)).ok", address)


def test_the_atlas_notebooks_page_opens_from_the_app_and_has_a_card(browser, folder):
    with serving(["-m", "ibqlab", "app", "notebooks", "--no-browser"], folder, "voila/static/voila.js") as address:
        with visited(browser, f"{address}/voila/render/codebook_atlas.ipynb") as shown:
            link = shown.page.locator("a", has_text="Open it")
            link.wait_for()
            assert "trained with preset smoke because no tokenizer run had finished" in shown.page.inner_text("body")
            with shown.page.context.expect_page() as popup:
                link.click()
            popup.value.set_default_timeout(1000 * PATIENCE)
            assert atlas_opened(popup.value)
            popup.value.close()
            assert shown.elsewhere == shown.errors == []
        with visited(browser, f"{address}/voila/render/codebook_atlas.ipynb") as shown:
            shown.page.locator("a", has_text="Open it").wait_for()
            text = shown.page.inner_text("body")
            assert "the newest tokenizer run that has finished" in text and "Preset smoke" not in text
        with visited(browser, address) as start:
            (card,) = (card for card in cards_of(start.page) if "codebook_atlas" in card["opens"])
            assert "finished" in card["text"] and "_atlas · " in card["text"]
            report = start.page.locator(".ibq-start article", has_text="codebook_atlas").get_by_text("report")
            with visited(browser, address + report.get_attribute("href")) as atlas:
                assert atlas_opened(atlas.page)


def test_the_atlas_notebook_shows_no_dead_link_in_jupyterlab(browser, folder):
    with running_lab(folder) as address, opened(browser, address, "notebooks/codebook_atlas") as shown:
        run_all(shown.page)
        shown.page.locator(".jp-OutputArea-output", has_text="Open index.html in it with a browser.").wait_for()
        assert "_atlas" in shown.page.locator(".jp-RenderedHTMLCommon code", has_text="_atlas").last.inner_text()
        assert not shown.page.locator("a[href^='file:'], .jp-OutputArea-output a[href*='_atlas']").count()
        assert shown.elsewhere == shown.errors == []
