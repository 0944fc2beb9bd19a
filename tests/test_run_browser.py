"""Runs found again: what their table tells, conditions and orders, differences, notes; in a terminal and by hand."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from ibqlab.base.files import RunError
from ibqlab.cli import main
from ibqlab.config.plain_lines import read_plain
from ibqlab.config.yaml_rules import read_yaml
from ibqlab.recipes.recipe_files import EXPERIMENTS
from ibqlab.runs import Run, RunIndex, list_runs, read_note, write_note
from ibqlab.runs import summaries as summaries_module
from ibqlab.runs.comparison import differing_settings
from ibqlab.runs.metrics import last_of_each, last_rows, read_rows
from ibqlab.runs.queries import QueryError, RunNames
from ibqlab.views.run_table import BrowserParameters, RunCatalogue, difference_html, measures_of, table_html
from ibqlab.widgets import RunBrowser
from ibqlab.widgets.run_browser import PAIR_VIEWS, VIEWS

EVIL = "<img src=x onerror=alert(1)> ü"


def make_run(folder, name, quantizer, size=1024, *, started="2026-11-27T12:00:00+00:00", rows=(), **settings):
    """A run that somebody's training could have left, without its weights."""
    config = {"tokenizer": {"quantizer": {"name": quantizer, "codebook_size": size, "code_dim": 8}}, "seed": 0}
    run = Run.start(folder / name, {**config, **settings})
    for row in rows:
        run.log(row)
    run.finish("finished", duration_s=43.0)
    date(run, started)
    return run.path


def date(run, started):
    """Tests must not depend on today."""
    file = run.path / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"started": started}))


def row(step, usage, psnr=None):
    return {"step": step, "usage": usage, "usage_tokens": 640, "loss": 1.0 / (step + 1), "validation_psnr": psnr}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of a VQ, two IBQ's, one of them in a study and newest, a monitored run, a generator, and a broken one."""
    runs = tmp_path_factory.mktemp("made")
    make_run(runs, "vq", "vq", rows=[row(0, 0.5, 9.0), row(10, 0.05)], optimizer={"learning_rate": 1e-3})
    make_run(
        runs,
        "study/ibq",
        "ibq",
        4096,
        started="2026-11-28T12:00:00+00:00",
        rows=[row(0, 0.5, 9.0), row(10, 0.75, 14.5)],
        optimizer={"learning_rate": 5e-4},
    )
    make_run(runs, EVIL, "ibq", rows=[row(5, None), row(6, None)], optimizer={"learning_rate": 1e-3})
    own = Run.start(runs / "own", {"kind": "monitored", "codebook_size": 16, "settings": {"quantizer": "my own"}})
    own.log({"step": 3, "usage": 0.25, "usage_tokens": 64})
    generator = Run.start(runs / "generator", {"generator": {"vocabulary_size": 64}, "steps": 5})
    for run in (own, generator):
        date(run, "2026-11-26T12:00:00+00:00")
    broken = make_run(runs, "broken", "vq")
    (broken / "config.yaml").write_text("a: [1")
    return runs


