"""TiTok: the design, its settings and what they refuse, its training and its cost."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from registry import SMALL_DIGITS

from ibqlab.config import ConfigError, parse, to_dict
from ibqlab.costs.run_cost import count_run
from ibqlab.generator import generator_config
from ibqlab.pretrained import export_published, export_tokenizer, load_tokenizer
from ibqlab.quantizers import quantizer_config
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokenizer import AutoencoderConfig, TitokConfig, Tokenizer, TokenizerConfig
from ibqlab.tokenizer.autoencoder import find_blocks
from ibqlab.tokenizer.vision_transformer import Attention
from ibqlab.tokens.writing import write_tokens
from ibqlab.training import recipe_config, train
from ibqlab.training.generator.token_source import check_fit

TINY = {
    "design": "titok",
    "resolution": 8,
    "patch": 4,
    "tokens": 6,
    "encoder_width": 16,
    "encoder_layers": 2,
    "encoder_heads": 2,
    "decoder_width": 24,
    "decoder_layers": 1,
    "decoder_heads": 3,
    "latent_channels": 4,
}
PIXELS = AutoencoderConfig(
    design="maskgit",
    base_channels=32,
    channel_multipliers=(1, 1, 1),
    num_res_blocks=1,
    attention_resolutions=(),
    latent_channels=5,
)
CODES = quantizer_config({"name": "vq", "codebook_size": 16, "code_dim": 4, "beta_on": "encoder"})


def tiny(**settings) -> Tokenizer:
    """A tokenizer with fresh weights, for images of 8 × 8."""
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(autoencoder=TitokConfig(**{**TINY, **settings}), quantizer=CODES))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("settings", [{}, {"mixed_latents": True, "pixel_codes": 7, "pixel_decoder": PIXELS}])
class TestDesign:
    def test_tokens_are_one_row_and_decode_back(self, settings, images):
        tokenizer = tiny(**settings).eval()
        with torch.no_grad():
            out = tokenizer(images)
            assert out.features.shape == (3, 4, 1, 6) and out.quantizer.indices.shape == (3, 1, 6)
            assert out.reconstruction.shape == images.shape
            assert torch.equal(tokenizer.decode_indices(out.quantizer.indices), out.reconstruction)
        assert tokenizer.latent_grid(8, 8) == (1, 6) and not tokenizer.config.has_grid

    def test_gradients_reach_every_weight(self, settings, images):
        tokenizer = tiny(**settings)
        out = tokenizer(images)
        (out.reconstruction.square().mean() + out.quantizer.loss).backward()
        assert not [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        last = tokenizer.decoder.pixel_decoder if settings else tokenizer.decoder
        assert tokenizer.decoder.last_layer is last.conv_out.weight

    def test_blocks_may_be_computed_again(self, settings):
        blocks = list(find_blocks(tiny(**settings)))
        assert sum(type(block).__name__ == "TransformerBlock" for block in blocks) == 3
        assert len(blocks) == (7 if settings else 3)

    def test_settings_and_weights_come_back_from_an_export(self, settings, images, tmp_path):
        tokenizer = tiny(**settings).eval()
        assert parse(TokenizerConfig, to_dict(tokenizer.config)) == tokenizer.config
        again = load_tokenizer(export_tokenizer(tokenizer, tmp_path / "tiny.safetensors"))
        assert again.config == tokenizer.config
        assert torch.equal(again.encode_indices(images), tokenizer.encode_indices(images))


def test_every_token_is_about_the_whole_image(images):
    tokenizer = tiny().eval().requires_grad_(False)
    pixel = images.clone()
    pixel[:, :, 0, 0] *= -1
    changed = (tokenizer.encoder(pixel) - tokenizer.encoder(images)).abs().amax((0, 1, 2))
    assert (changed > 0).all()  # one pixel, every token
    latents = tokenizer.encoder(images)
    moved = latents + torch.nn.functional.one_hot(torch.tensor(2), 6)
    difference = tokenizer.decoder(moved) - tokenizer.decoder(latents)
    assert (difference.abs().amax((0, 1)) > 0).all()  # one token, all pixels


def test_mixed_latents_read_the_same_numbers_in_another_order(images):
    straight, mixed = (tiny(mixed_latents=mixed).eval() for mixed in (False, True))
    mixed.load_state_dict(straight.state_dict())
    kept = []
    straight.encoder.ln_post.register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.no_grad():
        straight_latents, mixed_latents = straight.encoder(images), mixed.encoder(images)
        weight, bias = straight.encoder.conv_out.weight[:, :, 0, 0], straight.encoder.conv_out.bias
        latents = kept[0]  # (B, T, W)
        torch.testing.assert_close(straight_latents[:, :, 0], (latents @ weight.T + bias).transpose(1, 2))
        scrambled = latents.reshape(3, 16, 6).transpose(1, 2)
        torch.testing.assert_close(mixed_latents[:, :, 0], (scrambled @ weight.T + bias).transpose(1, 2))


def test_pixels_of_a_patch_are_ordered_row_column_colour(images):
    decoder = tiny().eval().decoder
    predictions = torch.arange(4 * 4 * 3.0).view(1, 48, 1, 1).expand(1, 48, 2, 2)
    placed = decoder._place_pixels(predictions)
    for row, column, colour in ((0, 0, 0), (0, 1, 2), (3, 2, 1)):
        assert (placed[0, colour, row::4, column::4] == (row * 4 + column) * 3 + colour).all()


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, torchs = Attention(12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True)
    torchs.load_state_dict({key.replace("in_proj.", "in_proj_"): value for key, value in ours.state_dict().items()})
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), torchs(x, x, x, need_weights=False)[0])


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"design": "vqgan"}, 'design must be "titok" in TitokConfig'),
            ({"tokens": 0}, "tokens must be at least 1; got 0"),
            ({"tokens": 10**6}, "tokens must be at most 4,096"),
            ({"patch": 3}, "patch must divide the resolution 8; got 3"),
            ({"encoder_heads": 3}, "encoder_width must be a multiple of encoder_heads; got 16 and 3"),
            ({"pixel_codes": 7}, 'needs a decoder .*Set pixel_decoder to settings of the design "maskgit"'),
            ({"pixel_decoder": PIXELS}, "got pixel_codes=0. Use pixel_codes=1024"),
            ({"pixel_codes": -1}, "pixel_codes must be ≥ 0"),
            ({"pixel_codes": 7, "pixel_decoder": AutoencoderConfig()}, 'must have the design "maskgit"; got "vqgan"'),
            (
                {"pixel_codes": 7, "pixel_decoder": replace(PIXELS, out_channels=1)},
                "pixel_decoder.out_channels must equal out_channels; got 1 and 3",
            ),
            ({"resolution": 2**14, "patch": 4}, "so many patches"),
        ],
    )
    def test_impossible_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TitokConfig(**{**TINY, **settings})

    def test_a_misspelt_setting_names_the_nearest(self):
        with pytest.raises(ConfigError, match="did you mean 'tokens'"):
            parse(TokenizerConfig, {"autoencoder": {**TINY, "token": 3}, "quantizer": to_dict(CODES)})

    def test_another_image_size(self):
        with pytest.raises(ValueError, match=r"must be 8 × 8 pixels.*got 16 × 8\. Resize and crop"):
            tiny().encode(torch.zeros(1, 3, 16, 8), value_range=(-1, 1))

    def test_another_number_of_tokens(self):
        with pytest.raises(ValueError, match=r"decodes 6 tokens.*got \(2, 3\).*indices\.view\(B, 1, 6\)"):
            tiny().decode_indices(torch.zeros(1, 2, 3, dtype=torch.long))

    def test_latents_must_be_as_wide_as_codes(self):
        with pytest.raises(ValueError, match=r"latent_channels must equal quantizer\.code_dim"):
            TokenizerConfig(autoencoder=TitokConfig(**TINY), quantizer=replace(CODES, code_dim=8))

    def test_an_export_under_the_names_of_ibqs_code(self, trained, tmp_path):
        with pytest.raises(ValueError, match=r"got 'titok'\. Use export_tokenizer"):
            export_published(trained.path, tmp_path / "published.ckpt")

    def test_a_generator_on_a_grid(self):
        config = generator_config({"name": "ibq", "vocabulary_size": 16, "grid_size": 4, "num_classes": 10})
        for size in (8, None):
            with pytest.raises(ValueError, match=r"tokens lie on no grid .*Use a tokenizer with a grid"):
                check_fit(tiny(), config, size)


def recipe(**settings) -> TrainConfig:
    """A run of four steps on digits."""
    base = to_dict(recipe_config("builtin/smoke", {**SMALL_DIGITS, "steps": 4, "record.validate_every": 2}))
    base["tokenizer"] = {"autoencoder": TINY, "quantizer": {"name": "ibq", "codebook_size": 16, "code_dim": 4}}
    base["data"]["image_size"] = 8
    return parse(TrainConfig, {**base, **settings})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, finished."""
    torch.set_num_threads(1)
    return train(recipe(), tmp_path_factory.mktemp("titok") / "run", progress=False)


class TestTraining:
    def test_a_recipe_trains(self, trained):
        assert trained.status == "finished"
        assert np.isfinite(trained.metrics["loss"].dropna()).all()

    def test_the_same_with_blocks_computed_again(self, trained, tmp_path):
        again = train(recipe(speed={"activation_checkpointing": True}), tmp_path / "run", progress=False)
        np.testing.assert_allclose(again.metrics["loss"].dropna(), trained.metrics["loss"].dropna(), rtol=1e-4)

    def test_its_cost_counts_tokens_and_not_patches(self):
        cost = count_run(recipe())
        assert cost.tokens_per_image == 6
        tokenizer = Tokenizer(recipe().tokenizer)
        assert cost.parameters.encoder == sum(p.numel() for p in tokenizer.encoder.parameters())

    def test_stored_tokens_know_that_they_lie_on_no_grid(self, trained, tmp_path):
        store = write_tokens(load_tokenizer(trained.path, "raw"), recipe().data, tmp_path / "store", progress=False)
        assert store.manifest.grid == (1, 6) and store.manifest.tokens_per_image == 6
        assert not store.manifest.has_grid
        assert json.loads((tmp_path / "store" / "manifest.json").read_text())["grid"] == [1, 6]
