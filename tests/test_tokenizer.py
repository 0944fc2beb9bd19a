"""The tokenizer: the published graph, number for number, and a door that says what is wrong with an image."""

import numpy as np
import pytest
import torch
from golden import golden
from PIL import Image
from torch import nn

from ibqlab.quantizers import (
    IndexBackpropQuantizerConfig,
    VectorQuantizerConfig,
    available_quantizers,
    quantizer_config,
)
from ibqlab.tokenizer import AutoencoderConfig, Tokenizer, TokenizerConfig, prepare_images

SMALL = AutoencoderConfig(
    base_channels=32,
    channel_multipliers=(1, 1, 1),
    num_res_blocks=1,
    attention_resolutions=(),
    resolution=16,
    latent_channels=8,
)
VQ_CODES = VectorQuantizerConfig(codebook_size=16, code_dim=4)
CODES = IndexBackpropQuantizerConfig(codebook_size=16, code_dim=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose far more time by waiting for a second thread than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer.from_config(TokenizerConfig(autoencoder=SMALL, quantizer=CODES)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def published_tokenizer() -> Tokenizer:
    """The published autoencoder without memory; around VQ, because drawing N(0, 1) without memory imports for 5 s."""
    with torch.device("meta"):
        return Tokenizer(TokenizerConfig(quantizer=VectorQuantizerConfig(codebook_size=16384, code_dim=256)))


def test_published_configuration_has_the_published_weights(published_tokenizer):
    tok = published_tokenizer
    assert sum(p.numel() for p in tok.encoder.parameters()) == 46_752_256
    assert sum(p.numel() for p in tok.decoder.parameters()) == 59_903_875
    assert sum(p.numel() for p in tok.quant_conv.parameters()) == 65_792
    assert tok.quantizer.codebook.shape == (16384, 256)
    assert tok.downsampling == 16
    assert TokenizerConfig().quantizer == IndexBackpropQuantizerConfig(codebook_size=16384, code_dim=256)


def test_published_keys_and_shapes(published_tokenizer):
    keys, _ = golden("official_state_dict_keys")
    ours_alone = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    published = {k: tuple(v[0]) for k, v in keys["IBQ/imagenet_ibqgan_16384"].items() if k.startswith(ours_alone)}
    ours = published_tokenizer.state_dict()
    assert len(published) > 500
    assert {k: tuple(v.shape) for k, v in ours.items() if not k.startswith("quantizer.")} == published


def test_same_numbers_as_the_published_code():
    facts, tensors = golden("tokenizer_attn")
    tok = _published(facts, tensors)
    with torch.no_grad():
        latents = tok.encoder(tensors["x"])
        out = tok(tensors["x"])
        from_indices = tok.decode_indices(out.quantizer.indices)
    _close(latents, tensors["out/encoder_out"])
    _close(out.features, tensors["out/h"])
    _close(out.quantizer.quantized, tensors["out/z_q"])
    _close(out.reconstruction, tensors["out/x_rec"])
    _close(from_indices, tensors["out/x_rec_from_indices"])
    assert torch.equal(out.quantizer.indices.flatten(), tensors["out/indices"])


def _published(facts: dict, tensors: dict[str, torch.Tensor]) -> Tokenizer:
    dd = facts["ddconfig"]
    config = TokenizerConfig(
        autoencoder=AutoencoderConfig(
            base_channels=dd["ch"],
            channel_multipliers=tuple(dd["ch_mult"]),
            num_res_blocks=dd["num_res_blocks"],
            attention_resolutions=tuple(dd["attn_resolutions"]),
            resolution=dd["resolution"],
            latent_channels=dd["z_channels"],
            double_latent=dd["double_z"],
        ),
        quantizer=IndexBackpropQuantizerConfig(codebook_size=facts["n_embed"], code_dim=facts["embed_dim"]),
    )
    weights = {k.removeprefix("state_dict/"): v.float() for k, v in tensors.items() if k.startswith("state_dict/")}
    weights["quantizer.codes.weight"] = weights.pop("quantize.embedding.weight")
    tok = Tokenizer(config)
    tok.load_state_dict(weights, strict=True)
    return tok.eval()


def _close(ours: torch.Tensor, published: torch.Tensor) -> None:
    assert ours.shape == published.shape
    assert (ours - published).abs().max() <= 1e-5 * published.abs().max()


@pytest.mark.parametrize("name", available_quantizers())
def test_any_quantizer_fits_and_decode_of_encode_is_forward(name, images):
    torch.manual_seed(0)
    quantizer = quantizer_config({"name": name, "codebook_size": 16, "code_dim": 4})
    tok = Tokenizer.from_config(TokenizerConfig(autoencoder=SMALL, quantizer=quantizer)).eval()
    with torch.no_grad():
        out = tok(images)
        code = tok.encode(images)
        assert torch.equal(tok.decode(code.quantized), out.reconstruction)
        assert torch.equal(code.indices, out.quantizer.indices)
        assert torch.allclose(tok.decode_indices(code.indices), out.reconstruction, atol=1e-5)
    assert out.reconstruction.shape == images.shape
    assert out.features.shape == (2, 4, 4, 6)
    assert code.indices.shape == (2, *tok.latent_grid(16, 24))


def test_gradients_reach_every_weight(tokenizer, images):
    tokenizer.zero_grad()
    out = tokenizer(images)
    (out.reconstruction.square().mean() + out.quantizer.loss).backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Attention keys have a bias that shifts all logits alike and so has no gradient but rounding; none other may lack
    # one.
    assert all(name.endswith("attn_1.k.bias") for name in without), without


def test_nominal_resolution_places_the_attention():
    def levels_with_attention(resolution: int) -> list[bool]:
        config = AutoencoderConfig(
            base_channels=32, channel_multipliers=(1, 1, 1), num_res_blocks=2, resolution=resolution, latent_channels=4
        )
        with torch.device("meta"):
            tok = Tokenizer(TokenizerConfig(autoencoder=config, quantizer=VQ_CODES))
        assert [len(level.attn) for level in tok.decoder.up] == [
            3 * bool(len(level.attn)) for level in tok.encoder.down
        ]
        return [len(level.attn) == 2 for level in tok.encoder.down]

    assert levels_with_attention(64) == [False, False, True]
    assert levels_with_attention(32) == [False, True, False]


def test_double_latent_doubles_what_the_quantizer_convolution_takes():
    config = AutoencoderConfig(base_channels=32, channel_multipliers=(1,), attention_resolutions=(), double_latent=True)
    with torch.device("meta"):
        tok = Tokenizer(TokenizerConfig(autoencoder=config, quantizer=VQ_CODES))
    assert tok.quant_conv.in_channels == tok.encoder.conv_out.out_channels == 512
    assert tok.decoder.conv_in.in_channels == 256


def test_dropout_acts_in_training_only(images):
    config = AutoencoderConfig(
        base_channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), dropout=0.5
    )
    encoder = Tokenizer(TokenizerConfig(autoencoder=config, quantizer=CODES)).encoder
    with torch.no_grad():
        assert not torch.equal(encoder(images), encoder(images))
        encoder.eval()
        assert torch.equal(encoder(images), encoder(images))
    assert sum(isinstance(module, nn.Dropout) for module in encoder.modules()) == 3


def test_every_kind_of_picture_gives_the_same_codes(tokenizer):
    array = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(picture) for picture in array]
    with torch.no_grad():
        expected = tokenizer(tensor.float() / 127.5 - 1).quantizer.indices
        for images in (
            array,
            tensor,
            pictures,
            tuple(pictures),
            tensor.float() / 127.5 - 1,
            tensor.double() / 127.5 - 1,
        ):
            assert torch.equal(tokenizer.encode(images).indices, expected)
        assert torch.equal(tokenizer.encode(pictures[0]).indices, expected[:1])
        assert torch.equal(tokenizer.encode(array[1]).indices, expected[1:])


