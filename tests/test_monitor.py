"""A monitor in somebody else's loop writes a run that everything here reads; its numbers are those of brute force."""

import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
import types
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from ibqlab.cli import main
from ibqlab.diagnostics.explain import measure_drift
from ibqlab.diagnostics.usage import perplexity
from ibqlab.monitor import CodebookMonitor, callbacks, diagnose, run_writer
from ibqlab.monitor.schedule import Schedule
from ibqlab.plots import plot_code_map, plot_run_curves, plot_usage_histogram
from ibqlab.plots.explain import explanation_table, plot_explanation
from ibqlab.pretrained import CheckpointError, load_tokenizer
from ibqlab.quantizers import build_quantizer
from ibqlab.runs import Run, RunError, list_runs
from ibqlab.studies import run_explanation
from ibqlab.studies.figures import map_run
from ibqlab.studies.run_report import figure_run_codes, figure_run_reconstructions, write_run_report
from ibqlab.widgets import explore_run

EXAMPLES = Path(__file__).parents[1] / "experiments" / "bring_your_own"
CODES, DIM = 16, 4
NAN = float("nan")


def tensors(seed, images=4, side=3):
    """Features (B, D, h, w), a codebook and the nearest codes (B, h, w)."""
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(images, DIM, side, side, generator=draw)
    codebook = torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(99))
    indices = torch.cdist(z.permute(0, 2, 3, 1), codebook).argmin(-1)
    return {"features": z, "codebook": codebook, "indices": indices}


def monitor_in(folder, **settings):
    return CodebookMonitor(folder / "mine", CODES, **settings)


