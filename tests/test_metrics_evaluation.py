"""Whole evaluations: protocols, cards, every kind of input, one process or two, and what is refused."""

import dataclasses
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics_features import feature_statistics

from ibqlab.base.cache import load_arrays, save_arrays
from ibqlab.data import DataConfig, DigitsSource, open_data
from ibqlab.data.resizing import RESIZERS, resize_and_crop
from ibqlab.metrics import (
    PROTOCOLS,
    Features,
    Protocol,
    build_extractor,
    cards_markdown,
    cards_table,
    evaluate_generation,
    evaluate_reconstruction,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_lpips,
    open_images,
    precision_recall,
    psnr,
    ssim,
    truncate_to_uint8,
)
from ibqlab.metrics.digits_classifier import DigitsExtractor
from ibqlab.metrics.features import load_reference
from ibqlab.metrics.pixel_metrics import published_range, to_unit_range
from ibqlab.quantizers import IndexBackpropQuantizerConfig
from ibqlab.tokenizer import AutoencoderConfig, Tokenizer, TokenizerConfig

pytest.importorskip("torch_fidelity")

QUICK = ("rfid", "psnr", "ssim", "usage", "perplexity")
SMALL = dataclasses.replace(
    PROTOCOLS["torch-fidelity"], name="small", kid_subsets=5, kid_subset_size=20, inception_splits=3, image_size=16
)


def make_tokenizer():
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        resolution=16,
        latent_channels=8,
    )
    codes = IndexBackpropQuantizerConfig(codebook_size=16, code_dim=4)
    return Tokenizer.from_config(TokenizerConfig(autoencoder=autoencoder, quantizer=codes))


