"""Notebooks that measure tokenizers: what is checked before any work, what is computed once, what may be compared."""

import dataclasses
import json
import tarfile

import numpy as np
import pytest
from golden import golden_file
from PIL import Image

from ibqlab.config import ConfigError
from ibqlab.grids import evaluation_session
from ibqlab.grids.comparison import (
    comparison_table,
    dots_table,
    judge_comparison,
    open_comparison,
    usage_table,
)
from ibqlab.grids.evaluation_parameters import ComparisonParameters, EvaluationParameters
from ibqlab.grids.evaluation_rules import TokenizerUnderTest
from ibqlab.grids.evaluation_session import open_evaluation
from ibqlab.grids.printed_numbers import find_published, of_row
from ibqlab.metrics import PROTOCOLS
from ibqlab.pretrained import export_tokenizer, load_tokenizer
from ibqlab.recipes.published import published_rows
from ibqlab.runs import runs_root
from ibqlab.training import recipe_config


@pytest.fixture
def folder(tmp_path):
    """Four small pictures of different sizes."""
    place = tmp_path / "images"
    place.mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 48), (48, 40), (36, 36), (33, 65)]):
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"{number}.png")
    return place


def evaluation(**parameters):
    return open_evaluation(EvaluationParameters(**{"preset": "smoke", "limit": 8} | parameters))


def test_a_published_file_is_measured_on_a_folder(folder, monkeypatch):
    path = golden_file("tokenizer_ema_official_ckpt.ckpt")
    measurement = evaluation(checkpoint=str(path), images=str(folder), weights="ema", limit=0)
    (measured,) = measurement.measure(progress=False)
    assert "279 of 279 keys accounted for" in measured.report
    assert measured.values.keys() == {"rfid", "lpips_vgg", "psnr", "ssim", "usage", "perplexity"}
    assert np.isnan(measured.values["lpips_vgg"]) and measured.values["psnr"] > 0
    cards = {card.key: card for card in measured.cards}
    assert cards["rfid"].metric == "Fréchet distance (digits-cnn)" and cards["rfid"].images == 4
    assert "vgg16-397923af.pth" in cards["lpips_vgg"].remarks[0]
    written = (measurement.folder / "cards.md").read_text()
    assert "| LPIPS (VGG) ↓ | – |" in written and "FID" not in written
    facts = json.loads((measurement.folder / "provenance.json").read_text())
    assert facts["command"].startswith("ibqlab run evaluate_tokenizer preset=smoke") and "/" not in facts["command"]
    assert measured.counts.sum() == 4 * 128 * 128
    table = usage_table(measured)
    assert table["definition"].tolist() == ["any_hit", "above_uniform_8pct", "perplexity"]
    assert table["usage"].str.contains("65,536 tokens").all()


def test_shards_are_measured_as_their_folder_is(folder, tmp_path):
    path = golden_file("tokenizer_ema_official_ckpt.ckpt")
    for file in sorted(folder.iterdir())[:2]:
        file.unlink()
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    (found,), (expected,) = (
        evaluation(checkpoint=str(path), images=str(images), limit=0, metrics=("psnr", "usage")).measure(progress=False)
        for images in (tmp_path / "set.tar", folder)
    )
    assert found.values["psnr"] == pytest.approx(expected.values["psnr"], rel=1e-5)
    assert found.counts.tolist() == expected.counts.tolist()


def test_what_stands_is_read_again_and_what_changed_is_measured_anew(monkeypatch):
    (first,) = evaluation().measure(progress=False)
    computed = []
    compute = evaluation_session.evaluate_reconstruction
    monkeypatch.setattr(
        evaluation_session, "evaluate_reconstruction", lambda *a, **k: computed.append(k) or compute(*a, **k)
    )
    (again,) = evaluation().measure(progress=False)
    assert not computed
    np.testing.assert_equal(again.values, first.values)
    assert np.array_equal(again.reconstructions, first.reconstructions)
    stored = next((runs_root() / "evaluate_tokenizer-smoke" / "results").glob("*.npz"))
    stored.write_bytes(stored.read_bytes()[:1000])
    (mended,) = evaluation().measure(progress=False)
    assert len(computed) == 1 and mended.values["psnr"] == first.values["psnr"]
    computed.clear()
    (fewer,) = evaluation(limit=4).measure(progress=False)
    (averaged,) = evaluation(weights="ema").measure(progress=False)
    assert len(computed) == 2
    assert fewer.values["psnr"] != first.values["psnr"] != averaged.values["psnr"]


