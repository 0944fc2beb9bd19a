"""What the README says is true: its commands and code run, its files are there, and it stays short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibqlab import widgets
from ibqlab.pretrained import load_tokenizer
from ibqlab.runs import Run
from ibqlab.studies import StudyParameters, open_study
from ibqlab.training import recipe_config, train

pytestmark = pytest.mark.usefixtures("warm_start")
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md"))]


def blocks(language=""):
    """Contents of the fenced blocks of a language, in their order."""
    return [
        text
        for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
        if kind == language
    ]


VIEW_BLOCK, TENSORS_BLOCK, QUANTIZER_BLOCK, STUDY_BLOCK = blocks("python")
COMMAND_BLOCKS = [block for block in blocks() if re.match(r"(ibqlab|make|papermill|torchrun) ", block)]
SMALL = {
    "ibqlab train builtin/photos": "steps=4 batch_size=4 record.log_every=2",
    "ibqlab train builtin/digits": "steps=2 record.log_every=1",
    "ibqlab train builtin/digits_generator": "steps=2 generator.depth=1 generator.width=16 record.validation_images=8",
    "ibqlab run evaluate_tokenizer": "limit=4",
    "ibqlab run explore_collapse preset=smoke output": "methods=[vq]",
    "ibqlab run explore_collapse preset=smoke methods": "methods=[dot_vq] initialisations=[published]",
    "make demo": "PRESET=smoke",
    "make test": "TESTS=tests/test_resizing.py",
}
"""What makes a command of the README small enough for a test; all else is run as it stands."""


def small(command):
    """A command of the README as words, at a size for tests."""
    command = re.sub(r"preset=(laptop|demo)", "preset=smoke", command.partition("  #")[0].strip())
    command = re.sub(r"--images-per-class \d+", "--images-per-class 1", command)
    words = shlex.split(command)
    for start, settings in SMALL.items():
        if " ".join(words).startswith(start):
            words += settings.split()
    return words


def run(words, folder):
    """A command of the README, with what it names by capitals replaced; its standard output."""
    words = [word.replace("IMAGES", "images").replace("CHECKPOINT", "mine.ckpt") for word in words]
    if words[0] == "make":
        if not (ROOT / ".venv" / ".ready").exists():
            pytest.skip("make would build its own environment first; run the tests by `make test`")
        words = ["make", "-C", str(ROOT), *words[1:]]
    else:
        words = [sys.executable, "-m", *words]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the README's reader has: images, a run, a checkpoint, the notebooks."""
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(pixels.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(f"images/{number}.png")
    (tmp_path / "my_quantizer.py").write_text(QUANTIZER_BLOCK)
    return tmp_path


@pytest.fixture
def trained(workplace):
    """The workplace of somebody who has trained `mine` and has it as a checkpoint of published names, too."""
    from ibqlab.pretrained import export_published  # noqa: PLC0415

    train(recipe_config("builtin/smoke", {"steps": 2}), "runs/mine", progress=False)
    export_published("runs/mine", Path("mine.ckpt"))
    return workplace


@pytest.mark.parametrize("block", COMMAND_BLOCKS, ids=lambda block: block.split("\n")[0][:40].replace(" ", "_"))
def test_every_command_runs(block, request):
    commands = [line for line in block.splitlines() if line.strip()]
    has_run = any("--output mine" in line for line in commands) or not re.search(r"\bmine\b|CHECKPOINT", block)
    folder = request.getfixturevalue("workplace" if has_run else "trained")
    for command in commands:
        run(small(command), folder)


def test_the_chain_ends_with_images(workplace):
    (block,) = (block for block in COMMAND_BLOCKS if "ibqlab sample" in block)
    for command in block.splitlines():
        run(small(command), workplace)
    (archive,) = (workplace / "runs").glob("*samples*/samples.npz")
    with np.load(archive) as stored:
        assert stored["arr_0"].shape[0] == 10


def test_a_command_that_fails_fails_the_test(workplace):
    with pytest.raises(AssertionError, match="no notebook"):
        run(small("ibqlab run no_such_notebook"), workplace)


def test_the_quantizer_of_the_readme_trains(workplace):
    settings = {"tokenizer.quantizer.name": "dot_vq", "steps": 2}
    run = train(recipe_config("builtin/smoke", settings, plugins=["my_quantizer.py"]), "runs/dot_vq", progress=False)
    assert run.status == "finished"
    assert {"step", "validation_usage", "validation_psnr"} <= set(run.metrics)
    quantizer = load_tokenizer(run.path, "raw").quantizer
    out = quantizer(torch.randn(2, quantizer.config.code_dim, 3, 3))
    assert torch.equal(quantizer.decode(out.indices), out.quantized)


def test_ones_own_tensors_become_numbers_figures_and_a_run(workplace, capsys):
    names = {}
    exec(TENSORS_BLOCK, names)
    assert "% of 1,024 codes in 20,000 tokens" in capsys.readouterr().out
    assert names["histogram"].axes
    assert names["code_map"].axes
    assert Run("runs/my_model").status == "finished"


def test_a_finished_study_is_opened(workplace):
    open_study("explore_collapse", StudyParameters(preset="smoke", output="my_collapse")).run(progress=False).check()
    names = {}
    exec(STUDY_BLOCK, names)
    assert len(names["study"].finished()) == len(names["study"].cells)
    (run,) = Path("runs/my_collapse").glob("ibq-normal-*")
    exec(re.sub(r'"explore_collapse-demo/ibq-normal-[^"]+"', f'"my_collapse/{run.name}"', VIEW_BLOCK), names)
    assert names["view"].data.name == run.name


def test_all_its_blocks_are_tried():
    assert len(COMMAND_BLOCKS) == len(blocks()) - 1  # the other one is the tree
    assert sum(len(block.splitlines()) for block in COMMAND_BLOCKS) >= 14


def test_it_is_short():
    assert len(README.split()) <= 1600


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_and_picture_leads_somewhere(document):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


def heading_anchor(line):
    return re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_anchor_leads_to_a_heading(document):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        text = (document.parent / target if target else document).read_text(encoding="utf-8")
        assert anchor in [heading_anchor(line) for line in text.splitlines() if line.startswith("#")], anchor


def test_every_entry_of_the_tree_exists():
    (tree,) = (block for block in blocks() if block.startswith("notebooks/ "))
    inside = re.split(r"^ibqlab/.*\n", tree, flags=re.MULTILINE)[1].split("\ntests/")[0]
    package = [name for line in inside.splitlines() for name in re.findall(r"(\w+/|\w+\.py)(?=  )", line)]
    assert len(package) > 10
    assert all((ROOT / "ibqlab" / entry).exists() for entry in package)
    top = {"notebooks", "experiments", "ibqlab", "tests", "Makefile", "requirements.lock", "environment.yml"}
    assert all(name in tree and (ROOT / name).exists() for name in top)


def test_every_package_of_the_library_is_in_the_tree():
    packages = {path.parent.name for path in (ROOT / "ibqlab").glob("*/__init__.py")}
    assert all(f"{name}/" in README for name in packages)


def test_every_notebook_is_in_the_table():
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"index"}  # the page that shows the others
    assert all(f"| `{name}` |" in README for name in names)


def test_every_view_it_names_is_there():
    names = re.findall(r"^\| `(\w+)\(run\b.*?\)` \|", README, re.MULTILINE)
    assert len(names) >= 4 and set(names) <= set(widgets.__all__)


def test_every_command_of_the_program_is_there():
    from ibqlab.cli import main  # noqa: PLC0415

    assert set(re.findall(r"ibqlab ([a-z]+)\b", README)) == set(main.commands)
