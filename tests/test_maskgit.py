"""The designs of MaskGIT and MaskBit: what sets them apart from VQGAN's, published sizes, training, plans."""

import pytest
import torch
from torch.nn import functional as F

from ibqlab.config import ConfigError
from ibqlab.costs.tokenizer_step_cost import count_tokenizer_step
from ibqlab.quantizers import VectorQuantizerConfig
from ibqlab.tokenizer import AutoencoderConfig, MaskgitDecoder, MaskgitEncoder, Tokenizer, TokenizerConfig
from ibqlab.tokenizer.autoencoder import find_blocks
from ibqlab.tokenizer.maskgit import OwnResultBlock
from ibqlab.training import recipe_config, train

DESIGNS = ("maskgit", "maskbit")


def settings(design, **others):
    small = {"base_channels": 32, "channel_multipliers": (1, 2, 1), "num_res_blocks": 2, "resolution": 16}
    return AutoencoderConfig(design=design, attention_resolutions=(), **small | {"latent_channels": 6} | others)


def built(design, **others):
    torch.manual_seed(0)
    codes = VectorQuantizerConfig(codebook_size=16, code_dim=6)
    return Tokenizer(TokenizerConfig(autoencoder=settings(design, **others), quantizer=codes))


@pytest.fixture(params=DESIGNS)
def design(request):
    return request.param


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("design", "channels", "encoder", "decoder"),
    [("maskgit", 256, 23_775_104, 30_478_339), ("maskbit", 14, 25_126_286, 29_363_203)],
)
def test_published_sizes(design, channels, encoder, decoder):
    config = AutoencoderConfig(
        design=design, attention_resolutions=(), num_res_blocks=2, latent_channels=channels, resolution=256
    )
    with torch.device("meta"):
        networks = MaskgitEncoder(config), MaskgitDecoder(config)
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [encoder, decoder]


def test_decode_of_encode_is_forward(design, images):
    tok = built(design).eval()
    with torch.no_grad():
        out, code = tok(images), tok.encode(images)
        assert out.reconstruction.shape == images.shape and out.features.shape == (2, 6, 4, 6)
        assert torch.equal(tok.decode_indices(code.indices), out.reconstruction)


def test_gradients_reach_every_weight(design, images):
    tok = built(design)
    out = tok(images)
    (out.reconstruction.square().mean() + out.quantizer.loss).backward()
    # Nothing but codes that no token chose may stand still.
    assert not [name for name, p in tok.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert tok.decoder.last_layer is tok.decoder.conv_out.weight


def test_blocks_have_no_biases_and_as_many_of_them_stand_on_every_level(design):
    tok = built(design)
    blocks = list(find_blocks(tok))
    assert len(blocks) == 2 * 2 * (3 + 1) and all(isinstance(block, OwnResultBlock) for block in blocks)
    names = [name for block in blocks for name, _ in block.named_parameters() if name.endswith("bias")]
    assert names and all(name.startswith("norm") for name in names)
    keys = tok.state_dict().keys()
    assert "encoder.conv_in.bias" not in keys and "decoder.conv_in.bias" in keys
    assert tok.encoder.conv_out.kernel_size == (1, 1) and tok.decoder.conv_out.kernel_size == (3, 3)
    assert ("encoder.down.0.downsample.conv.bias" in keys) == (design == "maskbit")


def test_a_block_that_changes_channels_adds_a_map_of_its_own_result():
    torch.manual_seed(0)
    x, block = torch.randn(2, 32, 4, 4), OwnResultBlock(32, 64)
    with torch.no_grad():
        inner = block.conv1(F.silu(F.group_norm(x, 32, block.norm1.weight, block.norm1.bias, 1e-6)))
        inner = block.conv2(F.silu(F.group_norm(inner, 32, block.norm2.weight, block.norm2.bias, 1e-6)))
        mapped = torch.einsum("oi,bihw->bohw", block.nin_shortcut.weight[:, :, 0, 0], inner)
        torch.testing.assert_close(block(x), inner + mapped)
        same = OwnResultBlock(32, 32)
        same.conv2.weight.zero_()
        assert torch.equal(same(x), x)


def test_the_size_is_halved_as_the_design_says(images):
    assert torch.equal(built("maskgit").encoder.down[0].downsample(images), F.avg_pool2d(images, 2))
    halve = built("maskbit").encoder.down[0].downsample
    x = torch.randn(1, 32, 6, 8)
    padded = torch.zeros(1, 32, 7, 9)
    padded[:, :, :6, :8] = x  # a row below, a column on the right
    torch.testing.assert_close(halve(x), F.conv2d(padded, halve.conv.weight, halve.conv.bias, stride=2))


def test_images_are_in_0_to_1_inside_and_in_minus_1_to_1_outside(design, images):
    tok = built(design).eval()
    with torch.no_grad():
        seen = []
        tok.encoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        tok.encode((images + 1) / 2, value_range=(0, 1))
        torch.testing.assert_close(seen[0], (images + 1) / 2)
        tok.decoder.conv_out.weight.zero_()
        for value, expected in ((0.0, -1.0), (0.5, 0.0), (1.5, 2.0)):  # 1.5: nothing is clamped
            tok.decoder.conv_out.bias.fill_(value)
            assert (tok.decode(torch.zeros(1, 6, 2, 2)) == expected).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dropout": 0.1}, r"dropout must be 0\.0 in the design"),
        ({"middle_attention": False}, "middle_attention must be True in the design"),
    ],
)
def test_settings_that_the_designs_do_not_have_are_refused(design, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(design, **wrong)


def recipe(design):
    return {
        "steps": 2,
        "tokenizer.autoencoder.design": design,
        "tokenizer.autoencoder.latent_channels": 4,
        "tokenizer.quantizer": {"name": "vq", "codebook_size": 16, "code_dim": 4},
    }


def test_the_design_trains_from_a_recipe(design, tmp_path):
    run = train(recipe_config("builtin/smoke", recipe(design)), tmp_path / "run", progress=False)
    assert run.status == "finished"
    with pytest.raises(ConfigError, match=r"latent_channels must equal"):
        recipe_config("builtin/smoke", recipe(design) | {"tokenizer.autoencoder.latent_channels": 16})


def test_a_plan_counts_the_design():
    maskgit, maskbit = (count_tokenizer_step(recipe_config("builtin/smoke", recipe(design))) for design in DESIGNS)
    tok = Tokenizer.from_config(recipe_config("builtin/smoke", recipe("maskbit")).tokenizer)
    assert maskbit.parameters.encoder == sum(p.numel() for p in tok.encoder.parameters())
    assert maskbit.parameters.decoder == maskgit.parameters.decoder
    assert maskbit.parameters.convolutions == 0
    halving = [level.downsample.conv for level in tok.encoder.down[:-1]]
    assert maskbit.parameters.encoder - maskgit.parameters.encoder == sum(
        conv.weight.numel() + conv.bias.numel() for conv in halving
    )
    size = recipe_config("builtin/smoke").data.image_size
    expected = sum(2 * conv.weight.numel() * (size // 2**level) ** 2 for level, conv in enumerate(halving, start=1))
    assert maskbit.forward.of(1) - maskgit.forward.of(1) == pytest.approx(expected, rel=1e-9)
    less = recipe_config("builtin/smoke", recipe("maskbit") | {"speed.activation_checkpointing": True})
    assert count_tokenizer_step(less).activations.of(1) < maskbit.activations.of(1)
