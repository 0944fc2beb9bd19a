"""Checkpoints in and out: published files number for number, every key accounted for, and nothing run from a file."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from golden import golden, golden_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ibqlab.pretrained.export
from ibqlab.pretrained import (
    PUBLISHED,
    CheckpointError,
    download_published,
    export_published,
    export_tokenizer,
    is_generator,
    load_first_stage,
    load_generator,
    load_tokenizer,
    read_checkpoint,
)
from ibqlab.pretrained.published_files import identify_tokenizer
from ibqlab.pretrained.tensor_files import TensorFile
from ibqlab.quantizers import quantizer_config
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs import Run, RunError
from ibqlab.tokenizer import AutoencoderConfig, Tokenizer, TokenizerConfig
from ibqlab.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator

TINY = AutoencoderConfig(
    base_channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=2,
    attention_resolutions=(16,),
    resolution=32,
    latent_channels=8,
)
MARK = os.path.join(tempfile.gettempdir(), f"ibqlab_ran_{os.getpid()}")


@pytest.fixture
def published() -> Path:
    """A Lightning checkpoint that the published code wrote: 279 keys, without the perceptual loss."""
    return golden_file("tokenizer_ema_official_ckpt.ckpt")


@pytest.fixture
def official(published) -> dict[str, torch.Tensor]:
    return torch.load(published, weights_only=True)["state_dict"]


def tiny(quantizer: str = "ibq", **autoencoder) -> Tokenizer:
    torch.manual_seed(3)
    settings = {"design": "vqgan", **vars(TINY), **autoencoder}
    codes = {"name": quantizer, "codebook_size": 16} | ({} if quantizer == "lfq" else {"code_dim": 4})
    return Tokenizer(
        TokenizerConfig(autoencoder=AutoencoderConfig(**settings), quantizer=quantizer_config(codes))
    ).eval()


def tiny_magvit2() -> Tokenizer:
    return tiny("lfq", design="magvit2", attention_resolutions=(), latent_channels=4)


def published_state(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Its weights under published names, without averages."""
    state = dict(tokenizer.state_dict())
    if "quantizer.codes.weight" in state:
        state["quantize.embedding.weight"] = state.pop("quantizer.codes.weight")
    return state


