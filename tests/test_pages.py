"""Pages that are sent around: names from outside stay text, and no picture but the study's own is inside."""

import os

import pandas as pd
import pytest

from ibqlab.base.files import RunError
from ibqlab.studies.pages import as_code, to_markdown, write_pages
from ibqlab.studies.provenance import provenance_text

HOSTILE = [
    "![x](figures/../secret.png)",
    "![x](http://example.org/x.png)",
    "<script>alert(1)</script>",
    "x\n\n# Forged heading\n\n",
    "a | b",
    "`</code><script>",
    "\x1b[31mred",
    "[here](javascript:alert(1))",
]
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 20


@pytest.fixture
def folder(tmp_path):
    study = tmp_path / "study"
    (study / "figures").mkdir(parents=True)
    (study / "figures" / "good.png").write_bytes(PNG)
    (study / "secret.png").write_bytes(PNG + b"private")
    (tmp_path / "private.txt").write_text("private")
    return study


def page_of(folder, text):
    return write_pages(folder, text, "title").read_text()


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_tables_and_provenance_stay_text(folder, name):
    row = {"seed": 0, "provenance": {"data": {"train": {"description": name}}, "commit": name, "threads": name}}
    table = to_markdown(pd.DataFrame({"method": [name], name: ["y"]}))
    page = page_of(folder, f"# Title\n\n{table}\n\n{provenance_text([row], name)}\n\n{as_code(name)}\n")
    assert page.count("<h1>") == 1 and page.count("<h2>") == 1
    for live in ("<script", "<img", "href=", "\x1b"):
        assert live not in page, live
    assert page.count("<th>") == 2 and page.count("<td>") == 2


@pytest.mark.parametrize(
    "target",
    [
        "figures/../secret.png",
        "figures/../../private.txt",
        "secret.png",
        "/etc/passwd",
        "http://example.org/x.png",
        "//example.org/x.png",
        "data:text/html,x",
        "figures/link.png",
        "figures/absent.png",
        "figures/pipe.png",
        "figures/text.png",
        "figures",
    ],
)
def test_only_pictures_inside_figures_travel_with_a_page(folder, target):

    (folder / "figures" / "link.png").symlink_to(folder / "secret.png")
    (folder / "figures" / "text.png").write_text("private")
    os.mkfifo(folder / "figures" / "pipe.png")
    page = page_of(folder, f"![shown]({target}) ![good](figures/good.png)")
    assert page.count("<img") == page.count("base64,") == 1 and 'alt="good"' in page
    assert "<em>shown</em>" in page and "example.org" not in page


def test_floats_in_tables_are_short_and_tables_scroll(folder):
    row = {"PSNR (dB)": 12.345678901234, "usage": float("nan"), "K": 16384, "name": "x", "tokens": 1234567.0}
    table = to_markdown(pd.DataFrame([row]))
    assert "| 12.35 | – | 16384 | x | 1,234,567.0 |" in table
    assert "overflow-x:auto" in page_of(folder, table)


def test_a_folder_that_may_not_be_written_is_a_message(tmp_path):
    (tmp_path / "study").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        write_pages(tmp_path / "study", "text", "title")
