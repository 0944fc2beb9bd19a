"""Where a file keeps its weights: entries within entries, prefixes, averages beside them."""

import argparse
from pathlib import Path

import pytest
import torch
from golden import golden_file

from ibqlab.pretrained import CheckpointError
from ibqlab.pretrained.containers import AVERAGES, HOLDERS
from ibqlab.pretrained.tensor_files import open_tensor_file

WEIGHTS = {"encoder.weight": torch.arange(6.0).reshape(2, 3), "quantize.codes": torch.ones(4)}
AVERAGED = {name: value + 1 for name, value in WEIGHTS.items()}


def opened(path: Path, content: object):
    torch.save(content, path)
    return open_tensor_file(path)


def same(found, expected) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def prefixed(prefix: str, weights=WEIGHTS) -> dict:
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("content", "holder", "entries"),
    [
        (WEIGHTS, "", ()),
        ({"state_dict": WEIGHTS, "epoch": 3}, "state_dict", ("epoch",)),
        ({"model": {"state_dict": {"module": WEIGHTS}}}, "model/state_dict/module", ()),
        ({"state_dict": {"model": WEIGHTS, "step": 1}, "args": {}}, "state_dict/model", ("args", "state_dict/step")),
        ({"model": {"state_dict": {"module": prefixed("module._orig_mod.")}}}, "model/state_dict/module", ()),
        ({"model": WEIGHTS, "discriminator": WEIGHTS, "steps": 7}, "model", ("discriminator", "steps")),
        ({"model": WEIGHTS, "args": argparse.Namespace()}, "model", ("args",)),
        ({"ema": WEIGHTS, "steps": 7}, "ema", ("steps",)),
        ({"state_dict_ema": {"module": prefixed("module.")}}, "state_dict_ema/module", ()),
    ],
)
def test_weights_at_any_depth(tmp_path, content, holder, entries):
    file = opened(tmp_path / "file.bin", content)
    assert same(file.tensors, WEIGHTS)
    assert (file.holder, file.entries, dict(file.averages)) == (holder, entries, {})
    assert ("entry" in str(file.wrappers)) == (holder not in ("", "state_dict"))


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("below", ["", "module", "state_dict"])
def test_averages_beside_the_weights(tmp_path, name, below):
    averages = {below: prefixed("module.", AVERAGED)} if below else AVERAGED
    file = opened(tmp_path / "file.pth", {"model": prefixed("_orig_mod."), name: averages, "steps": 1})
    assert same(file.tensors, WEIGHTS) and same(file.averages, AVERAGED)
    assert file.entries == ("steps",) and file.holder == "model"


def test_averages_within_the_outer_entry(tmp_path):
    file = opened(tmp_path / "file.pt", {"model": {"state_dict": WEIGHTS, "ema": AVERAGED}, "ema": 0.9})
    assert same(file.averages, AVERAGED) and file.entries == ("ema",)


@pytest.mark.parametrize(
    ("averages", "says"),
    [
        ({"encoder.weight": torch.zeros(2, 3)}, r"under 'ema' .* 1 missing \(quantize\.codes\)"),
        (AVERAGED | {"other": torch.zeros(1)}, r"under 'ema' .* 1 unknown \(other\)"),
        (AVERAGED | {"quantize.codes": torch.zeros(5)}, r"under 'ema' .* 1 of another shape \(quantize\.codes\)"),
        (AVERAGED | {"quantize.codes": torch.zeros(4).to_sparse()}, r"quantize\.codes' is sparse"),
    ],
)
def test_averages_of_another_model_are_refused(tmp_path, averages, says):
    with pytest.raises(CheckpointError, match=says):
        opened(tmp_path / "file.pt", {"model": WEIGHTS, "ema": averages})


def test_averages_of_another_form_are_an_entry(tmp_path):
    file = opened(tmp_path / "file.pt", {"model": WEIGHTS, "ema": {"decay": 0.99, "shadow": [torch.ones(1)]}})
    assert not file.averages and file.entries == ("ema",)


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_dict_that_holds_itself_is_refused(tmp_path, holder):
    content: dict = {}
    content[holder] = {holder: content}
    with pytest.raises(CheckpointError, match=f"got {holder} instead"):
        opened(tmp_path / "file.pt", content)


@pytest.mark.parametrize("content", [{"model": {}}, {"state_dict": {"model": {}}}, {"ema": 1}, {}])
def test_nothing_to_be_found_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match="must hold tensors by name"):
        opened(tmp_path / "file.pt", content)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", ["bin", "pth", "pt", "ckpt", "safetensors", "weights"])
def test_half_precision_under_any_name(tmp_path, kind, ending):
    half = {name: value.to(kind) for name, value in WEIGHTS.items()}
    file = opened(tmp_path / f"file.{ending}", {"model": half, "ema": half})
    assert same(file.tensors, half) and {value.dtype for value in file.averages.values()} == {kind}


@pytest.mark.parametrize(
    ("name", "holder", "entries"),
    [
        ("llamagen_vq_official.pt", "model", ()),
        ("vqgan_lc_official.pth", "state_dict", ("opt_ae", "opt_dist", "epoch", "scaler_ae", "scaler_dist")),
        ("titok_official.bin", "", ()),
        ("maskbit_lfq_official.bin", "", ()),
    ],
)
def test_containers_of_the_published_code(tmp_path, name, holder, entries):
    """As they are, and as their training loops save them: with the arguments, and LlamaGen's with averages."""
    path = golden_file(f"peers/{name}")
    file = open_tensor_file(path)
    assert (file.holder, file.entries) == (holder, entries)
    content = torch.load(path, weights_only=True)
    outer = content if holder else {"model": content}
    weights = outer[holder or "model"]
    ema = {key: value + 1 for key, value in weights.items()}
    again = opened(tmp_path / name, outer | {"args": argparse.Namespace(lr=1.0), "ema": ema})
    assert same(again.tensors, file.tensors) and same(again.averages, ema)
    assert again.stand_ins == ("argparse.Namespace",) and "args" in again.entries
