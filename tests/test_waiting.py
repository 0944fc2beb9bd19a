"""What a user sees while waiting: something at once, then where things stand, and at the end what came of it."""

import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ibqlab.progress import ProgressLine, time_left
from ibqlab.studies import CellStore
from ibqlab.studies.progress import StudyProgress, last_values
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
