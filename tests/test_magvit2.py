"""The Open-MAGVIT2 design: the published graph, number for number, and what sets it apart from VQGAN's."""

import pytest
import torch
from golden import golden

from ibqlab.config import ConfigError
from ibqlab.quantizers import LookupFreeQuantizerConfig
from ibqlab.tokenizer import AutoencoderConfig, Magvit2Decoder, Magvit2Encoder, Tokenizer, TokenizerConfig
from ibqlab.tokenizer.magvit2 import AdaptiveGroupNorm, DepthToSpace
from ibqlab.training import recipe_config, train

PUBLISHED = AutoencoderConfig(design="magvit2", attention_resolutions=(), latent_channels=18)
SMALL = AutoencoderConfig(
    design="magvit2",
    base_channels=32,
    channel_multipliers=(1, 2, 1),
    num_res_blocks=2,
    attention_resolutions=(),
    resolution=16,
    latent_channels=6,
)
CODES = LookupFreeQuantizerConfig(codebook_size=64)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(TokenizerConfig(autoencoder=SMALL, quantizer=CODES)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def published_tokenizer(autoencoder: AutoencoderConfig) -> Tokenizer:
    with torch.device("meta"):
        return Tokenizer(
            TokenizerConfig(autoencoder=autoencoder, quantizer=LookupFreeQuantizerConfig(codebook_size=2**18))
        )


def test_published_names_and_shapes():
    keys, _ = golden("official_state_dict_keys")
    listed = keys["Open-MAGVIT2/imagenet_lfqgan_256_L"]
    others = ("loss.", "model_ema.")
    published = {name: tuple(shape) for name, (shape, _) in listed.items() if not name.startswith(others)}
    tok = published_tokenizer(PUBLISHED)
    assert len(published) == 339
    assert {name: tuple(weight.shape) for name, weight in tok.state_dict().items()} == published
    assert sum(p.numel() for p in tok.encoder.parameters()) == 49_751_442
    assert sum(p.numel() for p in tok.decoder.parameters()) == 65_376_387
    assert tok.downsampling == 16
    averaged = {name for name in listed if name.startswith("model_ema.")}
    assert {f"model_ema.{name.replace('.', '')}" for name in published} <= averaged


def test_same_numbers_as_the_published_code():
    facts, tensors = golden("magvit2_tokenizer_tiny")
    dd = facts["ddconfig"]
    autoencoder = AutoencoderConfig(
        design="magvit2",
        base_channels=dd["ch"],
        channel_multipliers=tuple(dd["ch_mult"]),
        num_res_blocks=dd["num_res_blocks"],
        attention_resolutions=(),
        resolution=dd["resolution"],
        latent_channels=dd["z_channels"],
    )
    quantizer = LookupFreeQuantizerConfig(codebook_size=facts["n_embed"], code_dim=facts["embed_dim"])
    tok = Tokenizer(TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer)).eval()
    prefix = "state_dict/"
    weights = {name.removeprefix(prefix): w.float() for name, w in tensors.items() if name.startswith(prefix)}
    tok.load_state_dict(weights, strict=True)
    with torch.no_grad():
        out = tok(tensors["x"])
        again = tok.decode_indices(tok.encode(tensors["x"]).indices)
    assert torch.equal(out.quantizer.indices.flatten(), tensors["out/indices"])
    assert torch.equal(out.quantizer.quantized, tensors["out/z_q"])
    for ours, key in ((out.features, "out/h"), (out.reconstruction, "out/x_rec"), (again, "out/x_rec")):
        assert (ours - tensors[key]).abs().max() <= 1e-5 * tensors[key].abs().max()


def test_decode_of_encode_is_forward(tokenizer, images):
    with torch.no_grad():
        out, code = tokenizer(images), tokenizer.encode(images)
        assert out.reconstruction.shape == images.shape
        assert out.features.shape == (2, 6, 4, 6)
        assert torch.equal(tokenizer.decode(code.quantized), out.reconstruction)
        assert torch.equal(tokenizer.decode_indices(code.indices), out.reconstruction)


