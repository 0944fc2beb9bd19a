"""Tokenizers of other systems that are VQGAN's or Open-MAGVIT2's autoencoder with other settings: the published values,
number for number, and which file is whose."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import golden, golden_file
from peers import check_forward, check_quantizer, check_training, full_size, opened, same, stored_file
from safetensors.torch import load_file, save_file

from ibqlab.losses.gan_losses import adaptive_weight, hinge_loss
from ibqlab.pretrained import (
    CheckpointError,
    Family,
    available_families,
    export_tokenizer,
    load_tokenizer,
    read_checkpoint,
    register_family,
)
from ibqlab.quantizers.methods import gumbel
from ibqlab.recipes.plugins import import_plugins
from ibqlab.tokenizer import Tokenizer, available_designs
from ibqlab.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator

LOSS = {"quant_loss": "loss"}
CODEBOOK = {"grad_codebook": "codes.weight"}


def test_taming_vqgan(tmp_path):
    tokenizer = opened("taming_vqgan", tmp_path)
    assert tokenizer.load_report.format.endswith("a VQGAN (taming-transformers)")
    check_forward("taming_vqgan", tokenizer)
    check_quantizer("taming_vqgan", tokenizer, CODEBOOK, LOSS)
    check_training("taming_vqgan", tokenizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tamings_loss_before_and_after_its_discriminator_starts(dtype):
    """LPIPS is zero here, the discriminator that of the file and in evaluation, as where the values were made."""
    facts, values = golden("peers/taming_vqgan")
    checkpoint = read_checkpoint(golden_file("peers/taming_vqgan_official.ckpt"))
    told = facts["lossconfig"]["params"]
    settings = DiscriminatorConfig(base_channels=told["disc_ndf"], num_layers=told["disc_num_layers"])
    judge = PatchDiscriminator(settings).to(dtype).eval()
    judge.load_state_dict(checkpoint.discriminator)
    tokenizer = load_tokenizer(checkpoint.path).to(dtype)
    images = values["x"].to(dtype)
    out = tokenizer(images)
    distance = (images - out.reconstruction).abs().mean()
    real, fake = judge(images), judge(out.reconstruction)
    against = -fake.mean()  # taming's; recipes here train with the non-saturating loss of IBQ
    weight = adaptive_weight(distance, against, tokenizer.decoder.last_layer) * told["disc_weight"]
    word, tolerance = ("f64", 1e-6) if dtype == torch.float64 else ("f32", 1e-5)
    for step in (0, 10):
        expected = facts["official_loss_module"][f"{word}/global_step_{step}"]
        started = float(step >= told["disc_start"])
        found = {
            "disc_factor": torch.tensor(started),
            "quant_loss": out.quantizer.loss,
            "nll_loss": distance,
            "d_weight": weight,
            "g_loss": against,
            "total_loss": distance + out.quantizer.loss + started * weight * against,
            "disc_loss": started * hinge_loss(real, fake),
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
        }
        for name, value in found.items():
            assert value.item() == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("name", ["ldm_vq", "ldm_vq_noattn"])
def test_latent_diffusion(name, tmp_path):
    tokenizer = opened(name, tmp_path, family="ldm")
    check_forward(name, tokenizer)
    check_quantizer(name, tokenizer, CODEBOOK, LOSS)
    check_training(name, tokenizer)
    _, values = golden(f"peers/{name}")
    with torch.no_grad():
        same(tokenizer.decode(values["out/h"]), values["out/x_rec_unquantized"])


def test_llamagen(tmp_path):
    tokenizer = opened("llamagen_vq", tmp_path)
    check_forward("llamagen_vq", tokenizer)
    terms = {"vq_loss": "codebook", "commit_loss": "0.25 * commitment"}
    check_quantizer("llamagen_vq", tokenizer, CODEBOOK, terms)
    check_training("llamagen_vq", tokenizer, squared=True)
    stored = tokenizer.quantizer.codes.weight.norm(dim=1)
    assert (stored - 1).abs().max() > 0.1  # as stored they are no unit vectors, as used they are
    assert torch.allclose(tokenizer.quantizer.codebook.norm(dim=1), torch.ones(64))


def test_vqgan_lc(tmp_path):
    tokenizer = opened("vqgan_lc", tmp_path)
    check_forward("vqgan_lc", tokenizer)
    projector = {f"grad_projection_{word}": f"codes.layers.0.{word}" for word in ("weight", "bias")}
    check_quantizer("vqgan_lc", tokenizer, projector, LOSS)
    check_training("vqgan_lc", tokenizer)
    _, values = golden("peers/vqgan_lc")
    same(tokenizer.quantizer.codebook, values["out/projected_codebook"])


def test_simvq(tmp_path):
    raw = opened("simvq", tmp_path, weights="raw")
    check_forward("simvq", raw)
    projector = {f"grad_projection_{word}": f"codes.map.{word}" for word in ("weight", "bias")}
    check_quantizer("simvq", raw, projector, {"commitment": "loss"})
    check_training("simvq", raw)
    _, values = golden("peers/simvq")
    same(raw.quantizer.codebook, values["out/projected_codebook"])
    averaged = opened("simvq", tmp_path)  # as its authors evaluate it
    check_forward("simvq", averaged, part="ema")
    assert torch.equal(averaged.quantizer.codes.anchors, raw.quantizer.codes.anchors)


@pytest.mark.parametrize("whole_folder", [True, False])
def test_diffusers(whole_folder, tmp_path):
    folder = stored_file("diffusers_vq", tmp_path)
    tokenizer = load_tokenizer(folder if whole_folder else folder / "diffusion_pytorch_model.safetensors").float()
    check_forward("diffusers_vq", tokenizer)
    check_quantizer("diffusers_vq", tokenizer, CODEBOOK, LOSS)
    check_training("diffusers_vq", tokenizer)


class TestGumbel:
    def test_the_choice_without_noise(self, tmp_path):
        tokenizer = opened("taming_gumbel", tmp_path)
        _, values = golden("peers/taming_gumbel")
        with torch.no_grad():
            out = tokenizer.encode(values["x"])
            assert torch.equal(out.indices, values["det/indices"])
            same(out.quantized, values["det/z_q"])
            same(tokenizer.decode_indices(out.indices), values["det/x_rec"])
            encoded = tokenizer.encoder(values["x"])
            same(encoded, values["out/encoder_out"])
            same(tokenizer.quant_conv(encoded), values["out/h"])
            weight = tokenizer.quantizer.scores.weight[:, :, None, None]
            logits = torch.nn.functional.conv2d(values["out/h"], weight, tokenizer.quantizer.scores.bias)
            same(logits, values["out/logits"])
            same(tokenizer.decode_indices(values["out/indices"]), values["out/x_rec"])
            same(tokenizer.double()(values["x"].double()).features, values["f64/h"], 1e-6)

    def test_training_with_the_published_noise(self, monkeypatch, tmp_path):
        facts, values = golden("peers/taming_gumbel")
        noise = values["gumbel_noise"].permute(0, 2, 3, 1).reshape(-1, facts["n_embed"])  # one block holds all tokens
        monkeypatch.setattr(gumbel, "_gumbel_noise", lambda buffer: buffer.copy_(noise))
        loaded = opened("taming_gumbel", tmp_path)
        settings = {"kl_weight": facts["kl_weight"], "temperature_start": 1.0, "temperature_end": 1.0}
        config = replace(loaded.config, quantizer=replace(loaded.config.quantizer, **settings))
        tokenizer = Tokenizer(config)
        tokenizer.load_state_dict(loaded.state_dict())
        tokenizer.load_report = loaded.load_report
        layers = {"grad_codebook": "codes.weight"}
        layers |= {f"grad_proj_{word}": f"scores.{word}" for word in ("weight", "bias")}
        check_quantizer("taming_gumbel", tokenizer, layers, LOSS)
        check_training("taming_gumbel", tokenizer)
        with torch.no_grad():
            out = tokenizer.train()(values["x"])  # the published evaluation draws, as training does here
            assert torch.equal(out.quantizer.indices, values["out/indices"])
            same(out.quantizer.quantized, values["out/z_q"])
            same(out.reconstruction, values["out/x_rec"])
            same(tokenizer.eval().encode(values["x"]).loss, values["out/loss/quant_loss"])


FULL_SIZE = {
    "taming/vqgan_imagenet_f16_16384": ("vqgan", {"tokenizer": 343, "perceptual loss": 33, "discriminator": 16}),
    "taming/vqgan_gumbel_f8": ("vqgan_gumbel", {"tokenizer": 301}),
    "ldm/vq-f16": ("ldm", {"tokenizer": 343, "perceptual loss": 33, "discriminator": 16}),
    "ldm/vq-f4-noattn": ("ldm", {"tokenizer": 185, "perceptual loss": 33, "discriminator": 22}),
    "llamagen/VQ-16": ("llamagen", {"tokenizer": 343, "indices chosen last": 1}),
    "vqgan-lc/f16": ("vqgan_lc", {"tokenizer": 345, "perceptual loss": 33, "discriminator": 16}),
    "simvq/simvq_1k": (
        "simvq",
        {
            "tokenizer": 150,
            "tokenizer_ema": 149,
            "perceptual loss": 33,
            "discriminator": 22,
            "discriminator_ema": 13,
            "bookkeeping": 2,
        },
    ),
    "diffusers/vq-f16": ("diffusers", {"tokenizer": 343}),
}


@pytest.mark.parametrize(("model", "expected"), FULL_SIZE.items(), ids=FULL_SIZE)
def test_every_key_of_a_full_size_file_has_its_place(model, expected):
    family, parts = expected
    told = {"family": family} if family in ("vqgan", "ldm") and "noattn" not in model else {}
    name, config, found = full_size(model, **told)
    assert (name, found) == (family, parts)
    assert config.autoencoder.base_channels == 128


PEAK = """
import sys
from ibqlab.pretrained import load_tokenizer
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
before = status("VmRSS")
tokenizer = load_tokenizer(sys.argv[1])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc (Linux)")
@pytest.mark.parametrize("model", ["llamagen/VQ-16", "1d-tokenizer/maskgit-vqgan-imagenet-f16-256"])
def test_a_full_size_file_loads_in_little_more_memory_than_it_has_bytes(model, tmp_path):
    """Also where the file holds a class, so that it goes through our own reader of pickles."""
    listed = json.loads(golden_file("peers/peers_state_dict_keys.json").read_text())[model]
    state = {key: torch.full(shape, 0.01) for key, (shape, _) in listed.items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "full.pt")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "full.pt")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak <= 1.3 * (tmp_path / "full.pt").stat().st_size