def rows_of(monitor):
    return [json.loads(line) for line in (monitor.path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def told():
    """Warnings of a test, as text, each of which a test must look at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def texts(told):
    return [str(one.message) for one in told if "monitor" in str(one.message) or "goes on from" in str(one.message)]


# --- importing, reading ----------------------------------------------------------------------------------------------


def test_importing_it_needs_torch_and_numpy_alone():
    code = (
        "import sys; before = set(sys.modules); import torch, numpy; with_torch = set(sys.modules)\n"
        "from ibqlab.monitor import CodebookMonitor, diagnose\n"
        "print(' '.join({name.partition('.')[0] for name in set(sys.modules) - with_torch - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) <= {"ibqlab"}


@pytest.fixture(scope="module")
def monitored(tmp_path_factory):
    """A finished run of 60 steps, with images and a name, whose batches differ in size."""
    root = tmp_path_factory.mktemp("runs")
    images = torch.rand(3, 1, 8, 8)
    with monitor_in(root, steps=60, log_every=20, settings={"quantizer": "my own", "seed": 7, "width": 32}) as monitor:
        for step in range(1, 61):
            pictures = {"images": lambda: images, "reconstructions": lambda: images + 0.1}
            batch = tensors(step, 4 - (step - 1) % 3)
            monitor.update(step, **batch, loss=torch.tensor(1 / step), **pictures)
        monitor.log(60, validation_psnr=21.5)
    return Run(root / "mine")


class TestReaders:
    def test_the_run_is_one_like_any_other(self, monitored):
        assert monitored.status == "finished" and monitored.provenance["monitor_share_of_time"] > 0
        assert monitored.config == {
            **{"kind": "monitored", "codebook_size": CODES, "steps": 60, "code_dim": DIM},
            "settings": {"quantizer": "my own", "seed": 7, "width": 32},
        }
        assert monitored.metrics["step"].tolist() == [1, 2, 3, 5, 10, 15, 20, 30, 40, 50, 60, 60]
        assert monitored.snapshot_steps == [1, 2, 5, 10, 20, 50, 60]
        assert monitored.describe_status() == "finished at step 60 of 60"

    def test_the_table_of_all_runs(self, monitored):
        (row,) = list_runs(monitored.path.parent).to_dict("records")
        expected = {"kind": "monitored", "quantizer": "my own", "codebook_size": CODES, "code_dim": DIM, "seed": 7}
        assert expected.items() <= row.items()
        assert row["status"] == "finished" and row["usage_tokens"] == 180  # 10·K, in whole steps
        assert row["loss"] == pytest.approx(1 / 60)

    def test_the_command_line(self, monitored):
        shown = CliRunner().invoke(main, ["show", str(monitored.path)])
        assert shown.exit_code == 0, shown.output
        for line in ("kind: monitored", "codebook_size: 16", "settings.width: 32", "in 180 tokens"):
            assert line in shown.output
        listed = CliRunner().invoke(main, ["runs", str(monitored.path.parent), "--wide"])
        assert "monitored" in listed.output and listed.exit_code == 0

    def test_the_report(self, monitored):
        page = write_run_report(monitored).with_suffix(".md").read_text()
        for title in ("Curves", "Hits per code", "Codes among features", "Reconstructions"):
            assert f"## {title}\n\n![" in page
        assert "### Norms, margins, drift, births and deaths" in page
        assert (
            "seeds: 7; threads per run: 1" in page
            and "Not drawn" not in page
            and "my own" in page
            and "validation images" not in page
        )
        assert "the command below" not in page

    def test_the_explorer(self, monitored):
        explorer = explore_run(monitored)
        assert [step for _, step in explorer.step.options] == monitored.snapshot_steps
        seen = set()
        for step in (1, 60):
            explorer.step.value = step
            counts = monitored.snapshot(step)["counts"]
            assert (
                f"in {counts.sum()} tokens of training, perplexity {perplexity(counts):,.1f}" in explorer.numbers.value
            )
            seen |= {explorer.code_map.value, explorer.histogram.value}
        assert len(seen) == 4 and "base64" in explorer.static_html()

    def test_figures_of_one_run(self, monitored):
        projection, steps = map_run(monitored, "pca")
        counts = monitored.snapshot()["counts"]
        assert steps[-1] == 60
        for figure in (
            plot_run_curves(monitored.metrics),
            plot_code_map(projection, len(steps) - 1, counts),
            plot_usage_histogram({"my own": counts}),
        ):
            assert figure.axes

    def test_whoever_wants_weights_is_told_that_there_are_none(self, monitored):
        with pytest.raises(CheckpointError, match=r"monitor wrote .* holds no weights"):
            load_tokenizer(monitored.path)

    def test_what_was_not_given_is_named(self, tmp_path):
        with monitor_in(tmp_path) as monitor:
            monitor.update(1, indices=tensors(0)["indices"])
        with pytest.raises(RunError, match="hold no codebook and no features; give them to the monitor's update"):
            figure_run_codes(Run(monitor.path), "pca")
        with pytest.raises(RunError, match="hold no images and no reconstructions"):
            figure_run_reconstructions(Run(monitor.path))
        explorer = explore_run(Run(monitor.path))
        assert "no codebook and features" in explorer.code_map.value and "base64" in explorer.histogram.value


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_brute_force(tmp_path):
    monitor = monitor_in(tmp_path, log_every=4, window_tokens=100)
    stream = []
    for step in range(1, 9):
        given = tensors(step)
        stream += given["indices"].flatten().tolist()
        row = monitor.update(step, **given)
    window = stream[-108:]  # 100 tokens, in whole steps
    assert row["usage_tokens"] == 108 and row["usage"] == len(set(window)) / CODES
    assert row["perplexity"] == pytest.approx(perplexity(np.bincount(window, minlength=CODES)))
    assert row["step_tokens"] == 36 and row["step_usage"] == pytest.approx(len(set(stream[-36:])) / CODES)
    tokens, codes = given["features"].permute(0, 2, 3, 1).reshape(-1, DIM), given["codebook"]
    assert row["feature_to_code_distance"] == pytest.approx(float(torch.cdist(tokens, codes).amin(1).mean()), rel=1e-5)
    assert row["code_norm_mean"] == pytest.approx(float(codes.norm(dim=1).mean()))
    assert row["softmax_perplexity"] == pytest.approx(
        float(torch.special.entr((tokens @ codes.T).softmax(1)).sum(1).exp().mean()), rel=1e-5
    )
    chosen = codes[given["indices"].flatten()]
    assert row["quantization_error"] == pytest.approx(float((tokens - chosen).square().mean()), rel=1e-5)
    assert "gradient_reach" not in row


def test_a_snapshot_holds_what_was_given(tmp_path):
    monitor, given = monitor_in(tmp_path, snapshot_features=20), tensors(5)
    monitor.update(1, **given)
    snapshot = Run(monitor.path).snapshot(1)
    tokens = given["features"].permute(0, 2, 3, 1).reshape(-1, DIM)
    assert np.array_equal(snapshot["codebook"], given["codebook"]) and len(snapshot["features"]) == 20
    nearest = torch.cdist(torch.from_numpy(snapshot["features"]), given["codebook"]).argmin(1)
    assert np.array_equal(snapshot["assignments"], nearest)
    assert np.array_equal(snapshot["features"], tokens[:20])  # 36 tokens are too few to skip any
    assert np.array_equal(snapshot["counts"], np.bincount(given["indices"].flatten(), minlength=CODES))


LAYOUTS = {
    "(B, D, h, w)": lambda z: z,
    "(B, h, w, D)": lambda z: z.permute(0, 2, 3, 1),
    "(N, D)": lambda z: z.permute(0, 2, 3, 1).reshape(-1, DIM),
    "(B, T, D)": lambda z: z.flatten(2).transpose(1, 2),
    "(B, D, T)": lambda z: z.flatten(2),
    "NumPy": lambda z: z.numpy(),
    "float64": lambda z: z.double(),
    "a function": lambda z: lambda: z,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_of_any_layout_give_one_row(tmp_path, layout):
    given = tensors(3)
    reference = CodebookMonitor(tmp_path / "reference", CODES).update(1, **given)
    row = monitor_in(tmp_path).update(1, **given | {"features": LAYOUTS[layout](given["features"])})
    assert row | {"seconds": 0} == pytest.approx(reference | {"seconds": 0})


def test_what_is_not_given_is_not_measured(tmp_path):
    given = tensors(1)
    usage = monitor_in(tmp_path).update(1, indices=given["indices"].tolist())
    assert usage["usage_tokens"] == 36 and not any("norm" in key or "distance" in key for key in usage)
    codes = CodebookMonitor(tmp_path / "codes", CODES).update(1, indices=given["indices"], codebook=given["codebook"])
    assert "code_norm_mean" in codes and "feature_norm_mean" not in codes and "softmax_perplexity" not in codes
    features = CodebookMonitor(tmp_path / "z", CODES).update(1, indices=given["indices"], features=given["features"])
    tokens = given["features"].permute(0, 2, 3, 1).reshape(-1, DIM)
    assert features["feature_norm_mean"] == pytest.approx(float(tokens.norm(dim=1).mean()))
    assert Run(tmp_path / "z").config["code_dim"] == DIM


def test_nothing_is_computed_where_no_row_is_due(tmp_path):
    monitor, calls = monitor_in(tmp_path, log_every=100), []
    for step in range(1, 5):
        monitor.update(
            step, **tensors(step) | {"features": lambda step=step: calls.append(step) or tensors(1)["features"]}
        )
    assert calls == [1, 2, 3]


@pytest.mark.parametrize("zeroed", [True, False])
def test_gradient_reach_is_of_the_last_backward_pass(tmp_path, zeroed):
    monitor, codebook = monitor_in(tmp_path), nn.Parameter(torch.randn(CODES, DIM))
    monitor.watch(codebook)
    for step in (1, 2):
        codebook.grad = None
        (codebook[: 4 * step] ** 2).sum().backward()
        if zeroed:
            codebook.grad = None
        row = monitor.update(step, indices=torch.arange(CODES))
    assert row["gradient_reach"] == 0.5


def test_gradient_reach_of_a_computed_codebook(tmp_path):
    monitor = monitor_in(tmp_path)
    monitor.watch(lambda: torch.eye(CODES)[:, :DIM])
    assert monitor.update(1, indices=torch.arange(CODES))["gradient_reach"] == DIM / CODES
    for wrong in (nn.Parameter(torch.randn(2, 2)) * 2, "codebook"):
        with pytest.raises(ValueError, match="watch needs"):
            monitor.watch(wrong)


def test_reach_of_moving_averages_is_that_of_their_movement(tmp_path):
    monitor, codebook = monitor_in(tmp_path, log_every=100), torch.randn(CODES, DIM)
    monitor.watch(codebook)
    reach = []
    for step in range(1, 6):
        codebook[: 2 * step] += 0.1
        row = monitor.update(step, indices=torch.arange(CODES), codebook=codebook)
        reach.append(row and row["gradient_reach"])
    assert reach == [2 / CODES, 4 / CODES, 6 / CODES, None, 10 / CODES]


def test_micro_batches_of_a_step_are_one_step(tmp_path):
    monitor = monitor_in(tmp_path, log_every=2)
    monitor.update(1, indices=[0])
    for codes in ([1, 2], [3]):
        row = monitor.update(4, indices=codes)
    assert row is None and rows_of(monitor)[-1]["step_tokens"] == 2
    assert monitor.update(5, indices=[4])["usage_tokens"] == 5


@pytest.mark.parametrize(
    ("settings", "stride", "rows", "snapshots"),
    [
        (
            {"log_every": 100, "snapshot_every": 1000},
            *(1, [1, 2, 3, 5, 10, 15, 20, 30, 50, 100, 200], [1, 2, 5, 10, 20, 50, 100, 200]),
        ),
        ({"log_every": 100, "snapshot_every": 100}, 7, [7, 105, 203], [7, 105, 203]),
        ({"log_every": 1000, "snapshot_every": 1000, "steps": 203}, 7, [7, 203], [7, 203]),
    ],
)
def test_what_is_due(settings, stride, rows, snapshots):
    schedule = Schedule(**{"steps": None} | settings)
    logged, stored = [], []
    for step in range(stride, 204, stride):
        if not schedule.needs_row(step):
            continue
        logged.append(step)
        if schedule.needs_snapshot(step):
            stored.append(step)
            schedule.stored = step
        schedule.logged = step
    assert (logged, stored) == (rows, snapshots)


@pytest.mark.parametrize("has_probe", [True, False])
def test_drift_of_features_is_that_of_the_same_images_or_is_not_told(tmp_path, has_probe):
    """Codes and the probe's features move by one a step, along one axis each."""
    monitor = monitor_in(tmp_path)
    for step in range(1, 13):
        given = tensors(step, step % 3 + 1)
        given["codebook"] = given["codebook"] + step * torch.eye(DIM)[0]
        probe = {"probe": lambda step=step: step * torch.eye(DIM)[1].expand(5, DIM)} if has_probe else {}
        monitor.update(step, **given, **probe)
    monitor.close()
    run = Run(monitor.path)
    drifts = measure_drift(run_explanation._snapshots(run))
    assert [drift.features for drift in drifts] == pytest.approx([1.0 if has_probe else NAN] * 4, nan_ok=True)
    codes = np.array([drift[3:] for drift in drifts])
    assert codes[~np.isnan(codes)] == pytest.approx(1.0)
    caption = plot_explanation(explanation_table(run.metrics, drifts)).get_supxlabel().replace("\n", " ")
    told = "drift of the features of fixed images and" if has_probe else "that of the features needs the same images"
    assert told in caption


@pytest.mark.parametrize("end", [lambda monitor: monitor.close(), lambda monitor: run_writer._end_all()])
@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"log_every": 50}, [1, 2, 3, 5, 7]),
        ({"log_every": 1}, [1, 2, 3, 4, 5, 6, 7]),  # the last step has a row and lacks a snapshot
        ({"log_every": 50, "steps": 7}, [1, 2, 3, 5, 7]),
    ],
)
def test_the_last_update_has_a_row_and_a_snapshot(tmp_path, monkeypatch, end, settings, rows):
    monkeypatch.setattr(run_writer, "_OPEN", {})
    monitor = monitor_in(tmp_path, **settings)
    for step in range(1, 8):
        given = tensors(step) | {"features": lambda step=step: tensors(step)["features"]}
        monitor.update(step, **given, loss=torch.tensor(float(step), requires_grad=True) * 1)
    end(monitor)
    run = Run(monitor.path)
    assert run.metrics["step"].tolist() == rows and run.snapshot_steps == [1, 2, 5, 7] and run.status == "finished"
    whole = CodebookMonitor(tmp_path / "whole", CODES, log_every=1)
    for step in range(1, 8):
        row = whole.update(step, **tensors(step), loss=float(step))
    skipped = {"seconds", "births", "deaths"}
    assert {k: v for k, v in run.rows[-1].items() if k not in skipped} == pytest.approx(
        {k: v for k, v in row.items() if k not in skipped}
    )
    assert np.array_equal(run.snapshot()["assignments"], tensors(7)["indices"].flatten())


