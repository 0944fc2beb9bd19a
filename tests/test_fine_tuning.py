"""Training on from any file: its settings under any recipe, its weights, a codebook grown, and what starts fresh."""

import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden import golden, golden_file
from peers import stored_file
from test_training import assert_same_run, trained, weights
from torch.nn import functional as F

from ibqlab.cli import main
from ibqlab.config import ConfigError, content_hash, to_dict
from ibqlab.costs.run_cost import count_recipe, count_run
from ibqlab.data import to_model_range, to_uint8
from ibqlab.plots import plot_run_curves
from ibqlab.pretrained import CheckpointError, available_families, export_tokenizer, load_tokenizer
from ibqlab.runs import RunError
from ibqlab.training import TrainConfig, recipe_config
from ibqlab.training.optimisation import learning_rate_at
from ibqlab.training.tokenizer.growth import choose_parents, displacements
from ibqlab.training.tokenizer.models import build_models

FILES = {
    "vqgan": ("taming_vqgan", {}),
    "vqgan_gumbel": ("taming_gumbel", {}),
    "ldm": ("ldm_vq", {"start_family": "ldm"}),
    "llamagen": ("llamagen_vq", {}),
    "vqgan_lc": ("vqgan_lc", {}),
    "maskgit": ("maskgit_vqgan", {}),
    "maskbit": ("maskbit_lfq", {}),
    "vqgan_plus": ("vqgan_plus", {}),
    "titok": ("titok_pixel", {"data.image_size": 16, "start_num_heads": [2, 3]}),
    "simvq": ("simvq", {}),
    "diffusers": ("diffusers_vq", {}),
}
"""Family → set of golden values, and settings beside start_from."""
TOLD = [(family, *of) for family, of in FILES.items() if family in available_families()]
SMALL = {
    "data.source": "digits",
    "data.image_size": 8,
    "batch_size": 2,
    "steps": 2,
    "record.tokens_per_code": 1,
    "record.snapshot_images": 2,
}
OLD, CODES = 64, "quantizer.codes.weight"


def started(path, **settings):
    """The smallest run that starts from a file (a__b for a.b)."""
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return recipe_config("builtin/smoke", SMALL | {"start_from": str(path)} | dotted)


