"""Every notebook keeps the rules of the house and runs from start to end under its smallest preset."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from ibqlab.config import load_yaml
from ibqlab.notebooks.catalogue import START_PAGE
from ibqlab.notebooks.parameters import notebook_parameters
from ibqlab.recipes.presets import preset_names
from ibqlab.recipes.recipe_files import EXPERIMENTS
from ibqlab.studies.table_files import PRESETS_FILE, TABLES

pytestmark = pytest.mark.usefixtures("warm_start")
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(file for file in (ROOT / "notebooks").glob("*.ipynb") if file.stem != START_PAGE)
NAMES = [path.stem for path in NOTEBOOKS]
LAB = ("playground", "features_lab")
OTHERS = ("feature_code_map", "ablations", "codebook_atlas", "link_stages", "fair_comparison", "your_case")
WITHOUT_PRESET = ("browse_runs",)
"""Those that train and measure nothing."""
DIGITS = "[steps=4, data.source=digits, generator.num_classes=10]"
"""Far fewer images than photographs have crops."""
PRESETS = {
    **{name: load_yaml(EXPERIMENTS / "studies" / f"{name}.yaml") for name in ("explore_collapse", "scale_codebook")},
    "feature_code_map": load_yaml(EXPERIMENTS / "studies" / "explore_collapse.yaml"),
    "ablations": load_yaml(TABLES / PRESETS_FILE),
    **dict.fromkeys(("train_tokenizer", "codebook_atlas"), preset_names("tokenizer")),
    **dict.fromkeys(("evaluate_tokenizer", "compare_published"), preset_names("evaluation")),
    **dict.fromkeys(("train_generator", "generation_gallery"), preset_names("generator")),
    "link_stages": preset_names("link"),
    "fair_comparison": load_yaml(TABLES / "fair_comparison.yaml"),
    **dict.fromkeys(LAB, preset_names("lab")),
    "your_case": preset_names("cases"),
}


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_the_promised_notebooks_are_there():
    promised = {"explore_collapse", "scale_codebook", "train_tokenizer", "evaluate_tokenizer", "compare_published"}
    assert promised | {"train_generator", "generation_gallery", *OTHERS, *LAB} <= set(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
class TestForm:
    def test_first_cell_says_what_to_expect(self, path):
        first = nbformat.read(path, as_version=4).cells[0]
        assert first.cell_type == "markdown"
        for word in ("Question", "appears", "CPU cores", "GPU", f"ibqlab run {path.stem}"):
            assert word in first.source, word

    def test_second_cell_holds_plain_annotated_parameters_with_a_comment_each(self, path):
        second = nbformat.read(path, as_version=4).cells[1]
        assert second.metadata.tags == ["parameters"]
        for line in second.source.splitlines():
            assert re.fullmatch(r"\w+: (str|int|float|bool|list) = [^=#]+  # .+", line), line

    def test_parameters_are_seen_by_papermill_with_their_help(self, path):
        shown = papermill.inspect_notebook(str(path))
        assert list(shown) == list(notebook_parameters(path))
        assert ("preset" in shown) == (path.stem not in WITHOUT_PRESET)
        assert shown[next(iter(shown))]["inferred_type_name"] == "str"
        assert all(parameter["help"] for parameter in shown.values())

    def test_the_comment_of_preset_names_every_preset(self, path):
        if path.stem in WITHOUT_PRESET:
            return
        comment = notebook_parameters(path)["preset"].comment
        assert all(re.search(rf"\b{preset}\b", comment) for preset in PRESETS[path.stem])

    def test_third_code_cell_hands_them_to_the_library(self, path):
        assert "read_parameters(" in cells(path, "code")[1].source

    def test_a_name_comes_from_the_package_that_has_it_at_its_root(self, path):
        """A copy that somebody has changed then survives when a module moves inside its package."""
        lines = re.findall(
            r"^from (ibqlab\.(\w+)\.[\w.]+) import (.+)$", "\n".join(c.source for c in cells(path, "code")), re.M
        )
        for module, package, names in lines:
            root = importlib.import_module(f"ibqlab.{package}")
            at_root = [name for name in names.split(", ") if name in getattr(root, "__all__", ())]
            assert not at_root, f"{path.name}: {', '.join(at_root)} from ibqlab.{package}, not from {module}"

    def test_cells_are_short_and_define_nothing(self, path):
        for cell in cells(path, "code"):
            assert len(cell.source.splitlines()) <= 20
            assert not re.search(r"^\s*(def|class|async def) ", cell.source, re.MULTILINE)

    def test_stored_without_outputs(self, path):
        stored = json.loads(path.read_text())
        assert set(stored["metadata"]) <= {"kernelspec"}
        for cell in stored["cells"]:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None


def run_papermill(notebook, folder, *parameters):
    """Execute a notebook as a newcomer would, from a folder of theirs."""
    out = folder / "OUT.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "--no-progress-bar", *parameters]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=dict(os.environ))
    return done, out


def pictures(out):
    outputs = [output for cell in cells(out, "code") for output in cell.outputs if "data" in output]
    return sum("image/png" in output.data for output in outputs)


@pytest.mark.parametrize(
    ("name", "parameters", "figures"),
    [
        ("explore_collapse", ["-p", "projection", "pca"], 7),
        ("feature_code_map", ["-p", "projection", "pca"], 4),
        ("scale_codebook", ["-p", "steps", "6"], 2),
        ("ablations", ["-p", "tables", "[key_designs, lfq, soft_vq]"], 4),
        ("train_tokenizer", ["-p", "projection", "pca"], 4),
        ("codebook_atlas", ["-p", "count", "8"], 0),
        ("evaluate_tokenizer", ["-p", "limit", "8"], 2),
        ("compare_published", ["-p", "limit", "8"], 2),
        ("train_generator", ["-p", "settings", DIGITS, "-p", "tokenizer_settings", "[data.source=digits]"], 3),
        ("link_stages", ["-p", "codebook_sizes", "[64]", "-p", "lookup_free_bits", "6", "-p", "steps", "2"], 3),
        ("fair_comparison", ["-p", "methods", "[vq, ibq]", "-p", "data", "[lab]"], 1),
        ("playground", [], 3),
        ("features_lab", [], 2),
        ("your_case", ["-p", "cases", "[after_epoch_one, batch_perplexity]"], 4),
        ("generation_gallery", ["-p", "cfg_scales", "[1.0, 2.0]", "-p", "images_per_class", "2"], 5),
    ],
)
def test_runs_from_any_folder_under_smoke(name, parameters, figures, tmp_path):
    done, out = run_papermill(ROOT / "notebooks" / f"{name}.ipynb", tmp_path, "-p", "preset", "smoke", *parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pictures(out) >= figures


def test_every_notebook_is_executed_above():
    executed = {"explore_collapse", "scale_codebook", "train_tokenizer", "evaluate_tokenizer", "compare_published"}
    assert executed | {"train_generator", "generation_gallery", *OTHERS, *LAB} == set(NAMES) - {*WITHOUT_PRESET}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["-p", "codebok_sizes", "[64]"], "codebook_sizes"),
        (["-p", "codebook_sizes", "many"], "codebook_sizes"),
        (["-p", "preset", "smokey"], "smoke"),
    ],
)
def test_bad_parameters_stop_before_anything_is_trained(parameters, message, tmp_path, monkeypatch):
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
    done, _ = run_papermill(ROOT / "notebooks" / "scale_codebook.ipynb", tmp_path, *parameters)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_other_settings_stops_papermill_in_the_first_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    made = {"study": "scale_codebook", "recipe": "builtin/smoke", "steps": 0, "settings": ["data.source=pictures"]}
    (folder / "study.json").write_text(json.dumps(made))
    given = ["-p", "preset", "smoke", "-p", "output", "mine"]
    done, out = run_papermill(ROOT / "notebooks" / "scale_codebook.ipynb", tmp_path, *given)
    assert done.returncode != 0
    assert 'settings: ["data.source=pictures"] → nothing' in done.stderr
    executed = [cell for cell in cells(out, "code") if cell.execution_count and not cell.metadata.get("tags")]
    assert len(executed) == 1 and "open_study" in executed[0].source
    assert [path.name for path in folder.iterdir()] == ["study.json"]


def test_lists_passed_as_text_become_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
    parameters = ["-p", "preset", "smoke", "-p", "codebook_sizes", "[16]", "-p", "methods", "[vq]", "-p", "steps", "2"]
    done, _ = run_papermill(ROOT / "notebooks" / "scale_codebook.ipynb", tmp_path, *parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in (tmp_path / "runs" / "scale_codebook-smoke").glob("vq-*")] == [
        "vq-uniform-K16-D8-seed0"
    ]
