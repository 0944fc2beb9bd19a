"""What messages and docstrings tell people to type exists: options of commands and settings of runs."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch

import ibqlab
from ibqlab.cli import main
from ibqlab.config.assignments import dataclasses_in, field_types
from ibqlab.pretrained import CheckpointError
from ibqlab.pretrained.recognition import recognise
from ibqlab.pretrained.tensor_files import TensorFile
from ibqlab.training import GeneratorTrainConfig, TrainConfig

PACKAGE = Path(ibqlab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
SETTING = re.compile(r"(?<![\w./-])(?:data|loss|optimizer|record|tokenizer|generator|speed)(?:\.[a-z_]+)+(?![\w(/-])")
OTHER_OPTIONS = {
    "torchrun": {"--nproc-per-node", "--nnodes", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint", "--standalone"},
    "git": {"--porcelain", "--show-toplevel"},
    "squeue": {"--noheader"},
    "papermill": {"--log-level"},
    "embedding-atlas": {"--neighbors"},
    "every command": {"--help"},
}
OTHER_NAMES = {"tokenizer.safetensors", "data.pkl", "loss.perceptual_loss"}
"""Files, and tensors of published checkpoints."""


@cache
def texts(file: Path) -> list[str]:
    """All text in a module: messages, docstrings and pieces of f-strings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def options() -> set[str]:
    """Of all commands."""
    return {
        name
        for command in main.commands.values()
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }


def settings(kind: type, path: str = "") -> set[str]:
    """Dotted names of a dataclass's settings, those that hold others too; a chosen class has a name."""
    found = {f"{path}name"}
    for name, hint in field_types(kind).items():
        found.add(path + name)
        for inner in dataclasses_in(hint):
            for chosen in (inner, *inner.__subclasses__()):
                found |= settings(chosen, f"{path}{name}.")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_option_and_setting_in_a_text_exists(file):
    known = options().union(*OTHER_OPTIONS.values())
    named = {option for text in texts(file) for option in OPTION.findall(text)}
    assert named <= known
    known = settings(TrainConfig) | settings(GeneratorTrainConfig)
    named = {setting for text in texts(file) for setting in SETTING.findall(text)}
    assert named - OTHER_NAMES <= known


def test_the_scan_sees_what_does_not_exist():
    assert OPTION.findall("(with --flips for mirror images), a - b--c, --no-report") == ["--flips", "--no-report"]
    assert "--flips" not in options() and "--no-report" in options()
    assert SETTING.findall("lower loss.discriminator.num_layers, not data.sourcee") == [
        "loss.discriminator.num_layers",
        "data.sourcee",
    ]
    assert "data.sourcee" not in settings(TrainConfig)
    assert {"loss.discriminator.num_layers", "data.source"} <= settings(TrainConfig)


def test_a_message_names_tensors_as_a_terminal_may_show_them():
    with pytest.raises(CheckpointError, match=r"names begin with \\x1b\[31mlayer$") as refused:
        tensors = {"\x1b[31mlayer.weight": torch.zeros(2, 2)}
        recognise(TensorFile(path=Path("file"), format="", tensors=tensors), tensors)
    assert str(refused.value).isprintable()