class TestWhoseFileItIs:
    """A file is opened as what it is, or refused with what to type; never guessed."""

    def test_names_that_three_systems_share_are_asked_about(self, tmp_path):
        file = stored_file("ldm_vq", tmp_path)
        with pytest.raises(CheckpointError, match=r"family='ibq' for .*family='ldm' for .*family='vqgan' for"):
            load_tokenizer(file)
        for family in ("ldm", "vqgan"):
            check_forward("ldm_vq", load_tokenizer(file, family=family))
        assert load_tokenizer(file, "raw", family="ibq").config.quantizer.config_name == "ibq"

    @pytest.mark.parametrize("family", ["llamagen", "simvq", "magvit2", "vqgan_lc"])
    def test_another_family_than_the_files_is_refused_and_named(self, family):
        file = golden_file("peers/taming_vqgan_official.ckpt")
        with pytest.raises(CheckpointError, match=r"is not a tokenizer of .*no tensor's name begins with .*family="):
            load_tokenizer(file, family=family)

    def test_an_unknown_family(self):
        with pytest.raises(ValueError, match="did you mean 'llamagen'"):
            load_tokenizer(golden_file("peers/llamagen_vq_official.pt"), family="lamagen")

    def test_a_near_miss_names_the_family_and_what_differs(self, tmp_path):
        state = torch.load(stored_file("llamagen_vq", tmp_path), weights_only=True)["model"]
        torch.save({key: value for key, value in state.items() if "quantize" not in key}, tmp_path / "half.pt")
        with pytest.raises(CheckpointError, match=r"resembles a tokenizer of LlamaGen .*quantize\.embedding\.weight"):
            load_tokenizer(tmp_path / "half.pt")
        del state["decoder.mid.1.q.weight"]
        torch.save(state, tmp_path / "short.pt")
        with pytest.raises(CheckpointError, match=r"of a tokenizer of LlamaGen.*1 missing \(decoder.mid.attn_1.q"):
            load_tokenizer(tmp_path / "short.pt")

    def test_two_systems_in_one_file(self, tmp_path):
        state = torch.load(stored_file("llamagen_vq", tmp_path), weights_only=True)["model"]
        other = torch.load(golden_file("peers/taming_vqgan_official.ckpt"), weights_only=True)["state_dict"]
        torch.save(state | other, tmp_path / "both.pt")
        with pytest.raises(CheckpointError, match=r"names of .*LlamaGen.* and of .* stand in one file"):
            load_tokenizer(tmp_path / "both.pt")

    def test_a_folder_whose_weights_lie_in_pieces(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model-00001-of-00002.safetensors").touch()
        with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors.*max_shard_size"):
            load_tokenizer(tmp_path)

    def test_one_tensor_under_two_names(self, tmp_path):
        folder = stored_file("diffusers_vq", tmp_path)
        state = load_file(folder / "diffusion_pytorch_model.safetensors")
        key = next(key for key in state if ".to_q.weight" in key)
        save_file(state | {key.replace("to_q", "query"): state[key] + 1}, tmp_path / "both.safetensors")
        with pytest.raises(CheckpointError, match=r"tensors .*(to_q|query).* and .*(to_q|query).* are two names"):
            load_tokenizer(tmp_path / "both.safetensors")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype, tmp_path):
        state = torch.load(stored_file("llamagen_vq", tmp_path), weights_only=True)["model"]
        torch.save({key: value.to(dtype) for key, value in state.items()}, tmp_path / "half.pt")
        tokenizer = load_tokenizer(tmp_path / "half.pt")
        assert {value.dtype for value in tokenizer.state_dict().values()} == {dtype}
        assert tokenizer.encode(golden("peers/llamagen_vq")[1]["x"]).quantized.isfinite().all()

    def test_a_generator_is_no_tokenizer(self):
        with pytest.raises(CheckpointError, match="a generator of LlamaGen, not a tokenizer; use load_generator"):
            load_tokenizer(golden_file("peers/llamagen_gpt_official.pt"))


