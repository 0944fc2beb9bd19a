"""Exports as files: of two at once the first one stands, and a full disk is told in one message."""

import pytest
from test_pretrained_generators import tiny_tokenizer

from ibqlab.pretrained import export_tokenizer
from ibqlab.pretrained.export import TargetExists, save_checkpoint_file, whole_file
from ibqlab.runs import RunError


def test_of_two_at_once_the_first_one_stands(tmp_path):
    target = tmp_path / "x.ckpt"
    with pytest.raises(TargetExists, match="is there already and was not changed"), whole_file(target):
        save_checkpoint_file({"a": 1}, target)
        content = target.read_bytes()
    assert target.read_bytes() == content
    with pytest.raises(RunError, match="is there already"):
        export_tokenizer(tiny_tokenizer(), target.replace(tmp_path / "x.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import torch  # noqa: PLC0415

    def full(content, stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="disk or a quota is full"):
        save_checkpoint_file({}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []
