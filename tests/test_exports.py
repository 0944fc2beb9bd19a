"""Exports as files: of two at once the first one stands, and a full disk is told in one message."""

import warnings

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from golden import golden, golden_file
from PIL import Image
from test_pretrained_generators import tiny_tokenizer

from ibqlab.cli import main
from ibqlab.generator import Generator, GeneratorConfig
from ibqlab.pretrained import CheckpointError, export_tokenizer, load_tokenizer
from ibqlab.pretrained.export import (
    TargetExists,
    published_generator_state,
    published_tokenizer_state,
    save_checkpoint_file,
    whole_file,
)
from ibqlab.pretrained.load_report import warn_of_start
from ibqlab.runs import RunError
from ibqlab.tokenizer import Tokenizer, TokenizerConfig
from ibqlab.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from ibqlab.training import recipe_config, train


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
    def full(content, stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="disk or a quota is full"):
        save_checkpoint_file({}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_safetensors_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    def full(tensors, target, header):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(RunError, match=r"x\.safetensors: the disk or a quota is full"):
        export_tokenizer(tiny_tokenizer(), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- which weights ---


@pytest.mark.parametrize(
    ("decay", "step", "says"),
    [
        (0.999, 300, "still hold 74 % of what training began with (decay 0.999, 300 steps)"),
        (0.999, 2994, "still hold 5 %"),
        (0.999, 2995, ""),
        (0.5, 4, "still hold 6 %"),
        (None, 4, ""),
        (0.999, 0, ""),
    ],
)
def test_averages_of_few_steps_are_warned_of(decay, step, says):
    warning = warn_of_start(decay, step)
    assert says in warning and bool(warning) == bool(says)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "run"
    return train(recipe_config("builtin/smoke", {"steps": 2}), folder, progress=False).path


def told(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def test_what_a_published_file_does_not_tell_is_said_in_the_command(tmp_path):
    whole = torch.load(golden_file("peers/taming_vqgan_official.ckpt"), weights_only=True)["state_dict"]
    bare, image = tmp_path / "bare.ckpt", torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    torch.save({name: value for name, value in whole.items() if not name.startswith("loss.")}, bare)
    untold = CliRunner().invoke(main, ["export", str(bare), str(tmp_path / "no.safetensors")])
    assert untold.exit_code == 2 and "--family ibq" in untold.output and not (tmp_path / "no.safetensors").exists()
    for ending in ("safetensors", "ckpt"):
        target = tmp_path / f"vqgan.{ending}"
        told("export", bare, target, "--family", "vqgan")
        expected = load_tokenizer(bare, family="vqgan").encode(image).indices
        assert torch.equal(load_tokenizer(target).encode(image).indices, expected)
        assert load_tokenizer(target).config.quantizer.config_name == "vq"
    titok = golden_file("peers/titok_official.bin")
    told("export", titok, tmp_path / "titok.safetensors", "--num-heads", "2")
    assert load_tokenizer(tmp_path / "titok.safetensors").config.autoencoder.encoder_heads == 2


def test_a_family_that_is_told_wrongly_is_answered_with_all_that_fit(tmp_path):
    whole = torch.load(golden_file("peers/taming_vqgan_official.ckpt"), weights_only=True)["state_dict"]
    torch.save({name: value for name, value in whole.items() if not name.startswith("loss.")}, tmp_path / "bare.ckpt")
    with pytest.raises(CheckpointError, match=r"family='ibq' or family='ldm' or family='vqgan'$"):
        load_tokenizer(tmp_path / "bare.ckpt", family="maskgit")


WARNING = (
    "averaged weights still hold 100 % of what training began with (decay 0.999, 2 steps); for the weights as trained"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of a dozen: enough for two splits."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("door", ["tokenize", "inspect", "export"])
def test_every_door_says_which_weights_it_takes_and_warns_of_a_short_run(short_run, pictures, tmp_path, door):
    images = [f"source={pictures}"]
    outputs = {"tokenize": [*images, "--output", tmp_path / "tokens"], "inspect": []}
    outputs["export"] = [tmp_path / "x.safetensors"]
    taken = told(door, short_run, *outputs[door])
    assert (taken.stdout + taken.stderr).count(WARNING) == 1
    assert "--weights raw" in taken.output and "UserWarning" not in taken.output
    others = {"tokenize": [*images, "--output", tmp_path / "raw"], "inspect": []}
    others["export"] = [tmp_path / "raw.safetensors"]
    plain = told(door, short_run, *others[door], "--weights", "raw")
    assert WARNING not in plain.output
    if door == "inspect":
        assert "run at step 2, averaged weights" in taken.stdout and "run at step 2, weights as trained" in plain.stdout
    if door == "export":
        assert taken.stdout.splitlines()[1] == "holds averaged weights; for the weights as trained: --weights raw"
        assert plain.stdout.splitlines()[1] == "holds weights as trained; for the averaged weights: --weights ema"


def test_a_published_export_holds_both(short_run, tmp_path):
    said = told("export", short_run, tmp_path / "x.ckpt")
    assert said.stdout.splitlines() == [str(tmp_path / "x.ckpt"), "holds weights as trained and averaged weights"]


def test_python_is_warned_too(short_run):
    with pytest.warns(UserWarning, match='still hold 100 % .* type weights="raw" in Python'):
        assert "Warning: averaged" in str(load_tokenizer(short_run).load_report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(short_run, "raw")


ORDERS = {
    "IBQ/imagenet_ibqgan_16384": lambda: published_state_of_new_networks(TokenizerConfig()),
    "Open-MAGVIT2/imagenet_lfqgan_256_L": lambda: published_state_of_new_networks(
        recipe_config("imagenet/lfq_262144").tokenizer
    ),
    "IBQ-AR/B": lambda: published_generator_state(
        Generator(GeneratorConfig.preset("B")), Tokenizer.from_config(TokenizerConfig())
    ),
}


def published_state_of_new_networks(config: TokenizerConfig) -> dict[str, torch.Tensor]:
    """A new tokenizer and discriminator, and their averages, under published names."""
    tokenizer, discriminator = Tokenizer.from_config(config), PatchDiscriminator(DiscriminatorConfig())
    return published_tokenizer_state(
        config,
        tokenizer.state_dict(),
        tokenizer_ema=dict(tokenizer.named_parameters()),
        discriminator=discriminator.state_dict(),
        discriminator_ema=dict(discriminator.named_parameters()),
    )


def test_every_model_of_the_list_is_exported_in_its_order():
    """Key by key: loaders that go by position take each tensor for what it is. The perceptual loss is left out."""
    listed, _ = golden("official_state_dict_keys")
    assert set(listed) == set(ORDERS)
    for model, keys in listed.items():
        with torch.device("meta"):
            state = ORDERS[model]()
        expected = {key: entry for key, entry in keys.items() if not key.startswith("loss.perceptual_loss.")}
        assert list(state) == list(expected), model
        assert {key: list(value.shape) for key, value in state.items()} == {k: v[0] for k, v in expected.items()}
