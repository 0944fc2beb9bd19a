"""The start page: each notebook in its own words, what has come of it in the runs' folder, and how it opens."""

import json
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ibqlab.base.locking import holding
from ibqlab.cli import main
from ibqlab.notebooks import app
from ibqlab.notebooks.app import preset_to_show, show_finished_or_smallest
from ibqlab.notebooks.links import PageLink
from ibqlab.notebooks.parameters import notebook_parameters
from ibqlab.notebooks.start_page import PICTURES, STYLE, StartPage, links_here, page_html, read_cards
from ibqlab.notebooks.status import notebook_status

ROOT = Path(__file__).resolve().parents[1]
FIRST = """# A title

**Question.** Which
of `these`?

**Time.** Preset `smoke` seconds on 2 cores; on a GPU not measured. More."""


def write(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def notebook(file, *cells):
    """A notebook of text cells."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text) for text in cells]), file)
    return file


def study(folder, cells=2, rows=2, failed=0, name="mine"):
    """The folder of a study as far as the start page reads it."""
    write(folder / "study.json", {"study": name})
    for kind, count in (("cells", cells), ("rows", rows), ("failed", failed)):
        for number in range(count):
            write(folder / kind / f"{number}.json", {})
    return folder


# --- cards ------------------------------------------------------------------------------------------------------------


def test_every_notebook_of_the_project_has_a_card_with_question_and_minutes():
    cards = read_cards(ROOT / "notebooks", Path("nowhere"))
    names = [card.file.stem for card in cards]
    assert names[0] == "explore_collapse" and names[3:] == sorted(names[3:])
    assert {*names, "index"} == {file.stem for file in (ROOT / "notebooks").glob("*.ipynb")}
    assert all("?" in card.question and "CPU cores" in card.minutes for card in cards)
    states = {card.file.stem: card.status.state for card in cards}
    assert states.pop("browse_runs") == "ready" and set(states.values()) == {"not run yet"}


def test_pictures_are_small_and_of_notebooks_that_are_there():
    names = {file.stem for file in (ROOT / "notebooks").glob("*.ipynb")}
    pictures = list(PICTURES.glob("*"))
    assert {file.stem for file in pictures} <= names and len(pictures) >= 8
    assert all(file.suffix == ".webp" and file.stat().st_size < 25_000 for file in pictures)


@pytest.mark.parametrize(
    ("cells", "title", "question", "minutes"),
    [
        ([FIRST], "A title", "Which\nof `these`?", "Preset `smoke` seconds on 2 cores"),
        (["Just *text*.\n\nMore."], "mine", "Just *text*.", ""),
        (["# Only a title"], "Only a title", "", ""),
        (["", "## Second cell\n\nwords"], "Second cell", "words", ""),
        ([], "mine", "", ""),
    ],
)
def test_a_notebook_of_the_users_own_has_a_card(cells, title, question, minutes, tmp_path):
    (card,) = read_cards(notebook(tmp_path / "mine.ipynb", *cells).parent, tmp_path / "runs")
    assert (card.title, card.question, card.minutes) == (title, question, minutes)
    page = page_html([card], links_here(tmp_path))
    assert minutes or "time not stated" in page
    assert '<p class="minutes"><code>mine</code> · ' in page


def test_what_is_no_notebook_is_left_out_and_an_empty_folder_says_so(tmp_path):
    write(tmp_path / "broken.ipynb", "{")
    write(tmp_path / "list.ipynb", [])
    notebook(tmp_path / "index.ipynb", "# Start")
    assert read_cards(tmp_path, tmp_path / "runs") == []
    assert "no notebook in this folder" in StartPage(tmp_path)._repr_mimebundle_()["text/html"]


def test_nothing_of_a_notebook_becomes_mark_up_and_nothing_comes_from_elsewhere(tmp_path):
    evil = "<script>alert(1)</script>"
    file = notebook(tmp_path / 'a"b<i>.ipynb', f"# {evil}\n\n**Question.** {evil} `{evil}`\n\n**Time.** {evil}")
    page = page_html(read_cards(file.parent, tmp_path / "runs"), links_here(tmp_path))
    assert "<script" not in page and "<i>" not in page and page.count("&lt;script") == 4
    assert "<code>a&quot;b&lt;i&gt;</code>" in page
    assert 'href="a%22b%3Ci%3E.ipynb"' in page
    assert "http" not in page and "url(" not in STYLE.read_text()


def test_a_notebook_without_a_picture_shows_its_own_figure_else_its_name(tmp_path):
    file = notebook(tmp_path / "mine.ipynb", FIRST)
    page = page_html(read_cards(tmp_path, tmp_path / "runs"), links_here(tmp_path))
    assert '<span class="blank"' in page and ">mine</span>" in page
    figure = tmp_path / "runs" / "mine-demo" / "figures" / "curves.png"
    figure.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((900, 1200, 3), np.uint8)).save(figure)
    page = page_html(read_cards(file.parent, tmp_path / "runs"), links_here(tmp_path))
    assert 'alt="a figure of mine" src="data:image/webp;base64,' in page
    figure.write_text("no picture")
    assert '<span class="blank"' in page_html(read_cards(tmp_path, tmp_path / "runs"), links_here(tmp_path))


# --- status -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "failed", "state", "detail"),
    [
        (2, 0, "finished", "mine-demo: 2 of 2 runs"),
        (1, 0, "stopped", "mine-demo: 1 of 2 runs"),
        (1, 1, "failed", "mine-demo: 1 of 2 runs, 1 failed"),
    ],
)
def test_the_status_of_a_study(rows, failed, state, detail, tmp_path):
    folder = study(tmp_path / "mine-demo", rows=rows, failed=failed)
    status = notebook_status("mine", tmp_path)
    assert (status.state, status.detail) == (state, detail)
    assert re.fullmatch(rf"{state} \d{{4}}-\d\d-\d\d \d\d:\d\d · {detail}", str(status))
    report = write(folder / "report.html", "")
    assert notebook_status("mine", tmp_path).report == report


def test_a_study_at_work_counts_before_a_newer_one(tmp_path):
    folder = study(tmp_path / "other name", rows=1)
    study(tmp_path / "mine-later")
    assert notebook_status("mine", tmp_path).detail.startswith("mine-later")
    (folder / "locks").mkdir()
    with holding(folder / "locks" / "0"):
        assert str(notebook_status("mine", tmp_path)).startswith("running ")
        assert notebook_status("mine", tmp_path).detail == "other name: 1 of 2 runs"


def test_runs_in_one_folder_are_counted_and_a_single_run_is_found_by_its_settings(tmp_path):
    for name, noted in (("tokenizer", "finished"), ("generator", "stopped")):
        write(tmp_path / "mine-smoke" / name / "config.yaml", "steps: 3\n")
        write(tmp_path / "mine-smoke" / name / "provenance.json", {"status": noted})
    status = notebook_status("mine", tmp_path)
    assert (status.state, status.detail) == ("stopped", "mine-smoke: 1 of 2 runs")
    write(tmp_path / "photos-0123456789ab" / "config.yaml", "steps: 3\n")
    write(tmp_path / "photos-0123456789ab" / "provenance.json", {"status": "finished"})
    assert notebook_status("one", tmp_path).state == "not run yet"
    status = notebook_status("one", tmp_path, trains_one=True)
    assert status.state == "finished" and status.detail.startswith("photos-0123456789ab: finished at step 0 of 3")


def test_a_folder_of_another_notebook_does_not_count(tmp_path):
    study(tmp_path / "mine-demo", name="another")
    study(tmp_path / "minelaw")
    assert notebook_status("mine", tmp_path).detail.startswith("minelaw")
    assert notebook_status("another", tmp_path).detail.startswith("mine-demo")
    write(tmp_path / "third-x" / "rfid.csv", "")
    assert notebook_status("third", tmp_path).state == "stopped"
    assert notebook_status("fourth", tmp_path).state == "not run yet"


@pytest.mark.parametrize(
    ("noted", "age", "state"),
    [
        ({"end_time": "2026-01-01", "exception": None}, 0, "finished"),
        ({"end_time": "2026-01-01", "exception": True}, 0, "failed"),
        ({"end_time": None}, 0, "running"),
        ({"end_time": None}, 3600, "stopped"),
    ],
)
def test_the_status_of_an_executed_copy(noted, age, state, tmp_path):
    copy = write(tmp_path / "notebooks" / "mine" / "mine-2026.ipynb", {"metadata": {"papermill": noted}})
    os.utime(copy, (copy.stat().st_mtime - age,) * 2)
    status = notebook_status("mine", tmp_path)
    assert (status.state, status.executed_copy) == (state, copy)


@pytest.mark.parametrize("name", ["mine", "train_tokenizer"])
def test_what_is_too_short_to_mean_anything_says_so_and_is_not_green(name, tmp_path):
    books = notebook(tmp_path / "books" / f"{name}.ipynb", FIRST).parent
    runs = tmp_path / "runs"

    def shown():
        (card,) = read_cards(books, runs)
        (kind,) = re.findall(r'class="status ([^"]+)"', page_html([card], links_here(books)))
        return kind, str(card.status)

    executed = {"end_time": "2026-01-01", "parameters": {"preset": "smoke"}}
    write(runs / "notebooks" / name / f"{name}-1.ipynb", {"metadata": {"papermill": executed}})
    assert shown()[0] == "short" and shown()[1].endswith(" · preset smoke: too short to mean anything")
    folder = study(runs / f"{name}-x", name=name)
    assert shown()[0] == "finished" and shown()[1].endswith("2 of 2 runs")
    write(folder / "parameters.json", {"preset": "smoke"})
    assert shown()[0] == "short" and shown()[1].endswith("2 of 2 runs · preset smoke: too short to mean anything")
    write(folder / "parameters.json", {"preset": "demo"})
    write(folder / "rows" / "0.json", {"steps": 12})
    assert shown()[0] == "short" and shown()[1].endswith("2 of 2 runs · 12 steps: too short to mean anything")
    write(folder / "rows" / "1.json", {"steps": 300})
    assert shown()[0] == "finished"
    (folder / "rows" / "0.json").unlink()
    write(folder / "parameters.json", {"preset": "smoke"})
    assert shown()[0] == "stopped" and "too short" not in shown()[1]


def test_short_runs_are_told_by_their_steps(tmp_path):
    run = tmp_path / "mine-smoke" / "tokenizer"
    write(run / "config.yaml", "steps: 3\n")
    write(run / "provenance.json", {"status": "finished"})
    assert notebook_status("mine", tmp_path).too_short == "preset smoke"
    os.rename(run.parent, tmp_path / "mine-own")
    assert notebook_status("mine", tmp_path).too_short == "0 steps"


def test_an_atlas_counts_for_the_notebook_that_writes_atlases(tmp_path):
    page = atlas_in(tmp_path / "study-cell_atlas")
    assert notebook_status("study", tmp_path).state == "not run yet"
    assert notebook_status("codebook_atlas", tmp_path).state == "not run yet"
    status = notebook_status("codebook_atlas", tmp_path, writes_atlases=True)
    assert (status.state, status.report, status.detail) == ("finished", page, "study-cell_atlas")
    cards = {card.file.stem: card.status.state for card in read_cards(ROOT / "notebooks", tmp_path)}
    assert {name for name, state in cards.items() if state == "finished"} == {"codebook_atlas"}
    write(page.parent / "data" / "facts.js", 'atlas.take("facts",{"steps":[0,4]});\n')
    assert notebook_status("codebook_atlas", tmp_path, writes_atlases=True).too_short == "4 steps"


def test_a_notebook_that_leaves_nothing_says_what_it_shows(tmp_path):
    for name, words in (("a", "1 run to look at"), ("b/c", "2 runs to look at")):
        write(tmp_path / "runs" / name / "config.yaml", "steps: 3\n")
        write(tmp_path / "runs" / name / "provenance.json", {"status": "finished"})
        cards = {card.file.stem: card.status for card in read_cards(ROOT / "notebooks", tmp_path / "runs")}
        assert str(cards["browse_runs"]) == f"ready · {words}"
    write(tmp_path / "runs" / "notebooks" / "browse_runs" / "1.ipynb", {"metadata": {"papermill": {"end_time": "x"}}})
    assert notebook_status("browse_runs", tmp_path / "runs", looks_at_runs=True).state == "finished"


def test_damaged_files_are_no_error(tmp_path):
    write(tmp_path / "mine-demo" / "config.yaml", ": [")
    write(tmp_path / "mine-demo" / "study.json", "{")
    assert notebook_status("mine", tmp_path).state == "failed"
    write(tmp_path / "notebooks" / "theirs" / "theirs.ipynb", "{")
    assert notebook_status("theirs", tmp_path).state in ("running", "stopped")


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Makes the page of a folder `books` beside `runs`, as a server at an address shows it."""
    notebook(tmp_path / "books" / "mine.ipynb", FIRST)
    write(study(tmp_path / "runs" / "mine-demo") / "report.html", "")
    write(tmp_path / "runs" / "notebooks" / "mine" / "mine-1.ipynb", {"metadata": {"papermill": {"end_time": "x"}}})
    monkeypatch.chdir(tmp_path / "books")

    def page(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        html = StartPage()._repr_mimebundle_()["text/html"]
        return re.findall(r'<a (?!class)(href="[^"]+"(?: target="\w+")?)[^>]*>([^<]+)</a>', html)[1:]

    return page


def test_links_of_a_notebook_in_jupyterlab_are_paths_from_it(page):
    assert page() == [
        ('href="mine.ipynb"', "open"),
        ('href="../runs/mine-demo/report.html"', "report"),
        ('href="../runs/notebooks/mine/mine-1.ipynb"', "executed copy"),
    ]


@pytest.mark.parametrize("base", ["/", "/user/me/"])
def test_links_of_a_page_beside_jupyterlab_lead_into_it(base, page):
    shown = page(SERVER_SOFTWARE="voila/0.5", SCRIPT_NAME=f"{base}voila/render/books/index.ipynb")
    assert shown == [
        (f'href="{base}lab/tree/books/mine.ipynb" target="_parent"', "open"),
        ('href="mine.ipynb?template=ibqlab"', "without code"),
        (f'href="{base}lab/tree/runs/mine-demo/report.html" target="_parent"', "report"),
        (f'href="{base}lab/tree/runs/notebooks/mine/mine-1.ipynb" target="_parent"', "executed copy"),
    ]


def test_links_of_the_app_stay_in_it(page):
    shown = page(SERVER_SOFTWARE="voila/0.5", SCRIPT_NAME="/voila/render/index.ipynb", IBQLAB_APP="1")
    assert shown == [
        ('href="mine.ipynb?template=ibqlab"', "open"),
        ('href="/runs/mine-demo/report.html" target="_blank"', "report"),
    ]


def atlas_in(folder):
    """An atlas, as far as links and status look at it."""
    write(folder / "index.html", "")
    write(folder / "data" / "facts.js", 'atlas.take("facts",{"name":"study/cell"});\n')
    return folder / "index.html"


def test_a_page_of_scripts_is_linked_where_its_scripts_run_and_told_by_its_folder_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = atlas_in(tmp_path / "runs" / "a <b>_atlas")
    for variables in ({}, {"SERVER_SOFTWARE": "voila/0.5", "SCRIPT_NAME": "/voila/render/books/codebook_atlas.ipynb"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        shown = PageLink(file)._repr_mimebundle_()
        assert "href" not in shown["text/html"] and "file:" not in shown["text/html"]
        assert f"{tmp_path}/runs/a &lt;b&gt;_atlas</code>" in shown["text/html"]
        assert shown["text/plain"].split("\n") == [
            f"It lies in the folder {tmp_path}/runs/a <b>_atlas",
            "Open index.html in it with a browser.",
        ]
    monkeypatch.setenv("IBQLAB_APP", "1")
    monkeypatch.setenv("SCRIPT_NAME", "/voila/render/codebook_atlas.ipynb")
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
    assert (
        '<a href="/runs/a%20%3Cb%3E_atlas/index.html" target="_blank">'
        in PageLink(file)._repr_mimebundle_()["text/html"]
    )
    outside = PageLink(atlas_in(tmp_path / "elsewhere"))
    assert "href" not in outside._repr_mimebundle_()["text/html"]


# --- without code -----------------------------------------------------------------------------------------------------


def test_a_finished_preset_is_shown_and_the_smallest_otherwise(tmp_path):
    parameters = notebook_parameters(ROOT / "notebooks" / "explore_collapse.ipynb")
    assert preset_to_show("explore_collapse", parameters, tmp_path) == "smoke"
    folder = study(tmp_path / "explore_collapse-demo", rows=1)
    assert preset_to_show("explore_collapse", parameters, tmp_path) == "smoke"
    write(folder / "rows" / "1.json", {})
    assert preset_to_show("explore_collapse", parameters, tmp_path) == "demo"
    assert preset_to_show("mine", {}, tmp_path) is None


class Handler:
    """A request, as far as the hook looks at it."""

    xsrf_token = b""

    def __init__(self, path):
        self.request = type("Request", (), {"path": path})()


def test_the_hook_puts_the_preset_behind_the_parameters_and_says_so():
    opened = nbformat.read(ROOT / "notebooks" / "playground.ipynb", as_version=4)
    before = [cell.source for cell in opened.cells]
    show_finished_or_smallest(Handler("/voila/render/playground.ipynb"), opened, "")
    after = [cell.source for cell in opened.cells]
    assert after == [before[0], after[1], before[1], "preset = 'smoke'", *before[2:]]
    assert "`smoke`, too short to mean anything" in after[1]


def test_the_hook_leaves_a_notebook_alone_that_shows_a_run_which_has_finished(monkeypatch):
    for run, cells in ((None, 2), (object(), 0)):
        monkeypatch.setattr(app, "newest_tokenizer_run", lambda run=run: run)
        opened = nbformat.read(ROOT / "notebooks" / "codebook_atlas.ipynb", as_version=4)
        before = len(opened.cells)
        show_finished_or_smallest(Handler("/voila/render/codebook_atlas.ipynb"), opened, "")
        assert len(opened.cells) == before + cells


def test_the_hook_leaves_other_notebooks_alone():
    opened = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("preset = 1")])
    show_finished_or_smallest(Handler("/voila/render/mine.ipynb"), opened, "")
    assert [cell.source for cell in opened.cells] == ["preset = 1"]


def test_the_app_without_a_start_page_says_what_to_type(tmp_path):
    done = CliRunner().invoke(main, ["app", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no start page index.ipynb; copy it and all notebooks: ibqlab notebooks" in done.output
