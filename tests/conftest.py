"""The same surroundings for every test: one thread, no window system, runs in a folder that is thrown away."""

import os
import signal

# Before torch and matplotlib are imported, and inherited by child processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch

torch.set_num_threads(1)

# A shell starts what goes on in the background deaf to Ctrl-C; processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """One cache for all tests, child processes included, and none of the user's."""
    os.environ["IBQLAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _runs_elsewhere(tmp_path, monkeypatch):
    """No test writes into the checkout's runs, child processes included."""
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