# --- alarms ---


def collapsing(folder, steps=7, **settings):
    """A training whose tokens all choose one code, which few codes' rule sees at its fifth row; None: it was ended."""
    monitor = monitor_in(folder, log_every=1, **settings)
    for step in range(1, steps + 1):
        monitor.update(step, indices=torch.zeros(36, dtype=torch.int64), loss=1.0)
        if monitor.stopped:
            break
    monitor.close()
    return Run(monitor.path)


@pytest.mark.parametrize(("lasts", "alarms", "rows"), [(200, [140], 4), (1, [], 1)])
def test_signs_of_collapse_are_confirmed_by_rows_that_come_sooner(tmp_path, lasts, alarms, rows):
    """Codes are lost from step 91 on, which the row at 100 shows; five in sequence would be at 100, 150, … 300."""
    monitor = monitor_in(tmp_path)
    for step in range(1, 161):
        is_bad = 90 < step <= 100 or 100 < step < 100 + lasts
        monitor.update(step, indices=[0] * 36 if is_bad else torch.arange(36) % CODES)
    run = Run(monitor.path)
    assert [event["step"] for event in run.alarms] == alarms
    assert sum(100 < step < 150 for step in run.metrics["step"]) == rows


def test_an_alarm_is_printed_written_and_handed_on(tmp_path, capsys):
    events = []
    run = collapsing(tmp_path, on_alarm=events.append)
    (event,) = events
    assert (event.rule, event.step, run.status, run.step) == ("few_codes", 5, "finished", 7)
    told = capsys.readouterr().err.splitlines()
    assert [row["step"] for row in run.alarms] == [5] and str(event) in told
    assert told[0] == f"monitor: writes {run.path}; look at it with: ibqlab show {run.path}" and len(told) == 2
    assert "setting codes that no token has chosen" in event.remedy and "revive_after" not in event.remedy
    assert "few codes" in write_run_report(run).with_name("report.md").read_text()


def test_stop_asks_the_loop_and_off_says_nothing(tmp_path):
    run = collapsing(tmp_path, alarm="stop", steps=9)
    assert (run.status, run.step) == ("stopped", 5)
    # The same command goes on and is told nothing twice.
    again = collapsing(tmp_path, alarm="stop", steps=0)
    monitor = monitor_in(tmp_path, log_every=1, alarm="stop")
    for step in range(6, 12):
        monitor.update(step, indices=[0] * 36)
    monitor.close()
    assert not monitor.stopped and (again.status, len(again.alarms)) == ("finished", 1)
    assert collapsing(tmp_path / "off", alarm="off").alarms == []
    with pytest.raises(ValueError, match="alarm must be one of 'warn', 'stop', 'off', got 'loud'"):
        monitor_in(tmp_path / "loud", alarm="loud")


def test_a_loop_that_does_not_listen_finishes_its_run(tmp_path):
    monitor = monitor_in(tmp_path, log_every=1, alarm="stop")
    for step in range(1, 8):
        monitor.update(step, indices=[0] * 36)
    monitor.close()
    assert monitor.stopped and Run(monitor.path).status == "finished"


def test_a_loss_that_is_not_finite_is_an_alarm_and_a_listener_that_fails_a_warning(tmp_path, told):
    def fail(event):
        raise RuntimeError(f"no mail about {event.rule}")

    monitor = monitor_in(tmp_path, log_every=1, on_alarm=fail)
    monitor.update(1, indices=[0, 1, 2], loss=1.0)
    row = monitor.update(2, indices=[0, 1, 2], loss=NAN, other=None)
    assert row["loss"] is None and "other" not in row
    assert [event["rule"] for event in Run(monitor.path).alarms] == ["nonfinite"]
    assert texts(told) == ["monitor, step 2: no mail about nonfinite"]


@pytest.mark.parametrize(("reaches", "rules"), [("", ["reach_lost"]), ("map", []), (None, ["reach_lost"])])
def test_settings_say_how_codes_learn(tmp_path, reaches, rules):
    settings = {"quantizer": "ibq"} if reaches is None else {"reaches": reaches}
    monitor = CodebookMonitor(tmp_path / "mine", 1024, log_every=1, settings=settings)
    monitor.watch(lambda: torch.eye(1024)[:, :DIM])
    for step in range(1, 5):
        monitor.update(step, indices=torch.arange(1024))
    assert [event["rule"] for event in Run(monitor.path).alarms] == rules
    assert [("softmax over z" in event["cause"]) for event in Run(monitor.path).alarms] == [reaches is None] * len(
        rules
    )


# --- several processes -----------------------------------------------------------------------------------------------