def golden_weights(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A golden set's state dict in float32, and its other tensors."""
    _, tensors = golden(name)
    state = {k.removeprefix("state_dict/"): v.float() for k, v in tensors.items() if k.startswith("state_dict/")}
    return state, {k: v for k, v in tensors.items() if not k.startswith("state_dict/")}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


class TestPublished:
    @pytest.mark.parametrize("weights", ["ema", "raw"])
    def test_numbers_of_the_published_code(self, published, weights):
        _, tensors = golden("tokenizer_ema_official_ckpt")
        tok = load_tokenizer(published, weights)
        with torch.no_grad():
            out = tok(tensors["x"])
        assert not tok.training
        assert torch.equal(out.quantizer.indices.flatten(), tensors[f"{weights}/indices"])
        same(out.features, tensors[f"{weights}/h"])
        same(out.reconstruction, tensors[f"{weights}/x_rec"])

    def test_averaged_weights_are_the_default_and_differ(self, published):
        default, raw = load_tokenizer(published), load_tokenizer(published, "raw")
        assert default.load_report.weights == "ema"
        assert not torch.equal(default.quantizer.codebook, raw.quantizer.codebook)

    @pytest.mark.parametrize("form", ["lightning.ckpt", "bare.pt", "published.safetensors", "old_format.ckpt"])
    def test_attention_levels_and_every_form_of_file(self, tmp_path, form):
        state, tensors = golden_weights("tokenizer_attn")
        file = tmp_path / form
        if file.suffix == ".safetensors":
            save_file(state, file)
        else:
            content = state if form == "bare.pt" else {"state_dict": state, "hyper_parameters": {"n_embed": 64}}
            torch.save(content, file, _use_new_zipfile_serialization=form != "old_format.ckpt")
        tok = load_tokenizer(file, "raw", quantizer="ibq")
        config = tok.config.autoencoder
        assert (config.channel_multipliers, config.num_res_blocks, config.latent_channels) == ((2, 1), 1, 16)
        assert [r in config.attention_resolutions for r in config.level_resolutions] == [False, True]
        assert tok.load_report.entries == (("hyper_parameters",) if form.endswith(".ckpt") else ())
        with torch.no_grad():
            out = tok(tensors["x"])
        assert torch.equal(out.quantizer.indices.flatten(), tensors["out/indices"])
        same(out.reconstruction, tensors["out/x_rec"])

    def test_open_magvit2(self, tmp_path):
        state, tensors = golden_weights("magvit2_tokenizer_tiny")
        torch.save({"state_dict": state}, tmp_path / "magvit2.ckpt")
        tok = load_tokenizer(tmp_path / "magvit2.ckpt", "raw")
        assert tok.config.autoencoder.design == "magvit2"
        assert (tok.config.quantizer.config_name, tok.config.quantizer.codebook_size) == ("lfq", 64)
        with torch.no_grad():
            out = tok(tensors["x"])
        assert torch.equal(out.quantizer.indices.flatten(), tensors["out/indices"])
        same(out.reconstruction, tensors["out/x_rec"])

    @pytest.mark.parametrize(
        ("model", "keys", "parts"),
        [
            ("IBQ/imagenet_ibqgan_16384", 1156, [543, 543, 22, 13, 33, 2]),
            ("Open-MAGVIT2/imagenet_lfqgan_256_L", 748, [339, 339, 22, 13, 33, 2]),
        ],
    )
    def test_every_key_of_full_size_models_has_its_place(self, model, keys, parts):
        listed, _ = golden("official_state_dict_keys")
        tensors = {key: torch.empty(shape, device="meta") for key, (shape, _) in listed[model].items()}
        file = TensorFile(path=Path("file"), format="", tensors=tensors)
        _, config, places = identify_tokenizer(file, tensors)
        names = ["tokenizer", "tokenizer_ema", "discriminator", "discriminator_ema", "perceptual loss", "bookkeeping"]
        assert len(places) == keys == len(tensors)
        assert [sum(place.part == name for place in places.values()) for name in names] == parts
        assert (config.autoencoder.channel_multipliers, config.autoencoder.num_res_blocks) == ((1, 1, 2, 2, 4), 4)
        if model.startswith("IBQ"):
            assert config == TokenizerConfig()
        else:
            assert config.quantizer.codebook_size == 2**18

    def test_other_architectures(self, tmp_path):
        for number, tok in enumerate(
            [tiny(), tiny(channel_multipliers=(2, 1, 3), num_res_blocks=1), tiny(double_latent=True), tiny_magvit2()]
        ):
            torch.save(published_state(tok), tmp_path / f"{number}.pt")
            named = None if number == 3 else "ibq"
            again = load_tokenizer(tmp_path / f"{number}.pt", "raw", quantizer=named)
            images = torch.rand(1, 3, 32, 32) * 2 - 1
            with torch.no_grad():
                assert torch.equal(again(images).reconstruction, tok(images).reconstruction)

    def test_vq_must_be_named(self, tmp_path, published):
        torch.save(published_state(tiny("vq")), tmp_path / "vq.pt")
        named = load_tokenizer(tmp_path / "vq.pt", "raw", quantizer="vq")
        assert named.config.quantizer.config_name == "vq"
        with pytest.raises(ValueError, match=r"did you mean 'vq"):
            load_tokenizer(published, quantizer="vqq")

    def test_checkpoint_parts(self, published, official):
        found = read_checkpoint(published)
        assert torch.equal(found.tokenizer["quantizer.codes.weight"], official["quantize.embedding.weight"])
        average = official["model_ema.encoderdown1block0conv1weight"]
        assert torch.equal(found.tokenizer_ema["encoder.down.1.block.0.conv1.weight"], average)
        assert found.tokenizer_ema.keys() == dict(load_tokenizer(published).named_parameters()).keys()
        network = PatchDiscriminator(DiscriminatorConfig(base_channels=4))
        network.load_state_dict(found.discriminator, strict=True)
        assert found.discriminator_ema.keys() == dict(network.named_parameters()).keys()
        assert found.ema_decay == pytest.approx(0.999)
        assert found.report.accounted == found.report.keys == 279


class TestFamilies:
    """Checkpoints whose names and shapes are IBQ's are never opened as IBQ's unasked; test_peers opens the others."""

    def test_a_vqgan_opens_as_vq_whether_or_not_it_is_said_to_be_one(self):
        _, tensors = golden("peers/taming_vqgan")
        for told in ({}, {"quantizer": "vq"}, {"family": "vqgan"}):
            tok = load_tokenizer(golden_file("peers/taming_vqgan_official.ckpt"), "raw", **told)
            with torch.no_grad():
                out = tok(tensors["x"])
            assert tok.config.quantizer.config_name == "vq"
            assert torch.equal(out.quantizer.indices.flatten(), tensors["out/indices"])
            same(out.reconstruction, tensors["out/x_rec"])

    def test_codes_where_vq_starts_tell(self, tmp_path, official):
        official["quantize.embedding.weight"][5] = 1 / 100
        torch.save({"state_dict": official}, tmp_path / "vq.ckpt")
        with pytest.raises(CheckpointError, match="1 of its codes lie within ±1/K, where VQ starts"):
            load_tokenizer(tmp_path / "vq.ckpt")
        told = [({"family": "ibq"}, "ibq"), ({"quantizer": "ibq"}, "ibq"), ({"quantizer": "vq"}, "vq")]
        for words, name in told:
            assert load_tokenizer(tmp_path / "vq.ckpt", **words).config.quantizer.config_name == name

    @pytest.mark.parametrize("name", ["model.diffusion_model.out.weight", "transformer.pos_emb"])
    def test_what_lies_beside_a_first_stage_tells(self, tmp_path, name):
        state = {f"first_stage_model.{key}": value for key, value in published_state(tiny()).items()}
        torch.save({"state_dict": state}, tmp_path / "alone.ckpt")
        with pytest.raises(CheckpointError, match="family='ibq' for"):
            load_first_stage(tmp_path / "alone.ckpt")
        assert load_first_stage(tmp_path / "alone.ckpt", family="ldm").config.quantizer.config_name == "vq"
        torch.save({"state_dict": state | {name: torch.zeros(2)}}, tmp_path / "both.ckpt")
        assert load_first_stage(tmp_path / "both.ckpt").config.quantizer.config_name == "vq"
        with pytest.raises(CheckpointError, match=r"not a tokenizer .* load_first_stage\(path\)"):
            load_tokenizer(tmp_path / "both.ckpt")

    @pytest.mark.parametrize("name", ["ibq", "vq"])
    def test_an_export_under_published_names_tells_its_quantizer(self, tmp_path, name):
        ours = export_tokenizer(tiny(name), tmp_path / "tok.safetensors")
        file = export_published(ours, tmp_path / "tok.ckpt")
        assert load_tokenizer(file, "raw").config.quantizer.config_name == name


WRAPPERS = {
    "module.": (lambda state: {f"module.{key}": value for key, value in state.items()}, "prefix module."),
    "_orig_mod.": (lambda state: {f"_orig_mod.{key}": value for key, value in state.items()}, "prefix _orig_mod."),
    "model.": (lambda state: {f"model.{key}": value for key, value in state.items()}, "prefix model."),
    "both": (
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        "prefix module., prefix _orig_mod.",
    ),
    "inside": (
        lambda state: {key.replace("encoder.", "encoder._orig_mod.", 1): value for key, value in state.items()},
        "._orig_mod. inside names",
    ),
    "model": (lambda state: {"model": state, "step": 4}, "entry 'model'"),
    "module": (lambda state: {"module": state}, "entry 'module'"),
}


@pytest.mark.parametrize(("wrap", "says"), WRAPPERS.values(), ids=WRAPPERS)
def test_known_wrappers_are_taken_off_and_reported(tmp_path, wrap, says):
    tok = tiny()
    torch.save(wrap(published_state(tok)), tmp_path / "wrapped.pt")
    again = load_tokenizer(tmp_path / "wrapped.pt", "raw", quantizer="ibq")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tok.state_dict().items())
    assert f"taken off: {says}" in str(again.load_report)
    assert again.load_report.accounted == again.load_report.keys