def write_tar(path, folder, keep=slice(None)):
    """The pictures of a folder as a shard without labels."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir())[keep]:
            tar.add(file, file.name)
    return path


def digit_batch(count=40, size=16):
    source = DigitsSource(image_size=size, split="validation")
    return torch.stack([source.get(number, 0).image for number in range(count)])


def damaged(images, seed=0):
    noise = torch.randint(-60, 60, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this file's own; the digits network is trained once in it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("IBQLAB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def reconstruct(tokenizer, images, **settings):
    options = {"metrics": QUICK, "extractor": "digits", "batch_size": 16, "progress": False} | settings
    return evaluate_reconstruction(tokenizer, images, options.pop("protocol", "seed-voken-ibq"), **options)


def generate(samples, reference=None, protocol=SMALL, **settings):
    return evaluate_generation(samples, reference, protocol, **({"extractor": "digits", "progress": False} | settings))


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_reconstruction_evaluation_is_its_parts_put_together(tokenizer, name):
    protocol, images = PROTOCOLS[name], digit_batch()
    tokenizer.train()
    result = reconstruct(tokenizer, images, protocol=name)
    assert tokenizer.training, "the mode is restored"
    tokenizer.eval()
    x = published_range(images)
    with torch.no_grad():
        out = tokenizer(x)
    y = out.reconstruction.clamp(-1, 1)
    cut = [to_unit_range(pictures, protocol.pixel_rounding) for pictures in (x, y)]
    assert result["psnr"].value == pytest.approx(psnr(*cut).mean().item(), rel=1e-6)
    # Near zero for a fresh tokenizer, and one pixel that rounding tips over a step of 8 bits moves it by 1e-6.
    assert result["ssim"].value == pytest.approx(ssim(*cut).mean().item(), rel=1e-6, abs=1e-5)
    extractor = build_extractor("digits")
    a, b = (feature_statistics(extractor(to_unit_range(pictures, protocol.rounding)).features) for pictures in (x, y))
    assert result["rfid"].value == pytest.approx(frechet_distance(a, b), rel=1e-5)
    counts = torch.bincount(out.quantizer.indices.flatten(), minlength=16)
    assert torch.equal(result.counts, counts)
    assert result["usage"].value == (counts > 0).float().mean().item()
    assert torch.equal(result.originals, images[:8])
    assert result.reconstructions.shape == (8, 3, 16, 16)


def test_cards_say_how_a_number_came_about(tokenizer):
    result = reconstruct(tokenizer, DigitsSource(image_size=16, split="validation"), limit=20)
    card = result["rfid"]
    assert card.metric == "Fréchet distance (digits-cnn)"
    assert (card.images, card.protocol, card.better) == (20, "seed-voken-ibq", "lower")
    assert card.extractor == "digits-cnn"
    assert card.weights == build_extractor("digits").weights
    assert any("fewer than 10,000 images" in remark for remark in card.remarks)
    assert any("covariance is singular" in remark for remark in card.remarks)
    assert "truncation" in result["psnr"].rounding
    usage = result["usage"]
    assert usage.tokens == 20 * 8 * 8
    assert not any("too few" in remark for remark in usage.remarks), "1,280 tokens are enough for 16 codes"
    few = reconstruct(tokenizer, digit_batch(1), metrics=("usage", "perplexity"))
    assert any("at least 10·K = 160" in remark for remark in few["usage"].remarks)
    table = cards_table(result.cards)
    assert list(table["key"]) == list(QUICK)
    assert {"protocol", "resize", "crop", "rounding", "reference", "extractor", "weights", "tokens"} <= set(table)
    assert "FID" not in cards_markdown(result.cards).replace("Fréchet", "")
    assert len(result.markdown().splitlines()) == 2 + len(QUICK)
    with pytest.raises(ValueError, match="did you mean 'psnr'"):
        result["psn"]


def test_a_protocol_is_written_out_in_full():
    for name, protocol in PROTOCOLS.items():
        text = str(protocol)
        assert protocol.name == name
        for word in ("resize", "crop", "rounding", "reference", "extractor", "deviation", "kid_subset_size"):
            assert word in text
    assert PROTOCOLS["seed-voken-ibq"].resize == "opencv"
    assert PROTOCOLS["open-magvit2"].resize == "pil"
    rows = {
        "taming": ("opencv", 256, "truncated", "inception-tensorflow"),
        "llamagen": ("adm", 256, "half_up", "inception-tensorflow"),
        "vqgan-lc": ("opencv", 256, "truncated", "inception-tensorflow"),
        "titok": ("pil_bicubic", 256, "rounded", "inception-tensorflow"),
        "maskbit": ("pil", 256, "truncated_unit", "inception-tensorflow"),
        "simvq": ("pil", 128, "none", "inception-pytorch-fid"),
    }  # fact sheet of the peers §10
    for name, row in rows.items():
        protocol = PROTOCOLS[name]
        assert (protocol.resize, protocol.image_size, protocol.rounding, protocol.extractor) == row
        assert protocol.published_extractor and protocol.deviation and "fact sheet of the peers" in protocol.source
    adm = PROTOCOLS["adm"]
    assert (adm.rounding, adm.inception_split_size, adm.neighbours) == ("truncated", 5000, 3)
    assert (adm.samples, adm.reference_images) == (50_000, 10_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Colour pictures of different sizes in two class folders."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(6):
        place = root / f"class_{number % 2}"
        place.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return root


@pytest.mark.parametrize("method", RESIZERS)
def test_a_folder_is_resized_and_cropped_by_the_protocol(tokenizer, folder, method):
    if method == "opencv":
        pytest.importorskip("cv2")
    protocol = dataclasses.replace(PROTOCOLS["open-magvit2"], name="here", resize=method, image_size=16)
    result = reconstruct(tokenizer, folder, protocol=protocol, metrics="psnr")
    files = sorted(folder.rglob("*.png"))
    expected = np.stack([resize_and_crop(Image.open(file), 16, method) for file in files])
    assert torch.equal(result.originals, torch.from_numpy(expected).permute(0, 3, 1, 2))
    assert result["psnr"].resize == f"{method} to 16"
    assert "centre" in result["psnr"].crop
    source = open_images(folder, resize=method, image_size=16, limit=3).source
    assert [source.name(index) for index in range(3)] == [file.relative_to(folder).as_posix() for file in files[::2]]


def test_all_kinds_of_input_give_the_same(tmp_path, cache):
    images = digit_batch(30)
    samples = damaged(images)
    np.savez(tmp_path / "samples.npz", arr_0=samples.permute(0, 2, 3, 1).numpy())
    (tmp_path / "folder").mkdir()
    for number, picture in enumerate(samples):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "folder" / f"{number:03}.png")
    kinds = [
        samples,
        samples.numpy(),
        [samples[:7], samples[7:]],
        (part for part in samples.split(11)),
        tmp_path / "samples.npz",
        str(tmp_path / "folder"),
        tmp_path,
    ]
    values = [[card.value for card in generate(kind, images).cards] for kind in kinds]
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-6)
    assert len(generate(samples, images, limit=25).cards) == 5
    assert generate((part for part in samples.split(11)), images, limit=25).images == 25


def test_shards_are_evaluated_in_an_order_that_mixes_them(tmp_path):
    """What does not depend on the order is the folder's."""
    samples = damaged(digit_batch(30))
    (tmp_path / "folder").mkdir()
    for number, picture in enumerate(samples):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "folder" / f"{number:03}.png")
    first = write_tar(tmp_path / "shards" / "a.tar", tmp_path / "folder", slice(20))
    write_tar(tmp_path / "shards" / "b.tar", tmp_path / "folder", slice(20, None))
    metrics = ("fid", "precision", "recall")
    expected = [card.value for card in generate(tmp_path / "folder", digit_batch(30), metrics=metrics).cards]
    for kind in (tmp_path / "shards", f"{tmp_path}/shards/{{a,b}}.tar"):
        values = [card.value for card in generate(kind, digit_batch(30), metrics=metrics).cards]
        assert values == pytest.approx(expected, rel=1e-6)
    assert open_images(first).count == 20
    source = open_images(tmp_path / "shards", limit=10).source
    numbers = [int(source.name(index)[:3]) for index in range(10)]
    assert len(set(numbers)) == 10 and max(numbers) >= 20 > min(numbers)
    sides = {open_images(tmp_path / "shards", resize="pil", image_size=size).side for size in (8, 12)}
    assert sides == {(8, 8), (12, 12)}