SHARED = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_monitor import tensors, monitor_in
from pathlib import Path
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{folder}/meet", rank=rank, world_size=2)
monitor = monitor_in(Path({folder!r}), log_every=3)
for step in range(1, 8):
    given = tensors(step)
    share = slice(2 * rank, 2 * rank + 2)
    features = given["features"][share] if rank == 0 or step < 4 else torch.full((2, 4, 3, 3), float("nan"))
    row = monitor.update(step, indices=given["indices"][share], features=features, codebook=given["codebook"])
    assert rank == 0 or row is None
monitor.close()
# An empty share, a mistake and a function that fails, in one process: the other must not wait for it.
uneven, seen = monitor_in(Path({folder!r}) / "uneven", log_every=1), []
uneven.watch(lambda: 1 / 0 if rank and step == 4 else torch.ones(16, 4))
for step in range(1, 6):
    given = tensors(step, 2)
    if rank == 1 and step in (2, 3):
        given["indices"], given["features"] = (
            (given["indices"][:0], given["features"][:0]) if step == 2 else (given["indices"].float(), None)
        )
    seen.append(uneven.update(step, **given))
uneven.close()
assert rank or [row["step_tokens"] for row in seen] == [36, 18, 18, 36, 36], seen
collapsing = monitor_in(Path({folder!r}) / "collapsing", log_every=1, alarm="stop")
for step in range(1, 8):
    collapsing.update(step, indices=[0] * 36)
    assert collapsing.stopped == (step >= 5)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_writes_nothing(tmp_path):
    with monitor_in(tmp_path, steps=2, log_every=1) as monitor:
        monitor.update(1, **tensors(1, 4))
        if not (child := os.fork()):
            try:
                monitor.update(2, **tensors(2, 4))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        monitor.update(2, **tensors(2, 4))
    assert Run(tmp_path / "mine").metrics["step"].tolist() == [1, 2]


@pytest.mark.usefixtures("warm_start")
def test_two_processes_are_one(tmp_path):
    script = SHARED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    whole = CodebookMonitor(tmp_path / "whole", CODES, log_every=3)
    for step in range(1, 8):
        whole.update(step, **tensors(step))
    shared, whole = rows_of(types.SimpleNamespace(path=tmp_path / "mine")), rows_of(whole)
    assert [row["step"] for row in shared] == [row["step"] for row in whole]
    for ours, theirs in zip(shared, whole, strict=True):
        for key in ("usage", "usage_tokens", "perplexity", "step_usage", "step_tokens", "dead_codes"):
            assert ours[key] == pytest.approx(theirs[key])
    assert np.array_equal(Run(tmp_path / "mine").snapshot()["last_hit"], Run(tmp_path / "whole").snapshot()["last_hit"])


# --- beginning, continuing, ending -----------------------------------------------------------------------------------


def vanish(monitor):
    """As if the process were gone: its lock is, and nothing was noted."""
    run_writer._OPEN.pop(os.path.realpath(monitor.path))
    monitor._writer.run.release()
    monitor._writer.run = None


class TestFolder:
    def test_a_loop_that_dies_leaves_an_interrupted_run_that_goes_on(self, tmp_path, told):
        first = monitor_in(tmp_path)
        for step in (1, 2, 3):
            first.update(step, **tensors(step))
        assert Run(first.path).status == "running"
        vanish(first)
        assert Run(first.path).describe_status().startswith("interrupted at step 3; your own training")
        with monitor_in(tmp_path) as second:
            second.load_state_dict(first.state_dict())
            row = second.update(4, **tensors(4))
        assert row["usage_tokens"] == 4 * 36
        assert [row["step"] for row in rows_of(second)] == [1, 2, 3, 4] and not texts(told)
        assert Run(second.path).status == "finished" and len(Run(second.path).provenance["resumed"]) == 1

    def test_steps_that_were_logged_already_are_dropped_first(self, tmp_path, told):
        first = monitor_in(tmp_path)
        for step in (1, 2, 3, 5):
            first.update(step, **tensors(step))
        vanish(first)
        second = monitor_in(tmp_path)
        second.update(3, **tensors(9))
        assert "was at step 5 and goes on from step 3; rows and snapshots from step 3 on" in texts(told)[0]
        assert [row["step"] for row in rows_of(second)] == [1, 2, 3] and Run(second.path).snapshot_steps == [1, 2, 3]

    def test_a_finished_run_is_not_begun_again(self, tmp_path):
        with monitor_in(tmp_path) as first:
            first.update(1, **tensors(1))
        before = (first.path / "metrics.jsonl").read_bytes()
        with pytest.raises(RunError, match="finished run of 1 steps, and this update is step 1"):
            monitor_in(tmp_path).update(1, **tensors(1))
        assert (first.path / "metrics.jsonl").read_bytes() == before
        with monitor_in(tmp_path) as later:
            later.update(2, **tensors(2))
        assert len(rows_of(later)) == 2 and Run(later.path).status == "finished"

    def test_a_run_may_have_more_steps_than_before(self, tmp_path):
        for steps in (2, 4):
            with monitor_in(tmp_path, steps=steps) as monitor:
                for step in range(steps - 1, steps + 1):
                    monitor.update(step, **tensors(step))
        run = Run(monitor.path)
        assert run.describe_status() == "finished at step 4 of 4" and run.metrics["step"].tolist() == [1, 2, 3, 4]
        assert run.provenance["extended"][0]["to_steps"] == 4

    def test_other_settings_are_refused_at_once(self, tmp_path):
        with monitor_in(tmp_path, settings={"width": 1}) as first:
            first.update(1, **tensors(1))
        with pytest.raises(RunError, match=r"settings\.width: 1 → 2"):
            monitor_in(tmp_path, settings={"width": 2})
        with pytest.raises(RunError, match="codebook_size: 16 → 32"):
            CodebookMonitor(tmp_path / "mine", 32, settings={"width": 1})
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").write_text("")
        with pytest.raises(RunError, match="is no run"):
            CodebookMonitor(tmp_path / "other", CODES)

    def test_a_cell_that_is_run_again_takes_over(self, tmp_path, told):
        first, second = monitor_in(tmp_path), monitor_in(tmp_path)
        first.update(1, **tensors(1))
        second.update(2, **tensors(2))
        assert first.update(3, **tensors(3)) is None
        assert len(rows_of(second)) == 2 and "another" in texts(told)[0]

    @pytest.mark.parametrize(("error", "status"), [(RuntimeError, "failed"), (KeyboardInterrupt, "stopped")])
    def test_how_a_with_block_ends(self, tmp_path, error, status):
        with pytest.raises(error), monitor_in(tmp_path) as monitor:
            monitor.update(1, **tensors(1))
            raise error
        assert Run(monitor.path).status == status

    @pytest.mark.parametrize(("died", "status"), [(None, "finished"), (ValueError(), "interrupted")])
    def test_a_script_that_ends_has_finished(self, tmp_path, monkeypatch, died, status):
        monitor = monitor_in(tmp_path)
        monitor.update(1, **tensors(1))
        monkeypatch.setattr(sys, "last_value", died, raising=False)
        monkeypatch.setattr(sys, "last_exc", died, raising=False)
        monkeypatch.setattr(run_writer, "_OPEN", {"": monitor._writer})
        run_writer._end_all()
        if died:
            vanish_lock = monitor._writer.run
            vanish_lock.release()
        assert Run(monitor.path).status == status

    def test_a_name_lies_among_all_runs(self, tmp_path, monkeypatch):
        monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "all"))
        monkeypatch.chdir(tmp_path)
        assert CodebookMonitor("runs/mine", CODES).path == tmp_path / "all" / "mine"
        assert not (tmp_path / "all").exists()  # nothing is written before the first update


