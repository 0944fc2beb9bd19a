"""TiTok's tokenizers: the published values, number for number, and what its files tell and do not tell."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import golden, golden_file
from peers import check_forward, check_quantizer, check_training, full_size, opened, same
from safetensors.torch import save_file

from ibqlab.pretrained import CheckpointError, load_tokenizer
from ibqlab.tokenizer import Tokenizer

TERMS = {"quantizer_loss": "loss", "commitment_loss": "0.25 * commitment", "codebook_loss": "codebook"}
CODEBOOK = {"grad_codebook": "codes.weight"}
HEADS = {"titok": 2, "titok_pixel": (2, 3)}


def state_of(name: str) -> dict[str, torch.Tensor]:
    """A golden set's weights by the published names."""
    facts, tensors = golden(f"peers/{name}")
    if "weights" in facts:
        return torch.load(golden_file(f"peers/{facts['weights']}"), weights_only=True)
    return {key.removeprefix("state_dict/"): w.float() for key, w in tensors.items() if key.startswith("state_dict/")}


def folder_of(name: str, folder: Path, **changes: Any) -> Path:
    """The folder that the hub holds: config.json, some settings of the tokenizer changed, and the weights."""
    config = golden(f"peers/{name}")[0]["config"]
    config["model"]["vq_model"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state_of(name), folder / "model.safetensors")
    return folder


def check_losses(name: str, tokenizer: Tokenizer) -> None:
    """Losses of evaluation."""
    _, values = golden(f"peers/{name}")
    with torch.no_grad():
        out = tokenizer.encode(values["x"], value_range=(0, 1))
    same(out.loss, values["out/loss/quantizer_loss"])
    same(0.25 * out.terms["commitment"], values["out/loss/commitment_loss"])
    same(out.terms["codebook"], values["out/loss/codebook_loss"])


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("name", ["titok", "titok_pixel"])
def test_published_values(name, in_folder, tmp_path):
    told = {"num_heads": HEADS[name]}
    tokenizer = load_tokenizer(folder_of(name, tmp_path), **told) if in_folder else opened(name, tmp_path, **told)
    _, values = golden(f"peers/{name}")
    check_forward(name, tokenizer, low=0)
    check_losses(name, tokenizer)
    check_quantizer(name, tokenizer, CODEBOOK, TERMS)
    assert tokenizer.encode(values["x"], value_range=(0, 1)).indices.shape == values["out/indices"].shape
    assert tokenizer.load_report.accounted == tokenizer.load_report.keys == len(state_of(name))


def test_predicted_pixel_codes(tmp_path):
    tokenizer = opened("titok", tmp_path, num_heads=2)
    _, values = golden("peers/titok")
    with torch.no_grad():
        same(tokenizer.decoder.predict(values["out/z_q"]), values["out/pixel_logits"])
    assert tokenizer.config.quantizer.unit_vectors and tokenizer.config.autoencoder.mixed_latents


def test_gradients_of_the_whole_network(tmp_path):
    check_training("titok_pixel", opened("titok_pixel", tmp_path, num_heads=(2, 3)), low=0, squared=True)


@pytest.mark.parametrize(
    ("model", "keys", "parameters", "unit_vectors"),
    [("titok_s128", 308, 83_674_639, True), ("titok_bl64_vq8k", 459, 390_016_148, False)],
)
def test_every_key_of_a_full_size_file_has_its_place(model, keys, parameters, unit_vectors):
    family, config, parts = full_size(f"1d-tokenizer/{model}")
    assert (family, parts) == ("titok", {"tokenizer": keys})
    with torch.device("meta"):
        network = Tokenizer(config)
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    autoencoder = config.autoencoder
    heads = {512: 8, 768: 12, 1024: 16}
    assert autoencoder.encoder_heads == heads[autoencoder.encoder_width]
    assert autoencoder.decoder_heads == heads[autoencoder.decoder_width]
    assert config.quantizer.unit_vectors is unit_vectors
    assert network.latent_grid(256, 256) == (1, autoencoder.tokens)


