"""PSNR, SSIM, 8-bit cuts and LPIPS against the published code's values and against the packages that define them."""

import dataclasses

import numpy as np
import pytest
import torch
from golden import golden
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ibqlab.metrics import load_lpips, psnr, ssim, truncate_to_uint8
from ibqlab.metrics.pixel_metrics import ROUNDINGS, published_range, to_unit_range
from ibqlab.metrics.weights import ALEXNET, INCEPTION, find_weights, hash_file

lpips = pytest.importorskip("lpips")
pytestmark = pytest.mark.filterwarnings("ignore:.*pretrained:UserWarning", "ignore:.*weight enum:UserWarning")


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """Files of random trunks with only the layers that LPIPS takes, in torchvision's names."""
    folder = tmp_path_factory.mktemp("trunks")
    torch.manual_seed(0)
    files = {}
    for net in ("vgg", "alex"):
        trunk = getattr(lpips.pretrained_networks, {"vgg": "vgg16", "alex": "alexnet"}[net])(pretrained=False)
        state = {"features." + name.split(".", 1)[1]: value for name, value in trunk.state_dict().items()}
        files[net] = folder / f"{net}.pth"
        torch.save(state, files[net])
    return files


@pytest.fixture(scope="module")
def alex(trunks):
    return load_lpips("alex", trunks["alex"], expected_sha256=None)


def test_published_cut_psnr_and_ssim():
    _, values = golden("metrics")
    x, y = truncate_to_uint8(values["x"]), truncate_to_uint8(values["x_rec"])
    assert torch.equal(x, values["uint8_x"].permute(0, 3, 1, 2))
    assert torch.equal(y, values["uint8_rec"].permute(0, 3, 1, 2))
    sample = truncate_to_uint8(values["sample_uint8/in"])[0].permute(1, 2, 0)
    assert torch.equal(sample, values["sample_uint8/out"])
    torch.testing.assert_close(psnr(x, y), values["psnr"], rtol=1e-6, atol=0)
    torch.testing.assert_close(ssim(x, y), values["ssim"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(7, 7), (8, 31), (33, 16), (64, 64)])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_psnr_and_ssim_equal_scikit_image(size, kind):
    rng = np.random.default_rng(size[0])
    x = rng.random((2, 3, *size))
    y = (x + rng.normal(0, 0.1, x.shape)).clip(0, 1)
    if kind == "uint8":
        x, y = ((255 * a).astype(np.uint8) for a in (x, y))
    ours = psnr(torch.from_numpy(x), torch.from_numpy(y)), ssim(torch.from_numpy(x), torch.from_numpy(y))
    if kind == "uint8":
        x, y = x / 255, y / 255
    for n in range(2):
        assert ours[0][n].item() == pytest.approx(peak_signal_noise_ratio(x[n], y[n], data_range=1), rel=1e-6)
        assert ours[1][n].item() == pytest.approx(structural_similarity(x[n], y[n], data_range=1, channel_axis=0), 1e-6)


def test_equal_pictures():
    x = torch.randint(0, 256, (1, 3, 9, 9), dtype=torch.uint8)
    assert psnr(x, x).item() == float("inf")
    assert ssim(x, x).item() == pytest.approx(1)


def test_truncation_loses_a_level_on_95_levels():
    levels = torch.arange(256, dtype=torch.uint8)
    cut = truncate_to_uint8(published_range(levels))
    assert int((cut != levels).sum()) == 95
    assert torch.equal((to_unit_range(published_range(levels), "rounded") * 255).round().to(torch.uint8), levels)


@pytest.mark.parametrize(
    ("rounding", "published"),
    [
        ("truncated", "taming"),
        ("half_up", "llamagen"),
        ("truncated_unit", "titok_demo"),
        ("rounded", "titok_eval"),
    ],
)
def test_cuts_to_8_bits_of_other_systems(rounding, published):
    _, values = golden("peers/peer_preprocess")
    images = values["to_uint8/in01"] * 2 - 1 if published.startswith("titok") else values["to_uint8/in"]
    levels = (to_unit_range(images, rounding) * 255).round().to(torch.uint8)
    assert torch.equal(levels.permute(0, 2, 3, 1), values[f"to_uint8/{published}"])


@pytest.mark.parametrize("rounding", ["truncated_unit", "rounded", "half_up", "none"])
def test_only_one_cut_changes_a_picture_of_8_bits(rounding):
    levels = torch.arange(256, dtype=torch.uint8)
    kept = to_unit_range(published_range(levels), rounding) * 255
    assert torch.allclose(kept, levels.float(), atol=1e-4)
    assert torch.equal(kept.round(), levels.float())