# --- bad input -------------------------------------------------------------------------------------------------------

WRONG = {
    "indices above K": ({"indices": [[3, 16], [99, 0]] * 9}, "indices must lie in 0 to 15 .* 18 lie above"),
    "indices below": ({"indices": [-5, 0] * 18}, "indices must lie in 0 to 15 .* 18 lie below"),
    "one-hot indices": ({"indices": torch.eye(CODES).long()[torch.arange(36) % CODES]}, r"Use indices.argmax\(-1\)"),
    "indices as floats": ({"indices": torch.rand(4)}, "indices must be whole numbers"),
    "no indices": ({"indices": None}, "update needs the codes that the step chose"),
    "a smaller codebook": ({"codebook": torch.randn(8, DIM)}, r"codebook must hold one row per code, \(16, D\)"),
    "a codebook of 3 axes": ({"codebook": torch.randn(1, CODES, DIM)}, "codebook must be .rows, D."),
    "integers as features": ({"features": torch.ones(4, DIM, 3, 3).long()}, "features must be floating-point numbers"),
    "one row": ({"features": torch.randn(DIM)}, r"features must be \(N, D\), .* A single vector is features\[None\]"),
    "no row": ({"features": torch.randn(0, DIM)}, "with at least one token"),
    "another dimension": ({"features": torch.randn(4, 7, 3, 3)}, "features must have the codebook's dimension D = 4"),
    "a number of many elements": ({"loss": torch.rand(3)}, "loss must be a number"),
    "a number that the monitor writes": ({"usage": 0.5}, "usage is written by the monitor itself"),
    "features that cannot be computed": ({"features": lambda: 1 / 0}, "division by zero"),
    "a function of indices that fails": ({"indices": lambda: 1 / 0}, "indices must be .* raised ZeroDivisionError"),
    "indices without numbers": ({"indices": torch.ones(36, device="meta").long()}, "indices must have their numbers"),
    "a codebook's transpose": ({"codebook": torch.randn(DIM, CODES)}, r"codebook must .* got \(4, 16\).*codebook.T"),
    "a module of many tables": (
        {"codebook": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))},
        "codebook must be a tensor .* got Sequential with 2. .*codebook=module.weight",
    ),
    "features of meta": ({"features": torch.ones(36, DIM, device="meta")}, "features must be a plain tensor"),
    "features as text": ({"features": "z"}, "features must be floating-point numbers in .* got str"),
    "a probe of another dimension": ({"probe": torch.randn(3, 7)}, "probe must have the codebook's dimension D = 4"),
    "a loss as text": ({"loss": "x"}, "loss must be a number, or a tensor of one element; got 'x'"),
    "images as whole numbers": (
        {"images": torch.ones(2, 3, 4, 4).long(), "reconstructions": torch.rand(2, 3, 4, 4)},
        "images must be uint8, or floats .* got torch.int64",
    ),
    "images of two channels": (
        {"images": torch.rand(2, 2, 4, 4), "reconstructions": torch.rand(2, 2, 4, 4)},
        "images must be",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_in_the_first_update_raises(tmp_path, wrong):
    given, message = WRONG[wrong]
    with pytest.raises((ValueError, ZeroDivisionError), match=message):
        monitor_in(tmp_path).update(1, **tensors(1) | given)


@pytest.mark.parametrize("wrong", WRONG)
def test_later_trouble_is_told_once_and_training_goes_on(tmp_path, told, wrong):
    given, message = WRONG[wrong]
    monitor = monitor_in(tmp_path, log_every=1, snapshot_every=1)
    monitor.update(1, **tensors(1))
    for step in (2, 3):
        monitor.update(step, **tensors(step) | given)
    row = monitor.update(4, **tensors(4))
    (text,) = texts(told)
    assert re.search(message, text) and "step 2" in text
    assert row["usage"] > 0 and "feature_to_code_distance" in row
    assert Run(monitor.path).metrics["step"].iloc[-1] == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"features": torch.randn(40, DIM)}, "features must be one per index; got 40 features and 36 indices"),
        ({"indices": [], "features": torch.zeros(0, DIM)}, "indices must hold at least one token; got none"),
        (
            {"images": torch.rand(2, 3, 4, 4), "reconstructions": torch.rand(2, 3, 5, 4)},
            r"reconstructions must have the shape of their images; got .* \(2, 5, 4, 3\) and \(2, 4, 4, 3\)",
        ),
    ],
)
def test_what_may_be_meant_is_a_warning_from_the_first_update_on(tmp_path, told, given, message):
    monitor = monitor_in(tmp_path, log_every=1, snapshot_every=1)
    for step in (1, 2):
        row = monitor.update(step, **tensors(step) | given)
    (text,) = texts(told)
    assert re.search(message, text) and row["step"] == 2


def test_a_gradient_that_fails_or_has_other_rows_is_left_out(tmp_path, told):
    monitor, gradients = monitor_in(tmp_path, log_every=1), [torch.ones(CODES, DIM)]
    monitor.watch(lambda: gradients[0] / (0 if isinstance(gradients[0], int) else 1))
    reach = []
    for step, gradient in enumerate((torch.ones(CODES, DIM), 1, torch.ones(3, DIM)), start=1):
        gradients[0] = gradient
        reach.append(monitor.update(step, **tensors(step)).get("gradient_reach"))
    assert reach == [1.0, None, None] and "ZeroDivisionError" in texts(told)[0] and "got (3, 4)" in texts(told)[1]


def test_what_inference_mode_and_autocast_do_to_a_loop_changes_no_number(tmp_path):
    rows = []
    for name, context in {"plain": nullcontext, "odd": torch.inference_mode}.items():
        monitor, table = CodebookMonitor(tmp_path / name, CODES, log_every=1), nn.Embedding(CODES, DIM)
        for step in (1, 2, 3):
            given = tensors(step)
            table.weight.data.copy_(given["codebook"])
            given["codebook"] = table if name == "odd" else table.weight
            with context() if step != 2 else nullcontext(), torch.autocast("cpu", enabled=name == "odd"):
                row = monitor.update(step, **given)
        rows.append(row | {"seconds": 0})
    assert rows[0] == rows[1]


def test_a_compiled_step_may_call_it(tmp_path):
    monitor = monitor_in(tmp_path, log_every=1)

    @torch.compile(backend="eager")
    def train_step(step, features, indices):
        monitor.update(step, indices=indices, features=features)
        return features * 2

    for step in (1, 2, 3):
        train_step(step, torch.randn(30 + step, DIM), torch.arange(30 + step) % CODES)
    assert [row["step_tokens"] for row in rows_of(monitor)] == [31, 32, 33]