def test_a_generation_evaluation_is_its_parts_put_together():
    images = digit_batch(50)
    samples = damaged(images[:45])
    result = generate(samples, images)
    extractor = build_extractor("digits")
    a, b = extractor(samples / 255), extractor(images / 255)
    shares = precision_recall(a.features, b.features)
    expected = {
        "fid": frechet_distance(feature_statistics(a.features), feature_statistics(b.features)),
        "is": inception_score(a.logits, splits=3).mean,
        "kid": kernel_distance(a.features, b.features, subsets=5, subset_size=20).mean,
        "precision": shares.precision,
        "recall": shares.recall,
    }
    assert {card.key: card.value for card in result.cards} == pytest.approx(expected, rel=1e-5)
    names = [card.metric for card in result.cards]
    assert names[:3] == ["Fréchet distance (digits-cnn)", "class score (digits-cnn)", "kernel distance (digits-cnn)"]
    assert "45 samples, 50 reference images" in result["recall"].remarks[0]
    consecutive = dataclasses.replace(SMALL, name="consecutive", inception_split_size=20)
    score = generate(samples, None, consecutive, metrics="is")["is"]
    assert score.value == pytest.approx(inception_score(a.logits, split_size=20).mean, rel=1e-5)
    assert "consecutive splits of 20" in score.remarks[0]


def test_stored_statistics_take_the_place_of_images(tmp_path):
    images = digit_batch(40)
    samples = damaged(images)
    real = feature_statistics(build_extractor("digits")(damaged(images, seed=1) / 255).features)
    statistics = {"mu": real.mean, "sigma": real.covariance}
    np.savez(tmp_path / "statistics.npz", **statistics)
    found = generate(samples, tmp_path / "statistics.npz", "adm", metrics=("fid", "is"))
    drawn = feature_statistics(build_extractor("digits")(samples / 255).features)
    assert found["fid"].value == pytest.approx(frechet_distance(drawn, real), rel=1e-5)
    assert "stored statistics of statistics.npz" in found["fid"].reference
    with pytest.raises(ValueError, match="holds only mu and sigma"):
        generate(samples, tmp_path / "statistics.npz")
    np.savez(tmp_path / "both.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), **statistics)
    both = generate(samples, tmp_path / "both.npz", metrics=("fid", "recall"))
    assert both["fid"].value == found["fid"].value
    assert both["recall"].value == generate(samples, images, metrics="recall")["recall"].value
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="extractor's 64 features"):
        generate(samples, tmp_path / "other.npz", metrics="fid")


class Counting(torch.nn.Module):
    """Counts the images it sees."""

    name, dimension, smallest_side = "counting", 3, 1

    def __init__(self, weights):
        super().__init__()
        self.weights, self.seen = weights, 0

    def forward(self, images):
        self.seen += len(images)
        return Features(images.mean((2, 3)), None)


