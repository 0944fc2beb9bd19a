"""What a user sees while waiting: something at once, then where things stand, and at the end what came of it."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from ibqlab.executed import results_of, without_widgets
from ibqlab.notebooks import execute
from ibqlab.progress import ProgressLine, last_values, time_left
from ibqlab.runs import Run
from ibqlab.studies import CellStore
from ibqlab.studies.progress import StudyProgress
from ibqlab.training import recipe_config, train

HEAVY = ("torch._dynamo", "lightning_fabric", "torchvision", "torchmetrics", "pandas", "sklearn", "scipy", "sympy")
HEAVY += ("matplotlib", "ipywidgets", "IPython", "triton", "torch.distributed.tensor", "torch.distributed.fsdp")


def python(code, *arguments, **settings):
    """Run code in a new interpreter; what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True, **settings
    ).stdout


class TestImports:
    @pytest.mark.parametrize("module", ["ibqlab.training", "ibqlab.pretrained", "ibqlab.diagnostics"])
    def test_import_leaves_alone_what_only_a_run_needs(self, module):
        code = f"import sys, torch, {module}; print([name for name in {HEAVY} if name in sys.modules])"
        assert python(code) == "[]\n"

    def test_a_hand_made_gradient_stays_out_of_compiled_graphs(self):
        """Also in the process in which nothing had imported the compiler when the function was made and called."""
        code = """if True:
            import sys, torch
            from ibqlab.quantizers import index_backprop
            features, codes = torch.randn(5, 3), torch.randn(7, 3)
            alone = index_backprop(features, codes).quantized
            assert "torch._dynamo" not in sys.modules
            graphs = []
            def backend(graph, inputs):
                graphs.append([node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"])
                return graph
            @torch.compile(backend=backend)
            def whole(features):
                return 2 * index_backprop(1 * features, codes).quantized
            for rows in (5, 4, 3):
                assert torch.equal(whole(features[:rows]), 2 * alone[:rows])
            print({name for graph in graphs for name in graph}, len(graphs))
        """
        assert python(code) == "{'mul'} 4\n"


# --- where a study and a run stand ---


@pytest.fixture
def clock(monkeypatch):
    """A clock set by hand: clock[0] is the time, in seconds."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal of 80 columns; what is written to it."""
    written = io.StringIO()
    written.isatty = lambda: True
    monkeypatch.setattr("ibqlab.progress.sys", SimpleNamespace(stderr=written, modules=sys.modules))
    monkeypatch.setenv("COLUMNS", "80")
    return written


class TestProgressLine:
    def test_a_terminals_line_is_written_over_itself_and_stays_at_the_end(self, clock, terminal):
        with ProgressLine() as line:
            for second in (0.0, 0.1, 0.6):
                clock[0] = 100 + second
                line.show(f"after {second} s")
            line.show("at last")
        assert terminal.getvalue() == "\rafter 0.0 s\x1b[K\rafter 0.6 s\x1b[K\rat last\x1b[K\n"

    def test_a_line_never_breaks_and_sends_the_terminal_nothing(self, clock, terminal):
        with ProgressLine() as line:
            line.show("\x1b[31m" + "x" * 200)
        assert terminal.getvalue() == "\r\\x1b[31m" + "x" * 71 + "\x1b[K\n"

    def test_a_log_gets_a_line_now_and_then(self, clock, capsys):
        with ProgressLine() as line:
            for second in range(25):
                clock[0] = 100 + second
                line.show(f"second {second}")
        assert capsys.readouterr().err.splitlines() == ["second 0", "second 10", "second 20", "second 24"]

    def test_nothing_is_shown_where_nothing_is_wanted(self, clock, capsys):
        with ProgressLine(shown=False) as line:
            line.show("a step")
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(-1, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (130, "2 min 10 s"), (7500, "2 h 5 min")],
    )
    def test_times_are_said_as_people_say_them(self, seconds, text):
        assert time_left(seconds) == text