def test_a_token_without_code_counts_for_nothing(tmp_path, told):
    row = monitor_in(tmp_path).update(1, indices=torch.tensor([[0, -1], [3, -1]]))
    assert row["usage_tokens"] == 2 and not texts(told)


def test_an_index_beyond_32_bits_is_none(tmp_path):
    with pytest.raises(ValueError, match="1 lie above"):
        monitor_in(tmp_path).update(1, indices=[2**32 + 3, 1])


def test_features_with_nan_are_measured_without_them(tmp_path, told):
    monitor, given = monitor_in(tmp_path), tensors(1)
    monitor.update(1, **given)
    broken = given["features"].clone()
    broken[0] = NAN
    row = monitor.update(2, **given | {"features": broken})
    assert "9 of 36 rows looked at hold NaN or infinity" in texts(told)[0]
    rest = given["features"][1:].permute(0, 2, 3, 1).reshape(-1, DIM)
    assert row["feature_norm_mean"] == pytest.approx(float(rest.norm(dim=1).mean()))
    row = monitor.update(3, **given | {"features": broken * NAN, "codebook": given["codebook"] * NAN})
    assert row["usage"] > 0 and "feature_norm_mean" not in row and "code_norm_mean" not in row
    assert len(texts(told)) == 2


def test_steps_that_go_back_are_left_aside(tmp_path, told):
    monitor = monitor_in(tmp_path, log_every=1)
    for step in (1, 2, 5, 1, 2, 6):
        monitor.update(step, **tensors(step))
    assert [row["step"] for row in rows_of(monitor)] == [1, 2, 5, 6]
    assert len(texts(told)) == 1 and "step must grow: got 1 after 5" in texts(told)[0]


def test_a_closed_monitor_writes_nothing(tmp_path, told):
    monitor = monitor_in(tmp_path)
    monitor.update(1, **tensors(1))
    monitor.close()
    monitor.close()
    assert monitor.update(2, **tensors(2)) is None and "closed" in texts(told)[0]
    assert len(rows_of(monitor)) == 1


def test_a_disk_that_is_full_ends_no_training(tmp_path, told, monkeypatch):
    monitor = monitor_in(tmp_path, log_every=1)
    monitor.update(1, **tensors(1))

    def full(row):
        raise RunError("the disk is full")

    monkeypatch.setattr(monitor._writer, "log", full)
    assert monitor.update(2, **tensors(2)) is None and "the disk is full" in texts(told)[0]
    monkeypatch.undo()
    assert monitor.update(3, **tensors(3))["usage_tokens"] == 3 * 36


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_size": 1}, "codebook_size must be at least 2"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"settings": {"model": object()}}, "settings"),
    ],
)
def test_settings_are_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        CodebookMonitor(tmp_path / "mine", **{"codebook_size": CODES} | settings)


# --- modules and callbacks -------------------------------------------------------------------------------------------


