"""The same surroundings for every test: one thread, no window system, runs in a folder that is thrown away.

`make test` runs one worker per core. Tests that share something costly or something of the whole machine stay together
in one worker (`SHARED`); the longest files start first, and single tests fill the gaps.
"""

import multiprocessing.spawn
import os
import signal
import sys
from pathlib import Path

# Before torch and matplotlib are imported, and inherited by child processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, on tensors of the CPU. Read when triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from warm import WarmPython

from ibqlab.quantizers import base
from ibqlab.recipes import plugins

torch.set_num_threads(1)
pytest.register_assert_rewrite("browsers", "map_hands", "training_hands")  # which say what arrived instead
# jsonschema, which reads notebooks, would build 39 grammars of addresses first, and no notebook has an address.
sys.modules["rfc3987_syntax"] = None

# A shell starts what goes on in the background deaf to Ctrl-C; processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST_FIRST = (
    *("test_browser_notebooks", "test_browser", "test_browser_views", "test_browser_app", "test_browser_runs"),
    *("test_ablations", "test_doors", "test_run_folder", "test_engine", "test_studies", "test_slurm"),
    *("test_readme", "test_notebooks", "test_benchmarks", "test_speed", "test_plan", "test_training", "test_kills"),
)
"""Files in the order in which they start; all others follow. Those of browsers wait more than they work."""
SHARED = {
    *("test_ablations", "test_alarm", "test_atlas", "test_browser", "test_browser_app", "test_browser_notebooks"),
    *("test_browser_runs", "test_browser_views"),
    *("test_cards_widgets", "test_cases", "test_codebook_map", "test_doors", "test_engine", "test_exports"),
    *("test_fair_comparison", "test_feature_code_map", "test_generating", "test_generator_training"),
    *("test_installed", "test_link_stages", "test_magvit2", "test_measures", "test_metrics_evaluation"),
    *("test_metrics_features", "test_metrics_pixels", "test_monitor", "test_plots", "test_run_browser"),
    *("test_run_folder", "test_sampling_runs", "test_settings_are_read", "test_shards", "test_slurm"),
    *("test_studies", "test_token_costs", "test_tokenizer", "test_tokens_store", "test_training"),
    *("test_training_view", "test_views", "test_waiting", "test_widgets"),
}
"""Files whose tests share something that takes long to make, or Slurm's daemons."""


def pytest_collection_modifyitems(items):
    """The longest first."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's, which a run of one file does without
def pytest_xdist_make_scheduler(config, log):
    """Hands out whole files where their tests share something, else single tests.

    By ourselves, since pytest-xdist 3.8 writes its groups where pytest 9.2 no longer looks for them.
    """
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            stem = Path(nodeid.partition("::")[0]).stem
            return stem if stem in SHARED else nodeid

    return Together(config, log)


@pytest.fixture(scope="session")
def _warm_python(tmp_path_factory):
    """The server of forks and its program; None where the system has not what they need."""
    server = WarmPython(tmp_path_factory.mktemp("warm")) if hasattr(os, "pidfd_open") else None
    yield server
    if server:
        server.stop()


@pytest.fixture(scope="module")
def warm_start(_warm_python):
    """Python processes of a test, and theirs, are forks of one that has imported the libraries: see `warm`."""
    with pytest.MonkeyPatch.context() as patch:
        if _warm_python:
            patch.setattr(sys, "executable", str(_warm_python.program))
            patch.setattr(multiprocessing.spawn, "_python_exe", os.fsencode(_warm_python.program))
        yield


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    from browsers import chromium  # noqa: PLC0415

    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def notebooks(request, tmp_path_factory):
    """A folder with the notebooks that the test file names in `NOTEBOOKS`, with settings and runs of its own."""
    from browsers import notebook_folder  # noqa: PLC0415

    with notebook_folder(tmp_path_factory.mktemp("lab"), request.module.NOTEBOOKS) as folder:
        yield folder


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """One cache for all tests, workers and child processes included, and none of the user's."""
    base = tmp_path_factory.getbasetemp()
    workers_share = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["IBQLAB_CACHE"] = str(workers_share / "cache")


@pytest.fixture(autouse=True)
def _runs_elsewhere(tmp_path, monkeypatch):
    """No test writes into the checkout's runs, child processes included."""
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is known in that test alone, because others go over all quantizers."""
    monkeypatch.setattr(base, "_PRESETS", dict(base._PRESETS))
    monkeypatch.setattr(plugins, "_LOADED", dict(plugins._LOADED))
    monkeypatch.setattr(plugins, "_REGISTERED", dict(plugins._REGISTERED))