def opened(path, told):
    """The tokenizer of a file, in float32."""
    heads = told.get("start_num_heads")
    return load_tokenizer(path, family=told.get("start_family"), num_heads=heads and tuple(heads)).float()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of six steps, with averages and a discriminator."""
    settings = {"loss.adversarial_weight": 0.1, "loss.discriminator": {"base_channels": 4, "num_layers": 1}}
    config = recipe_config("builtin/smoke", SMALL | {"steps": 6} | settings)
    return trained(tmp_path_factory.mktemp("first") / "run", config)


class TestEveryFamily:
    @pytest.mark.parametrize(("family", "name", "told"), TOLD, ids=[of[0] for of in TOLD])
    def test_a_run_starts_at_the_loaded_tokenizer(self, family, name, told, tmp_path):
        file = stored_file(name, tmp_path)
        loaded = opened(file, told)
        run = trained(tmp_path / "run", started(file, **told))
        assert run.metrics["step"].max() == 2
        recorded = run.config["tokenizer"]
        assert recorded["autoencoder"] == to_dict(loaded.config.autoencoder)
        assert recorded["quantizer"]["codebook_size"] == loaded.config.quantizer.codebook_size
        snapshot = run.snapshot(0)
        images = torch.from_numpy(snapshot["images"]).permute(0, 3, 1, 2)
        with torch.no_grad():
            rebuilt = to_uint8(loaded.eval()(to_model_range(images)).reconstruction).permute(0, 2, 3, 1)
        assert np.array_equal(snapshot["reconstructions"], rebuilt.numpy())
        state = torch.load(run.path / "checkpoints" / "step_00000000.pt")["state"]["model"]
        assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())
        start = run.provenance["start"]
        assert start["settings"] == "the file's" and start["optimizers"] == "fresh" and "discriminator" in start

    def test_settings_of_every_recipe_give_way(self, tmp_path):
        file = stored_file("llamagen_vq", tmp_path)
        for recipe in ("builtin/smoke", "builtin/digits", "imagenet/ibq_16384", "imagenet/lfq_262144"):
            config = recipe_config(recipe, assignments=[f"start_from={file}"])
            assert config.tokenizer.quantizer == load_tokenizer(file).config.quantizer, recipe
            assert config.tokenizer.autoencoder == load_tokenizer(file).config.autoencoder
            plain = recipe_config(recipe)
            assert (config.loss, config.optimizer, config.record) == (plain.loss, plain.optimizer, plain.record)

    def test_names_that_do_not_tell_are_asked_about(self, tmp_path):
        file = stored_file("ldm_vq", tmp_path)
        with pytest.raises(CheckpointError, match=r"family='ldm' .* the setting is called start_family"):
            started(file)
        assert started(file, start_family="vqgan").tokenizer.quantizer.config_name == "vq"
        titok = stored_file("titok", tmp_path)  # both of its widths are none of the published ones
        with pytest.raises(CheckpointError, match=r"type num_heads=.* the setting is called start_num_heads"):
            started(titok)
        autoencoder = started(titok, data__image_size=16, start_num_heads=[2]).tokenizer.autoencoder
        assert autoencoder.encoder_heads == autoencoder.decoder_heads == 2
        with pytest.raises(ValueError, match="start_num_heads must be one number"):
            recipe_config("builtin/smoke", {"start_num_heads": [2, 2, 2]})
        with pytest.raises(ValueError, match="family must be one of"):
            started(file, start_family="nobody")


class TestWhoseSettings:
    """Layers: a recipe's base, the recipe, what is typed; the file's stand just below the one that names the file."""

    def test_losses_stay_the_recipes(self, tmp_path, first):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(
            "extends: builtin/smoke\ntokenizer: {quantizer: {entropy_weight: 0.5, beta: 2.0, codebook_init: uniform}}\n"
        )
        config = recipe_config(str(recipe), SMALL | {"start_from": str(first.path)})
        quantizer = config.tokenizer.quantizer
        assert (quantizer.entropy_weight, quantizer.beta, quantizer.codebook_init) == (0.5, 2.0, "normal")
        file = stored_file("llamagen_vq", tmp_path)  # another quantizer than the recipe's, of which it says nothing
        other = recipe_config(str(recipe), SMALL | {"start_from": str(file)}).tokenizer.quantizer
        assert (other.config_name, other.beta, other.beta_on) == ("vq", 0.25, "encoder")

    def test_what_stands_beside_the_file_or_is_typed_wins(self, tmp_path):
        file, recipe = stored_file("llamagen_vq", tmp_path), tmp_path / "grown.yaml"
        recipe.write_text(
            f"extends: builtin/smoke\nstart_from: {file}\ntokenizer: {{quantizer: {{codebook_size: 100}}}}\n"
        )
        config = recipe_config(str(recipe))
        assert config.tokenizer.quantizer.codebook_size == 100 and config.tokenizer.quantizer.unit_vectors
        typed = recipe_config(str(recipe), assignments=["tokenizer.quantizer.beta=1"])
        assert (typed.tokenizer.quantizer.codebook_size, typed.tokenizer.quantizer.beta) == (100, 1)
        again = recipe_config(str(recipe), assignments=[f"start_from={file}"])
        assert again.tokenizer.quantizer.codebook_size == OLD

    def test_another_quantizer_of_the_same_codes_can_be_typed(self, tmp_path):
        file = golden_file("peers/taming_vqgan_official.ckpt")
        config = started(file, tokenizer__quantizer__name="ibq")
        quantizer = config.tokenizer.quantizer
        assert (quantizer.config_name, quantizer.codebook_size, quantizer.code_dim) == ("ibq", OLD, 8)
        run = trained(tmp_path / "run", config)
        assert "tokenizer.quantizer.name=ibq (there vq)" in run.provenance["start"]["settings"]
        with pytest.raises(ValueError, match=r"2 tensors do not fit .*'quantizer.codes.hits': none in the checkpoint"):
            trained(tmp_path / "other", started(file, tokenizer__quantizer__name="vq_ema"))
        assert not (tmp_path / "other").exists()

    def test_upkeep_may_be_another_and_is_named(self, tmp_path):
        file = golden_file("peers/taming_vqgan_official.ckpt")
        run = trained(tmp_path / "run", started(file, tokenizer__quantizer__revive_after=5))
        assert run.provenance["start"]["upkeep"] == "fresh, as the settings say"
        without = trained(tmp_path / "without", started(run.path, tokenizer__quantizer__revive_after=0))
        assert without.provenance["start"]["upkeep"] == "left out, as the settings say"
        with pytest.raises(ValueError, match="kmeans would overwrite the file's codes"):
            trained(tmp_path / "no", started(file, tokenizer__quantizer__codebook_init="kmeans"))

    def test_a_runs_own_settings_are_taken_as_they_stand_also_without_the_file(self, tmp_path):
        file = tmp_path / "file.ckpt"
        shutil.copy(golden_file("peers/taming_vqgan_official.ckpt"), file)
        run = trained(tmp_path / "run", started(file, tokenizer__quantizer__codebook_size=80))
        file.unlink()
        config = recipe_config(str(run.path / "config.yaml"))
        assert content_hash(config) == run.config_hash
        longer = trained(run.path, recipe_config(str(run.path / "config.yaml"), {"steps": 3}))
        assert longer.metrics["step"].max() == 3
        with pytest.raises(FileNotFoundError):
            started(file)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"start_from": 5}, "start_from: must be text; got"),
            ({"start_family": 5}, "start_family: must be text; got"),
            ({"start_num_heads": "two"}, "start_num_heads: must be a list; got"),
            ({"start_weights": "averaged"}, "start_weights must be one of"),
            ({"grow_codes": "clone"}, "grow_codes must be one of"),
            ({"grow_noise": 0.0}, "grow_noise must lie above 0 to 1, got 0.0"),
            ({"tokenizer": "mine"}, "tokenizer: must be a mapping of settings; got"),
            ({"tokenizer.quantizer": "vq"}, "tokenizer.quantizer: a quantizer needs a name"),
        ],
        ids=str,
    )
    def test_impossible_settings(self, settings, says, first):
        with pytest.raises(ValueError, match=re.escape(says)):
            recipe_config("builtin/smoke", {"start_from": str(first.path)} | settings)

    def test_a_generator_starts_from_no_file(self, first):
        with pytest.raises(ConfigError, match="start_from: unknown key"):
            recipe_config("builtin/smoke_generator", {"start_from": str(first.path)})

    def test_hashes_from_before_stay(self, first):
        settings = to_dict(TrainConfig())
        newer = ("start_family", "start_num_heads", "start_weights", "grow_codes", "grow_noise")
        older = {key: value for key, value in settings.items() if key not in newer}
        older["optimizer"] = {key: value for key, value in settings["optimizer"].items() if key != "scale_lr_by_batch"}
        assert content_hash(older) == content_hash(settings) == "c97a0964a0be"


class TestWeights:
    @pytest.mark.parametrize("asked", ["", "ema", "raw"])
    def test_of_a_published_file_with_averages(self, asked):
        file = golden_file("peers/simvq_official.ckpt")
        models, start = build_models(started(file, start_weights=asked))
        expected = load_tokenizer(file, asked or "ema").state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in models.tokenizer.state_dict().items())
        averages = load_tokenizer(file, "ema").state_dict()
        assert start.averages and all(torch.equal(value, averages[key]) for key, value in start.averages.items())
        assert start.facts["averages"] == "the file's"
        assert start.facts["weights"] == ("as trained" if asked == "raw" else "averaged")

    def test_of_a_run_go_on_as_trained_unless_averages_are_asked_for(self, tmp_path, first):
        second = trained(tmp_path / "second", started(first.path))
        assert all(torch.equal(value, weights(first)[key]) for key, value in _begun(second)["model"].items())
        third = trained(tmp_path / "third", started(first.path, start_weights="ema"))
        stored = first.load_checkpoint()[1]["ema"]
        for part in ("model", "ema"):
            assert all(torch.equal(_begun(third)[part][key], value) for key, value in stored.items())

    def test_of_an_export_are_the_one_set_it_has(self, tmp_path, first):
        export_tokenizer(first.path, tmp_path / "averaged.safetensors", weights="ema")
        run = trained(tmp_path / "run", started(tmp_path / "averaged.safetensors"))
        stored = first.load_checkpoint()[1]["ema"]
        assert all(torch.equal(_begun(run)["model"][key], value) for key, value in stored.items())
        with pytest.raises(CheckpointError, match='type start_weights="ema"'):
            build_models(started(tmp_path / "averaged.safetensors", start_weights="raw"))

    def test_those_that_a_run_lacks_are_not_made_up(self, tmp_path):
        run = trained(tmp_path / "run", recipe_config("builtin/smoke", SMALL | {"ema_decay": 0.0, "steps": 1}))
        assert build_models(started(run.path))[1].facts["averages"] == "fresh, at the weights: the file has none"
        with pytest.raises(RunError, match=r'holds no averaged weights; type start_weights="raw"'):
            build_models(started(run.path, start_weights="ema"))

    def test_a_discriminator_is_the_files_where_it_fits_and_is_named(self, first, tmp_path):
        adversary = {"loss__adversarial_weight": 0.1}
        fitting = {"base_channels": 4, "num_layers": 1}
        models, start = build_models(started(first.path, **adversary, loss__discriminator=fitting))
        stored = first.load_checkpoint()[1]["discriminator"]
        assert all(torch.equal(value, stored[key]) for key, value in models.discriminator.state_dict().items())
        assert start.facts["discriminator"] == "its own" and start.discriminator_averages
        wider = {"base_channels": 8, "num_layers": 1}
        _, start = build_models(started(first.path, **adversary, loss__discriminator=wider))
        assert start.facts["discriminator"].startswith("fresh, as the recipe says: the file's is another (main.0.bias")
        assert not start.discriminator_averages
        file = stored_file("diffusers_vq", tmp_path)
        _, start = build_models(started(file, **adversary, loss__discriminator=fitting))
        assert start.facts["discriminator"] == "fresh, as the recipe says: the file has none"

    def test_a_discriminator_that_is_not_read_is_not_called_missing(self, tmp_path):
        file = torch.load(golden_file("peers/llamagen_vq_official.pt"), weights_only=False)
        entries = {"discriminator": {"main.0.weight": torch.zeros(4, 3, 4, 4)}, "steps": 9}
        torch.save({"model": file["model"]} | entries, tmp_path / "trained.pt")
        adversary = {"loss__adversarial_weight": 0.1, "loss__discriminator": {"base_channels": 4, "num_layers": 1}}
        _, start = build_models(started(tmp_path / "trained.pt", **adversary))
        assert start.facts["discriminator"] == "fresh, as the recipe says: the file's is not read"

    def test_the_first_line_names_all_of_it(self, tmp_path):
        file = golden_file("peers/simvq_official.ckpt")
        typed = [f"{key}={value}" for key, value in SMALL.items()] + [f"start_from={file}"]
        output = ["--output", str(tmp_path / "run"), "--no-report"]
        done = CliRunner().invoke(main, ["train", "builtin/smoke", *typed, *output])
        assert done.exit_code == 0, done.output
        line = next(line for line in done.stderr.splitlines() if line.startswith("starts from"))
        assert "a tokenizer of SimVQ): settings: the file's; weights: averaged; averages: the file's" in line
        assert line.endswith("discriminator: none, as the recipe says; optimizers: fresh")


def _begun(run):
    return torch.load(run.path / "checkpoints" / "step_00000000.pt")["state"]


class TestGrowth:
    @pytest.mark.parametrize("family", [of[0] for of in TOLD if of[0] != "maskbit"])
    def test_old_codes_stay_and_new_ones_lie_beside_them(self, family, tmp_path):
        name, told = FILES[family]
        file = stored_file(name, tmp_path)
        old = opened(file, told)
        size = old.config.quantizer.codebook_size
        config = started(file, **told, tokenizer__quantizer__codebook_size=size + 40)
        models, start = build_models(config)
        grown = models.tokenizer.eval()
        assert (start.growth.old, start.growth.new) == (size, size + 40)
        table = "quantizer.codes.anchors" if family in ("simvq", "vqgan_lc") else CODES
        before, after = old.state_dict()[table], grown.state_dict()[table]
        assert torch.equal(after[:size], before)
        assert len(torch.unique(after, dim=0)) == size + 40
        unit = F.normalize(before, dim=1) if family == "llamagen" else before
        gaps = torch.cdist(unit, unit).fill_diagonal_(torch.inf).min(1).values
        shifts = torch.cdist(after[size:], unit)
        nearest = shifts.argmin(1)
        share = shifts.amin(1) / gaps[nearest]
        assert (share <= 0.1001).all()
        if family != "llamagen":  # the sphere shortens a step out of its plane
            assert share.min() > 0.0999
        side = old.config.autoencoder.resolution if family == "titok" else size
        rows, columns = old.latent_grid(side, side) if family == "titok" else (1, size)
        indices = torch.arange(rows * columns).view(1, rows, columns)
        assert torch.allclose(grown.decode_indices(indices), old.decode_indices(indices), atol=1e-6)

    def test_images_are_rebuilt_nearly_as_before(self, tmp_path):
        file = golden_file("peers/taming_vqgan_official.ckpt")
        images = golden("peers/taming_vqgan")[1]["x"]
        old = load_tokenizer(file).eval()
        config = started(file, tokenizer__quantizer__codebook_size=4 * OLD)
        grown = build_models(config)[0].tokenizer.eval()
        fresh = build_models(started(file, tokenizer__quantizer__codebook_size=4 * OLD, grow_noise=1.0))[0].tokenizer
        with torch.no_grad():
            expected = old(images).reconstruction
            near, far = ((net.eval()(images).reconstruction - expected).abs().mean() for net in (grown, fresh))
        assert 0 < near < 0.5 * far

    def test_copies_go_to_the_code_with_most_hits_per_copy(self):
        hits = torch.tensor([8, 3, 0, 1])
        parents = choose_parents(hits, 4, 6).tolist()
        assert parents[:3] == [0, 0, 0]  # 8/2, 8/3 and 8/4 hits each, ahead of 3/2; then 8/5 and 3/2
        assert parents == [0, 0, 0, 0, 1, 0]
        assert choose_parents(None, 3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert 2 not in choose_parents(hits, 4, 100).tolist()

    def test_copies_of_codes_at_one_place_part(self):
        codes = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
        shifts = displacements(codes, torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0))
        assert torch.allclose(shifts.norm(dim=1), torch.full((3,), 5.0))

    def test_hits_of_a_run_are_known(self, first):
        counts = torch.as_tensor(first.snapshot()["counts"])
        _, start = build_models(started(first.path, tokenizer__quantizer__codebook_size=OLD + 3))
        assert start.growth.known_hits and "split from those used most" in start.facts["codes"]
        models, _ = build_models(started(first.path, tokenizer__quantizer__codebook_size=OLD + 3, grow_noise=0.01))
        table = models.tokenizer.state_dict()[CODES]
        parents = torch.cdist(table[OLD:], table[:OLD]).argmin(1)
        assert parents.tolist() == choose_parents(counts, OLD, 3).tolist()
        assert counts[parents[0]] == counts.max()

    def test_hits_in_llamagens_window_are_known(self, tmp_path):
        file = torch.load(golden_file("peers/llamagen_vq_official.pt"), weights_only=False)
        file["model"]["quantize.codebook_used"] = window = torch.full((65536,), 9.0)
        window[: len(window) // 4] = 5
        torch.save({"model": file["model"]}, tmp_path / "used.pt")
        config = started(tmp_path / "used.pt", tokenizer__quantizer__codebook_size=OLD + 2, grow_noise=0.01)
        models, start = build_models(config)
        table = F.normalize(models.tokenizer.state_dict()[CODES], dim=1)
        assert start.growth.known_hits
        assert torch.cdist(table[OLD:], table[:OLD]).argmin(1).tolist() == [9, 9]

    def test_averages_grow_with_the_weights(self, first, tmp_path):
        run = trained(tmp_path / "run", started(first.path, tokenizer__quantizer__codebook_size=OLD + 8))
        begun, stored = _begun(run), first.load_checkpoint()[1]
        assert torch.equal(begun["ema"][CODES][:OLD], stored["ema"][CODES])
        shift = begun["model"][CODES][OLD:] - begun["ema"][CODES][OLD:]
        assert 0 < shift.abs().max() <= (stored["model"][CODES] - stored["ema"][CODES]).abs().max() * 1.001

    def test_moving_averages_of_new_codes_begin_at_one_hit(self, tmp_path):
        ema = {"name": "vq_ema", "codebook_size": 32, "code_dim": 8, "revive_after": 3}
        begun = trained(tmp_path / "ema", recipe_config("builtin/smoke", SMALL | {"tokenizer.quantizer": ema}))
        _, start = build_models(started(begun.path, tokenizer__quantizer__codebook_size=40))
        models, _ = build_models(started(begun.path, tokenizer__quantizer__codebook_size=40))
        state = {key.removeprefix("quantizer."): value for key, value in models.tokenizer.state_dict().items()}
        assert start.growth.known_hits
        assert torch.equal(state["codes.hits"][32:], torch.ones(8))
        assert torch.equal(state["codes.sums"][32:], state["codes.weight"][32:])
        assert torch.equal(state["codes.hits"][:32], weights(begun)["quantizer.codes.hits"])
        assert state["upkeep.1.idle"].shape == (40,)
        assert (
            trained(tmp_path / "on", started(begun.path, tokenizer__quantizer__codebook_size=40)).status == "finished"
        )

    @pytest.mark.parametrize("family", ["vqgan", "llamagen", "ibq"])
    def test_new_codes_at_tokens_are_encoder_features(self, family, tmp_path, first):
        file = first.path if family == "ibq" else stored_file(FILES[family][0], tmp_path)
        config = started(file, tokenizer__quantizer__codebook_size=OLD + 30, grow_codes="tokens")
        run = trained(tmp_path / "run", config)
        before = weights(first)[CODES] if family == "ibq" else load_tokenizer(file).state_dict()[CODES]
        model = _begun(run)["model"]
        assert torch.equal(model[CODES][:OLD], before.float())
        assert torch.equal(_begun(run)["ema"][CODES][OLD:], model[CODES][OLD:])
        tokenizer = build_models(config)[0].tokenizer.eval()
        images = torch.cat([tokenizer_image(index) for index in range(30)])
        with torch.no_grad():
            features = tokenizer.quant_conv(tokenizer.encoder(images)).permute(0, 2, 3, 1).flatten(0, 2)
        new = model[CODES][OLD:]
        cosines = F.normalize(new, dim=1) @ F.normalize(features, dim=1).T
        assert (cosines.amax(1) > 1 - 1e-5).all()  # each is a token, by its direction
        lengths = {"vqgan": features[cosines.argmax(1)].norm(dim=1), "llamagen": torch.ones(30)}
        lengths["ibq"] = before.norm(dim=1).mean().expand(30)
        assert torch.allclose(new.norm(dim=1), lengths[family], rtol=1e-4)
        assert "at features of the first training images" in run.provenance["start"]["codes"]

    def test_too_few_images_for_codes_at_tokens(self, tmp_path, first):
        config = started(first.path, tokenizer__quantizer__codebook_size=60_000, grow_codes="tokens")
        with pytest.raises(ValueError, match=r"grow_codes=tokens needs 3,746 training images of 16 tokens .*split"):
            trained(tmp_path / "run", config)

    @pytest.mark.parametrize("family", ["simvq", "vqgan_lc", "vqgan_gumbel"])
    def test_tokens_have_no_place_where_codes_are_no_features(self, family, tmp_path):
        file = stored_file(FILES[family][0], tmp_path)
        with pytest.raises(ValueError, match=r"grow_codes='tokens' does not apply to .*use grow_codes=split"):
            build_models(started(file, tokenizer__quantizer__codebook_size=200, grow_codes="tokens"))

    @pytest.mark.parametrize("name", ["vq", "vq_ema"])
    def test_codes_of_another_kind_are_not_grown_into(self, name):
        file = golden_file(f"peers/{'simvq' if name == 'vq' else 'taming_vqgan'}_official.ckpt")
        typed = {"tokenizer__quantizer__name": name, "tokenizer__quantizer__codebook_size": 80}
        with pytest.raises(ValueError, match=r"tensors do not fit the settings under tokenizer"):
            build_models(started(file, **typed))

    def test_another_quantizer_can_be_typed_for_a_grown_codebook(self):
        file = golden_file("peers/taming_vqgan_official.ckpt")
        typed = {"tokenizer__quantizer__name": "ibq", "tokenizer__quantizer__codebook_size": 80}
        models, _ = build_models(started(file, **typed))
        assert torch.equal(models.tokenizer.quantizer.codes.weight[:OLD], load_tokenizer(file).quantizer.codes.weight)

    def test_a_codebook_is_not_shrunk(self, first, tmp_path):
        with pytest.raises(ValueError, match=r"codebook_size=32 is less than the 64 codes .* no longer be decoded"):
            trained(tmp_path / "run", started(first.path, tokenizer__quantizer__codebook_size=32))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        "quantizer",
        [
            {"name": "fsq", "codebook_size": 64, "code_dim": 3},
            {"name": "residual", "codebook_size": 64, "code_dim": 4, "inner": {"name": "vq"}},
            {"name": "fvq", "codebook_size": 64, "code_dim": 4},
        ],
        ids=lambda quantizer: quantizer["name"],
    )
    def test_codes_that_are_no_rows_are_not_grown(self, quantizer, tmp_path):
        smaller = quantizer | {"codebook_size": 16} | ({"code_dim": 3} if quantizer["name"] == "fsq" else {})
        smaller |= {"codebook_size": 27} if quantizer["name"] == "fsq" else {}
        config = recipe_config("builtin/smoke", SMALL | {"tokenizer.quantizer": smaller, "steps": 1})
        begun = trained(tmp_path / "begun", config)
        with pytest.raises(ValueError, match=r"is not grown: its codes are no rows that are stored one by one"):
            build_models(started(begun.path, tokenizer__quantizer=quantizer))

    def test_lfqs_size_follows_from_its_bits(self, tmp_path):
        lfq = {"name": "lfq", "codebook_size": 16, "code_dim": 4}
        begun = trained(tmp_path / "begun", recipe_config("builtin/smoke", SMALL | {"tokenizer.quantizer": lfq}))
        with pytest.raises(ValueError, match=r"code_dim must be log2\(codebook_size\) for lfq, 6 for 64 codes"):
            started(begun.path, tokenizer__quantizer__codebook_size=64)
        larger = {"tokenizer__quantizer": {"name": "lfq", "codebook_size": 64, "code_dim": 6}}
        with pytest.raises(ValueError, match=r"code_dim=6, and codes of the file have 4 numbers"):
            build_models(started(begun.path, **larger))

    def test_another_code_dim_is_refused_with_the_reason(self, first, tmp_path):
        with pytest.raises(
            ValueError, match=r"code_dim=16, and codes of the file have 8 .*start fresh.*Leave code_dim"
        ):
            trained(tmp_path / "run", started(first.path, tokenizer__quantizer__code_dim=16))
        assert not (tmp_path / "run").exists()

    def test_the_curve_of_old_and_new_codes_is_recorded_and_drawn(self, tmp_path, first):
        run = trained(tmp_path / "run", started(first.path, tokenizer__quantizer__codebook_size=OLD + 16, steps=4))
        rows = run.metrics
        for row in rows.to_dict("records"):
            for prefix in ("", "step_"):
                if row["step"]:
                    whole = OLD * row[f"{prefix}usage_old"] + 16 * row[f"{prefix}usage_new"]
                    assert whole == pytest.approx(row[f"{prefix}usage"] * (OLD + 16))
        counts = run.snapshot()["counts"]
        last = rows.iloc[-1]
        assert last["validation_usage_old"] == (counts[:OLD] > 0).mean()
        assert last["validation_usage_new"] == (counts[OLD:] > 0).mean()
        usage = plot_run_curves(rows).axes[1]
        assert {"validation, old codes", "validation, new codes"} <= {line.get_label() for line in usage.get_lines()}
        assert not any("usage_old" in key for key in first.metrics)
        assert not any("old codes" in line.get_label() for line in plot_run_curves(first.metrics).axes[1].get_lines())

    @pytest.mark.parametrize("rule", ["split", "tokens"])
    def test_a_run_that_was_killed_is_resumed_bit_for_bit_when_the_file_is_gone(self, rule, tmp_path, first):
        file = tmp_path / "file"
        shutil.copytree(first.path, file)
        typed = {"tokenizer__quantizer__codebook_size": OLD + 16, "grow_codes": rule, "steps": 6}
        adversary = {"loss__adversarial_weight": 0.1, "loss__discriminator": {"base_channels": 4, "num_layers": 1}}
        config = started(file, **typed, **adversary, record__checkpoint_every=2)
        whole = trained(tmp_path / "whole", config)

        def stop(row):
            if row["step"] == 3:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            trained(tmp_path / "killed", config, watch=stop)
        shutil.rmtree(file)
        again = trained(tmp_path / "killed", config)
        assert len(again.provenance["resumed"]) == 1
        assert_same_run(again, whole)


def tokenizer_image(index):
    """One of the digits that training sees first, as it was validated: without crops there is no choice in it."""
    from ibqlab.data import DigitsSource  # noqa: PLC0415

    picture = DigitsSource(image_size=8, split="train").get(index, 0).image
    return to_model_range(torch.as_tensor(picture)[None])


class TestLearningRate:
    def test_it_is_exact(self):
        taming = {"optimizer.learning_rate": 4.5e-6, "optimizer.scale_lr_by_batch": 1, "batch_size": 16}
        config = recipe_config("builtin/smoke", taming)
        assert config.scaled_optimizer.learning_rate == 4.5e-6 * 16
        assert config.optimizer.learning_rate == 4.5e-6
        published = recipe_config("builtin/smoke", {"optimizer.scale_lr_by_batch": 256, "batch_size": 64})
        assert published.scaled_optimizer.learning_rate == published.optimizer.learning_rate / 4
        assert recipe_config("builtin/smoke").scaled_optimizer == recipe_config("builtin/smoke").optimizer

    def test_a_run_learns_at_it_with_its_drops(self, tmp_path):
        rate = {"optimizer.learning_rate": 1e-5, "optimizer.scale_lr_by_batch": 1, "optimizer.drop_steps": [1]}
        adversary = {"loss.adversarial_weight": 0.1, "loss.discriminator": {"base_channels": 4, "num_layers": 1}}
        config = recipe_config("builtin/smoke", SMALL | rate | adversary | {"batch_size": 4})
        run = trained(tmp_path / "run", config)
        assert run.metrics["learning_rate"].dropna().tolist() == [4e-5, 4e-5 * 0.1]
        assert learning_rate_at(1, config.scaled_optimizer) == 4e-5
        state = run.load_checkpoint()[1]
        for name in ("optimizer", "discriminator_optimizer"):
            assert state[name]["param_groups"][0]["lr"] == 4e-5 * 0.1
        plain = recipe_config("builtin/smoke", SMALL | adversary | {"batch_size": 4, "optimizer.learning_rate": 4e-5})
        same_rate = trained(tmp_path / "plain", TrainConfig(**{**vars(plain), "optimizer": config.scaled_optimizer}))
        assert all(torch.equal(weights(run)[key], value) for key, value in weights(same_rate).items())

    def test_a_plan_shows_it(self):
        settings = ["optimizer.learning_rate=4.5e-6", "optimizer.scale_lr_by_batch=1", "batch_size=16"]
        assert "learning rate 7.2e-05" in count_recipe("builtin/smoke", settings).describe()
        assert "learning rate 0.001" in count_run(recipe_config("builtin/smoke")).describe()

    def test_a_plan_of_a_run_from_a_file_counts_the_files_network(self, tmp_path):
        file = stored_file("llamagen_vq", tmp_path)
        cost = count_recipe("builtin/smoke", [f"start_from={file}"])
        assert cost.parameters.total == sum(p.numel() for p in load_tokenizer(file).parameters())

    def test_less_than_no_image(self):
        with pytest.raises(ValueError, match="scale_lr_by_batch must be ≥ 0"):
            recipe_config("builtin/smoke", {"optimizer.scale_lr_by_batch": -1})