class Nearest(nn.Module):
    """A quantizer of somebody: (B, T, D) to codes and indices."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(CODES, DIM))

    def forward(self, z):
        indices = torch.cdist(z, self.codes).argmin(-1)
        return self.codes[indices], indices


def test_any_module_is_read(tmp_path):
    monitor, module, z = monitor_in(tmp_path), Nearest(), torch.randn(2, 5, DIM)
    monitor.attach(module, lambda output: output[1], codebook=module.codes)
    module(z)
    module.eval()
    module(torch.zeros(1, 1, DIM))  # a validation between: left aside
    row = monitor.update(1)
    assert row["step_tokens"] == 10
    assert row["feature_norm_mean"] == pytest.approx(float(z.norm(dim=2).mean()), rel=1e-5)
    with pytest.raises(ValueError, match=r"how to read a Nearest; give it read=lambda output: \(indices, features\)"):
        monitor.attach(module)
    monitor.close()
    assert not module._forward_hooks


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"codebook_dim": 2},
        {"use_cosine_sim": True, "codebook_dim": 2},
        {"channel_last": False},
        {"learnable_codebook": True, "ema_update": False},
    ],
    ids=str,
)
def test_modules_of_vector_quantize_pytorch_are_read(tmp_path, settings):
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    module = library.VectorQuantize(dim=DIM, codebook_size=CODES, decay=1.0, **settings)
    monitor = monitor_in(tmp_path)
    monitor.attach(module)
    z = torch.randn(3, 10, DIM)
    _, indices, _ = module(z.transpose(1, 2) if settings.get("channel_last") is False else z)
    row = monitor.update(1)
    assert row["step_tokens"] == 30 and row["step_usage"] == len(indices.unique()) / CODES
    assert ("gradient_reach" in row) == (not settings.get("learnable_codebook"))
    snapshot = Run(monitor.path).snapshot()
    gaps = torch.cdist(torch.from_numpy(snapshot["features"]), torch.from_numpy(snapshot["codebook"]))
    # Each feature's stored code is its nearest: features and codes lie in the space in which the module compares them.
    assert np.array_equal(gaps.argmin(1), snapshot["assignments"])


GRIDS = {
    "FSQ": {"levels": [4, 4]},
    "FSQ projected": {"levels": [2, 8], "dim": 5, "preserve_symmetry": True, "channel_first": True},
    "FSQ clamped": {"levels": [4, 4], "bound_hard_clamp": True, "orthogonal_rotation": True},
    "LFQ": {"dim": 6, "codebook_size": CODES, "channel_first": True},
    "LFQ spherical": {"codebook_size": CODES, "spherical": True, "soft_clamp_input_value": 2.0},
}


@pytest.mark.parametrize("kind", GRIDS)
def test_grids_of_vector_quantize_pytorch_are_read_with_their_codes(tmp_path, kind):
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    module = getattr(library, kind.partition(" ")[0])(**GRIDS[kind])
    monitor = monitor_in(tmp_path)
    monitor.attach(module)
    z = torch.randn(3, 20, module.dim)
    _, indices, *_ = module(z.transpose(1, 2) if GRIDS[kind].get("channel_first") else z)
    row, snapshot = monitor.update(1), Run(monitor.path).snapshot()
    assert row["step_tokens"] == 60 and 0 < row["quantization_error"] < 1
    assert np.array_equal(snapshot["assignments"], indices.flatten())
    gaps = torch.cdist(*(torch.from_numpy(snapshot[name]) for name in ("features", "codebook")))
    assert np.array_equal(gaps.argmin(1), snapshot["assignments"])


def test_several_grids_in_one_give_usage_alone_and_residuals_are_refused(tmp_path):
    library = pytest.importorskip("vector_quantize_pytorch")
    module = library.FSQ(levels=[4, 4], num_codebooks=2)
    monitor = monitor_in(tmp_path)
    monitor.attach(module)
    module(torch.randn(2, 9, 4))
    row = monitor.update(1)
    assert row["step_tokens"] == 36 and "code_norm_mean" not in row
    with pytest.raises(ValueError, match=r"one of its codebooks, such as module.layers\[0\]"):
        monitor.attach(library.ResidualVQ(dim=4, num_quantizers=2, codebook_size=16))


def test_a_codebook_may_be_a_function_of_indices_or_a_quantizer(tmp_path):
    quantizer = build_quantizer("fsq", levels=[4, 4], code_dim=2, codebook_size=CODES)
    given = {"indices": torch.arange(CODES), "features": quantizer.codebook + 0.1}
    rows = [
        CodebookMonitor(tmp_path / name, CODES).update(1, **given, codebook=codebook) | {"seconds": 0}
        for name, codebook in {
            "table": quantizer.codebook,
            "function": lambda: quantizer.codebook,
            "indices": lambda indices, unused=None: quantizer.codebook[indices],
            "quantizer": quantizer,
        }.items()
    ]
    assert rows[0]["quantization_error"] == pytest.approx(0.01) and rows == [rows[0]] * 4


def run_example(name, folder, monkeypatch, steps="12"):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [name, "--output", str(folder / "mine"), "--steps", steps])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    run_writer._end_all()
    run = Run(folder / "mine")
    assert (run.status, run.step) == ("finished", int(steps))
    last = run.last_values
    assert {"loss", "usage", "feature_to_code_distance", "softmax_perplexity"} <= set(last)
    assert {"codebook", "features", "assignments"} <= set(run.snapshot())
    return last


def test_the_plain_example(tmp_path, monkeypatch):
    assert len((EXAMPLES / "vqvae.py").read_text().splitlines()) <= 60
    last = run_example("vqvae.py", tmp_path, monkeypatch)
    assert 0 < last["gradient_reach"] < 1 and Run(tmp_path / "mine").snapshot()["images"].shape == (8, 8, 8, 3)


@pytest.mark.usefixtures("warm_start")
def test_the_plain_example_under_torchrun(tmp_path):
    words = ["--standalone", "--nproc-per-node", "2", str(EXAMPLES / "vqvae.py"), "--steps", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", *words, "--output", str(tmp_path / "mine")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(tmp_path / "mine")
    assert (run.status, run.step, run.last_values["step_tokens"]) == ("finished", 4, 2 * 64 * 16)


@pytest.mark.skipif(not importlib.util.find_spec("vector_quantize_pytorch"), reason="needs vector-quantize-pytorch")
def test_the_example_with_vector_quantize_pytorch(tmp_path, monkeypatch):
    run_example("lucidrains.py", tmp_path, monkeypatch)


LIGHTNING = importlib.util.find_spec("lightning") or importlib.util.find_spec("pytorch_lightning")


@pytest.mark.skipif(not LIGHTNING, reason="needs lightning or pytorch-lightning")
@pytest.mark.filterwarnings("ignore")
def test_the_example_with_lightning(tmp_path, monkeypatch):
    assert run_example("lightning_module.py", tmp_path, monkeypatch)["step_tokens"] == 64 * 16


@pytest.mark.skipif(not LIGHTNING, reason="needs lightning or pytorch-lightning")
def test_an_alarm_ends_lightnings_training(tmp_path):
    monitor = monitor_in(tmp_path, log_every=1, alarm="stop")
    monitor.attach(module := Nearest(), lambda output: output[1])
    callback = callbacks.LightningCallback(monitor)
    trainer = types.SimpleNamespace(callback_metrics={}, should_stop=False)
    for trainer.global_step in range(1, 6):
        assert not trainer.should_stop
        module(torch.zeros(1, 36, DIM))
        callback.on_train_batch_end(trainer, None, None)
    assert trainer.should_stop
    callback.on_fit_end(trainer, None)
    assert Run(monitor.path).status == "stopped"


@pytest.mark.skipif(
    not importlib.util.find_spec("transformers"),
    reason="needs transformers, which torchmetrics would import everywhere; its callback is tested on a stand-in",
)
def test_the_example_with_transformers(tmp_path, monkeypatch):
    run_example("transformers_trainer.py", tmp_path, monkeypatch)


def test_the_example_with_accelerate_or_a_stand_in(tmp_path, monkeypatch):
    pytest.importorskip("vector_quantize_pytorch")
    if not importlib.util.find_spec("accelerate"):

        class Accelerator:
            """Every second backward pass is a step."""

            def __init__(self, cpu, gradient_accumulation_steps):
                assert cpu
                self.every, self.batches = gradient_accumulation_steps, 0

            def prepare(self, *parts):
                return parts

            @contextmanager
            def accumulate(self, model):
                self.batches += 1
                self.sync_gradients = self.batches % self.every == 0
                yield

            def backward(self, loss):
                (loss / self.every).backward()

            def end_training(self):
                pass

        stand_in = types.ModuleType("accelerate")
        stand_in.Accelerator = Accelerator
        monkeypatch.setitem(sys.modules, "accelerate", stand_in)
    last = run_example("accelerate_loop.py", tmp_path, monkeypatch)
    run = Run(tmp_path / "mine")
    assert 0 < last["quantization_error"] < 0.1 and run.alarms == []
    # A row is that of its step's first micro-batch, the window has both of all steps before.
    assert last["step_tokens"] == 64 * 16 and last["usage_tokens"] == 2048


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers itself is installed")
def test_the_callback_of_transformers_on_a_stand_in(tmp_path, monkeypatch):
    """The order of events of transformers' Trainer with two micro-batches a step, without the library."""
    stand_in = types.ModuleType("transformers")
    stand_in.TrainerCallback = object
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    callbacks._transformers_callback.cache_clear()
    monitor, module, state = monitor_in(tmp_path, log_every=1), Nearest(), types.SimpleNamespace(global_step=0)
    monitor.attach(module, lambda output: output[1], codebook=module.codes)
    callback = callbacks.TransformersCallback(monitor)
    control = types.SimpleNamespace(should_training_stop=False)
    for step in (1, 2):
        module(torch.randn(2, 5, DIM))
        callback.on_substep_end(None, state, control)
        module(torch.randn(2, 5, DIM))
        state.global_step = step
        callback.on_step_end(None, state, control)
        assert not control.should_training_stop
        callback.on_log(None, state, None, logs={"loss": 0.5 / step})
    monkeypatch.setattr(monitor, "update", lambda step: setattr(monitor, "stopped", True))
    callback.on_step_end(None, state, control)
    assert control.should_training_stop
    callback.on_train_end(None, state, None)
    run = Run(monitor.path)
    assert run.status == "finished" and run.last_values["loss"] == 0.25
    assert run.metrics["step"].tolist() == [1, 1, 2, 2] and run.snapshot()["counts"].sum() == 30
    callbacks._transformers_callback.cache_clear()


def test_a_callback_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    callbacks._transformers_callback.cache_clear()
    with pytest.raises(ImportError, match="pip install transformers"):
        _ = callbacks.TransformersCallback


def test_the_benchmark_tells_the_share_of_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    sizes = {"--dim": 4, "--tokens": 256, "--steps": 6, "--warm-up": 2, "--log-every": 3}
    sizes = ["--codes", "16", "32", *(str(word) for pair in sizes.items() for word in pair)]
    monkeypatch.setattr(sys, "argv", ["monitor.py", *sizes, "--output", str(tmp_path / "monitor.csv")])
    runpy.run_path(str(EXAMPLES.parent / "benchmarks" / "monitor.py"), run_name="__main__")
    table = pd.read_csv(tmp_path / "monitor.csv")
    assert table["share_of_step"].tolist() == pytest.approx((table["mean_ms"] / 50).tolist())
    assert table["log_every"].tolist() == [3, 3] and (table["logged_ms"] > table["plain_ms"]).all()
    assert table["started"].notna().all() and capsys.readouterr().out.count("of 50 ms") == 2


