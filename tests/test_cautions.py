"""Warnings before hours are lost: each told by name with what to do, and nothing said where nothing is wrong."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from golden import golden_file
from PIL import Image

from ibqlab.data import DataConfig, PhotosSource, open_data
from ibqlab.grids.evaluation_parameters import EvaluationParameters
from ibqlab.grids.evaluation_session import open_evaluation
from ibqlab.metrics import PROTOCOLS, evaluate_reconstruction, open_images
from ibqlab.metrics.cautions import EvaluationWarning, cautions_of_images, without_cautions
from ibqlab.metrics.images import BatchImages
from ibqlab.pretrained import load_tokenizer

IBQ = PROTOCOLS["seed-voken-ibq"]
OWN = dataclasses.replace(IBQ, name="mine")
"""A protocol of the user's: other images than 50,000 are no reason to warn."""
ORIGINALS = [(300, 400), (500, 375), (280, 281), (900, 600)]


def pictures(folder, sizes, suffix="png"):
    folder.mkdir(exist_ok=True)
    for number, (height, width) in enumerate(sizes):
        pixels = np.full((height, width, 3), number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return folder


def opened(images, protocol=OWN):
    settings = {"resize": protocol.resize, "image_size": protocol.image_size, "crop": protocol.crop}
    return open_images(images if isinstance(images, (PhotosSource, list)) else str(images), **settings)


def told(images, protocol=OWN):
    return cautions_of_images(opened(images, protocol), protocol)


def test_originals_are_silent(tmp_path):
    assert told(pictures(tmp_path / "a", ORIGINALS)) == []
    one_camera = [(480, 640)] * 4
    assert told(pictures(tmp_path / "b", one_camera)) == []
    as_named = opened(pictures(tmp_path / "a", ORIGINALS), IBQ)
    as_named.count = 50_000
    assert cautions_of_images(as_named, IBQ) == []


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_files_that_have_the_size_already(tmp_path, suffix):
    (caution,) = told(pictures(tmp_path / "a", [(256, 256)] * 3, suffix))
    assert caution.startswith("resized before: all 3 files looked at are 256 × 256 pixels already")
    assert "mine's rule (opencv" in caution and "Give the folder of originals" in caution
    (caution,) = told(pictures(tmp_path / "b", [(256, 300), (400, 256)], suffix))
    assert "short side of 256 pixels already and are not cropped" in caution


def test_files_that_somebody_resized_to_another_size(tmp_path):
    (caution,) = told(pictures(tmp_path / "a", [(512, 512)] * 3))
    assert caution.startswith("resized twice: all 3") and "resizes them again, to 256" in caution
    (caution,) = told(pictures(tmp_path / "b", [(512, 600), (700, 512), (512, 512)]))
    assert caution.startswith("resized twice") and "short side of 512" in caution


def test_files_that_are_too_small(tmp_path):
    (caution,) = told(pictures(tmp_path / "a", [(60, 64), (64, 100), (300, 400)]))
    assert caution.startswith("size: 2 of 3 files looked at are smaller than 256 pixels")
    assert "image_size=64" in caution


def test_another_number_than_the_protocols(tmp_path):
    (caution,) = told(pictures(tmp_path / "a", ORIGINALS), IBQ)
    assert caution.startswith("count: 4 images, and numbers of seed-voken-ibq are from 50,000, and rFID is biased")
    assert "limit=0" in caution
    more = opened(pictures(tmp_path / "a", ORIGINALS), IBQ)
    more.count = 60_000
    (caution,) = cautions_of_images(more, IBQ)
    assert "biased" not in caution


def test_arrays_and_archives(tmp_path):
    def batch(height, width):
        return [torch.zeros(2, 3, height, width, dtype=torch.uint8)]

    (caution,) = told(batch(256, 256))
    assert caution.startswith("resized before: an array of pixels, 256 × 256") and "(opencv) was not applied" in caution
    (caution,) = told(batch(128, 128))
    assert caution.startswith("size: an array of pixels, 128 × 128 pixels; mine names 256 × 256")
    (caution,) = told(batch(256, 300))
    assert caution.startswith("not cropped: an array of pixels, 256 × 300")
    np.savez(tmp_path / "set.npz", arr_0=np.zeros((2, 256, 256, 3), dtype=np.uint8))
    (caution,) = told(tmp_path / "set.npz")
    assert caution.startswith("resized before: 2 images of set.npz")
    as_stored = dataclasses.replace(OWN, resize="none")
    assert told(tmp_path / "set.npz", as_stored) == [] == told(batch(256, 256), as_stored)
    unknown = BatchImages(iter(batch(99, 99)), None, None, "batches")
    assert cautions_of_images(unknown, OWN) == []


def test_images_as_stored_must_have_the_size_that_the_protocol_names(tmp_path):
    as_stored = dataclasses.replace(OWN, resize="none")
    assert told(pictures(tmp_path / "a", [(256, 256)] * 2), as_stored) == []
    (caution,) = told(pictures(tmp_path / "b", [(64, 64)] * 2), as_stored)
    assert caution.startswith("size: ")
    (caution,) = told(pictures(tmp_path / "c", [(256, 320)] * 2), as_stored)
    assert caution.startswith("not cropped: ")


def test_images_of_a_source_that_is_resized_by_another_rule(tmp_path):
    folder = str(pictures(tmp_path / "a", ORIGINALS * 4))

    def source(resize):
        data = DataConfig(source=folder, validation_source=folder, image_size=256, resize=resize)
        return cautions_of_images(open_images(open_data(data, "validation")), OWN)

    assert source("opencv") == []
    (caution,) = source("pil")
    assert caution.startswith("resize: ") and "resized by pil, and mine resizes by opencv" in caution
    photos = PhotosSource(image_size=32, split="validation", flip=False)
    assert cautions_of_images(open_images(photos, limit=2), dataclasses.replace(OWN, image_size=32)) == []


class TestEvaluations:
    images = (torch.zeros(2, 3, 32, 32, dtype=torch.uint8),)

    def evaluate(self, tokenizer, protocol):
        return evaluate_reconstruction(tokenizer, [*self.images], protocol, metrics=("psnr",), progress=False)

    def test_they_warn_at_once_and_by_name(self, monkeypatch):
        tokenizer = load_tokenizer(golden_file("tokenizer_ema_official_ckpt.ckpt"), "raw")
        calls = []
        monkeypatch.setattr(type(tokenizer), "forward", lambda *a: calls.append(1) or 1 / 0)
        with pytest.warns(EvaluationWarning) as warned, pytest.raises(ZeroDivisionError):
            self.evaluate(tokenizer, "seed-voken-ibq")
        texts = [str(warning.message) for warning in warned]
        assert [text.split(":")[0] for text in texts] == ["size", "count", "weights"]
        assert "its authors evaluate averaged ones, which it holds. Type weights=ema" in texts[2]
        assert warned[0].filename == __file__

    def test_averaged_weights_and_trials_are_silent(self):
        path = golden_file("tokenizer_ema_official_ckpt.ckpt")
        fitting = dataclasses.replace(OWN, image_size=32, resize="none")
        with warnings.catch_warnings():
            warnings.simplefilter("error", EvaluationWarning)
            self.evaluate(load_tokenizer(path, "ema"), fitting)
            self.evaluate(load_tokenizer(path, "raw"), dataclasses.replace(OWN, source=""))
            with without_cautions():
                self.evaluate(load_tokenizer(path, "raw"), fitting)
            # A family that publishes one set of weights has no others to recommend.
            self.evaluate(load_tokenizer(golden_file("peers/taming_vqgan_official.ckpt"), "raw"), fitting)
        with pytest.warns(EvaluationWarning, match="weights: "):
            self.evaluate(load_tokenizer(path, "raw"), fitting)

    def test_a_notebook_is_told_when_it_opens_and_once(self, tmp_path):
        path = str(golden_file("tokenizer_ema_official_ckpt.ckpt"))
        settings = {"preset": "smoke", "images": str(pictures(tmp_path / "a", ORIGINALS)), "image_size": 32}
        with pytest.warns(EvaluationWarning, match=r"weights: tokenizer_ema_official_ckpt .*Type weights=ema"):
            told = EvaluationParameters(checkpoint=path, weights="raw", metrics=("psnr",), **settings)
            session = open_evaluation(told)
        with warnings.catch_warnings():
            warnings.simplefilter("error", EvaluationWarning)
            session.measure(progress=False)
            averaged = open_evaluation(EvaluationParameters(checkpoint=path, **settings))
        assert averaged.cautions == [] and "weights: " in (session.folder / "provenance.json").read_text()

    def test_a_published_protocol_is_checked_before_any_image_is_decoded(self, tmp_path, monkeypatch):
        path = str(golden_file("tokenizer_ema_official_ckpt.ckpt"))
        folder = str(pictures(tmp_path / "a", [(256, 256)] * 3))
        with pytest.warns(EvaluationWarning) as warned:
            session = open_evaluation(
                EvaluationParameters(preset="published", checkpoint=path, images=folder, metrics=("psnr",))
            )
        assert [text.split(":")[0] for text in session.cautions] == ["resized before", "count"]
        assert len(warned) == 2
