"""`make bench-gpu` without a GPU: its scripts take what they are given, and its table reads what they write."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"
pytestmark = pytest.mark.usefixtures("warm_start")

TINY = {
    "index_backprop.py": ("--tokens", "64", "--codes", "128", "512", "--dim", "16", "--rounds", "1"),
    "training_speed.py": ("--rounds", "1", "--steps", "1", "--warm-up", "1", "--images", "2"),
    "sampling.py": ("--width", "64", "--depth", "1", "--batches", "2", "--positions", "3", "--rounds", "1"),
    "gpu_study.py": ("--preset", "smoke"),
}
"""Arguments of each script that come after its own, so that it ends in seconds on a CPU."""


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("gpu", "rows"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("gpu")
    for name in ("gpu", "rows"):
        sys.modules.pop(name, None)


def run_script(script, folder):
    """One script with its own arguments, the tiny ones behind them."""
    path, *own = script.arguments
    # A recipe is no option and cannot be given again.
    own = ["builtin/smoke" if word == "imagenet/ibq_262144" else word for word in own]
    output = folder / script.output
    more = ["--runs", str(folder / "study_runs")] if path.endswith("gpu_study.py") else []
    command = [sys.executable, path, *own, *TINY[Path(path).name], *more, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_every_target_reads_a_number_that_its_script_writes(gpu, tmp_path):
    """A CPU has no memory of CUDA's, no half types in index backpropagation, and no first image in a fresh process."""
    tables = {}
    for part in ("index_backprop", "sampling"):
        for script in gpu.PARTS[part].scripts:
            tables[script.output.removesuffix(".csv")] = pd.read_csv(run_script(script, tmp_path))
    index = tables["index_backprop"]
    index["codes"] = index["codes"].replace({128: gpu.SMALL, 512: gpu.LARGE})
    tables["index_backprop"] = pd.concat([index, index.assign(dtype="bfloat16")])
    tables["sampling"]["first_image_seconds"] = 2.0
    steps = run_script(gpu.PARTS["step"].scripts[1], tmp_path)
    step = pd.read_csv(steps)
    assert set(step["compile"]) == {False}
    assert {"start_seconds", "images_per_second", "quantizer"} <= set(step)
    tables["training_step"] = step.assign(speed_ratio=2.5)
    tables["training_step_compiled"] = step.assign(compile=True)
    targets = gpu.table_of_targets(tables)
    assert len(targets) == len(gpu.TARGETS)
    missing = targets[targets["measured"] == "not measured"]
    assert missing.empty, missing
    rows = targets.set_index("target")
    assert rows.loc["its seconds to a first image", ["measured", "reached"]].tolist() == ["2", "yes"]
    speed = float(rows.loc["training step, images/s", "measured"])
    assert rows.loc["training step, images/s", "reached"] == ("yes" if speed >= 100 else "no")


def test_what_was_not_measured_is_called_so(gpu):
    targets = gpu.table_of_targets({"sampling": pd.DataFrame({"images_per_second": [10.0, 450.0]})})
    rows = targets.set_index("target")
    sampling = rows.loc["sampling IBQ-B, 64 images with guidance, images/s"]
    assert sampling[["measured", "reached", "before"]].tolist() == ["450", "yes", "32.8"]
    assert (rows.drop(sampling.name)["measured"] == "not measured").all()
    assert (rows.drop(sampling.name)["reached"] == "").all()


def test_a_compiled_step_that_takes_too_long_costs_no_other_number(gpu):
    """It is timed last, in a process of its own."""
    *others, last = gpu.PARTS["step"].scripts
    compiled = [script.arguments[script.arguments.index("--compile") + 1] for script in (*others, last)]
    assert compiled == ["off", "off", "on"]
    step = pd.DataFrame({"quantizer": ["as configured"], "compile": [False], "start_seconds": [7.0]})
    rows = gpu.table_of_targets({"training_step": step}).set_index("target")
    assert rows.loc["seconds to the end of the first step", "measured"] == "7"
    assert rows.loc["the same, compiled", "measured"] == "not measured"


def test_a_step_that_did_not_fit_is_not_measured(gpu):
    """Rows without numbers: the batch did not fit."""
    columns = {"quantizer": ["as configured"], "compile": [False], "images_per_second": [float("nan")]}
    table = gpu.table_of_targets({"training_step": pd.DataFrame(columns | {"start_seconds": [float("nan")]})})
    assert (table["measured"] == "not measured").all()


def test_a_part_ends_when_its_time_is_up_and_later_scripts_are_told(gpu, tmp_path, monkeypatch, capfd):
    slow = gpu.Script(("-c", "import time; print('begun', flush=True); time.sleep(60)"))
    part = gpu.Part((slow, gpu.Script(("-c", "raise SystemExit(3)"))), seconds=2)
    monkeypatch.setitem(gpu.PARTS, "step", part)
    began = time.monotonic()
    gpu.run_part("step", tmp_path, {})
    assert time.monotonic() - began < 30
    told = capfd.readouterr().out
    assert "begun" in told and "step, -c: ended, its time was up" in told
    assert told.count("step, -c:") == 2


def test_the_parts_that_run_by_themselves_take_less_than_seven_minutes(gpu):
    assert sum(part.seconds for part in gpu.PARTS.values() if part.by_itself) < 7 * 60
    assert {name for name, part in gpu.PARTS.items() if not part.by_itself} == {"tests", "study"}


def test_without_a_gpu_it_says_what_to_type():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--parts", "sampling"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA device here; `make bench` measures a CPU" in done.stderr


def test_the_study_leaves_report_figures_and_numbers(gpu, tmp_path):
    folder = run_script(gpu.PARTS["study"].scripts[0], tmp_path)
    names = {file.name for file in folder.iterdir()}
    assert {"report.md", "provenance.json", "collapse_curves.png", "collapse_curves.csv", "table.csv"} <= names
    assert not any(name.endswith((".pt", ".npz")) for name in names)


def test_the_h200_preset_trains_vq_and_ibq_at_both_sizes():
    from ibqlab.studies import StudyParameters, open_study  # noqa: PLC0415 - seconds, for this test alone

    cells = open_study("explore_collapse", StudyParameters(preset="h200")).cells
    sizes = {(cell.labels["method"], cell.labels["codebook_size"], cell.labels["code_dim"]) for cell in cells}
    assert sizes == {(method, size, 256) for method in ("vq", "ibq") for size in (16384, 262144)}
    assert {cell.config.steps for cell in cells} == {400} and len(cells) == 4
