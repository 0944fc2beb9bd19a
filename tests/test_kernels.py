"""Triton's kernels without a GPU: they compile for three kinds of GPU, and their absence is told once."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ibqlab.base import kernels
from ibqlab.base.kernels import kernels_run_on, triton_problem

HERE = Path(__file__).parent
triton = pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
VARIANT_FILES = sorted(path.stem for path in HERE.glob("kernels_*.py"))


@pytest.mark.parametrize("module", VARIANT_FILES)
def test_kernels_compile_for_gpus_without_spilling(module):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    command = [sys.executable, "compile_kernels.py", module]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows
    assert not [row for row in rows if row.get("error")]
    assert not [row for row in rows if row["spilled_bytes"]]
    # What one block may have on an A100; the others have more.
    assert not [row for row in rows if row["shared_bytes"] > 163 * 1024]


def test_every_kernel_is_compiled_by_the_test_above():
    sources = [path for path in (HERE.parent / "ibqlab").rglob("*.py") if "@triton.jit" in path.read_text()]
    listed = "".join((HERE / f"{module}.py").read_text() for module in VARIANT_FILES)
    assert sources
    for path in sources:
        module = ".".join(path.relative_to(HERE.parent).with_suffix("").parts)
        assert module in listed, module


def test_the_trial_kernel_counts_up():
    from ibqlab.base.trial_kernel import count_up  # noqa: PLC0415

    numbers = torch.zeros(16, dtype=torch.int32)
    count_up[(1,)](numbers, SIZE=16)
    assert numbers.tolist() == list(range(16))


def test_a_cpu_has_none_and_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels_run_on(torch.device("cpu"))


@pytest.fixture
def card(monkeypatch):
    """A machine that says it has an H200."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    kernels._run_on_card.cache_clear()
    yield torch.device("cuda", 0)
    kernels._run_on_card.cache_clear()


def test_a_card_that_runs_the_trial_has_kernels(card, monkeypatch):
    monkeypatch.setattr(kernels, "_try_kernel", lambda device: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels_run_on(card)


def test_a_failing_trial_is_a_warning_told_once(card, monkeypatch):
    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "_try_kernel", no_compiler)
    with pytest.warns(UserWarning, match="Failed to find C compiler.*Use a card"):
        assert not kernels_run_on(card)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels_run_on(card)


def test_an_old_card_and_an_old_triton_are_named(card, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    assert triton_problem() == "Triton 3.1.0 is installed, and 3.6 is the oldest that will do"
    with pytest.warns(UserWarning, match=r"Triton 3\.1\.0"):
        assert not kernels_run_on(card)
    monkeypatch.undo()
    kernels._run_on_card.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.warns(UserWarning, match="Tesla V100 is older"):
        assert not kernels_run_on(card)


def test_without_triton_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert triton_problem() == "Triton is not installed"