def test_pictures_follow_the_weights_type(images):
    tok = Tokenizer(TokenizerConfig(autoencoder=SMALL, quantizer=CODES)).double().eval()
    with torch.no_grad():
        code = tok.encode(images)
        assert code.quantized.dtype == tok.decode_indices(code.indices).dtype == torch.float64


def test_gradients_reach_every_weight(images):
    torch.manual_seed(0)
    tok = Tokenizer(TokenizerConfig(autoencoder=SMALL, quantizer=CODES))
    out = tok(images)
    (out.reconstruction.square().mean() + out.quantizer.loss).backward()
    without = [name for name, p in tok.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_convolutions_around_the_quantizer_and_biases_in_blocks_are_absent(tokenizer):
    names = tokenizer.state_dict().keys()
    assert not any("quant" in name or "attn" in name for name in names)
    biases = {name for name in names if ".block." in name and name.endswith("bias")}
    assert biases and all(".norm" in name for name in biases)
    assert "encoder.conv_in.bias" not in names and "decoder.conv_in.bias" in names
    assert isinstance(tokenizer.encoder, Magvit2Encoder) and isinstance(tokenizer.decoder, Magvit2Decoder)
    assert tokenizer.decoder.last_layer is tokenizer.decoder.conv_out.weight


def test_upsampling_orders_channels_by_row_column_and_channel():
    layer = DepthToSpace(3)
    with torch.no_grad():
        layer.conv1.weight.zero_()
        layer.conv1.bias.copy_(torch.arange(12.0))
        out = layer(torch.zeros(1, 3, 2, 5))
    assert out.shape == (1, 3, 4, 10)
    for row in range(4):
        for column in range(10):
            place = 2 * (row % 2) + column % 2
            assert out[0, :, row, column].tolist() == [3 * place, 3 * place + 1, 3 * place + 2]


def test_adaptive_norm_is_set_by_mean_and_unbiased_spread():
    torch.manual_seed(0)
    layer, x, latents = AdaptiveGroupNorm(4, 64), torch.randn(2, 64, 6, 6), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        out = layer(x, latents)
        for image in range(2):
            spread = (latents[image].flatten(1).var(1, correction=1) + 1e-6).sqrt()
            scale = layer.gamma.weight @ spread + layer.gamma.bias
            shift = layer.beta.weight @ latents[image].flatten(1).mean(1) + layer.beta.bias
            groups = x[image].view(32, -1)
            normed = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
            expected = scale[:, None, None] * normed.view(64, 6, 6) + shift[:, None, None]
            torch.testing.assert_close(out[image], expected)


def test_a_grid_of_one_position_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least 2 positions; got 1 × 1"):
        tokenizer(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"design": "magvit"}, "did you mean 'magvit2'"),
        ({"design": "magvit2"}, r'attention_resolutions must be \(\) in the design "magvit2".*got \(16,\)'),
        ({"design": "magvit2", "attention_resolutions": (), "double_latent": True}, "double_latent must be False"),
        ({"design": "magvit2", "attention_resolutions": (), "dropout": 0.1}, r"dropout must be 0\.0.*got 0\.1"),
    ],
)
def test_settings_that_the_design_does_not_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**settings)


def test_latents_must_be_as_wide_as_codes():
    with pytest.raises(ValueError, match=r"latent_channels must equal quantizer\.code_dim.*got 18 and 6.*channels=6"):
        TokenizerConfig(autoencoder=PUBLISHED, quantizer=CODES)


def test_the_design_trains_from_a_recipe(tmp_path):
    settings = {
        "steps": 2,
        "tokenizer.autoencoder.design": "magvit2",
        "tokenizer.autoencoder.latent_channels": 4,
        "tokenizer.quantizer": {"name": "lfq", "codebook_size": 16},
    }
    run = train(recipe_config("builtin/smoke", settings), tmp_path / "run", progress=False)
    assert run.status == "finished"
    with pytest.raises(ConfigError, match=r"latent_channels must equal"):
        recipe_config("builtin/smoke", settings | {"tokenizer.autoencoder.latent_channels": 16})