def test_a_reference_is_computed_once_for_each_content(tokenizer, tmp_path):
    def seen(images, weights="a", protocol="seed-voken-ibq", **settings):
        extractor = Counting(weights)
        result = reconstruct(tokenizer, images, protocol=protocol, extractor=extractor, metrics="rfid", **settings)
        return extractor.seen - 1, result["rfid"].value  # one picture is for trying the extractor

    images = digit_batch(12)
    first, value = seen(images)
    assert first == 24
    assert seen(images.clone()) == (12, value), "found by content"
    assert seen(images, cache=False) == (24, value)
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    assert seen(changed)[0] == 24
    assert seen(images, weights="b")[0] == 24
    assert seen(images, protocol="adm")[0] == 24, "another rounding"
    files = tmp_path / "pictures"
    files.mkdir()
    for number, picture in enumerate(images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(files / f"{number:02}.png")
    stored = dataclasses.replace(PROTOCOLS["adm"], name="stored")
    assert [seen(files, protocol=stored)[0] for _ in range(2)] == [24, 12]
    (files / "00.png").write_bytes((files / "01.png").read_bytes())
    assert seen(files, protocol=stored)[0] == 24


def test_a_generators_images_are_never_kept(tokenizer):
    images = digit_batch(12)
    for _ in range(2):
        extractor = Counting("generator")
        reconstruct(tokenizer, (part for part in images.split(5)), extractor=extractor, metrics="rfid")
        assert extractor.seen == 25


BAD_RECONSTRUCTIONS = {
    "unknown protocol": ({"protocol": "seed-voken"}, "did you mean 'seed-voken-ibq'"),
    "unknown metric": ({"metrics": ("psnr", "rfidd")}, "did you mean 'rfid'"),
    "no metric": ({"metrics": ()}, "at least one metric"),
    "unknown extractor": ({"extractor": "digit"}, "did you mean 'digits'"),
    "changed protocol": ({"protocol": dataclasses.replace(PROTOCOLS["adm"], neighbours=5)}, "name of its own"),
    "limit": ({"limit": 0}, "limit must be at least 1"),
    "batch size": ({"batch_size": 0}, "batch_size"),
    "huge batch": ({"batch_size": 10**9}, r"batch_size must be at most 1,048,576 .*got 1,000,000,000"),
    "huge limit": ({"limit": 10**12}, r"limit must be at most 1,000,000,000 .*got 1,000,000,000,000"),
    "no rows": ({"images": torch.zeros(2, 3, 0, 16, dtype=torch.uint8)}, r"must have pixels; got \(2, 3, 0, 16\)"),
    "no columns": ({"images": np.zeros((2, 3, 16, 0), np.uint8)}, r"must have pixels; got \(2, 3, 16, 0\)"),
    "no images in an array": ({"images": np.zeros((0, 3, 16, 16), np.uint8)}, "at least 1 image"),
    "neither skip nor stop": ({"unreadable": "stopp"}, "did you mean 'stop'"),
    "float images": ({"images": torch.rand(2, 3, 16, 16)}, "truncate_to_uint8"),
    "channels last": ({"images": torch.zeros(2, 16, 16, 3, dtype=torch.uint8)}, r"permute\(0, 3, 1, 2\)"),
    "mixed sizes": (
        {"images": [torch.zeros(1, 3, s, s, dtype=torch.uint8) for s in (16, 32)]},
        "one size; got 32 × 32 after 16 × 16",
    ),
    "no images": ({"images": []}, "at least 1 image"),
    "one image": ({"images": digit_batch(1)}, "rfid needs at least 2 images"),
    "odd size": ({"images": torch.zeros(2, 3, 15, 16, dtype=torch.uint8)}, "multiples of the downsampling"),
    "too small for ssim": ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "metrics": "ssim"}, "ssim needs"),
    "too small for the extractor": (
        {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "metrics": "rfid"},
        "digits-cnn needs images of at least 8 × 8",
    ),
    "too small for alex": ({"metrics": "lpips_alex"}, "lpips_alex needs images of at least 32"),
    "unknown net": ({"lpips_weights": {"vgg16": "file"}}, "did you mean 'vgg'"),
    "not images": ({"images": 3}, "must be a folder"),
}


@pytest.mark.parametrize("case", BAD_RECONSTRUCTIONS)
def test_bad_reconstruction_input_is_refused_before_any_work(tokenizer, case, monkeypatch):
    settings, message = BAD_RECONSTRUCTIONS[case]
    monkeypatch.setattr(type(tokenizer), "forward", lambda *_: pytest.fail("work began"))
    settings = dict(settings)
    with pytest.raises(ValueError, match=message):
        reconstruct(tokenizer, settings.pop("images", digit_batch(4)), **settings)