def test_all_missing_weight_files_are_named_at_once_before_any_work(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    path = golden_file("tokenizer_ema_official_ckpt.ckpt")
    with pytest.raises(FileNotFoundError) as caught:
        evaluation(preset="published", checkpoint=str(path), images=str(folder))
    for name in ("3 weight files", "vgg16-397923af.pth", "alexnet-owt-7be5be79.pth", "weights-inception-2015-12-05"):
        assert name in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"preset": "published"}, "checkpoint=FILE"),
        ({"checkpoint": "nowhere.ckpt"}, "nowhere.ckpt"),
        ({"images": "nowhere"}, "nowhere"),
        ({"protocol": "seed-voken"}, "seed-voken-ibq"),
        ({"metrics": ("fid",)}, "rfid"),
    ],
)
def test_bad_requests_stop_before_any_work(parameters, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluation(**parameters)
    assert not (tmp_path / "runs").exists()


def test_two_tokenizers_side_by_side():
    measurement = open_comparison(ComparisonParameters(preset="smoke", limit=8))
    measured = measurement.measure(progress=False)
    table = comparison_table(measured, {})
    assert table["label"].tolist() == ["vq", "ibq"] and table["K"].tolist() == [64, 64]
    assert table["published_rfid"].isna().all() and table["psnr"].nunique() == 2
    distance = [name for name in table if name.startswith("frechet_distance_")]
    assert len(distance) == 1 and table[distance[0]].gt(0).all()
    assert "rfid" not in table  # another network's distance is no FID, in no table and no CSV
    assert "Nothing is published" in judge_comparison(measurement.rules, {})
    published = {"ibq": of_row(next(iter(published_rows().values())))}
    assert "is not a published one; 8 images" in judge_comparison(measurement.rules, published)
    dots = dots_table(measured, published, measurement.rules).set_index(["label", "key"])["published"]
    assert dots.isna().all()
    default = find_published(measurement.tokenizers)
    assert {label: row.number("rfid") for label, row in default.items()} == {"vq": 3.98, "ibq": 1.37}
    allowed = dataclasses.replace(measurement.rules, protocol=PROTOCOLS["seed-voken-ibq"], weights="ema")
    allowed.images.count = 50_000
    dots = dots_table(measured, published, allowed).set_index(["label", "key"])["published"]
    assert dots["ibq", "usage"] == published["ibq"].number("usage") and np.isnan(dots["vq", "usage"])
    assert ("ibq", "rfid") not in dots and np.isnan(dots["ibq", distance[0]])
    assert np.isnan(dots["ibq", "lpips_vgg"])


def test_published_rows_are_found_by_architecture_or_by_name(tmp_path):
    config = recipe_config("imagenet/ibq_16384").tokenizer
    mine = TokenizerUnderTest(label="mine", path=tmp_path, config=config)
    other = TokenizerUnderTest(label="other", path=tmp_path, config=recipe_config("builtin/smoke").tokenizer)
    found = find_published([mine, other])
    assert found.keys() == {"mine"} and found["mine"].number("rfid") == 1.37
    assert find_published([other], ["other=imagenet/ibq_262144"])["other"].number("rfid") == 1.00
    with pytest.raises(ValueError, match="the checkpoints' are mine"):
        find_published([mine], ["yours=imagenet/ibq_16384"])
    with pytest.raises(ValueError, match="nothing is published for 'imagenet/none'"):
        find_published([mine], ["mine=imagenet/none"])
    twice = TokenizerUnderTest(label="two", path=tmp_path, config=recipe_config("imagenet/ibq_16384_blocks2").tokenizer)
    assert not find_published([twice])
    trained_so = dataclasses.replace(twice, data=recipe_config("imagenet/ibq_16384").data)
    assert find_published([trained_so])["two"].number("rfid") == 1.55
    with pytest.raises(ValueError, match="given twice"):
        open_comparison(ComparisonParameters(preset="smoke", checkpoints=("a=x", "a=y")))


def test_columns_may_be_compared_only_under_the_published_rules():
    measurement = open_comparison(ComparisonParameters(preset="smoke", limit=8))
    published = {"ibq": of_row(next(iter(published_rows().values())))}
    protocol = PROTOCOLS["seed-voken-ibq"]
    rules = dataclasses.replace(measurement.rules, protocol=protocol, weights="ema")
    assert "8 images were measured, the published numbers are from 50,000" in judge_comparison(rules, published)
    rules.images.count = protocol.samples
    assert "may be compared with them if the images are ImageNet's" in judge_comparison(rules, published)
    rows = published_rows()
    assert "were made under open-magvit2" in judge_comparison(rules, {"lfq": of_row(rows["imagenet/lfq_262144"])})
    raw = dataclasses.replace(rules, weights="raw")
    assert "must not be compared" in judge_comparison(raw, published)


def test_the_only_weights_of_a_file_are_taken_and_others_refused_before_any_work(folder, tmp_path):
    tokenizer, images = load_tokenizer(golden_file("tokenizer_ema_official_ckpt.ckpt"), "ema"), str(folder)
    averaged = export_tokenizer(tokenizer, tmp_path / "averaged.safetensors", "ema")
    trained = export_tokenizer(tokenizer, tmp_path / "trained.safetensors", "raw")
    assert evaluation(checkpoint=str(averaged), images=images).rules.weights == "ema"
    assert evaluation(checkpoint=str(trained), images=images).rules.weights == "raw"
    with pytest.raises(ConfigError, match=r"averaged.*only one set of weights; give weights=ema"):
        evaluation(checkpoint=str(averaged), images=images, weights="raw")
    with pytest.raises(ConfigError, match=r"averaged.*give weights=ema, or a file that holds 'raw', too"):
        open_comparison(ComparisonParameters(preset="smoke", checkpoints=(str(averaged), str(trained)), images=images))


def test_an_export_that_does_not_tell_its_weights_is_called_so(folder, tmp_path):
    tokenizer = load_tokenizer(golden_file("tokenizer_ema_official_ckpt.ckpt"))
    unlabelled = export_tokenizer(tokenizer, tmp_path / "unlabelled.safetensors")
    labelled = export_tokenizer(tokenizer, tmp_path / "labelled.safetensors", "ema")
    settings = {"preset": "smoke", "images": str(folder), "weights": "ema", "metrics": ("psnr",), "limit": 1}
    measurement = evaluation(checkpoint=str(unlabelled), **settings)
    (measured,) = measurement.measure(progress=False)
    assert (measurement.folder / "cards.md").read_text().startswith("Of weights as they were given.")
    assert "weights as they were given" in measured.report and "averaged" not in measured.report
    both = open_comparison(ComparisonParameters(checkpoints=(str(unlabelled), str(labelled)), **settings))
    both.measure(progress=False)
    first = (both.folder / "cards.md").read_text().splitlines()[0]
    assert first == "Of averaged weights; of unlabelled: weights as they were given."
