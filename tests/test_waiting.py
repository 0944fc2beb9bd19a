"""What a user sees while waiting: something at once, then where things stand, and at the end what came of it."""

import ast
import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from click.testing import CliRunner

import ibqlab
from ibqlab.base.progress import CountingLine, ProgressLine, time_left, track_items
from ibqlab.cli import main
from ibqlab.grids.cells import Cell, CellStore
from ibqlab.grids.engine import run_cells
from ibqlab.grids.progress import StudyProgress
from ibqlab.notebooks.execution import execute
from ibqlab.notebooks.results import results_of, without_widgets
from ibqlab.runs import Run, RunError
from ibqlab.runs.metrics import last_values
from ibqlab.studies import run_report
from ibqlab.studies.run_report import write_run_report
from ibqlab.training import TrainingInterrupted, recipe_config, train, train_generator

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
    monkeypatch.setattr("ibqlab.base.progress.sys", SimpleNamespace(stderr=written, modules=sys.modules))
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

    def test_a_log_says_nothing_twice(self, clock, capsys):
        with ProgressLine() as line:
            for second in range(0, 60, 20):
                clock[0] = 100 + second
                line.show("run 1 of 6 · step 0 of 12")
            line.show("run 1 of 6 · step 1 of 12")
        assert capsys.readouterr().err.splitlines() == ["run 1 of 6 · step 0 of 12", "run 1 of 6 · step 1 of 12"]

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