def test_missing_weights_and_folders_are_refused_before_any_work(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(type(tokenizer), "forward", lambda *_: pytest.fail("work began"))
    images = digit_batch(4, size=32)
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth"):
        reconstruct(tokenizer, images, metrics=None)
    with pytest.raises(FileNotFoundError, match="6726825d"):
        reconstruct(tokenizer, images, extractor=None)
    with pytest.raises(FileNotFoundError, match="6726825d"):
        evaluate_generation(images, images, metrics="fid")
    with pytest.raises(FileNotFoundError, match="no such one at"):
        reconstruct(tokenizer, tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileNotFoundError, match=r"that is no ordinary file at .*pipe\.png"):
        reconstruct(tokenizer, tmp_path / "pipe.png")


def test_bad_generation_input_is_refused_before_any_work(tmp_path):
    class NoClasses(Counting):
        smallest_side = 1

    images = digit_batch(12)
    cases = [
        ((images, images), {}, r"kid needs at least 20 samples; got 12.*kid_subset_size=6"),
        ((images[:3], images), {"metrics": "precision"}, "precision needs at least 4 samples"),
        ((images, images[:3]), {"metrics": "recall"}, "recall needs at least 4 reference images"),
        ((images[:1], images), {"metrics": "fid"}, "fid needs at least 2 samples"),
        ((images[:2], None), {"metrics": "is"}, "inception_splits=2"),
        ((images, None), {"metrics": "fid"}, "got no reference"),
        ((images, digit_batch(12, size=32)), {"metrics": "fid"}, "one size"),
        ((images, None), {"metrics": "is", "extractor": NoClasses("w")}, "gives no logits"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            generate(*arguments, **settings)
    with pytest.raises(ValueError, match="recall needs at least 4 samples"):
        generate((part for part in images[:3].split(2)), images, metrics="recall")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"must be an \.npz archive"):
        generate(tmp_path / "text.npz", images)
    np.savez(tmp_path / "named.npz", pictures=images.numpy())
    with pytest.raises(ValueError, match="it holds pictures"):
        generate(tmp_path / "named.npz", images)
    np.savez(tmp_path / "float.npz", arr_0=images.permute(0, 2, 3, 1).float().numpy())
    with pytest.raises(ValueError, match="float32"):
        generate(tmp_path / "float.npz", images)


def test_folders_of_mixed_sizes_or_with_damage_are_refused(tokenizer, folder, tmp_path):
    with pytest.raises(ValueError, match=r"one size; got 40 × 50 .*replace"):
        generate(folder, digit_batch(4), metrics="fid")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"all 1 validation images in .* fail, the last with: its content is none of"):
        reconstruct(tokenizer, tmp_path, protocol="open-magvit2", metrics="psnr")


def test_one_setting_decides_about_unreadable_images(tokenizer, tmp_path, capfd):
    images = digit_batch(6)
    for number, picture in enumerate(images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    os.truncate(tmp_path / "2.png", 60)
    os.truncate(tmp_path / "3.png", 60)
    settings = {"metrics": "psnr", "protocol": dataclasses.replace(SMALL, name="as-stored")}
    result = reconstruct(tokenizer, tmp_path, **settings)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"2 of 6 images unreadable: 2\.png, 3\.png \(\S.*\), left out", line)
    assert "2 unreadable files left out" in result["psnr"].remarks
    assert torch.equal(result.originals, images[[0, 1, 4, 5]])
    assert (result.images, result["psnr"].images) == (4, 4)
    assert result["psnr"].reference.startswith("4 of 6 images of ")
    readable = reconstruct(tokenizer, images[[0, 1, 4, 5]], **settings)
    assert result["psnr"].value == pytest.approx(readable["psnr"].value, rel=1e-6)
    with pytest.raises(ValueError, match=r"readable with unreadable='stop'; 2\.png"):
        reconstruct(tokenizer, tmp_path, unreadable="stop", **settings)
    # The same in the images of a run, whose settings have the same name.
    for unreadable in ("skip", "stop"):
        data = DataConfig(source=str(tmp_path), validation_source=str(tmp_path), image_size=16, unreadable=unreadable)
        source = open_data(data, "validation")
        if unreadable == "skip":
            again = reconstruct(tokenizer, source, **settings)
            assert "2 unreadable files left out" in again["psnr"].remarks and again.images == 4
            assert capfd.readouterr().err.count("2 of 6 images unreadable") == 1
        else:
            with pytest.raises(ValueError, match=r"'stop'; [23]\.png .*data\.unreadable=skip"):
                reconstruct(tokenizer, source, **settings)


def test_unreadable_samples_and_references_are_counted(tmp_path, capfd):
    images = digit_batch(30)
    for number, picture in enumerate(images):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:02}.png")
    os.truncate(tmp_path / "07.png", 60)
    result = generate(tmp_path, images, metrics="fid")
    assert "1 of 30 images unreadable: 07.png (" in capfd.readouterr().err
    assert "1 unreadable file left out" in result["fid"].remarks and result.images == 29
    # Of a reference whose features are kept from the first time, too.
    for _ in range(2):
        result = generate(images, tmp_path, metrics="fid")
        assert "1 unreadable file left out" in result["fid"].remarks
        assert result["fid"].reference.startswith("29 of 30 images of ")
    with pytest.raises(ValueError, match=r"07\.png"):
        generate(images, tmp_path, metrics="fid", unreadable="stop")