def test_rows_stand_in_the_order_of_their_steps(tmp_path, told):
    monitor = monitor_in(tmp_path, log_every=1)
    monitor.log(1, validation_psnr=20.0)
    monitor.update(5, **tensors(1))
    monitor.log(3, validation_psnr=20.0)
    monitor.log(5, validation_psnr=21.0)
    with pytest.raises(ValueError, match=r"status must be one of 'finished', .*got 'wat'"):
        monitor.close("wat")
    monitor.update(6, **tensors(2))
    monitor.close()
    assert [row["step"] for row in rows_of(monitor)] == [5, 5, 6] and Run(monitor.path).status == "finished"
    first, second = texts(told)
    assert "before the first update" in first and "got step 3 after 5" in second


@pytest.mark.parametrize(
    "state",
    [3, {"window": 3}, {"window": torch.zeros(5), "last_hit": torch.zeros(CODES), "cursor": 0}]
    + [{"cursor": 0, "window": torch.full((180,), value), "last_hit": torch.zeros(CODES)} for value in (CODES, -9)]
    + [{"cursor": 180, "window": torch.zeros(180), "last_hit": torch.zeros(CODES)}],
    ids=["3", "no tensor", "length", "above", "below", "cursor"],
)
def test_a_stored_window_of_other_sizes_is_left_aside(tmp_path, told, state):
    monitor = monitor_in(tmp_path)
    monitor.load_state_dict(state)
    row = monitor.update(1, **tensors(1))
    (text,) = texts(told)
    assert "a new one begins" in text and row["usage_tokens"] == 36


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"settings": [1]}, "settings must be a dictionary .* got list"),
        ({"on_alarm": 3}, "on_alarm must be a function"),
    ],
)
def test_settings_that_are_none_are_refused_at_once(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        monitor_in(tmp_path, **settings)


def test_curves_without_psnr_show_the_reach_and_tell_the_range_of_tokens():
    rows = pd.DataFrame(
        {"step": [1, 2], "loss": 1.0, "step_usage": 0.5, "step_tokens": [80, 1024], "gradient_reach": [0.5, 0.2]}
    )
    figure = plot_run_curves(rows)
    assert figure.axes[3].get_lines()[0].get_ydata().tolist() == [50, 20]
    assert (figure.axes[3].get_title(), figure.axes[3].get_ylabel()) == ("Gradient reach", "codes reached (%)")
    assert "80 to 1,024 tokens of each step" in figure.get_supxlabel().replace("\n", " ")


@pytest.mark.parametrize(("quantizer", "has_softmax"), [("my own", False), ("ibq", True)])
def test_what_is_true_of_a_softmax_is_said_of_it_alone(tmp_path, quantizer, has_softmax):
    with monitor_in(tmp_path, settings={"quantizer": quantizer}) as monitor:
        monitor.update(1, **tensors(1))
    text = run_explanation.how_to_read(Run(monitor.path))
    assert ("The ring is the run" in text["band"]) == ("reach the codes' norm" in text["explanation"]) == has_softmax


# --- arrays alone ----------------------------------------------------------------------------------------------------


def test_diagnosis_numbers_are_those_of_brute_force():
    given = tensors(2, images=20)
    found = diagnose(given["features"], given["codebook"].numpy(), given["indices"])
    tokens, codes = given["features"].permute(0, 2, 3, 1).reshape(-1, DIM).double(), given["codebook"].double()
    gaps, flat = torch.cdist(tokens, codes), given["indices"].flatten()
    counts = np.bincount(flat, minlength=CODES)
    nearest = gaps.sort(1).values
    expected = {
        "perplexity": math.exp(-sum(p * math.log(p) for p in counts[counts > 0] / counts.sum())),
        "dead_codes": (counts == 0).sum(),
        "feature_to_code_distance": gaps.amin(1).mean(),
        "code_to_feature_distance": gaps.amin(0).mean(),
        "quantization_error": (tokens - codes[flat]).square().mean(),
        "winner_margin": (1 - nearest[:, 0] / nearest[:, 1]).mean(),
        "softmax_perplexity": torch.special.entr((tokens @ codes.T).softmax(1)).sum(1).exp().mean(),
        "feature_norm_mean": tokens.norm(dim=1).mean(),
        "feature_norm_std": tokens.norm(dim=1).std(correction=0),
        "code_norm_mean": codes.norm(dim=1).mean(),
        "code_norm_std": codes.norm(dim=1).std(correction=0),
    }
    assert found.numbers == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-5)
    assert (found.usage.value, found.usage.tokens) == ((counts > 0).mean(), 180)
    assert diagnose(given["features"], given["codebook"]).numbers == pytest.approx(found.numbers)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_a_diagnosis_of_very_large_and_small_numbers_is_that_of_plain_ones(scale):
    given, power = tensors(2), 2.0 ** round(math.log2(scale))
    plain = diagnose(given["features"], given["codebook"])
    found = diagnose(given["features"] * power, given["codebook"] * power)
    assert (found.usage, found.numbers["winner_margin"]) == (plain.usage, pytest.approx(plain.numbers["winner_margin"]))
    for key in ("feature_to_code_distance", "code_to_feature_distance", "feature_norm_mean", "code_norm_std"):
        assert found.numbers[key] == pytest.approx(power * plain.numbers[key])
    assert found.numbers["quantization_error"] == pytest.approx(power**2 * plain.numbers["quantization_error"], abs=0)


def test_a_diagnosis_shows_itself():
    given = tensors(2)
    found = diagnose(**given)
    text, page = str(found), found._repr_html_()
    assert "of 16 codes in 36 tokens; too few tokens: at least 10·K = 160" in text and "quantization error" in text
    assert page.count("data:image/png;base64,iVBOR") == 2 and page.count("<tr>") == len(found.lines) == 12
    assert found.histogram().axes and found.map("pca").axes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.full((5, DIM), NAN)}, r"features must be finite; 5 of 5 rows .* features\[isfinite"),
        ({"codebook": torch.full((CODES, DIM), NAN)}, "codebook must be finite"),
        ({"features": torch.randn(5, 9)}, "codebook's dimension D = 4"),
        ({"features": torch.ones(5, DIM).int()}, "Whole numbers are indices"),
        ({"features": torch.randn(DIM)}, r"A single vector is features\[None\]"),
        ({"codebook": torch.randn(1, DIM)}, "at least two codes"),
        ({"indices": [0, CODES] * 18}, "indices must lie in 0 to 15.*got 0 to 16: pass the whole codebook"),
        ({"indices": [-1, 3] * 18}, "got -1 to 3: leave out the tokens without a code"),
        ({"indices": [1] * 35}, "one per feature; got 35 indices .* and 36 features"),
        ({"indices": torch.eye(CODES).long()[torch.arange(36) % CODES]}, r"got \(36, 16\).*Use indices.argmax\(-1\)"),
        ({"indices": []}, "at least one; got none"),
    ],
)
def test_a_diagnosis_of_bad_arrays_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        diagnose(**tensors(1) | changes)
