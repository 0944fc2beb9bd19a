"""MaskGIT's, MaskBit's and VQGAN+'s tokenizers: the published values, number for number, and which file is whose."""

import pytest
import torch
from golden import golden
from peers import FORWARD, check_forward, check_quantizer, check_training, full_size, opened, same, stored_file
from torch import Tensor

from ibqlab.pretrained import CheckpointError, load_tokenizer
from ibqlab.tokenizer import Tokenizer

CODEBOOK = {"grad_codebook": "codes.weight"}


def state_of(name, tmp_path) -> dict[str, Tensor]:
    """The tensors of a published file by their names there."""
    return torch.load(stored_file(name, tmp_path), weights_only=True)


def saved(state, tmp_path):
    torch.save(state, tmp_path / "changed.bin")
    return tmp_path / "changed.bin"


class TestPublishedValues:
    def test_maskgit(self, tmp_path):
        tokenizer = opened("maskgit_vqgan", tmp_path)
        assert tokenizer.load_report.format.endswith("a VQGAN of MaskGIT (1d-tokenizer)")
        check_forward("maskgit_vqgan", tokenizer, low=0)
        check_quantizer("maskgit_vqgan", tokenizer, CODEBOOK, {"quant_loss": "loss"})
        check_training("maskgit_vqgan", tokenizer, low=0)
        _, values = golden("peers/maskgit_vqgan")
        with torch.no_grad():
            images = tokenizer(2 * values["x"] - 1).reconstruction
            assert images.abs().max() > 1  # nothing is clamped here; the published decode does
            same(((images + 1) / 2).clamp(0, 1), values["out/x_rec_clamped"])

    def test_maskbit(self, tmp_path):
        tokenizer = opened("maskbit_lfq", tmp_path)
        assert tokenizer.load_report.format.endswith("a tokenizer of MaskBit")
        check_forward("maskbit_lfq", tokenizer, low=0)
        terms = {
            "quantizer_loss": "loss",
            "commitment_loss": "0.25 * commitment",
            "entropy_loss": "0.02 * (sample_entropy - average_entropy)",
            "per_sample_entropy": "sample_entropy",
            "avg_entropy": "average_entropy",
        }
        check_quantizer("maskbit_lfq", tokenizer, {}, terms)
        check_training("maskbit_lfq", tokenizer, low=0, squared=True)
        _, values = golden("peers/maskbit_lfq")
        codes = tokenizer.quantizer.decode(values["bits/indices"].view(1, 1, -1))
        assert torch.equal(codes[0, :, 0].T, values["bits/codes"])
        evaluated = tokenizer.encode(values["x"], value_range=(0, 1))
        same(evaluated.loss, values["out/loss/quantizer_loss"])
        same(0.25 * evaluated.terms["commitment"], values["out/loss/commitment_loss"])

    def test_vqgan_plus(self, tmp_path):
        tokenizer = opened("vqgan_plus", tmp_path)
        assert tokenizer.load_report.format.endswith("a tokenizer of VQGAN+ (MaskBit)")
        check_forward("vqgan_plus", tokenizer, low=0)
        terms = {"quantizer_loss": "loss", "commitment_loss": "0.25 * commitment", "codebook_loss": "codebook"}
        check_quantizer("vqgan_plus", tokenizer, CODEBOOK, terms)
        check_training("vqgan_plus", tokenizer, low=0, squared=True)
        _, values = golden("peers/vqgan_plus")
        evaluated = tokenizer.encode(values["x"], value_range=(0, 1))
        same(evaluated.loss, values["out/loss/quantizer_loss"])
        same(evaluated.terms["codebook"], values["out/loss/codebook_loss"])


@pytest.mark.parametrize(
    ("model", "family", "parts", "learned"),
    [
        ("1d-tokenizer/maskgit-vqgan-imagenet-f16-256", "maskgit", {"tokenizer": 168}, 54_515_587),
        ("maskbit/maskbit_tokenizer_14bit", "maskbit", {"tokenizer": 175, "bookkeeping": 2}, 54_489_489),
        ("maskbit/vqgan_plus_12bit", "vqgan_plus", {"tokenizer": 176}, 55_007_683),
    ],
)
def test_every_key_of_a_full_size_file_has_its_place(model, family, parts, learned):
    name, config, found = full_size(model)
    assert (name, found) == (family, parts)
    assert config.autoencoder.channel_multipliers == (1, 1, 2, 2, 4) and config.autoencoder.num_res_blocks == 2
    with torch.device("meta"):
        assert sum(p.numel() for p in Tokenizer(config).parameters()) == learned


