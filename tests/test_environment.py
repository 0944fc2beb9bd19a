"""The one lock serves pip, conda and Binder; importing the package is quick and light."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text().splitlines()


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def locked():
    """Pins of the lock that apply here: name → version."""
    pins = [Requirement(line) for line in LOCK if line.strip() and not line.startswith("#")]
    return {
        canonical(pin.name): Version(str(pin.specifier).removeprefix("=="))
        for pin in pins
        if not pin.marker or pin.marker.evaluate()
    }


def required():
    extras = PROJECT["optional-dependencies"]
    texts = PROJECT["dependencies"] + [text for name, group in extras.items() if name != "all" for text in group]
    return [Requirement(text) for text in texts]


def test_every_line_of_the_lock_is_an_exact_pin():
    assert len(LOCK) > 100
    assert all(re.match(r"^[A-Za-z0-9_.\-]+==[^ ]+( ; .+)?$", line) for line in LOCK)


@pytest.mark.parametrize("requirement", required(), ids=lambda r: r.name)
def test_the_lock_satisfies_pyproject(requirement):
    assert locked()[canonical(requirement.name)] in requirement.specifier


def test_this_environment_is_the_locked_one():
    from importlib.metadata import version  # noqa: PLC0415

    for requirement in required():
        assert Version(version(requirement.name)).public == locked()[canonical(requirement.name)].public, requirement


def test_the_packages_that_define_the_project_are_required():
    names = {canonical(requirement.name) for requirement in required()}
    fixed = {"torch", "jupyterlab", "ipywidgets", "matplotlib", "umap-learn", "scikit-learn"}
    assert fixed | {"lpips", "torch-fidelity", "papermill"} <= names


def test_conda_and_binder_take_their_versions_from_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    assert Version(python.split("=")[1]) >= Version("3.11")
    assert ">=" + python.split("=")[1] == PROJECT["requires-python"]


def test_the_torch_that_torchvision_cannot_be_imported_with_is_excluded():
    torch, vision = (next(r for r in required() if r.name == name) for name in ("torch", "torchvision"))
    assert "2.13.0" not in torch.specifier
    assert "0.28.0" not in vision.specifier
    assert "2.11.0" in torch.specifier


def imported_by(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_ibqlab_pulls_in_nothing_heavy():
    heavy = {"torch", "umap", "lpips", "matplotlib", "IPython", "ipywidgets", "papermill"}
    assert not heavy & imported_by("import ibqlab")


def test_training_needs_no_notebook_plotting_or_metric_package():
    absent = {"umap", "lpips", "torch_fidelity", "papermill", "IPython", "ipywidgets", "matplotlib", "numba"}
    loaded = imported_by("import ibqlab.training, ibqlab.quantizers, ibqlab.runs, ibqlab.diagnostics")
    assert "torch" in loaded
    assert not absent & loaded