class TestCounting:
    def test_says_how_many_of_how_many_and_the_time_left(self, clock, terminal):
        with CountingLine("tokens", 1200, "images") as line:
            clock[0] += 10
            line.advance(300)
            clock[0] += 20
            line.advance(900)
        assert terminal.getvalue() == (
            "\rtokens: 300 of 1,200 images · 30 s left\x1b[K\rtokens: 1,200 of 1,200 images\x1b[K\n"
        )

    def test_an_unknown_total_is_left_out(self, clock, terminal):
        with CountingLine("features", None, "images") as line:
            line.advance(300)
        assert terminal.getvalue() == "\rfeatures: 300 images\x1b[K\n"

    def test_items_pass_through_and_the_last_state_stays_where_it_stopped(self, clock, terminal):
        assert list(track_items("abc", "reading", "shards")) == ["a", "b", "c"]
        assert terminal.getvalue().endswith("\rreading: 3 of 3 shards\x1b[K\n")
        items = track_items(iter("abc"), "reading", "shards", total=3)
        assert [next(items), next(items)] == ["a", "b"]
        items.close()
        assert terminal.getvalue().endswith("\rreading: 1 of 3 shards · 0 s left\x1b[K\n")

    def test_nothing_is_shown_where_nothing_is_wanted(self, clock, capsys):
        assert list(track_items([1, 2], "reading", "shards", shown=False)) == [1, 2]
        assert capsys.readouterr() == ("", "")


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
                "run 1 of 2 · step 100 of 300 · "
                "window usage 50.0% · time left not known yet · vq, K 64, seed 0 · loss 2"
            )
            # 100 of the 500 missing steps in 30 s; rows without usage, and one that is being written, change nothing.
            self.log(tmp_path / "vq-a", 199, usage=0.051)
            self.log(tmp_path / "vq-a", 200, loss=0.25, usage=None)
            with open(tmp_path / "vq-a" / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write('{"step": 2')
            clock[0] += 30
            line.look(["vq-a", "ibq-a"], 0)
            assert line.text == (
                "run 1 of 2 · step 200 of 300 · "
                "window usage 5.1% · study 2 min 0 s left · vq, K 64, seed 0 · loss 0.25 · "
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

    def test_a_row_without_a_step_changes_nothing(self, cells, tmp_path, terminal):
        self.log(tmp_path / "vq-a", "many")
        with StudyProgress(cells, list(cells), CellStore(tmp_path)) as line:
            line.look(["vq-a"], 0)
            assert line.text.startswith("run 1 of 2 · step 0 of 300 · ")

    def test_stopping_a_study_says_how_to_go_on(self, tmp_path):
        """Ctrl-C comes while the first of two runs is trained."""
        stopped = []

        class Launched:
            def ended(self):
                raise KeyboardInterrupt

            def stop(self):
                stopped.append(True)

        launcher = SimpleNamespace(free=lambda cell: True, find=lambda *_: None, start=lambda *_: Launched())
        cells = [Cell(f"seed{seed}", recipe_config("builtin/smoke", {"seed": seed}), {}) for seed in (0, 1)]
        with pytest.raises(TrainingInterrupted, match=r"stopped with 0 of 2 runs finished; .* again to go on"):
            run_cells(cells, CellStore(tmp_path / "study"), launcher, progress=False)
        assert stopped == [True, True]

    def test_a_damaged_row_is_no_number(self, tmp_path):
        file = tmp_path / "metrics.jsonl"
        assert last_values(file) == {}
        file.write_bytes(b'\xff\xfe{"step": 3}\n[' + b"[" * 5000 + b'\n{"step": 4, "loss": 1.0}\n"text"\n')
        assert last_values(file) == {"step": 4, "loss": 1.0}


def test_a_training_says_where_it_stands(tmp_path, terminal):
    train(recipe_config("builtin/smoke"), tmp_path / "mine")
    last = terminal.getvalue().split("\r")[-1]
    assert re.match(r"mine: step 12 of 12 · loss [\d.]+ · window usage [\d.]+% · images/s \d+\x1b\[K\n$", last), last


# --- executed copies of notebooks ---

VIEW = "application/vnd.jupyter.widget-view+json"
TALKS = """
import time
import ipywidgets
from IPython.display import display
from tqdm.auto import tqdm
from ibqlab.base.progress import ProgressLine, tell

with ProgressLine() as line:
    for step in range(1, 4):
        line.show(f"step {step} of 3")
        time.sleep(1.5)
for _ in tqdm(range(7), desc="bar"):
    pass
label = ipywidgets.HTML("no step logged yet")
display(label)
tell(folder="/runs/mine", result="codes live")
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
        patch.setattr("ibqlab.base.progress.sys", SimpleNamespace(stderr=errors, modules={}))
        execution = execute(folder / "tiny.ipynb", folder / "copy.ipynb", {})
    copy = nbformat.read(folder / "copy.ipynb", 4)
    nbformat.validate(copy)
    return execution, copy, re.sub(r"\x1b\[K", "", errors.getvalue()).split("\r")


class TestExecutedCopies:
    def test_the_terminal_hears_what_the_kernel_says(self, executed):
        execution, _, lines = executed
        assert execution == (None, Path("/runs/mine"), "codes live")
        assert lines[1] == "tiny: starting a kernel"
        # Each stands for 1.5 s, and is looked at every 0.5 s.
        steps = dict.fromkeys(line.strip() for line in lines if line.startswith("step"))
        assert list(steps) == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
        assert lines[-1].endswith("\n")

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

    def test_a_view_that_brings_its_own_page_keeps_it(self, tmp_path):
        file = tmp_path / "copy.ipynb"
        page = "<p>usage 5 %</p><div><img alt='' src='x'><b>map</b></div>"
        twin = nbformat.v4.new_output(
            "display_data", {VIEW: {"model_id": "x"}, "text/html": page, "text/plain": "Box(children=…"}
        )
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[twin])]), file)
        without_widgets(file)
        (output,) = nbformat.read(file, 4).cells[0].outputs
        assert output["data"] == {"text/html": page, "text/plain": "usage 5 %\nmap"}

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
        (tmp_path / "figures" / "a.png").touch()
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
        said = "result: 50.0% of codes hit, PSNR 12.3 dB in 640 validation tokens"
        assert results_of(run.path) == [f"{said} (3 steps: too short to mean anything)"]
        run.log({"step": 100, "loss": 1.0})
        assert results_of(run.path) == [said]
        few = Run.start(tmp_path / "few", {"steps": 100, "tokenizer": {"quantizer": {"codebook_size": 1024}}})
        few.log({"step": 100, "validation_usage": 0.146, "validation_tokens": 256})
        (line,) = results_of(few.path)
        assert line == (
            "result: 14.6% of codes hit in 256 validation tokens: even use of all 1,024 codes would hit 22% in so few"
        )
        assert results_of(run.path, "\x1b[31mtold") == ["result: \\x1b[31mtold"]

    @pytest.mark.parametrize(
        ("preset", "steps", "caveat"),
        [
            ("smoke", 900, " (preset smoke: too short to mean anything)"),
            ("laptop", 99, " (99 steps: too short to mean anything)"),
            ("laptop", 100, ""),
        ],
    )
    def test_what_is_too_short_to_mean_anything_says_so(self, tmp_path, preset, steps, caveat):
        (tmp_path / "rows").mkdir()
        (tmp_path / "parameters.json").write_text(json.dumps({"preset": preset}))
        for number in (0, steps):
            row = {"method": "vq", "usage": 0.5, "steps": number}
            (tmp_path / "rows" / f"{number}.json").write_text(json.dumps(row))
        assert results_of(tmp_path) == [f"result: codes hit, mean over 2 runs by method: vq 50.0%{caveat}"]

    def test_pictures_and_cards_of_a_measurement_are_named(self, tmp_path):
        (tmp_path / "gallery.png").touch()
        (tmp_path / "cards.md").touch()
        lines = [f"figures: {tmp_path}", f"report: {tmp_path / 'cards.md'}", "result: told"]
        assert results_of(tmp_path, "told") == lines
        (tmp_path / "figures").mkdir()
        (tmp_path / "figures" / "a.png").touch()
        assert results_of(tmp_path, "told")[0] == f"figures: {tmp_path / 'figures'}"


# --- a run's report, and the end of a training ---


def pictures_of(page):
    return page.read_text(encoding="utf-8").count('src="data:image/png;base64,')


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a name that must not act in Markdown, HTML or figures."""
    return train(recipe_config("builtin/smoke"), tmp_path_factory.mktemp("report") / "a|b<i>$x$", progress=False)


class TestRunReport:
    def test_shows_curves_histogram_map_and_reconstructions(self, run):
        page = write_run_report(run)
        assert page == run.path / "report.html"
        assert pictures_of(page) == 8
        assert "<i>" not in page.read_text(encoding="utf-8")
        text = (run.path / "report.md").read_text(encoding="utf-8")
        assert "Finished at step 12 of 12" in text
        last = run.metrics["validation_usage"].dropna().iloc[-1]
        assert f"| validation usage | {100 * last:.2f} % of codes in 640 tokens | 12 |" in text
        assert "would hit" not in text  # 640 tokens are ten per code
        names = ("curves", "usage_histogram", "code_maps", "reconstructions")
        names += ("band", "explanation", "survival", "rarefaction")
        for file in [run.path / "figures" / f"{name}.{ending}" for name in names for ending in ("png", "csv")]:
            assert file.stat().st_size > 0
        drawn = pd.read_csv(run.path / "figures" / "curves.csv")
        assert drawn["step"].iloc[-1] == 12

    def test_a_run_without_snapshots_says_what_it_lacks(self, run, tmp_path, capsys):
        shutil.copytree(run.path, tmp_path / "short", ignore=shutil.ignore_patterns("snapshots", "figures", "report.*"))
        short = Run(tmp_path / "short")
        short.write_provenance(status="stopped")
        page = write_run_report(short)
        assert pictures_of(page) == 2
        text = (short.path / "report.md").read_text(encoding="utf-8")
        assert "Stopped at step 12 of 12; the command below goes on where it stopped." in text
        assert re.search(r"Not drawn: hits per code .*; codes among features .*; reconstructions ", text)
        (told,) = capsys.readouterr().err.splitlines()
        assert re.match(r"not drawn: hits per code \(.*\); codes among features \(.*\); reconstructions \(", told)

    def test_a_generator_has_its_curves_and_samples(self, run, tmp_path, monkeypatch):
        config = recipe_config("builtin/smoke_generator", {"tokenizer": str(run.path), "steps": 4})
        made = train_generator(config, tmp_path / "generator", progress=False)
        assert pictures_of(write_run_report(made)) == 2
        assert re.search(
            r"\| validation loss \| [\d.]+ nats per token", (made.path / "report.md").read_text(encoding="utf-8")
        )
        drawn = pd.read_csv(made.path / "figures" / "samples.csv")
        assert list(drawn[["class", "seed"]].itertuples(index=False, name=None)) == [
            (label, seed) for label in range(config.generator.num_classes) for seed in range(4)
        ]
        monkeypatch.setattr(run_report, "MOST_WORK", 1)
        assert pictures_of(write_run_report(made)) == 1
        text = (made.path / "report.md").read_text(encoding="utf-8")
        assert re.search(r"Not drawn: samples \(with 0 million weights they take minutes: type ibqlab run ", text)

    def test_refuses_a_run_without_rows_and_other_projections(self, run, tmp_path):
        with pytest.raises(RunError, match="has logged nothing yet"):
            write_run_report(Run.start(tmp_path / "empty", {"steps": 3}))
        with pytest.raises(ValueError, match="projection must be one of"):
            write_run_report(run, "tsne")

    def test_the_command_takes_runs_and_refuses_what_is_neither(self, run, tmp_path):
        result = CliRunner().invoke(main, ["report", str(run.path)])
        assert result.stdout.splitlines() == [str(run.path / "report.html"), str(run.path / "report.md")]
        (tmp_path / "nothing").mkdir()
        result = CliRunner().invoke(main, ["report", str(tmp_path / "nothing")])
        assert (result.exit_code, "Traceback" in result.output) == (2, False)
        assert "nothing" in result.stderr


class TestTrainCommand:
    def test_something_is_said_before_anything_heavy_is_imported(self, tmp_path):
        code = """if True:
            import sys
            from ibqlab import cli
            from ibqlab.cli import terminal, training_commands
            said = []
            terminal.say = training_commands.say = lambda text, err=False: said.append((text, "torch" in sys.modules))
            words = ["train", "builtin/smoke", "steps=2", "--no-report", "--output", sys.argv[1]]
            cli.main(words, standalone_mode=False)
            print(said[0], [text for text, _ in said[1:]], {"torchmetrics", "matplotlib"} & sys.modules.keys())
        """
        folder = tmp_path / "mine"
        ends = [f"finished: {folder}; look at it with: ibqlab show {folder}"]
        assert python(code, folder) == f"('ibqlab train builtin/smoke: loading …', False) {ends} set()\n"
        assert not (folder / "report.md").exists()

    def test_ends_by_naming_its_report(self, tmp_path):
        folder = tmp_path / "mine"
        result = CliRunner().invoke(main, ["train", "builtin/smoke", "--output", str(folder)])
        assert result.exit_code == 0, result.output
        assert result.stderr.splitlines()[1] == f"12 steps → {folder}"
        lines = result.stdout.splitlines()
        assert lines[1:3] == [f"figures: {folder / 'figures'}", f"report: {folder / 'report.html'}"]
        assert re.fullmatch(
            r"result: [\d.]+% of codes hit, PSNR [\d.]+ dB in 640 validation tokens "
            r"\(12 steps: too short to mean anything\)",
            lines[3],
        )

    @pytest.mark.parametrize("source", ["nowhere", "empty", "broken"])
    def test_images_that_are_not_there_are_told_before_anything_else(self, tmp_path, source):
        (tmp_path / "empty").mkdir()
        (tmp_path / "broken").mkdir()
        for number in range(3):
            (tmp_path / "broken" / f"{number}.png").write_bytes(b"nothing")
        words = ["train", "builtin/smoke", f"data.source={tmp_path / source}", "--output", str(tmp_path / "run")]
        result = CliRunner().invoke(main, words)
        first, second = result.stderr.splitlines()
        assert (result.exit_code, first) == (2, "ibqlab train builtin/smoke: loading …")
        assert second.startswith("Error: ") and str(tmp_path / source) in second
        assert not (tmp_path / "run").exists()

    @pytest.mark.usefixtures("warm_start")
    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
    def test_stopping_saves_draws_and_says_how_to_go_on(self, name, tmp_path):
        folder = tmp_path / "mine"
        settings = ["steps=100000", "record.checkpoint_every=1000"]
        command = [sys.executable, "-m", "ibqlab", "train", "builtin/smoke", *settings]
        process = subprocess.Popen(
            [*command, "--output", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while last_values(folder / "metrics.jsonl").get("step", 0) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        output, errors = process.communicate(timeout=120)
        step = int(Run(folder).last_checkpoint.stem.removeprefix("step_"))
        assert (process.returncode, "Traceback" in errors) == (130, False), errors
        assert errors.splitlines()[-1] == (
            f"stopped at step {step} of 100000, everything is saved; go on with the same command"
        )
        assert f"report: {folder / 'report.html'}" in output
        drawn = pd.read_csv(folder / "figures" / "curves.csv")
        assert 4 <= drawn["step"].iloc[-1] <= step


def prose_of(file):
    """Texts of a module that may come before a user's eyes: its string constants of several words, docstrings aside."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str) and " " in node.value.strip()]


def test_what_is_read_on_a_screen_calls_runs_runs():
    """A cell is one of a notebook; what a study trains is a run."""
    texts = [text for file in Path(ibqlab.__file__).parent.rglob("*.py") for text in prose_of(file)]
    assert len(texts) > 1000
    told = [text for text in texts if re.search(r"\bcells?\b", text)]
    assert [text for text in told if "notebook" not in text and "tagged" not in text and "parameters" not in text] == []


def test_a_notebook_that_trains_ends_with_figures_and_report(tmp_path, monkeypatch):
    """The whole command, on a notebook of the house; its copy says nothing that was true only in between."""
    monkeypatch.chdir(Path(ibqlab.__file__).parents[1])
    target = tmp_path / "copy.ipynb"
    words = ["run", "train_tokenizer", "preset=smoke", "projection=pca", "--output", str(target)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").glob("smoke-*")
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"figures: {folder / 'figures'}", f"report: {folder / 'report.html'}"]
    assert lines[2].startswith("result: ")
    assert lines[3:] == [f"executed copy: {target}"]
    cells = nbformat.read(target, 4).cells
    data = [output.data for cell in cells for output in cell.get("outputs", []) if "data" in output]
    texts = [shown["text/plain"] for shown in data]
    assert not [text for text in texts if re.search(r"no step|\b0/|children=\(|first step;", text)]
    assert texts[0].endswith("up to step 12")
    assert base64.b64decode(data[0]["image/png"]).startswith(b"\x89PNG")
    assert re.match(rf"{folder.name}: step 12 of 12 · ", texts[1])
