"""Tokenizers' files that are nearly right: every one is an error of one sentence that names what is wrong."""

import json
import shutil

import pytest
import torch
from peers import stored_file

from ibqlab.pretrained import CheckpointError, load_generator, load_tokenizer
from ibqlab.pretrained.containers import find_weights
from ibqlab.pretrained.families.llamagen import LlamaGen
from ibqlab.pretrained.names import DECAY
from ibqlab.pretrained.tensor_files import file_kind, load_content

LDM, LLAMAGEN, SIMVQ = "ldm_vq_noattn", "llamagen_vq", "simvq"
CODES, CONV = "quantize.embedding.weight", "encoder.conv_in.weight"


def without_numbers(state: dict, key: str) -> dict:
    return state | {key: state[key][:0]}


DAMAGED = {
    "no channels": (LDM, lambda state: without_numbers(state, CONV), "VQ first stage of latent-diffusion.*shapes are"),
    "no codes": (LDM, lambda state: without_numbers(state, CODES), "latent-diffusion.*codebook_size must be at least"),
    "one code": (SIMVQ, lambda state: state | {CODES: state[CODES][:1]}, "SimVQ.*codebook_size must be at least 2"),
    "no dimension": (LDM, lambda state: state | {CODES: state[CODES][:, :0]}, "code_dim must be at least 1"),
    "a codebook of another width": (SIMVQ, lambda state: state | {CODES: state[CODES][:, :1]}, "must equal"),
    "names with line breaks": (
        LDM,
        lambda state: {f"{key}\n": value for key, value in state.items()},
        "no image tokenizer",
    ),
    "a name of ours for averages": (LDM, lambda state: state | {"averages/x": torch.ones(1)}, "'averages/x'"),
    "two decays": (LDM, lambda state: state | {DECAY: torch.zeros(2)}, r"model_ema.decay must be one number; got \(2,"),
    "a header with a number": (LDM, lambda state: {"state_dict": state, "ibqlab": {"quantizer": 5}}, "header names"),
    "an unknown quantizer": (LDM, lambda state: {"model": state, "ibqlab": {"quantizer": "x1"}}, "quantizer 'x1'"),
    "a million blocks": (
        LDM,
        lambda state: state | {"encoder.down.0.block.999999.norm1.weight": torch.ones(32)},
        r"encoder.down.0.block.*missing, and there are some of 999,999",
    ),
    "averages twice": (SIMVQ, lambda state: {"model": state, "ema": state}, "averaged weights stand twice"),
    "averages of averages": (SIMVQ, lambda state: {"ema": state}, "averaged weights stand twice"),
    "a tensor under two systems' names": (
        LLAMAGEN,
        lambda state: state | {"decoder.mid.block_1.norm1.weight": state["decoder.mid.0.norm1.weight"] + 1},
        "'decoder.mid.0.norm1.weight' and 'decoder.mid.block_1.norm1.weight' are two names of one",
    ),
}


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGED.values(), ids=DAMAGED)
def test_one_error_says_what_is_wrong(tmp_path, name, damage, says):
    torch.save(damage(state_dict(name, tmp_path)), tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError, match=says) as caught:
        load_tokenizer(tmp_path / "damaged.pt")
    assert "damaged.pt: " in str(caught.value)


@pytest.mark.parametrize(
    "word", ["num_vq_embeddings", "vq_embed_dim", "latent_channels", "layers_per_block", "norm_num_groups"]
)
def test_a_folder_whose_settings_are_of_other_weights(tmp_path, word):
    folder = tmp_path / "folder"
    shutil.copytree(stored_file("diffusers_vq", tmp_path), folder, copy_function=shutil.copyfile)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {word: 7}))
    with pytest.raises(CheckpointError, match=f"VQModel.*its config.json says {word} 7"):
        load_tokenizer(folder)


def test_a_generator_without_hidden_units_is_refused_and_its_averages_are_told(tmp_path):
    state = state_dict("llamagen_gpt", tmp_path)
    torch.save({"model": state, "ema": state}, tmp_path / "generator.pt")
    report = load_generator(tmp_path / "generator.pt", num_heads=2, grid_size=4).load_report
    assert report.entries == ("averaged weights",)
    hidden = "layers.0.feed_forward.w1.weight"
    torch.save(state | {hidden: state[hidden][:0]}, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError, match="hidden width must be 8/3"):
        load_generator(tmp_path / "damaged.pt", num_heads=2, grid_size=4)


def test_names_are_looked_through_once_a_file():
    """Levels are counted from the other end, which every name's renaming needs and none counts again."""

    class Names(dict):
        times = 0

        def __iter__(self):
            Names.times += 1
            return super().__iter__()

    names = Names.fromkeys([f"decoder.conv_blocks.{level}.res.0.conv1.weight" for level in range(50)])
    ours = [LlamaGen().rename(key, names) for key in list(names)]
    assert ours[0] == "decoder.up.49.block.0.conv1.weight"
    assert Names.times <= 2


def state_dict(name: str, folder) -> dict:
    """The tensors of a set of golden values by the names in its file."""
    path = stored_file(name, folder)
    content, make_tensors, _ = load_content(path, file_kind(path))
    return find_weights(path, content, make_tensors).tensors