def test_cuts_differ_between_two_levels():
    """A quarter and three quarters of the way from level 100 to 101, and just below 101."""
    images = (torch.tensor([100.25, 100.5, 100.75, 100.99]) / 127.5 - 1).float()
    cut = {rounding: (to_unit_range(images, rounding) * 255).round().tolist() for rounding in ROUNDINGS}
    assert cut["truncated"] == cut["truncated_unit"] == [100, 100, 100, 100]
    assert cut["half_up"] == [100, 101, 101, 101]
    assert cut["rounded"][::2] == [100, 101] and cut["rounded"][3] == 101


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9), "one shape"),
        (torch.rand(3, 8, 8), torch.rand(3, 8, 8), r"\(B, C, H, W\)"),
        (torch.rand(1, 3, 8, 8) - 0.5, torch.rand(1, 3, 8, 8), "truncate_to_uint8"),
        (torch.rand(1, 3, 6, 8), torch.rand(1, 3, 6, 8), "at least 7 × 7"),
    ],
)
def test_unfit_pictures_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        ssim(x, y)


def test_unknown_rounding_and_nan():
    with pytest.raises(ValueError, match="did you mean 'rounded'"):
        to_unit_range(torch.zeros(1), "round")
    with pytest.raises(ValueError, match="NaN"):
        truncate_to_uint8(torch.tensor([float("nan")]))


def test_lpips_head_equals_the_published_one(trunks):
    """The module's own forward pass, with given feature maps in place of the trunk's and given weights of layers."""
    _, values = golden("lpips_head")
    module = load_lpips("vgg", trunks["vgg"], expected_sha256=None)
    torch.testing.assert_close(module.distance.scaling_layer(values["scaling/in"]), values["scaling/out"])
    maps = iter([[values[f"feat{side}/{layer}"].float() for layer in range(5)] for side in (0, 1)])
    module.distance.net.forward = lambda _: next(maps)
    for layer, head in enumerate(module.distance.lins):
        head.model[-1].weight.data.copy_(values[f"lin/{layer}"].float())
    x = torch.zeros(2, 3, 16, 16)
    torch.testing.assert_close(module(x, x), values["value"].flatten(), rtol=1e-6, atol=1e-7)


def test_lpips_is_the_package_on_the_given_trunk(trunks, alex):
    x, y = (torch.rand(2, 3, 40, 36) * 2 - 1 for _ in range(2))
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(trunks["alex"], weights_only=True)
    theirs.net.load_state_dict({k: state["features." + k.split(".", 1)[1]] for k in theirs.net.state_dict()})
    torch.testing.assert_close(alex(x, y), theirs(x, y).flatten().detach())
    assert alex(x, x).abs().max() == 0


def test_lpips_is_frozen_and_passes_gradients(alex):
    alex.train()
    assert not any(module.training for module in alex.modules())
    assert not any(parameter.requires_grad for parameter in alex.parameters())
    x = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    alex(x, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert x.grad.abs().sum() > 0


def test_loading_lpips_leaves_the_random_state_alone(trunks):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_lpips("alex", trunks["alex"], expected_sha256=None)
    assert torch.rand(1) == expected


def test_small_pictures_are_refused_by_lpips(alex):
    with pytest.raises(ValueError, match="at least 32 × 32"):
        alex(torch.zeros(1, 3, 31, 40), torch.zeros(1, 3, 31, 40))
    with pytest.raises(ValueError, match="one shape"):
        alex(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))


def test_missing_weights_name_file_size_address_and_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load_lpips("vgg")
    place = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    for text in (str(place), "553 MB", "https://download.pytorch.org/models/vgg16-397923af.pth"):
        assert text in str(error.value)


def test_weights_of_another_content_are_refused(trunks):
    with pytest.raises(ValueError, match="begins with 7be5be79"):
        load_lpips("alex", trunks["alex"])
    digest = hash_file(trunks["alex"])
    assert not find_weights(ALEXNET, trunks["alex"], expected_sha256=digest[:12]).published
    assert "not the published file" in str(find_weights(ALEXNET, trunks["alex"], None))
    published = dataclasses.replace(INCEPTION, sha256=digest[:8])
    assert find_weights(published, trunks["alex"]).published


def test_weights_are_found_in_torchs_folder(trunks, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    (place / ALEXNET.file).symlink_to(trunks["alex"])
    assert load_lpips("alex", expected_sha256=None).weights.path == place / ALEXNET.file


def test_a_trunk_of_the_other_network_is_refused(trunks):
    with pytest.raises(ValueError, match="not the state dict"):
        load_lpips("vgg", trunks["alex"], expected_sha256=None)
    with pytest.raises(ValueError, match="did you mean 'vgg'"):
        load_lpips("vgg16")