def test_a_single_picture_is_evaluated(tokenizer, tmp_path):
    (picture,) = digit_batch(1)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "one.png")
    result = reconstruct(tokenizer, tmp_path / "one.png", protocol=SMALL, metrics="psnr")
    assert torch.equal(result.originals, picture[None])
    with pytest.raises(ValueError, match="rfid needs at least 2 images; got 1"):
        reconstruct(tokenizer, tmp_path / "one.png", protocol=SMALL, metrics="rfid")


def npy(header: str, values: bytes = bytes(64)) -> bytes:
    """An array's file with such a header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + values


def archive(path, **arrays: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as stored:
        for name, content in arrays.items():
            stored.writestr(f"{name}.npy", content)
    return path


def header(dtype: str, *shape: int) -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}}}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(header("|u1", 10**12, 16, 16, 3)), "at least 1 image|says shape"),
        (npy(header("|u1", 4, 16, 16, 3)), r"says shape \(4, 16, 16, 3\), 3,072 bytes, and holds 64"),
        (npy(header("|u1", 0, 16, 16, 3), b""), "must hold at least 1 image"),
        (npy(header("|u1", 4, 0, 16, 3), b""), "must hold at least 1 image"),
        (npy(header("|O", 4, 16, 16, 3)), "Python objects, which could run a program"),
        (npy("{" * 100), "is no array"),
        (b"", "is no array"),
        (b"nothing" * 100, "is no array"),
    ],
)
def test_archives_that_do_not_hold_what_they_say_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        open_images(archive(tmp_path / "a.npz", arr_0=content))


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=digit_batch(4).permute(0, 2, 3, 1).numpy())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz .*\(Bad CRC.*Write it again|a\.npz .*\(Bad CRC.*write it again"):
        generate(path, digit_batch(4), metrics="fid")


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (npy(header("<f8", 10**12)), npy(header("<f8", 10**12, 10**12)), "says shape"),
        (npy(header("<f8", 8)), npy(header("<f8", 10**6, 10**6)), "says shape"),
        (npy(header("<f8", 8)), npy(header("<f8", 8)), r"must be \(D,\) and \(D, D\), D at most 16,384"),
        (npy(header("<i8", 8)), npy(header("<i8", 8, 8), bytes(512)), "must be float; got int64"),
        (npy(header("<f8", 8), b"\xff" * 64), npy(header("<f8", 8, 8), bytes(512)), "must be finite"),
        (npy(header("|O", 8)), npy(header("<f8", 8, 8), bytes(512)), "Python objects"),
    ],
)
def test_statistics_that_cannot_be_are_refused_before_memory_is_taken(tmp_path, mu, sigma, message):
    path = archive(tmp_path / "stored.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=message):
        generate(digit_batch(4), path, metrics="fid")


def test_a_damaged_entry_of_the_cache_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path))
    save_arrays("references", "key", {"mean": np.zeros(3)})
    (stored,) = (tmp_path / "references").iterdir()
    assert load_arrays("references", "key")["mean"].tolist() == [0, 0, 0]
    for content in (b"", b"PK no archive", stored.read_bytes()[:-30]):
        stored.write_bytes(content)
        assert load_arrays("references", "key") is None
    archive(stored, mean=npy(header("<f8", 10**12)))
    assert load_arrays("references", "key") is None
    stored.unlink()
    os.mkfifo(stored)
    assert load_arrays("references", "key") is None


def test_a_kept_digits_network_of_other_shapes_is_trained_again(cache):
    expected = DigitsExtractor().weights
    (stored,) = (cache / "digits-cnn").iterdir()
    whole = stored.read_bytes()
    np.savez(stored, **dict(np.load(stored)) | {"classify.bias": np.zeros(3, np.float32)})
    assert DigitsExtractor().weights == expected
    stored.write_bytes(whole)


def test_a_kept_reference_that_lacks_something_is_no_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path))
    save_arrays("references", "key", {"mean": np.zeros(3)})
    assert load_reference("key") is None


def test_recognising_no_digits_is_refused():
    with pytest.raises(ValueError, match="at least one; got 0 and 0"):
        DigitsExtractor().accuracy(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut", pickle.dumps({"features.0.weight": 1})])
def test_weight_files_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth .*(state dict|Pass the file)"):
        load_lpips("vgg", tmp_path / "weights.pth", expected_sha256=None)
    with pytest.raises(ValueError, match=r"weights\.pth .*state dict"):
        build_extractor("inception-tensorflow", weights=tmp_path / "weights.pth", expected_sha256=None)


def test_an_endless_source_needs_a_limit(tokenizer):
    source = DigitsSource(image_size=16, split="validation")
    source.endless = True
    with pytest.raises(ValueError, match="limit=360"):
        reconstruct(tokenizer, source)


def test_protocols_refuse_impossible_settings():
    with pytest.raises(ValueError, match="did you mean 'opencv'"):
        Protocol(name="mine", purpose="", resize="open-cv")
    with pytest.raises(ValueError, match="kid_subset_size must be at least 2"):
        Protocol(name="mine", purpose="", kid_subset_size=1)


def test_lpips_of_other_weights_is_not_called_lpips(tokenizer, tmp_path):
    lpips = pytest.importorskip("lpips")
    with pytest.warns(UserWarning):
        trunk = lpips.pretrained_networks.alexnet(pretrained=False)
    state = {"features." + name.split(".", 1)[1]: value for name, value in trunk.state_dict().items()}
    torch.save(state, tmp_path / "alex.pth")
    result = reconstruct(
        tokenizer,
        digit_batch(3, size=32),
        metrics="lpips_alex",
        lpips_weights={"alex": tmp_path / "alex.pth"},
        check_weights=False,
    )
    assert result["lpips_alex"].metric == "LPIPS formula on other weights (alex)"
    assert "not the published file" in result["lpips_alex"].weights
    assert result["lpips_alex"].value > 0


def evaluate_for_comparison(batch_size):
    """Every number of two evaluations, as one list; called in one process and in two."""
    source = DigitsSource(image_size=16, split="validation")
    rebuilt = reconstruct(make_tokenizer(), source, limit=37, batch_size=batch_size)
    images = digit_batch(41)
    drawn = generate([damaged(images)[:5], damaged(images)[5:]], images, batch_size=batch_size)
    values = [card.value for card in (*rebuilt.cards, *drawn.cards)]
    return torch.tensor([*values, *rebuilt.counts.tolist(), *rebuilt.reconstructions.float().mean((1, 2, 3)).tolist()])


@pytest.mark.usefixtures("warm_start")
def test_two_processes_find_what_one_finds(tmp_path):
    script = (
        "import sys, torch, torch.distributed as dist\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "torch.set_num_threads(1)\n"
        "from test_metrics_evaluation import evaluate_for_comparison\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=int(sys.argv[1]), world_size=2)\n"
        f"torch.save(evaluate_for_comparison(8), f'{tmp_path}/{{sys.argv[1]}}.pt')\n"
        "dist.destroy_process_group()\n"
    )
    environment = os.environ | {"IBQLAB_CACHE": os.environ["IBQLAB_CACHE"], "OMP_NUM_THREADS": "1"}
    expected = evaluate_for_comparison(10)
    environment["IBQLAB_CACHE"] = str(tmp_path / "cache")
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_samples_are_cut_as_published():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.999, 1.0, 2.0])
    assert truncate_to_uint8(x).tolist() == [0, 0, 0, 127, 254, 255, 255]