def test_two_names_that_become_one_are_refused(tmp_path):
    torch.save({"a._orig_mod.b": torch.zeros(1), "a.b": torch.zeros(1)}, tmp_path / "twice.pt")
    with pytest.raises(CheckpointError, match="two tensors have one name"):
        load_tokenizer(tmp_path / "twice.pt")


class TestHostile:
    """Files that are not what they claim: one message each, before memory is taken."""

    CODES = "quantize.embedding.weight"
    CONV = "encoder.conv_in.weight"
    TENSORS: ClassVar = {
        "int64": (CONV, lambda value: value.long(), "1 of another type .encoder.conv_in.weight torch.int64"),
        "complex": (CONV, lambda value: value.to(torch.complex64), "encoder.conv_in.weight torch.complex64"),
        "bool": (CONV, lambda value: value > 0, "encoder.conv_in.weight torch.bool"),
        "float8": (CONV, lambda value: value.to(torch.float8_e4m3fn), "encoder.conv_in.weight torch.float8"),
        "sparse": (CONV, lambda value: value.to_sparse(), "'encoder.conv_in.weight' is sparse"),
        "meta": (CONV, lambda value: value.to("meta"), "has a shape and no numbers"),
        "claims": (CODES, lambda value: value[:1, :1].expand(2**33, 16), r"claims 549,755,813,888 bytes .* stores"),
    }

    @pytest.mark.parametrize(("key", "change", "says"), TENSORS.values(), ids=TENSORS)
    def test_tensors_that_are_no_weights(self, tmp_path, official, key, change, says):
        torch.save({"state_dict": official | {key: change(official[key])}}, tmp_path / "bad.ckpt")
        for load in (load_tokenizer, read_checkpoint):
            with pytest.raises(CheckpointError, match=says):
                load(tmp_path / "bad.ckpt")

    @pytest.mark.parametrize("kind", [torch.int64, torch.float8_e4m3fn, torch.bool])
    def test_exports_whose_weights_are_no_numbers(self, tmp_path, kind):
        file = export_tokenizer(tiny(), tmp_path / "tok.safetensors")
        with safe_open(file, "pt") as stored:
            header = stored.metadata()
        tensors = load_file(file)
        save_file(tensors | {self.CONV: tensors[self.CONV].to(kind)}, tmp_path / "bad.safetensors", metadata=header)
        with pytest.raises(CheckpointError, match=f"encoder.conv_in.weight {kind}, not torch.float32"):
            load_tokenizer(tmp_path / "bad.safetensors")

    HEADERS: ClassVar = {
        "deep": ("[" * 100_000, "header is damaged"),
        "list": ("[]", "header is damaged"),
        "digits": ('{"a": ' + "9" * 5000 + "}", "header is damaged"),
        "blocks": ({"autoencoder": {"num_res_blocks": 100_000}}, "num_res_blocks must be at most 1,024; got 100,000"),
        "channels": ({"autoencoder": {"base_channels": 2**40}}, "base_channels must be at most 65,536"),
        "codes": ({"quantizer": {"codebook_size": 10**12}}, "codebook_size must be at most 16,777,216"),
        "dimension": ({"quantizer": {"code_dim": 10**12}}, "code_dim must be at most 65,536"),
    }

    @pytest.mark.parametrize(("header", "says"), HEADERS.values(), ids=HEADERS)
    def test_headers(self, tmp_path, header, says):
        file = export_tokenizer(tiny(), tmp_path / "tok.safetensors")
        with safe_open(file, "pt") as stored:
            settings = json.loads(stored.metadata()["ibqlab"])
        if isinstance(header, dict):
            for part, changes in header.items():
                settings["tokenizer"][part] |= changes
            header = json.dumps(settings)
        save_file(load_file(file), tmp_path / "bad.safetensors", metadata={"ibqlab": header})
        with pytest.raises(ValueError, match=says):
            load_tokenizer(tmp_path / "bad.safetensors")

    def test_numbers_in_names_are_bounded(self, tmp_path, official):
        for name in (
            "encoder.down.999999999.block.0.x",
            f"encoder.down.{'9' * 5000}.x",
            "encoder.down.0.block.99999.x",
        ):
            torch.save({"state_dict": official | {name: torch.zeros(1)}}, tmp_path / "bad.ckpt")
            with pytest.raises(CheckpointError):
                load_tokenizer(tmp_path / "bad.ckpt")

    def test_names_cannot_steer_a_terminal(self, tmp_path, official):
        torch.save({"state_dict": official | {"\x1b[2Jevil\n": torch.zeros(1)}}, tmp_path / "bad.ckpt")
        with pytest.raises(CheckpointError, match="evil") as caught:
            load_tokenizer(tmp_path / "bad.ckpt")
        torch.save({"state_dict": official, "\x1b[2Jentry": 1}, tmp_path / "good.ckpt")
        assert "\x1b" not in str(caught.value) + str(load_tokenizer(tmp_path / "good.ckpt").load_report)

    def test_compressed_archives_are_refused(self, tmp_path, published):
        with (
            zipfile.ZipFile(published) as good,
            zipfile.ZipFile(tmp_path / "bad.ckpt", "w", zipfile.ZIP_DEFLATED) as bad,
        ):
            for entry in good.namelist():
                bad.writestr(entry, good.read(entry))
        with pytest.raises(CheckpointError, match="compressed archive"):
            load_tokenizer(tmp_path / "bad.ckpt")

    @pytest.mark.parametrize("load", [load_tokenizer, load_generator, load_first_stage])
    def test_what_is_no_ordinary_file(self, tmp_path, load):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for path, says in {
            tmp_path / "pipe": "is a pipe; give an ordinary file",
            Path("/dev/zero"): "is a device",
            tmp_path / "loop": "leads back to itself",
            tmp_path / ("n" * 300): "name is too long",
            "a\0b": "zero byte",
        }.items():
            with pytest.raises((ValueError, FileNotFoundError), match=says):
                load(path)

    def test_the_home_folder_may_be_written_short(self, tmp_path, published, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "tok.ckpt").write_bytes(published.read_bytes())
        assert load_tokenizer("~/tok.ckpt").load_report.keys == 279
        assert not is_generator("~/tok.ckpt")
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_generator("~/nothing.ckpt")