class TestFamiliesOfYourOwn:
    """One file makes checkpoints of a user's own model known, its networks among it."""

    FILE = str(Path(__file__).parents[1] / "experiments" / "bring_your_own" / "my_family.py")

    @pytest.fixture
    def plugin(self):
        import_plugins([self.FILE])

    @pytest.fixture
    def saved(self, tmp_path):
        torch.manual_seed(0)
        model = torch.nn.Module()
        layers = torch.nn.Conv2d(3, 24, 4, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(24, 8, 3, 1, 1)
        model.encoder = torch.nn.Sequential(*layers)
        model.codebook = torch.nn.Parameter(torch.randn(40, 8))
        layers = torch.nn.ConvTranspose2d(8, 24, 4, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(24, 3, 3, 1, 1)
        model.decoder = torch.nn.Sequential(*layers)
        torch.save(model.state_dict(), tmp_path / "mine.pt")
        return model, tmp_path / "mine.pt"

    @torch.no_grad()
    def test_it_opens_and_computes_what_the_model_does(self, plugin, saved):
        model, file = saved
        tokenizer = load_tokenizer(file)
        assert tokenizer.load_report.accounted == tokenizer.load_report.keys == 9
        images = torch.rand(2, 3, 8, 12) * 2 - 1
        features = model.encoder(images)
        out = tokenizer.encode(images)
        tokens = features.permute(0, 2, 3, 1).reshape(-1, 8)
        assert torch.equal(out.indices.flatten(), torch.cdist(tokens, model.codebook).argmin(1))
        assert torch.allclose(tokenizer.decode(out.quantized), model.decoder(out.quantized))
        assert {"my_vqvae"} <= set(available_families()) & set(available_designs())

    def test_an_export_names_the_file_that_it_needs(self, plugin, saved, tmp_path, monkeypatch):
        file = export_tokenizer(saved[1], tmp_path / "mine.safetensors")
        command = [sys.executable, "-m", "ibqlab", "inspect", str(file)]
        monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "cache"))  # of somebody who has never run it
        refused = subprocess.run(command, check=False, capture_output=True, text=True)
        words = "its autoencoder 'my_vqvae' is registered by the plugin my_family.py"
        assert refused.returncode and words in refused.stderr
        told = subprocess.run([*command, "--plugin", self.FILE], check=False, capture_output=True, text=True)
        assert told.returncode == 0 and "9 of 9 keys accounted for" in told.stdout

    def test_an_edited_file_takes_the_place_of_what_it_was(self, plugin, tmp_path):
        source = Path(self.FILE).read_text()
        edited = tmp_path / "my_family.py"
        edited.write_text(source.replace('@register_family("my_vqvae")', '@register_family("renamed")'))
        import_plugins([str(edited)])
        assert "renamed" in available_families() and "my_vqvae" not in available_families()
        import_plugins([self.FILE])
        assert "renamed" not in available_families() and "my_vqvae" in available_families()

    def test_a_file_that_fails_leaves_nothing(self, tmp_path):
        source = Path(self.FILE).read_text().replace("my_vqvae", "half")
        (tmp_path / "half.py").write_text(f"{source}\n1 / 0\n")
        with pytest.raises(ValueError, match="division by zero"):
            import_plugins([str(tmp_path / "half.py")])
        assert "half" not in available_families() and "half" not in available_designs()

    @pytest.mark.parametrize(
        ("name", "members", "says"),
        [
            ("ibq", {"title": "a tokenizer of mine"}, "a family named 'ibq' exists already"),
            ("My family", {"title": "mine"}, "a family's name is text such as 'vqgan'"),
            ("mine", {}, 'write title = "a tokenizer of …" into class Mine'),
        ],
    )
    def test_what_cannot_be_registered(self, name, members, says):
        with pytest.raises(ValueError, match=says):
            register_family(name)(type("Mine", (Family,), members))
        with pytest.raises(ValueError, match="takes a class derived from Family"):
            register_family("mine")(dict)