def test_pictures_are_turned_the_right_way():
    corner = np.zeros((4, 8, 3), dtype=np.uint8)
    corner[0, 7] = (255, 128, 0)
    prepared = prepare_images(Image.fromarray(corner))
    assert prepared.shape == (1, 3, 4, 8)
    assert prepared[0, :, 0, 7].tolist() == pytest.approx([1, 128 / 127.5 - 1, -1], abs=1e-6)
    grey = prepare_images(Image.new("L", (4, 4), 255))
    assert grey.shape == (1, 3, 4, 4)
    assert grey.min() == 1


BAD_IMAGES = {
    "0 to 255 as float": (torch.full((1, 3, 16, 16), 255.0), r"got 255 to 255.*value_range=\(0, 255\)"),
    "slightly too high": (torch.full((1, 3, 16, 16), 1.01), r"\[−1, 1\]; got 1\.01"),
    "nan": (torch.tensor(float("nan")).expand(1, 3, 16, 16), "NaN"),
    "infinite": (torch.tensor(float("inf")).expand(1, 3, 16, 16), "got inf"),
    "whole numbers": (torch.zeros(1, 3, 16, 16, dtype=torch.int64), r"images\.to\(torch\.uint8\)"),
    "no batch": (torch.zeros(3, 16, 16), r"images\[None\]"),
    "channels last": (torch.zeros(1, 16, 16, 3), r"permute\(0, 3, 1, 2\)"),
    "one channel": (torch.zeros(1, 1, 16, 16), r"B, 3, H, W.*3 channels"),
    "no image": (torch.zeros(0, 3, 16, 16), "at least one image"),
    "no images in an array": (np.zeros((0, 16, 16, 3), dtype=np.uint8), "at least one image"),
    "no side in an array": (np.zeros((1, 0, 16, 3), dtype=np.uint8), "at least one image"),
    "no side": (torch.zeros(1, 3, 16, 0), "at least one image"),
    "float array": (np.zeros((16, 16, 3)), "uint8.*float64.*from_numpy"),
    "array, channels first": (np.zeros((3, 16, 16), dtype=np.uint8), "moveaxis"),
    "empty list": ([], "empty list"),
    "list of tensors": ([torch.zeros(3, 16, 16)], "PIL images.*Tensor.*torch.stack"),
    "two sizes": ([Image.new("RGB", (16, 16)), Image.new("RGB", (20, 16))], "one size.*20, 16"),
    "text": ("cat.jpg", "got str"),
    "height": (-torch.ones(1, 3, 18, 16), "multiples of the downsampling 4; got 18 × 16.*16 or 20.*width of 16"),
    "too small": (-torch.ones(1, 3, 2, 16), "got 2 × 16.*height of 4"),
}


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_are_refused(tokenizer, images, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images)