class TestReport:
    def test_account_of_every_key(self, published, official):
        report = load_tokenizer(published).load_report
        keys = [*report.used, *(key for group in report.left.values() for key in group)]
        assert sorted(keys) == sorted(official) and len(keys) == report.keys == report.accounted == 279
        assert report.used["model_ema.quantizeembeddingweight"] == "quantizer.codes.weight"
        assert {group: len(keys) for group, keys in report.left.items()} == {
            "tokenizer, as trained": 121,
            "discriminator": 22,
            "discriminator, averaged": 13,
            "bookkeeping": 2,
        }
        assert {"optimizer_states", "callbacks", "loops", "epoch"} <= set(report.entries)
        assert list(load_tokenizer(published, "raw").load_report.renamed) == ["quantize.embedding.weight"]

    def test_text(self, published):
        text = str(load_tokenizer(published).load_report)
        assert text.endswith("279 of 279 keys accounted for")
        assert "averaged weights" in text and "optimizer_states" in text and "model_ema.decay" in text
        assert max(map(len, text.splitlines()[1:])) < 160


class TestMemory:
    def test_weights_are_its_own_and_trainable(self, published, tmp_path):
        file = tmp_path / "copy.ckpt"
        file.write_bytes(published.read_bytes())
        tok = load_tokenizer(file)
        images = torch.rand(1, 3, 32, 32) * 2 - 1
        before = tok(images).reconstruction
        with open(file, "r+b") as stream:
            stream.write(bytes(file.stat().st_size))
        assert torch.equal(tok(images).reconstruction, before)
        optimizer = torch.optim.SGD(tok.parameters(), 0.1)
        out = tok.train()(images)
        (out.reconstruction.square().mean() + out.quantizer.loss).backward()
        assert all(p.grad is not None and p.is_leaf for p in tok.parameters())
        optimizer.step()
        assert not torch.equal(tok(images).reconstruction, before)

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc (Linux)")
    @pytest.mark.parametrize("form", ["tensors", "classes", "before_torch_1.6"])
    def test_a_full_size_checkpoint_needs_little_more_than_its_size(self, tmp_path, form):
        listed, _ = golden("official_state_dict_keys")
        shapes = dict(listed["IBQ/imagenet_ibqgan_16384"])
        for key in ("quantize.embedding.weight", "model_ema.quantizeembeddingweight"):
            shapes[key] = [[262144, 256], "float32"]
        state = {key: torch.zeros(shape, dtype=getattr(torch, kind)) for key, (shape, kind) in shapes.items()}
        state["model_ema.quantizeembeddingweight"][-1] = 7
        state["quantize.embedding.weight"].fill_(1)  # codes of zero would be VQ's
        file = tmp_path / "full.ckpt"
        beside = {"args": SimpleNamespace(lr=1)} if form == "classes" else {}
        is_archive = form != "before_torch_1.6"
        torch.save({"state_dict": state, **beside}, file, _use_new_zipfile_serialization=is_archive)
        del state
        found = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
        facts = json.loads(found.stdout.splitlines()[-1])
        size = file.stat().st_size
        file.unlink()
        assert size > 1.4e9
        assert facts["last"] == 7.0 and facts["codes"] == 262144
        assert facts["text"].endswith("1,156 of 1,156 keys accounted for")
        assert facts["peak"] <= 1.3 * size, f"{facts['peak'] / size:.2f} times the file"


