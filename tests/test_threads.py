"""Threads wait asleep in every process that imports ibqlab, whoever starts it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MAPPED = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
GOMP = next(line.split(maxsplit=5)[5] for line in MAPPED if "libgomp" in line)
"""Torch's library of threads, which conftest has loaded. Loaded alone, it takes none of torch's seconds."""
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def policy(code, **variables):
    """What torch's library of threads says when it is loaded: its policy and its number of spins."""
    clean = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"OMP_DISPLAY_ENV": "VERBOSE"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return [re.search(rf"{name} = '(\w+)'", done.stderr)[1] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]


@pytest.mark.parametrize(
    "code",
    [
        "import ibqlab.training",
        "import ibqlab.config, torch",
        "import ibqlab, subprocess, sys; subprocess.run([sys.executable, '-c', 'import torch'])",
    ],
    ids=["package", "torch afterwards", "child"],
)
def test_threads_wait_asleep(code):
    assert policy(code) == ["PASSIVE", "0"]


def test_an_explicit_value_wins():
    load = f"import ctypes; ctypes.CDLL({GOMP!r})"
    assert policy(f"import ibqlab; {load}") == ["PASSIVE", "0"]  # loaded alone, it sees what the package sets
    assert policy(f"import ibqlab; {load}", OMP_WAIT_POLICY="ACTIVE")[0] == "ACTIVE"
    assert policy(f"import ibqlab; {load}", GOMP_SPINCOUNT="300000") == policy(load)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_ibqlab_before_torch(notebook):
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    imports = re.findall(r"^(?:from|import) (\w+)", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    first = imports.index("ibqlab")
    assert set(imports[:first]) <= {"IPython", "time"}