def test_rounding_beyond_the_range_is_tolerated(tokenizer):
    assert tokenizer.encode(torch.full((1, 3, 8, 8), -1.0005)).indices.shape == (1, 2, 2)


def test_a_range_that_cannot_be_seen_is_asked_about(tokenizer, images):
    unit = images / 2 + 0.5
    for encode in (tokenizer.encode, tokenizer.encode_indices):
        with pytest.raises(ValueError, match=r"value_range=\(0, 1\), or value_range=\(-1, 1\)"):
            encode(unit)
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; got −?-?0\.99"):
            encode(images, value_range=(0, 1))
        with pytest.raises(ValueError, match="uint8 is 0 to 255"):
            encode((unit * 255).to(torch.uint8), value_range=(0, 1))
        for wrong in ((1, 0), (0, 1, 2), (0, float("nan"))):
            with pytest.raises(ValueError, match="two numbers, the lower first"):
                encode(images, value_range=wrong)
    expected = tokenizer.encode_indices(images)
    assert torch.equal(tokenizer.encode_indices(unit, value_range=(0, 1)), expected)
    assert torch.equal(tokenizer.encode(unit * 255, value_range=(0, 255)).indices, expected)
    assert torch.equal(tokenizer.encode_indices(unit, value_range=(-1, 1)), tokenizer(unit).quantizer.indices)


def test_training_checks_the_size_too(tokenizer):
    with pytest.raises(ValueError, match="multiples of the downsampling 4"):
        tokenizer(torch.zeros(1, 3, 16, 15))