PEAK = """
import json, sys, torch
from ibqlab.pretrained import load_tokenizer
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
before = status("VmRSS")
tok = load_tokenizer(sys.argv[1])
peak = status("VmHWM") - before
codes = tok.quantizer.codebook
print(json.dumps({"peak": peak, "last": codes[-1].mean().item(), "codes": len(codes), "text": str(tok.load_report)}))
"""


class Attack:
    """Makes a folder when a pickle reader rebuilds it."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


class TestRefusal:
    @pytest.mark.parametrize("form", ["lightning", "old_format", "pickle"])
    def test_nothing_in_a_file_is_run(self, tmp_path, official, form):
        file = tmp_path / "attack.ckpt"
        content = {"state_dict": official, "hyper_parameters": Attack()}
        if form == "pickle":
            file.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, file, _use_new_zipfile_serialization=form == "lightning")
        if form == "pickle":
            with pytest.raises(CheckpointError, match="nothing in it was run") as caught:
                load_tokenizer(file)
            assert str(file) in str(caught.value)
        else:
            report = load_tokenizer(file).load_report
            assert report.stand_ins == (f"{os.name}.mkdir",) and report.entries == ("hyper_parameters",)
        assert not os.path.exists(MARK)

    def test_classes_that_were_not_made_are_named(self, tmp_path, official):
        extra = {"args": SimpleNamespace(lr=1), "callbacks": {SimpleNamespace: 1}, "path": tmp_path}
        torch.save({"state_dict": official, **extra}, tmp_path / "args.ckpt")
        tok = load_tokenizer(tmp_path / "args.ckpt")
        assert torch.equal(tok.quantizer.codebook, official["model_ema.quantizeembeddingweight"])
        text = "beside the weights, stood in for and not made: pathlib.PosixPath, types.SimpleNamespace"
        assert text in str(tok.load_report) and tok.load_report.keys == 279

    def test_no_checkpoint(self, tmp_path, published):
        whole = published.read_bytes()
        (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text.ckpt").write_text("hello, this is no checkpoint")
        (tmp_path / "empty.ckpt").touch()
        (tmp_path / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
        (tmp_path / "half.safetensors").write_bytes((500).to_bytes(8, "little") + b'{"a":')
        pickled = pickle.dumps({"state_dict": list(range(1000))})
        (tmp_path / "cut_pickle.pt").write_bytes(pickled[: len(pickled) // 2])
        with zipfile.ZipFile(tmp_path / "photos.ckpt", "w") as archive:
            archive.writestr("cat.png", b"1")
        torch.save(torch.zeros(3), tmp_path / "tensor.pt")
        torch.save({"state_dict": {"weight": 3}}, tmp_path / "number.pt")
        expected = {
            "cut.ckpt": "cut short or damaged",
            "text.ckpt": "no checkpoint.*hello",
            "empty.ckpt": "it is empty",
            "pointer.ckpt": "Git LFS pointer",
            "half.safetensors": "cut short or damaged",
            "cut_pickle.pt": "damaged",
            "photos.ckpt": r"zip archive of cat\.png",
            "tensor.pt": "a Tensor",
            "number.pt": "got weight instead",
        }
        for name, text in expected.items():
            with pytest.raises(CheckpointError, match=text) as caught:
                load_tokenizer(tmp_path / name)
            assert name in str(caught.value) and "weights_only=False" not in str(caught.value)

    @pytest.mark.parametrize(
        ("names", "text"),
        [
            (["transformer.tok_emb.weight", "first_stage_model.encoder.conv_in.weight"], "autoregressive generator"),
            (["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "fc.weight"], "conv1, bn1, layer1, fc"),
        ],
    )
    def test_another_model(self, tmp_path, names, text):
        torch.save({"state_dict": {name: torch.zeros(4, 4) for name in names}}, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match=text):
            load_tokenizer(tmp_path / "other.ckpt")

    def test_half_matching_files(self, tmp_path, official):
        def without(*parts):
            return {key: value for key, value in official.items() if not any(part in key for part in parts)}

        codebook = official["quantize.embedding.weight"]
        faults = {
            "8 missing (decoder.up.1.block.1.norm1.weight,": without("decoder.up.1.block.1."),
            "8 missing (model_ema.decoderup1block1norm1weight,": without("decoderup1block1"),
            "1 unknown (encoder.extra)": official | {"encoder.extra": torch.zeros(1)},
            "1 unknown (loss.logvar)": official | {"loss.logvar": torch.zeros(1)},
            "1 unknown (model_ema.encoderextra)": official | {"model_ema.encoderextra": torch.zeros(1)},
            "1 of another shape (encoder.mid.attn_1.q.weight (32, 31, 1, 1), not (32, 32, 1, 1))": official
            | {"encoder.mid.attn_1.q.weight": torch.zeros(32, 31, 1, 1)},
            "(model_ema.quantizeembeddingweight (64, 16), not (60, 16))": official
            | {"quantize.embedding.weight": codebook[:60].clone()},
            "an autoencoder without codes": without("quantize"),
            "'quantize.embedding.weight' must have 2 dimensions; got (1024,)": official
            | {"quantize.embedding.weight": codebook.flatten()},
            "resembles a tokenizer of IBQ (family='ibq'), but no tensor's name begins with quant_conv.…, quantize": {
                k: v for k, v in official.items() if k.startswith("encoder.")
            },
        }
        for number, (text, state) in enumerate(faults.items()):
            torch.save({"state_dict": state}, tmp_path / f"{number}.ckpt")
            with pytest.raises(CheckpointError) as caught:
                load_tokenizer(tmp_path / f"{number}.ckpt")
            assert text in str(caught.value) and f"{number}.ckpt" in str(caught.value)

    def test_missing_paths_and_published_names(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file or run folder"):
            load_tokenizer(tmp_path / "nothing.ckpt")
        with pytest.raises(FileNotFoundError, match=r'download_published\("IBQ-16384"\)'):
            load_tokenizer("IBQ-16384")
        with pytest.raises(RunError, match="no run"):
            load_tokenizer(tmp_path)

    def test_no_averaged_weights(self, tmp_path):
        torch.save(published_state(tiny()), tmp_path / "plain.pt")
        with pytest.raises(CheckpointError, match='no averaged weights; type weights="raw"'):
            load_tokenizer(tmp_path / "plain.pt", quantizer="ibq")
        with pytest.raises(ValueError, match="'ema', 'raw'"):
            load_tokenizer(tmp_path / "plain.pt", "best")


@pytest.fixture
def run(tmp_path) -> Run:
    """A run of a tokenizer with a discriminator, at step 40."""
    tok, judge = tiny(), PatchDiscriminator(DiscriminatorConfig(base_channels=4))
    made = Run.start(tmp_path / "trained", TrainConfig(tokenizer=tok.config, ema_decay=0.99))
    state = {
        "model": tok.state_dict(),
        "ema": {name: p.detach() + 1 for name, p in tok.named_parameters()},
        "discriminator": judge.state_dict(),
        "discriminator_ema": {name: p.detach() + 2 for name, p in judge.named_parameters()},
        "lecam": {"real": torch.zeros(()), "fake": torch.zeros(())},
        "optimizer": {"state": {}, "param_groups": []},
    }
    made.save_checkpoint(40, state)
    return made


class TestRuns:
    def test_parts_and_report(self, run):
        found = read_checkpoint(run.path)
        raw, averaged = load_tokenizer(run.path, "raw"), load_tokenizer(run.path)
        assert torch.equal(averaged.quantizer.codebook, raw.quantizer.codebook + 1)
        assert (found.step, found.ema_decay, found.config) == (40, 0.99, raw.config)
        assert torch.equal(found.discriminator_ema["main.0.bias"], found.discriminator["main.0.bias"] + 2)
        assert averaged.load_report.entries == ("lecam", "optimizer")
        assert averaged.load_report.accounted == averaged.load_report.keys
        assert averaged.load_report.used["ema.quantizer.codes.weight"] == "quantizer.codes.weight"

    def test_a_run_without_discriminator_or_averages(self, tmp_path):
        made = Run.start(tmp_path / "old", TrainConfig(tokenizer=tiny().config, ema_decay=0))
        made.save_checkpoint(5, {"model": tiny().state_dict(), "ema": {}, "optimizer": {}})
        found = read_checkpoint(made.path)
        assert found.tokenizer_ema is found.discriminator is found.discriminator_ema is found.ema_decay is None
        with pytest.raises(RunError, match='weights="raw"'):
            load_tokenizer(made.path)

    def test_a_damaged_newest_checkpoint_is_passed_over(self, run):
        older = load_tokenizer(run.path)
        (run.path / "checkpoints/step_00000050.pt").write_bytes(b"PK damaged")
        with pytest.warns(UserWarning, match=r"step_00000050\.pt"):
            again = load_tokenizer(run.path)
        assert torch.equal(again.quantizer.codebook, older.quantizer.codebook)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": {}}, r"must hold tensors by name under 'model'; its entries are: model, ema"),
            ({"model": None}, "must hold tensors by name under 'model'"),
            ({"model": {"layer": 1}}, "must hold tensors by name under 'model'"),
            ({"model": {"layer": torch.zeros(1).expand(2**40)}}, r"claims 4,398,046,511,104 bytes"),
            ({"model": {"\x1b[31m": torch.zeros(1)}}, r"missing .*1 unknown \(\\x1b\[31m\)"),
            ({"ema": {"\x1b[31m": torch.zeros(1)}}, r"1 unknown \(\\x1b\[31m\)"),
            ({"ema": {"quantizer.codes.weight": torch.zeros(1)}}, "1 of another shape"),
            ({"discriminator": [1]}, "by name under 'discriminator'"),
        ],
    )
    def test_a_checkpoint_of_other_networks_is_a_message(self, run, change, message):
        _, state = run.load_checkpoint()
        run.save_checkpoint(40, state | change)
        for load in (read_checkpoint, load_tokenizer, lambda path: export_tokenizer(path, path / "x.safetensors")):
            with pytest.raises(CheckpointError, match=message):
                load(run.path)

    def test_checkpoints_that_are_gone_or_not_yet_there(self, run):
        (run.path / "checkpoints/step_00000040.pt").unlink()
        with pytest.raises(RunError, match="has no checkpoint yet"):
            load_tokenizer(run.path)
        run.finish("finished")
        with pytest.raises(RunError, match=r"is finished and its checkpoints are gone .*checkpoints\); put them back"):
            load_tokenizer(run.path)

    def test_one_step_of_a_run_names_the_folder(self, run):
        with pytest.raises(CheckpointError, match=r"run's folder, .*trained$"):
            load_tokenizer(run.last_checkpoint)

    def test_weights_of_another_design_are_refused(self, run):
        run.save_checkpoint(60, {"model": tiny(num_res_blocks=1).state_dict(), "ema": {}})
        with pytest.raises(CheckpointError, match=r"missing .*encoder\.down\.0\.block\.1"):
            load_tokenizer(run.path, "raw")

    def test_the_quantizer_of_a_run_is_known(self, run):
        assert load_tokenizer(run.path, quantizer="ibq").config.quantizer.config_name == "ibq"
        with pytest.raises(ValueError, match="holds 'ibq'"):
            load_tokenizer(run.path, quantizer="vq")


class TestExport:
    @pytest.mark.parametrize("kind", ["ibq", "vq_ema", "simvq", "lfq", "half"])
    def test_a_tokenizer_comes_back_bit_by_bit(self, tmp_path, kind):
        tok = {"lfq": tiny_magvit2, "half": lambda: tiny().bfloat16()}.get(kind, lambda: tiny(kind))()
        tok.encoder.conv_in.to(memory_format=torch.channels_last)
        again = load_tokenizer(export_tokenizer(tok, tmp_path / "tok.safetensors"))
        assert again.config == tok.config
        assert again.state_dict().keys() == tok.state_dict().keys()
        for name, value in tok.state_dict().items():
            found = again.state_dict()[name]
            assert found.dtype == value.dtype and torch.equal(found, value)
        assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in tok.parameters()]

    def test_an_export_knows_which_weights_it_holds(self, published, tmp_path):
        averaged = export_tokenizer(published, tmp_path / "averaged.safetensors")
        trained = export_tokenizer(published, tmp_path / "trained.safetensors", weights="raw")
        assert torch.equal(load_tokenizer(averaged).quantizer.codebook, load_tokenizer(published).quantizer.codebook)
        with pytest.raises(CheckpointError, match='type weights="ema"'):
            load_tokenizer(averaged, "raw")
        with pytest.raises(CheckpointError, match='type weights="raw"'):
            load_tokenizer(trained)
        expected = load_tokenizer(published, "raw").quantizer.codebook
        assert torch.equal(load_tokenizer(trained, "raw").quantizer.codebook, expected)
        assert read_checkpoint(averaged).tokenizer_ema.keys() == read_checkpoint(published).tokenizer_ema.keys()
        assert read_checkpoint(trained).tokenizer_ema is None

    def test_nothing_is_overwritten_or_left_half_written(self, tmp_path, published, monkeypatch):
        target = tmp_path / "tok.safetensors"
        target.write_text("mine")
        for export in (export_tokenizer, export_published):
            with pytest.raises(FileExistsError, match="was not changed"):
                export(published, target)
        assert target.read_text() == "mine"
        with pytest.raises(ValueError, match=r"must end in \.safetensors"):
            export_tokenizer(published, tmp_path / "tok.pt")
        with pytest.raises(FileNotFoundError, match="no such folder"):
            export_published(published, tmp_path / "nowhere" / "tok.ckpt")

        def broken(content, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(ibqlab.pretrained.export.torch, "save", broken)
        with pytest.raises(RunError, match="full"):
            export_published(published, tmp_path / "tok.ckpt")
        assert [file.name for file in tmp_path.iterdir()] == ["tok.safetensors"]

    def test_a_damaged_header_says_so(self, tmp_path):
        file = export_tokenizer(tiny(), tmp_path / "tok.safetensors")
        save_file(load_file(file), tmp_path / "bad.safetensors", metadata={"ibqlab": "{"})
        with pytest.raises(CheckpointError, match="header is damaged"):
            load_tokenizer(tmp_path / "bad.safetensors")

    def test_published_names_round_trip(self, published, official, tmp_path):
        again = torch.load(export_published(published, tmp_path / "again.ckpt"), weights_only=True)["state_dict"]
        assert list(again) == list(official)
        for key, value in official.items():
            assert again[key].dtype == value.dtype and torch.equal(again[key], value), key

    def test_a_run_under_published_names(self, run, tmp_path):
        file = export_published(run.path, tmp_path / "run.ckpt")
        content = torch.load(file, weights_only=True)
        state = content["state_dict"]
        assert content["global_step"] == 40
        assert state["model_ema.decay"].dtype == torch.float32 and state["model_ema.decay"] == torch.tensor(0.99)
        assert state["model_ema.num_updates"].dtype == torch.int32 and state["model_ema.num_updates"] == -1
        bias, average = state["loss.discriminator.main.0.bias"], state["model_ema.lossdiscriminatormain0bias"]
        assert torch.equal(average, bias + 2)
        assert "loss.discriminator.main.3.running_var" in state
        assert not any("running" in key for key in state if key.startswith("model_ema."))
        theirs, ours = load_tokenizer(file), load_tokenizer(run.path)
        assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())

    def test_published_format_holds_one_codebook(self, tmp_path):
        file = export_tokenizer(tiny("simvq"), tmp_path / "tok.safetensors")
        with pytest.raises(ValueError, match=r"anchors.*export_tokenizer"):
            export_published(file, tmp_path / "tok.ckpt")
        plain = export_published(export_tokenizer(tiny(), tmp_path / "ibq.safetensors"), tmp_path / "ibq.ckpt")
        assert not any(key.startswith("model_ema.") for key in torch.load(plain)["state_dict"])


class TestDownload:
    @pytest.fixture
    def hub(self, monkeypatch, tmp_path):
        """A hub without a network, with one file."""
        import huggingface_hub  # noqa: PLC0415 - its functions are replaced here

        content = b"weights as published"
        state = SimpleNamespace(etag=hashlib.sha256(content).hexdigest(), sent=content, asked=[])

        def metadata(url):
            state.asked.append(url)
            return SimpleNamespace(etag=state.etag, commit_hash="abc", size=len(content))

        def download(repo_id, filename, *, revision, local_dir=None):
            state.asked.append((repo_id, filename, revision))
            path = Path(local_dir or tmp_path / "cache") / filename
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(state.sent)
            return str(path)

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return state

    def test_the_file_of_the_table_at_a_fixed_revision(self, hub, tmp_path):
        path = download_published("IBQ-16384", tmp_path / "here")
        assert path == tmp_path / "here" / "imagenet256_16384.ckpt" and path.read_bytes() == hub.sent
        assert hub.asked[1] == ("TencentARC/IBQ-Tokenizer-16384", "imagenet256_16384.ckpt", "abc")
        assert "IBQ-Tokenizer-16384/resolve/main/imagenet256_16384.ckpt" in hub.asked[0]
        assert download_published("IBQ-1024").parent == tmp_path / "cache"

    def test_generators_come_the_same_way(self, hub, tmp_path):
        path = download_published("IBQ-AR-B", tmp_path / "here")
        assert path == tmp_path / "here" / "AR_256_B.ckpt" and path.read_bytes() == hub.sent
        assert hub.asked[1] == ("TencentARC/IBQ-AR-B", "AR_256_B.ckpt", "abc")
        hub.sent = b"weights as damaged"
        with pytest.raises(CheckpointError, match=r"sha256 .* is not the hub's .* deleted"):
            download_published("Open-MAGVIT2-AR-XL", tmp_path)
        assert not (tmp_path / "AR_256_XL.ckpt").exists()

    def test_a_damaged_file_is_not_used(self, hub, tmp_path):
        hub.sent = b"weights as damaged"
        with pytest.raises(CheckpointError, match=r"sha256 .* is not the hub's .* deleted"):
            download_published("IBQ-16384", tmp_path)
        assert not (tmp_path / "imagenet256_16384.ckpt").exists()
        hub.etag = None
        with pytest.raises(CheckpointError, match="missing one"):
            download_published("IBQ-16384", tmp_path)

    def test_without_network_it_says_what_to_do(self, monkeypatch):
        import huggingface_hub  # noqa: PLC0415 - as above

        def offline(url):
            raise huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co")

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
        expected = r"Cannot reach.*/resolve/main/imagenet256_262144\.ckpt.*load_tokenizer\(\"path/to/imagenet256_262144"
        with pytest.raises(CheckpointError, match=expected):
            download_published("IBQ-262144")
        with pytest.raises(CheckpointError, match=r"IBQ-AR-L/resolve/main/AR_256_L\.ckpt.*load_generator\("):
            download_published("IBQ-AR-L")

    def test_unknown_names(self):
        with pytest.raises(ValueError, match="did you mean 'IBQ-16384'"):
            download_published("IBQ-16383")

    def test_the_table_is_that_of_the_paper(self):
        rows = [(e.codebook_size, e.code_dim, e.rfid, e.lpips, e.usage) for e in list(PUBLISHED.values())[:4]]
        assert rows == [
            (1024, 256, 2.24, 0.2580, 0.99),
            (8192, 256, 1.87, 0.2437, 0.98),
            (16384, 256, 1.37, 0.2235, 0.96),
            (262144, 256, 1.00, 0.2030, 0.84),
        ]
        for entry in PUBLISHED.values():
            if entry.system in ("IBQ", "Open-MAGVIT2"):
                assert entry.code_dim == (256 if entry.system == "IBQ" else entry.codebook_size.bit_length() - 1)