@pytest.fixture
def folder(made, tmp_path):
    """A copy of them, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


def ibqlab(*words, code=0):
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == code, result.output
    return result.output


# --- what a run tells, read quickly -----------------------------------------------------------------------------------


def test_plain_settings_are_read_as_the_full_rules_read_them():
    texts = [file.read_text() for file in EXPERIMENTS.rglob("*.yaml")]
    texts += ["a: 1\nb:\n  c: -2.5e-07\n  d: [1, x/y, true]\ne: ''\n", "a: 32-true\nb: null\n", "a: -0\n", "A: Null\n"]
    texts += [
        "a: 1e-3\n",
        "a: 007\n",
        "a: yes\nb: no\nc: [no, off]\n",
        "a: 0.10\n",
        "a: .5\n",
        "a: inf\n",
        "a: 1.0e+10\n",
    ]
    plain = {text: read_plain(text) for text in texts}
    assert sum(content is not None for content in plain.values()) > 20
    for text, content in plain.items():
        assert content is None or repr(content) == repr(read_yaml(text)), text


@pytest.mark.parametrize(
    "text",
    [
        "a: b: c\n",
        "a: 1\na: 2\n",
        "a:\n",
        "a:\n- 1\n",
        "a: 1 # one\n",
        "a: 'b'\n",
        "\n",
        "a: &b 1\n",
        " a: 1\n",
        "a:\n   b: 1\n",
    ],
)
def test_what_is_not_plain_is_left_to_the_full_rules(text):
    assert read_plain(text) is None


def test_the_last_value_of_each_metric_without_reading_all_rows(tmp_path):
    run = Run.start(tmp_path / "a", {"steps": 1})
    lines = [{"step": step, "loss": None if step > 150 else 1.0 * step, "often": step} for step in range(200)]
    lines[100] |= {"validation_psnr": 12.5, "in the middle": 1}
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 200, "lo')
    rows = read_rows(run.path)
    every = {name: value for one in rows for name, value in one.items() if value is not None}
    assert every["loss"] == 150.0
    assert last_of_each(run.path, ["validation_psnr", "in the middle", "nothing"]) == every
    assert "in the middle" not in last_of_each(run.path, ["validation_psnr"])
    text = (run.path / "metrics.jsonl").read_text()
    (run.path / "metrics.jsonl").write_text(text.replace('"often": 90}', '"often": 90'))
    with pytest.raises(RunError, match="line 91: damaged"):
        last_of_each(run.path, ["loss"])


def test_only_what_has_changed_is_read_again(folder, monkeypatch):
    index = RunIndex(folder)
    before = {run.name: run for run in index.read()}
    assert before["broken"].problem and set(before) == {"vq", "study/ibq", EVIL, "own", "generator", "broken"}
    opened = []
    read = summaries_module.summarize_run
    monkeypatch.setattr(
        summaries_module, "summarize_run", lambda path, top: opened.append(path.name) or read(path, top)
    )
    Run(folder / "vq").log(row(20, 0.5))
    make_run(folder, "new", "vq")
    shutil.rmtree(folder / "study")
    after = {run.name: run for run in index.read()}
    # Whether a process still trains a run changes without a file.
    assert set(opened) == {"vq", "new", "own", "generator"} and "study/ibq" not in after
    assert after["vq"].results["usage"] == 0.5 and before["vq"].results["usage"] == 0.05


# --- which runs, in what order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["broken", EVIL, "generator", "own", "study/ibq", "vq"]),
        (["method=ibq"], [EVIL, "study/ibq"]),
        (["method=IBQ", "usage>0.5"], ["study/ibq"]),
        (["usage<50%"], ["own", "vq"]),
        (["usage>=5%", "usage<=0.75"], ["own", "study/ibq", "vq"]),
        (["method=ibq|vq", "K=1,024"], [EVIL, "vq"]),
        (["K=1024..4096"], [EVIL, "study/ibq", "vq"]),
        (["K=..100"], ["generator", "own"]),
        (["name=study/*"], ["study/ibq"]),
        (["learning_rate=1e-3"], [EVIL, "vq"]),
        (["optimizer.learning_rate<0.001"], ["study/ibq"]),
        (["method!=vq", "kind=tokenizer"], [EVIL, "study/ibq"]),
        (["psnr="], ["broken", EVIL, "generator", "own"]),
        (["status=finished", "usage!="], ["study/ibq", "vq"]),
        (["~MY OWN"], ["own"]),
        (["problem!="], ["broken"]),
        (["date>2026-11-28"], ["study/ibq"]),
        (["name=*ü"], [EVIL]),
        (["method=ibq usage>0.5"], ["study/ibq"]),
        (["  kind ~my own  usage > 0.1 "], []),
        (["method~my own usage > 0.1"], ["own"]),
        (["method ~vq", "name='vq'"], ["vq"]),
    ],
)
def test_conditions(folder, words, names):
    known = RunNames(RunIndex(folder).read())
    if words == ["date>2026-11-28"]:
        words = [*words, "kind=tokenizer"]
    assert sorted(run.name for run in known.select(words)) == sorted(names)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("usge>0.5", "no run has a column, setting or result 'usge'; did you mean 'usage'?"),
        ("learning_rat=1", "did you mean 'learning_rate'?"),
        ("usage>many", "usage is a number, so > needs one behind it; got 'many'"),
        ("K=1k", "K is a number: type K=1024, K=256..1024, or K=256|1024; got '1k'"),
        ("usage>", "lacks a number behind it, such as usage>0.5"),
        (">0.5", "lacks a name in front, such as usage>0.5"),
        ("ibq", "such as method=ibq or usage>0.5; got 'ibq'. Runs that hold a word anywhere: ~ibq"),
        ("zzzz=1", "columns are method, K, D, start"),
        ("size=1", "could be a.size or b.size"),
    ],
)
def test_what_cannot_be_meant_is_told_with_what_to_type(folder, word, says):
    make_run(folder, "two", "vq", a={"size": 1}, b={"size": 2})
    with pytest.raises(QueryError, match=re.escape(says)):
        RunNames(RunIndex(folder).read()).select([word])


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("psnr", ["study/ibq", "vq"]),
        ("-psnr", ["vq", "study/ibq"]),
        ("loss", ["study/ibq", "vq", EVIL]),
        ("K", ["own", "generator", EVIL, "vq", "study/ibq"]),
        ("method", [EVIL, "study/ibq", "own", "vq"]),
    ],
)
def test_the_best_or_least_come_first_and_those_without_last(folder, order, names):
    known = RunNames(RunIndex(folder).read())
    assert [run.name for run in known.sort(known.runs, order)][: len(names)] == names
    assert len(known.sort(known.runs, order)) == 6


def test_only_settings_that_differ_are_compared(folder):
    runs = {run.name: run for run in RunIndex(folder).read()}
    assert differing_settings([runs["vq"], runs["study/ibq"]]) == {
        "tokenizer.quantizer.name": ["vq", "ibq"],
        "tokenizer.quantizer.codebook_size": ["1024", "4096"],
        "optimizer.learning_rate": ["0.001", "0.0005"],
    }
    make_run(folder, "older", "vq", optimizer={"learning_rate": 0.001})
    make_run(folder, "newer", "vq", optimizer={"learning_rate": 0.001}, alarm="warn", flip=True)
    make_run(folder, "stops", "vq", optimizer={"learning_rate": 0.001}, alarm="stop", flip=1)
    runs = {run.name: run for run in RunIndex(folder).read()}
    # A run from before there was a setting was made as with its default; 1 is not true.
    assert differing_settings([runs["older"], runs["newer"]]) == {"flip": ["–", "true"]}
    assert differing_settings([runs["newer"], runs["stops"]]) == {"alarm": ["warn", "stop"], "flip": ["true", "1"]}
    assert "are the same" in difference_html([runs["older"], runs["older"]])
    for wrong, says in (
        ([runs["vq"]], "at least two runs; got 1"),
        ([runs["vq"], runs["broken"]], "broken cannot be read"),
    ):
        with pytest.raises(QueryError, match=says):
            differing_settings(wrong)


# --- notes ------------------------------------------------------------------------------------------------------------


def test_a_note_is_kept_in_the_runs_folder_whole_or_not_at_all(folder, tmp_path):
    path = folder / "vq"
    write_note(path, "  the one\nwith ü \n")
    assert (path / "note.txt").read_text(encoding="utf-8") == "the one\nwith ü\n"
    assert read_note(path) == list_runs(folder).set_index("name").loc["vq", "note"] == "the one\nwith ü"
    assert not [file for file in path.iterdir() if file.name.endswith(".part")]
    for text, says in (("x" * 4001, "at most 4,000"), ("\udc80", "half of a letter")):
        with pytest.raises(ValueError, match=says):
            write_note(path, text)
    assert read_note(path) == "the one\nwith ü"
    write_note(path, "")
    assert read_note(path) == "" and not (path / "note.txt").exists()
    (path / "note.txt").symlink_to(tmp_path / "outside")
    with pytest.raises(RunError, match="leads out of the run folder"):
        write_note(path, "x")
    (path / "note.txt").unlink()
    (path / "note.txt").write_bytes(b"\xff")
    assert "cannot be read" in read_note(path) and RunIndex(folder).read()[-1].name == "vq"
    shutil.rmtree(path)
    with pytest.raises(RunError, match="is no run any more"):
        write_note(path, "x")


# --- in a terminal ----------------------------------------------------------------------------------------------------


def test_ibqlab_runs_filters_sorts_and_compares(folder, monkeypatch):
    monkeypatch.setenv("IBQLAB_RUNS", str(folder))
    monkeypatch.setenv("COLUMNS", "100")
    table = ibqlab("runs", "method=ibq|vq", "usage>0", "--sort", "psnr").splitlines()
    assert [line.split()[0] for line in table[:3]] == ["name", "study/ibq", "vq"]
    assert "usage" in table[0].split() and "0.75" in table[1]
    assert "optimizer.learning_rate" in ibqlab("runs", "--columns", "learning_rate").splitlines()[0]
    assert "none of 6 runs" in ibqlab("runs", "method=lfq")
    assert "note on" in ibqlab("runs", "--note", "vq", "the old one") and "the old one" in ibqlab("runs", "~old")
    assert "the old one" in ibqlab("show", "vq")
    lines = ibqlab("runs", "--diff", "vq", "study/ibq").splitlines()
    assert lines[0].split() == ["vq", "study/ibq"] and lines[-1].split() == [
        "optimizer.learning_rate",
        "0.001",
        "0.0005",
    ]
    assert ibqlab("runs", "--diff", "usage>0", "kind=tokenizer").splitlines()[-1].split()[-2:] == ["0.0005", "0.001"]
    assert all(len(line) <= 100 for line in ibqlab("runs").splitlines())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["usge>1"], "did you mean 'usage'?"),
        (["vq", "own"], "one FOLDER at most; got vq and own"),
        (["--diff", "vq", "method=vq"], "takes runs or conditions, not both"),
        (["--diff", "vq"], "at least two runs; got 1"),
        (["--diff", "vq", "nothing"], "there is no such run 'nothing'"),
        (["--note", "nothing", "x"], "there is no such run 'nothing'"),
        (["--sort", "psn"], "did you mean 'psnr'?"),
    ],
)
def test_ibqlab_runs_says_what_to_type(folder, monkeypatch, words, says):
    monkeypatch.setenv("IBQLAB_RUNS", str(folder))
    assert says in ibqlab("runs", *words, code=2)


@pytest.mark.parametrize("width", [50, 80, 200])
def test_rows_fit_the_terminal(folder, monkeypatch, width):
    make_run(folder, "x" * 120, "vq")
    write_note(folder / "vq", "long " * 50)
    monkeypatch.setenv("IBQLAB_RUNS", str(folder))
    monkeypatch.setenv("COLUMNS", str(width))
    lines = ibqlab("runs").splitlines()
    assert all(len(line) <= width for line in lines) and any("…" in line for line in lines)
    assert "x" * 120 in ibqlab("runs", "--wide") and "long " * 49 in ibqlab("runs", "--wide")


def test_metrics_that_never_end_are_not_read(tmp_path):
    file = Path(make_run(tmp_path, "device", "vq", rows=[row(1, 0.5)])) / "metrics.jsonl"
    file.unlink()
    file.symlink_to("/dev/zero")
    assert last_rows(file) == []


def test_a_run_whose_loss_is_nan_by_now_has_none(tmp_path):
    rows = [row(0, 0.5) | {"loss": 0.06}, row(1, 0.5) | {"loss": float("nan")}]
    make_run(tmp_path, "diverged", "vq", rows=rows)
    (summary,) = RunIndex(tmp_path).read()
    assert "loss" not in summary.results and "loss" not in summary.columns and summary.results["step"] == 1
    assert RunNames([summary]).select(["usage>0"]) == [summary]
    assert RunCatalogue(tmp_path).select("~diverged")


@pytest.fixture
def long_names(tmp_path, monkeypatch):
    for name, rate in (("vq", 0.1), ("ibq", 0.1), ("soft_vq", 0.2)):
        settings = {"optimizer": {"learning_rate": rate}}
        make_run(tmp_path, f"a_study_with_a_long_name/{name}-normal-K1024-D64-seed0", "vq", **settings)
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path))


def test_shortened_names_leave_out_what_they_have_in_common(long_names, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    names = [line.split()[0] for line in ibqlab("runs", "--columns", "K").splitlines()[1:4]]
    assert names == [f"…/{name}-normal-K1024-D64-seed0" for name in ("ibq", "soft_vq", "vq")]
    monkeypatch.setenv("COLUMNS", "40")
    names = [line.split()[0] for line in ibqlab("runs", "--columns", "K").splitlines()[1:4]]
    assert names == ["…/ibq…", "…/soft_vq…", "…/vq…"]


def test_differences_of_runs_with_long_names_give_them_numbers(long_names, monkeypatch):
    first = [f"[{n}]  a_study_with_a_long_name/{m}-normal-K1024-D64-seed0" for n, m in ((1, "ibq"), (2, "soft_vq"))]
    monkeypatch.setenv("COLUMNS", "80")
    lines = ibqlab("runs", "--diff", "K=1024").splitlines()
    assert lines[:2] == first and lines[4].split() == ["[1]", "[2]", "[3]"]
    assert lines[5].split() == ["optimizer.learning_rate", "0.1", "0.2", "0.1"]
    monkeypatch.setenv("COLUMNS", "30")
    lines = ibqlab("runs", "--diff", "K=1024").splitlines()
    assert lines[4:7] == ["optimizer.learning_rate", "  0.1   [1] [3]", "  0.2   [2]"]


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(folder):
    return RunBrowser(folder)


class TestBrowser:
    def test_shows_the_newest_first_and_draws_them(self, browser):
        assert browser.shown[0].name == "study/ibq"
        assert "6 runs in" in browser.said.value and "newest runs" in browser.overlay.value
        assert "<img" in browser.overlay.value and browser.single.layout.display == "none"
        assert (browser.measure.value, browser.measure.label) == ("usage", "usage")

    def test_filters_sorts_and_adds_columns(self, browser):
        browser.filter.value = "method=ibq|vq usage!="
        browser.sort.value = "-psnr"
        assert [run.name for run in browser.shown] == ["vq", "study/ibq"]
        browser.column.value = "learning_rate"
        assert list(browser.table.children[0].df["optimizer.learning_rate"]) == ["0.0010", "0.0005"]
        assert browser.column.value == ""
        browser.fewer.click()
        assert "optimizer.learning_rate" not in browser.table.children[0].df
        browser.filter.value = "usge>1"
        assert "did you mean &#x27;usage&#x27;?" in browser.said.value and len(browser.shown) == 2
        browser.filter.value = "method=nothing"
        assert "No run fulfils the filter" in browser.said.value and browser.table.children == ()

    def test_a_selection_is_drawn_compared_and_kept(self, browser):
        browser.table.children[0].selected_rows = [0, 1]
        first = browser.selected
        assert len(first) == 2 and "study/ibq" in first
        browser.select(["vq", "study/ibq"])
        assert browser.run.options == ("study/ibq", "vq") or set(browser.run.options) == {"study/ibq", "vq"}
        assert all(text in browser.difference.value for text in ("optimizer.learning_rate", "0.0005", "4096"))
        drawn = browser.overlay.value
        browser.measure.value = "loss"
        assert browser.overlay.value != drawn and "Loss of the selected runs" in browser.overlay.value
        browser.filter.value = "method=vq"
        assert browser.selected == ["vq"] and browser.table.children[0].selected_rows == [0]
        assert browser.measure.value == "loss" and browser.difference.value == ""

    def test_writes_a_note_that_is_text_wherever_it_is_shown(self, browser, folder):
        browser.select([EVIL])
        browser.note.value = f"why? {EVIL}"
        browser.save.click()
        assert read_note(folder / EVIL) == f"why? {EVIL}" and "is kept in its folder" in browser.answer.value
        assert browser.selected == [EVIL] and browser.note.value == f"why? {EVIL}"
        shown = [browser.said, browser.overlay, browser.difference, browser.answer]
        assert not any("<img src=x" in part.value for part in shown) and "<img src=x" not in browser.static_html()
        assert "&lt;img src=x" in browser.static_html()
        assert "<img src=x" not in browser.table.children[0]._dt_args["data_json"]
        write_note(folder / EVIL, "from a terminal")
        browser.reload.click()
        assert browser.note.value == "from a terminal"
        browser.note.value = "not saved yet"
        browser.reload.click()
        assert browser.note.value == "not saved yet"
        browser.note.value = "x" * 5000
        browser.save.click()
        assert "No note was written: letters of a note must be at most 4,000" in browser.answer.value

    @pytest.mark.parametrize(
        ("name", "view", "says"),
        [
            ("own", "tokens of images", "a monitor stores codes and features, not the model"),
            ("own", "map of codes", "snapshot"),
            ("vq", "step by step", "has no snapshot yet, so there is nothing to explore."),
            ("vq", "tokens of images", "has no checkpoint yet"),
            ("generator", "map of codes", "is a run of a generator"),
            ("generator", "cards of codes", "is a run of a generator"),
            ("broken", "training", "damaged run"),
        ],
    )
    def test_a_view_that_a_run_cannot_give_is_a_sentence(self, browser, name, view, says):
        browser.select([name])
        browser.buttons[view].click()
        shown = browser.view.children[0].static_html() if browser.view.children else browser.answer.value
        assert says in shown and "Traceback" not in shown

    def test_opens_a_view_and_closes_it_with_the_next_run(self, browser):
        assert set(browser.buttons) == {*VIEWS, *PAIR_VIEWS}
        browser.buttons["training"].click()
        assert "Select a run" in browser.answer.value
        browser.select(["vq"])
        browser.buttons["training"].click()
        assert browser.answer.value == '<div class="ibq-runs"><p>Training: vq.</p></div>' and browser.view.children
        browser.note.value = "while it is open"
        browser.save.click()
        assert browser.view.children and "is kept in its folder" in browser.answer.value
        browser.select(["own"])
        assert browser.view.children == () and browser.answer.value == ""

    def test_two_runs_are_opened_beside_each_other(self, browser):
        browser.select(["vq"])
        assert browser.buttons["both maps"].layout.display == "none"
        browser.open_view("both on one image")
        assert "Select two runs in the table first." in browser.answer.value
        browser.select(["vq", "study/ibq"])
        assert browser.buttons["both maps"].layout.display == ""
        browser.buttons["both maps"].click()
        assert "Both maps: study/ibq and vq." in browser.answer.value
        (pair,) = browser.view.children
        assert [one.subject.name for one in pair.maps] == ["ibq", "vq"]
        browser.buttons["both on one image"].click()
        assert len(browser.view.children) == 1 and "both on one image" in browser.answer.value.lower()
        browser.reload.click()
        assert browser.view.children
        browser.select(["study/ibq", "own"])
        assert browser.view.children == () and browser.answer.value == "", "it was of another pair"

    def test_what_decides_is_seen(self, browser, tmp_path):
        rows = [row(1, 0.9) | {"validation_usage": 0.25, "validation_tokens": 5120}]
        make_run(tmp_path / "validated", "one", "vq", rows=rows)
        validated = RunBrowser(tmp_path / "validated")
        assert "window usage" not in validated.table.children[0].df
        validated.filter.value = "usage>50% ~one"
        assert validated.table.children[0].df.loc[0, "window usage"] == "90.00%"
        validated.filter.value, validated.sort.value = "", "-loss"
        assert (
            "loss" in "".join(validated.table.children[0].df) and "window usage" not in validated.table.children[0].df
        )

    def test_a_run_that_has_logged_no_numbers_draws_what_it_has(self, browser, folder):
        browser.select([EVIL])
        assert browser.measure.value == "loss" and "<img" in browser.overlay.value
        browser.select([EVIL, "vq"])
        browser.measure.value = "usage"
        assert "has logged none." in browser.overlay.value and "<img alt" in browser.overlay.value
        (folder / "vq" / "metrics.jsonl").write_text('{"step": 1, "usage": NaN, "loss": NaN}\n')
        browser.reload.click()
        browser.select(["vq"])
        assert "Nothing is logged yet that could be drawn" in browser.overlay.value

    def test_finds_new_runs_and_those_that_went_on(self, browser, folder):
        browser.select(["vq"])
        Run(folder / "vq").log(row(20, 0.5))
        make_run(folder, "new", "vq", started="2027-01-01T00:00:00+00:00", rows=[row(1, 0.9)])
        browser.reload.click()
        assert browser.shown[0].name == "new" and browser.selected == ["vq"]
        table = browser.table.children[0].df.set_index("name")
        assert table.loc["vq", "step"] == "20" and table.loc["new", "window usage"] == "90.00%"

    def test_usage_is_that_of_the_validation_where_there_is_one(self, browser, tmp_path):
        assert "window usage" in browser.table.children[0].df, "these runs have none"
        rows = [row(1, 0.9) | {"validation_usage": 0.25, "validation_tokens": 5120}]
        make_run(tmp_path / "validated", "one", "vq", started="2027-01-01T00:00:00+00:00", rows=rows)
        validated = RunBrowser(tmp_path / "validated")
        table = validated.table.children[0].df
        assert table.loc[0, "validation usage"] == "25.00%" and table.loc[0, "in tokens"] == "5,120"
        assert "window usage" not in table and "usage" in validated.column.options

    def test_a_folder_that_is_deleted_while_it_is_shown(self, browser, folder):
        browser.select(["vq"])
        shutil.rmtree(folder)
        browser.measure.value = "loss"
        assert "there is no such run folder" in browser.overlay.value
        browser.note.value = "gone"
        browser.save.click()
        assert "No note was written: " in browser.answer.value and "is no run any more" in browser.answer.value
        browser.buttons["training"].click()
        assert "no such run" in browser.view.children[0].static_html()
        browser.reload.click()
        assert "which does not exist: make one with" in browser.said.value and browser.table.children == ()

    def test_an_empty_folder_says_how_to_make_a_run(self, tmp_path, monkeypatch):
        monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "none"))
        for browser in (RunBrowser(), RunBrowser("")):
            assert "No runs in" in browser.said.value and "ibqlab train builtin/smoke" in browser.static_html()
        make_run(tmp_path / "none", "first", "vq")
        browser.reload.click()
        assert [run.name for run in browser.shown] == ["first"] and "Nothing is logged yet" in browser.overlay.value
        with pytest.raises(FileNotFoundError, match="there is no such folder of runs 'nowhere'"):
            RunBrowser("nowhere")

    def test_without_a_kernel_there_are_table_curves_and_differences(self, browser):
        browser.select(["vq", "study/ibq"])
        bundle = browser._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        page, lines = data["text/html"], data["text/plain"].splitlines()
        assert page.count("<tr>") == 1 + 6 + 1 + 3 and page.count("<img") == 1
        assert all(text in page for text in ("75.00%", "validation PSNR (dB)", "what differs", "00:00:43"))
        assert lines[0].startswith("6 runs in ") and lines[1].startswith("name kind method K")
        assert len(lines) < 20


def test_the_notebooks_parameters_are_checked_before_anything_is_shown(folder):
    assert len(BrowserParameters(folder=str(folder)).open().runs) == 6
    with pytest.raises(QueryError, match="did you mean 'usage'"):
        BrowserParameters(folder=str(folder), conditions="usge>1").open()


def test_every_measure_has_one_title_and_every_column_one_heading(folder):
    make_run(
        folder, "many", "vq", rows=[{"step": 1, "fid": 1.0, "frechet_distance": 2.0, "frechet_distance_mean": 3.0}]
    )
    catalogue = RunCatalogue(folder)
    titles = measures_of(catalogue.runs)
    assert len(set(titles.values())) == len(titles) and "step" not in titles
    cells = catalogue.cells(catalogue.runs, ["frechet_distance", "frechet_distance_mean", "seed"])
    assert all(len(values) == len(catalogue.runs) for values in cells.values())
    assert table_html(catalogue, catalogue.runs * 50).count("<tr>") == 201


def test_two_thousand_runs_are_read_in_a_few_seconds(tmp_path):
    """Twenty here: two milliseconds each, of processor time, and a twentieth of it the second time."""
    first = make_run(tmp_path, "run0", "vq", rows=[row(step, 0.5) for step in range(3)])
    lines = "".join(
        json.dumps({**row(step, 0.5, 9.0), **{f"m{n}": 0.1 for n in range(50)}}) + "\n" for step in range(300)
    )
    (first / "metrics.jsonl").write_text(lines)
    config = (EXPERIMENTS / "builtin" / "photos.yaml").read_text()
    (first / "config.yaml").write_text(config)
    for number in range(1, 20):
        shutil.copytree(first, tmp_path / f"run{number}")
        with open(tmp_path / f"run{number}" / "config.yaml", "a") as stream:
            stream.write(f"seed_of_its_own: {number}\n")
    index = RunIndex(tmp_path)
    took = []
    for _ in range(2):
        began = time.process_time()
        assert len(index.read()) == 20
        took.append(time.process_time() - began)
    assert took[0] < 20 * 0.02 and took[1] < took[0] / 4
    assert os.path.getsize(first / "metrics.jsonl") > 200_000