def test_bad_codes_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"D = 4; got \(1, 5, 2, 2\)"):
        tokenizer.decode(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match=r"indices\.long\(\)"):
        tokenizer.decode_indices(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"indices\.view\(B, h, w\)"):
        tokenizer.decode_indices(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="0 … 15"):
        tokenizer.decode_indices(torch.full((1, 2, 2), 16))


BAD_SETTINGS = {
    "groups": ({"base_channels": 48}, r"base_channels must be a positive multiple of 32.*got 48"),
    "no level": ({"channel_multipliers": ()}, "at least one level"),
    "level without channels": ({"channel_multipliers": (1, 0)}, r"channel_multipliers\[1\].*got 0"),
    "blocks": ({"num_res_blocks": 0}, "num_res_blocks must be at least 1; got 0.*4"),
    "resolution": ({"resolution": 250}, r"multiple of 16.*got 250.*resolution=256"),
    "attention nowhere": ({"attention_resolutions": (24,)}, r"256, 128, 64, 32, 16\); got 24"),
    "dropout": ({"dropout": 1.0}, "dropout must lie in 0 to below 1; got 1.0"),
    "too many blocks": ({"num_res_blocks": 100_000}, "num_res_blocks must be at most 1,024; got 100,000"),
    "too many channels": ({"base_channels": 2**40}, "base_channels must be at most 65,536"),
    "too large": ({"resolution": 2**40}, "resolution must be at most 16,384"),
    "too many levels": ({"channel_multipliers": (1,) * 40, "resolution": 256}, "levels must be at most 15; got 40"),
    "latent": ({"latent_channels": 0}, "latent_channels must be at least 1"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**settings)


@pytest.mark.parametrize("name", available_quantizers())
def test_encode_indices_gives_what_decode_indices_takes(name, images):
    torch.manual_seed(0)
    quantizer = quantizer_config({"name": name, "codebook_size": 16, "code_dim": 4})
    tok = Tokenizer(TokenizerConfig(autoencoder=SMALL, quantizer=quantizer)).train()
    before = [value.clone() for value in tok.state_dict().values()]
    indices = tok.encode_indices(images)
    assert all(torch.equal(a, b) for a, b in zip(before, tok.state_dict().values(), strict=True))
    tok.eval()
    out = tok.encode(images)
    assert torch.equal(indices, out.indices)
    torch.testing.assert_close(tok.decode_indices(indices), tok.decode(out.quantized))
    with pytest.raises(ValueError, match=r"float images must lie in \[−1, 1\]"):
        tok.encode_indices(images * 100)


@pytest.mark.parametrize("name", available_quantizers())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokenizers_of_every_type_work(name, dtype, images):
    torch.manual_seed(0)
    codes = quantizer_config({"name": name, "codebook_size": 16, "code_dim": 4})
    tok = Tokenizer(TokenizerConfig(autoencoder=SMALL, quantizer=codes)).to(dtype).eval()
    indices = tok.encode_indices(images)
    assert torch.equal(indices, tok.encode(images).indices)
    # Indices are those of features and codebook in float32, or wider.
    features = tok(images).features
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(indices, tok.quantizer.to(wide).encode(features.to(wide)))
    tok.to(dtype)
    out = tok(images)
    assert out.reconstruction.dtype == tok.decode_indices(indices.numpy().astype(np.uint16)).dtype == dtype
    assert out.reconstruction.isfinite().all()
    tok.train()(images).reconstruction.sum().backward()
    assert tok.encoder.conv_in.weight.grad.isfinite().all()


def test_a_fingerprint_names_the_weights():
    torch.manual_seed(0)
    config = TokenizerConfig(
        autoencoder=AutoencoderConfig(
            base_channels=32,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            attention_resolutions=(),
            resolution=8,
            latent_channels=4,
        ),
        quantizer=quantizer_config({"name": "ibq", "codebook_size": 8, "code_dim": 4}),
    )
    tokenizer = Tokenizer(config)
    before = tokenizer.fingerprint()
    again = Tokenizer(config)
    assert again.fingerprint() != before
    again.load_state_dict(tokenizer.state_dict())
    assert again.fingerprint() == before and len(before) == 16
    with torch.no_grad():
        again.quantizer.codes.weight[3, 1] += 1e-6
    assert again.fingerprint() != before