class TestStudyProgress:
    @pytest.fixture
    def cells(self):
        labels = {"vq-a": {"method": "vq", "seed": 0, "codebook_size": 64}, "ibq-a": {"method": "ibq", "seed": 1}}
        config = SimpleNamespace(steps=300)
        return {name: SimpleNamespace(name=name, config=config, labels=label) for name, label in labels.items()}

    def log(self, folder, step, **values):
        folder.mkdir(exist_ok=True)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")

    def test_names_run_step_usage_and_the_time_that_the_study_takes(self, cells, tmp_path, clock, terminal):
        self.log(tmp_path / "vq-a", 100, usage=0.5, loss=2.0)
        with StudyProgress(cells, list(cells), CellStore(tmp_path)) as line:
            line.look(["vq-a"], 0)
            assert line.text == (
                "run 1 of 2 · step 100 of 300 · usage 50.0% · time left not known yet · vq, K 64, seed 0 · loss 2"
            )
            # 100 of the 500 missing steps in 30 s; rows without usage, and one that is being written, change nothing.
            self.log(tmp_path / "vq-a", 199, usage=0.051)
            self.log(tmp_path / "vq-a", 200, loss=0.25, usage=None)
            with open(tmp_path / "vq-a" / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write('{"step": 2')
            clock[0] += 30
            line.look(["vq-a", "ibq-a"], 0)
            assert line.text == (
                "run 1 of 2 · step 200 of 300 · usage 5.1% · study 2 min 0 s left · vq, K 64, seed 0 · loss 0.25 · "
                "1 more at the same time"
            )
            # The run ends between two looks.
            line.end("vq-a")
            self.log(tmp_path / "ibq-a", 100)
            clock[0] += 30
            line.look(["ibq-a"], 1)
            assert line.text == "run 2 of 2 · step 100 of 300 · study 40 s left · ibq, seed 1"

    def test_a_finished_study_says_nothing(self, cells, tmp_path, terminal):
        with StudyProgress(cells, [], CellStore(tmp_path)) as line:
            line.finish(2)
        assert terminal.getvalue() == ""

    def test_a_damaged_row_is_no_number(self, tmp_path):
        file = tmp_path / "metrics.jsonl"
        assert last_values(file) == {}
        file.write_bytes(b'\xff\xfe{"step": 3}\n[' + b"[" * 5000 + b'\n{"step": 4, "loss": 1.0}\n"text"\n')
        assert last_values(file) == {"step": 4, "loss": 1.0}


def test_a_training_says_where_it_stands(tmp_path, terminal):
    train(recipe_config("builtin/smoke"), tmp_path / "mine")
    last = terminal.getvalue().split("\r")[-1]
    assert re.match(r"mine: step 12 of 12 · loss [\d.]+ · usage [\d.]+% · images/s \d+\x1b\[K\n$", last), last


# --- executed copies of notebooks ---

VIEW = "application/vnd.jupyter.widget-view+json"
TALKS = """
import time
import ipywidgets
from IPython.display import display
from tqdm.auto import tqdm
from ibqlab.progress import ProgressLine, tell

with ProgressLine() as line:
    for step in range(1, 4):
        line.show(f"step {step} of 3")
        time.sleep(0.6)
for _ in tqdm(range(7), desc="bar"):
    pass
label = ipywidgets.HTML("no step logged yet")
display(label)
tell(folder="/runs/mine")
"""
CHANGES = """
label.value = 'now <img alt="a curve" src="data:image/png;base64,QUJD">'
slider = ipywidgets.SelectionSlider(options=[("step 5", 5), ("step 10", 10)], value=10, description="at")
ipywidgets.VBox([ipywidgets.HBox([slider, ipywidgets.IntText(3, description="seed")]), ipywidgets.Button()])
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A notebook that talks and shows widgets, executed: the execution, the copy's cells, what the terminal got."""
    folder = tmp_path_factory.mktemp("executed")
    cells = [
        nbformat.v4.new_markdown_cell("text\n\n## Some training\n\nmore"),
        *map(nbformat.v4.new_code_cell, [TALKS, CHANGES]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "tiny.ipynb")
    errors = io.StringIO()
    errors.isatty = lambda: True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ibqlab.progress.sys", SimpleNamespace(stderr=errors, modules={}))
        execution = execute(folder / "tiny.ipynb", folder / "copy.ipynb", {})
    copy = nbformat.read(folder / "copy.ipynb", 4)
    nbformat.validate(copy)
    return execution, copy, re.sub(r"\x1b\[K", "", errors.getvalue()).split("\r")


class TestExecutedCopies:
    def test_the_terminal_hears_what_the_kernel_says(self, executed):
        execution, _, lines = executed
        assert execution == (None, Path("/runs/mine"))
        assert {"tiny: starting a kernel", "step 2 of 3"} <= set(map(str.strip, lines))
        assert lines[-1] == "tiny: Some training\n"

    def test_views_become_what_they_showed_last(self, executed):
        _, copy, _ = executed
        assert "widgets" not in copy.metadata
        outputs = [output for cell in copy.cells for output in cell.get("outputs", [])]
        data = [output["data"] for output in outputs if "data" in output]
        assert not any(VIEW in shown for shown in data)
        texts = [shown["text/plain"] for shown in data]
        assert texts[0] == "step 3 of 3"
        assert re.match(r"bar: 100% 7/7 \[", texts[1])
        assert texts[2:] == ["now a curve", "at step 10 seed 3"]
        assert data[2]["image/png"] == "QUJD"

    def test_bars_on_text_end_at_their_end(self, tmp_path):
        file = tmp_path / "copy.ipynb"
        stream = nbformat.v4.new_output("stream", name="stderr", text="a\r 0/3\r 3/3\nwhole\r\nlast\r")
        twin = nbformat.v4.new_output(
            "display_data", {VIEW: {"model_id": "x"}, "image/png": "QUJD", "text/plain": "Box()"}
        )
        gone = nbformat.v4.new_output("display_data", {VIEW: {"model_id": "y"}, "text/plain": "Box(children=…"})
        cell = nbformat.v4.new_code_cell("1", outputs=[stream, twin, gone])
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)
        without_widgets(file)
        outputs = nbformat.read(file, 4).cells[0].outputs
        assert outputs[0]["text"] == " 3/3\nwhole\nlast"
        # A view that brings its own picture keeps it; one of which nothing is known is no output.
        assert [output["data"] for output in outputs[1:]] == [{"image/png": "QUJD"}]

    @pytest.mark.parametrize("content", [None, b"", b"[1]", b'{"cells": '])
    def test_what_is_no_notebook_is_left_alone(self, tmp_path, content):
        file = tmp_path / "copy.ipynb"
        if content is not None:
            file.write_bytes(content)
        without_widgets(file)
        assert (file.read_bytes() if file.exists() else None) == content


class TestResults:
    def test_a_study_ends_with_figures_report_and_usage_by_method(self, tmp_path):
        for name in ("rows", "figures"):
            (tmp_path / name).mkdir()
        (tmp_path / "figures" / "report.md").touch()
        rows = [("a", "vq", 0.05), ("b", "vq", 0.07), ("c", "ibq\x1b[31m", 0.998)]
        for name, method, usage in rows:
            row = {"method": method, "init": "N(0, 1)", "usage": usage, "tokens": 10240.0}
            (tmp_path / "rows" / f"{name}.json").write_text(json.dumps(row))
        (tmp_path / "rows" / "d.json").write_text("damaged")
        assert results_of(tmp_path) == [
            f"figures: {tmp_path / 'figures'}",
            f"report: {tmp_path / 'figures' / 'report.md'}",
            "result: codes hit in 10,240 validation tokens or more, mean over 3 runs by method: vq from N(0, 1) 6.0%, "
            "ibq\\x1b[31m from N(0, 1) 99.8%",
        ]

    def test_a_run_ends_with_its_last_validation(self, tmp_path):
        run = Run.start(tmp_path / "mine", {"steps": 3})
        assert results_of(run.path) == []
        run.log({"step": 2, "validation_usage": 0.5, "validation_psnr": 12.34, "validation_tokens": 640})
        run.log({"step": 3, "loss": 1.0})
        assert results_of(run.path) == ["result: 50.0% of codes hit, PSNR 12.3 dB in 640 validation tokens"]
