"""What somebody has who installs the wheel and never sees the checkout: every recipe, every notebook, every command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ibqlab.base.resources import resource_folder

ROOT = Path(__file__).resolve().parents[1]


def uv(*words):
    """uv with its cache alone, which the build of this environment has filled; over the network where it was not."""
    command = [sys.executable, "-m", "uv", *words]
    done = subprocess.run([*command, "--offline"], capture_output=True, text=True, check=False)
    if done.returncode:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel was installed into, in front of this environment's packages."""
    built, target = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("installed")
    uv("build", "--wheel", "--quiet", "--python", sys.executable, "--out-dir", str(built), str(ROOT))
    (wheel,) = built.glob("*.whl")
    uv("pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(target), str(wheel))
    return target


@pytest.fixture
def run(installed, tmp_path, monkeypatch):
    """Runs a program in a folder that is no checkout, with the installed package; gives what it printed."""
    monkeypatch.delenv("IBQLAB_RUNS", raising=False)

    def run(*words, code=0):
        settings = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout if code == 0 else done.stderr

    return run


@pytest.fixture
def ibqlab(installed, run):
    """The installed program `ibqlab`."""
    return lambda *words, code=0: run(str(installed / "bin" / "ibqlab"), *words, code=code)


def files_below(folder, pattern):
    return {file.relative_to(folder).as_posix() for file in folder.glob(pattern)}


def test_the_wheel_holds_the_recipes_and_notebooks_of_the_checkout(installed):
    for name, pattern in (("experiments", "*/*.yaml"), ("notebooks", "*.ipynb")):
        inside = installed / "ibqlab" / "resources" / name
        assert resource_folder(name) == ROOT / name
        assert files_below(inside, pattern) == files_below(ROOT / name, pattern) != set()
    assert not list(installed.rglob("*.png")) and not list(installed.glob("experiments"))


NAMES = """
import json, sys, ibqlab
from ibqlab.costs.time_and_price import measured_speeds
from ibqlab.recipes.published import published_rows
from ibqlab.recipes.recipe_files import recipe_config
from ibqlab.studies.table_files import read_table, table_names

recipes = json.loads(sys.argv[1])
print(json.dumps({
    "file": ibqlab.__file__,
    "recipes": sum(recipe_config(name) is not None for name in recipes),
    "tables": [read_table(name).title for name in table_names()],
    "published": list(published_rows()),
    "speeds": len(measured_speeds()),
}))
"""


def test_every_recipe_and_table_is_found_by_its_name(installed, run):
    others = ("published", "studies", "tables", "results")
    files = [file for file in (ROOT / "experiments").glob("*/*.yaml") if file.parent.name not in others]
    names = [f"{file.parent.name}/{file.stem}" for file in files]
    seen = json.loads(run(sys.executable, "-c", NAMES, json.dumps(names)))
    assert Path(seen["file"]).is_relative_to(installed)
    assert seen["recipes"] == len(names) > 25
    assert len(seen["tables"]) > 5 and len(seen["published"]) > 5


def test_a_notebook_runs_by_its_name(ibqlab, tmp_path):
    said = ibqlab("run", "explore_collapse", "preset=smoke", "projection=pca", "methods=[vq]")
    study = tmp_path / "runs" / "explore_collapse-smoke"
    assert f"report: {study / 'report.html'}" in said and "result: " in said
    (facts, *_) = [json.loads(file.read_text()) for file in study.glob("*/provenance.json")]
    # What ran was the installed package, in the kernel and in the cells' processes, too.
    assert facts["commit"] is None and facts["versions"]["ibqlab"]


def test_notebooks_are_copied_out_and_changed_ones_are_left_alone(ibqlab, tmp_path):
    said = ibqlab("notebooks", "my lab")
    copies = files_below(tmp_path / "my lab", "*")
    assert copies == files_below(ROOT / "notebooks", "*.ipynb")
    assert "open them: jupyter lab 'my lab'" in said
    assert "ibqlab run 'my lab/explore_collapse.ipynb' preset=smoke" in said
    assert "parameters of explore_collapse.ipynb" in ibqlab("run", "my lab/explore_collapse.ipynb", "--help")


START = """
import sys
from ibqlab.notebooks.app import JUPYTER
from ibqlab.notebooks.start_page import StartPage

print(StartPage(sys.argv[1])._repr_mimebundle_()["text/html"].count("data:image/webp"))
print((JUPYTER / "voila" / "templates" / "ibqlab" / "index.html.j2").is_file())
"""


def test_the_start_page_of_the_installed_notebooks_has_its_pictures(installed, run):
    pictures, has_template = run(sys.executable, "-c", START, str(installed / "ibqlab/resources/notebooks")).split()
    assert int(pictures) >= 8 and has_template == "True"
