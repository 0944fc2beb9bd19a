"""What the README says is true: its code runs, its files are there, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ibqlab.quantizers import available_quantizers, build_quantizer
from ibqlab.quantizers.base import _PRESETS
from ibqlab.training import recipe_config, train, train_generator

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "experiments").glob("*.md"))]


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_python_block_runs_and_registers_a_quantizer():
    block = BLOCKS[0]
    names = available_quantizers()
    assert str(names) in block
    try:
        exec(block, {"__name__": "readme"})
        assert "dot_vq" in available_quantizers()
        assert build_quantizer("dot_vq", codebook_size=8, code_dim=2).codebook.shape == (8, 2)
    finally:
        _PRESETS.pop("dot_vq", None)


def test_the_second_python_block_draws_images(tmp_path, monkeypatch):
    """From the run folders that the commands above it leave behind, after a step each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IBQLAB_RUNS", str(tmp_path / "runs"))
    train(recipe_config("builtin/digits", {"steps": 1}), "runs/digits", progress=False)
    small = {"generator.depth": 1, "generator.width": 16, "steps": 1, "record.validation_images": 8}
    train_generator(recipe_config("builtin/digits_generator", small), "runs/digits_generator", progress=False)
    names = {"labels": torch.tensor([3, 8])}
    exec(BLOCKS[1], names)
    assert names["images"].shape == (2, 3, 16, 16)
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_and_picture_leads_somewhere(document):
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


def test_every_entry_of_the_tree_exists():
    (tree,) = re.findall(r"```\n(notebooks/ .*?)```", README, re.DOTALL)
    package = re.findall(r"^  (\w+(?:/|\.py)) ", tree.split("ibqlab/\n")[1], re.MULTILINE)
    assert len(package) > 10
    assert all((ROOT / "ibqlab" / entry).exists() for entry in package)
    top = {"notebooks", "experiments", "ibqlab", "tests", "Makefile", "requirements.lock", "environment.yml"}
    assert all(name in tree and (ROOT / name).exists() for name in top)


def test_every_package_of_the_library_is_in_the_tree():
    packages = {path.parent.name for path in (ROOT / "ibqlab").glob("*/__init__.py")}
    assert all(f"{name}/" in README for name in packages)


def test_every_command_exists():
    shown = subprocess.run(
        [sys.executable, "-m", "ibqlab", "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = {"run", "report", "train", "tokenize", "sample", "plan", "runs", "show", "inspect", "download", "export"}
    commands = set(re.findall(rf"ibqlab ({'|'.join(known)})\b", README))
    assert commands == known
    assert all(command in shown for command in commands)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)", README)) <= targets