class TestWhatAFileDoesNotTell:
    def test_heads_of_an_unpublished_width_are_asked_for(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"the width 32 is none .*type num_heads=…"):
            load_tokenizer(golden_file("peers/titok_official.bin"))
        with pytest.raises(ValueError, match=r"num_heads of TiTok must be .*or two.*num_heads=\(12, 16\)"):
            load_tokenizer(golden_file("peers/titok_official.bin"), num_heads=(2, 3, 4))
        with pytest.raises(ValueError, match="encoder_width must be a multiple of encoder_heads; got 32 and 5"):
            load_tokenizer(golden_file("peers/titok_official.bin"), num_heads=5)

    def test_config_json_says_whether_vectors_are_unit_vectors(self, tmp_path):
        for unit_vectors in (True, False):
            folder = folder_of("titok_pixel", tmp_path, use_l2_norm=unit_vectors)
            tokenizer = load_tokenizer(folder, num_heads=(2, 3))
            assert tokenizer.config.quantizer.unit_vectors is unit_vectors

    @pytest.mark.parametrize(("name", "kind"), [("titok", "unit vectors"), ("titok_pixel", "vectors of any length")])
    def test_the_report_says_what_the_layout_alone_told(self, name, kind, tmp_path):
        bare = opened(name, tmp_path, num_heads=HEADS[name]).load_report.format
        assert bare.endswith(
            f"a tokenizer of TiTok ({kind}, as published for this layout; no config.json beside it says use_l2_norm)"
        )
        told = load_tokenizer(folder_of(name, tmp_path), num_heads=HEADS[name]).load_report.format
        assert told.endswith("a tokenizer of TiTok")

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"is_legacy": True}, "config.json says is_legacy: True"),
            ({"finetune_decoder": True}, "config.json says finetune_decoder: True"),
            ({"use_l2_norm": "yes"}, "use_l2_norm must be true or false; got 'yes'"),
            ({"quantize_mode": "vae"}, "TiTok without codes"),
        ],
    )
    def test_a_config_json_of_another_model_is_refused(self, changes, says, tmp_path):
        with pytest.raises(CheckpointError, match=says):
            load_tokenizer(folder_of("titok_pixel", tmp_path, **changes), num_heads=(2, 3))

    def test_a_config_json_of_another_kind_is_refused(self, tmp_path):
        folder = folder_of("titok_pixel", tmp_path)
        (folder / "config.json").write_text('{"model": ["vq_model"]}')
        with pytest.raises(CheckpointError, match="model must hold settings; got list"):
            load_tokenizer(folder, num_heads=(2, 3))


class TestVariants:
    """Models of the same authors that are no such tokenizer."""

    def load_changed(self, folder: Path, name: str, drop: str = "", **added: torch.Tensor) -> Tokenizer:
        state = {key: value for key, value in state_of(name).items() if not (drop and key.startswith(drop))}
        torch.save(state | added, folder / "changed.bin")
        return load_tokenizer(folder / "changed.bin", num_heads=HEADS[name])

    def test_clustered_codes_bring_a_buffer_that_is_bookkeeping(self, tmp_path):
        tokenizer = self.load_changed(tmp_path, "titok_pixel", **{"quantize.embed_prob": torch.zeros(64)})
        assert tokenizer.load_report.left == {"bookkeeping": ("quantize.embed_prob",)}
        check_forward("titok_pixel", tokenizer, low=0)

    def test_one_without_codes(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"TiTok without codes .*Give one of the published files"):
            self.load_changed(tmp_path, "titok_pixel", drop="quantize.")

    def test_one_whose_decoder_reads_text(self, tmp_path):
        with pytest.raises(CheckpointError, match="TA-TiTok"):
            self.load_changed(tmp_path, "titok_pixel", **{"decoder.text_guidance_proj.weight": torch.zeros(48, 8)})

    def test_one_of_the_first_stage(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"holds no decoder of them .*the file of the second"):
            self.load_changed(tmp_path, "titok", drop="pixel_")

    def test_one_that_lacks_a_tensor(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.weight"):
            self.load_changed(tmp_path, "titok_pixel", drop="decoder.conv_out")