def test_maskgit_as_maskbits_authors_saved_it(tmp_path):
    """Names of MaskBit, level 0 of the decoder at the highest resolution, no convolution to halve the size."""
    state = {
        key.replace(".block.", ".res_blocks.").replace(".mid.", ".mid.res_blocks."): value
        for key, value in state_of("maskgit_vqgan", tmp_path).items()
    }
    tokenizer = load_tokenizer(saved(state, tmp_path))
    assert tokenizer.config.autoencoder.design == "maskgit"
    assert tokenizer.load_report.format.endswith("a tokenizer of VQGAN+ (MaskBit)")
    check_forward("maskgit_vqgan", tokenizer, low=0)


class TestTablesOfSigns:
    """A file of MaskBit holds the sign vectors that follow from its bits; they must be ours."""

    def test_another_order_of_bits_is_refused(self, tmp_path):
        state = state_of("maskbit_lfq", tmp_path)
        state["quantize.bits_to_indices"] = state["quantize.bits_to_indices"].flip(0)
        with pytest.raises(CheckpointError, match=r"bits_to_indices must be 1, 2, 4, .*got \[32, 16, 8, 4, 2, 1\]"):
            load_tokenizer(saved(state, tmp_path))

    def test_a_code_that_is_another(self, tmp_path):
        state = state_of("maskbit_lfq", tmp_path)
        state["quantize.codebook"][37, 2] *= -1
        with pytest.raises(CheckpointError, match=r"quantize\.codebook must hold .*; row 37 does not"):
            load_tokenizer(saved(state, tmp_path))

    @pytest.mark.parametrize("key", ["quantize.codebook", "quantize.bits_to_indices"])
    def test_another_shape(self, key, tmp_path):
        state = state_of("maskbit_lfq", tmp_path)
        state[key] = state[key][:-1]
        with pytest.raises(CheckpointError, match=rf"{key} must have the shape .* for 6 bits"):
            load_tokenizer(saved(state, tmp_path))

    def test_they_may_be_stored_in_half_precision(self, tmp_path):
        state = state_of("maskbit_lfq", tmp_path)
        halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
        assert load_tokenizer(saved(halves, tmp_path)).config.quantizer.codebook_size == 64


class TestWhoseFileItIs:
    def test_no_family_needs_to_be_said(self, tmp_path):
        for name, family in (("maskgit_vqgan", "maskgit"), ("maskbit_lfq", "maskbit"), ("vqgan_plus", "vqgan_plus")):
            file = stored_file(name, tmp_path)
            plain, told = load_tokenizer(file), load_tokenizer(file, "raw", family=family)
            assert plain.config == told.config
            with pytest.raises(CheckpointError, match=rf"looks like .*: type family='{family}'"):
                load_tokenizer(file, family="vqgan")

    def test_a_near_miss_names_the_family_and_what_differs(self, tmp_path):
        state = state_of("maskgit_vqgan", tmp_path)
        del state["decoder.mid.0.conv1.weight"]
        with pytest.raises(CheckpointError, match=r"of a VQGAN of MaskGIT.*1 missing \(decoder\.mid\.0\.conv1\.weight"):
            load_tokenizer(saved(state, tmp_path))
        state = state_of("maskbit_lfq", tmp_path)
        del state["quantize.codebook"]
        with pytest.raises(CheckpointError, match=r"resembles a tokenizer of MaskBit .*quantize\.codebook"):
            load_tokenizer(saved(state, tmp_path))

    def test_prefixes_of_wrappers_are_taken_off(self, tmp_path):
        state = {f"module.{key}": value for key, value in state_of("vqgan_plus", tmp_path).items()}
        tokenizer = load_tokenizer(saved(state, tmp_path))
        _, values = golden("peers/vqgan_plus")
        images = tokenizer.decode_indices(values["out/indices"])
        same((images + 1) / 2, values["out/x_rec_from_indices"], FORWARD)
