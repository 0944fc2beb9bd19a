"""The published ways to resize: golden values, and the libraries themselves over many odd sizes."""

import sys

import numpy as np
import pytest
from golden import golden
from PIL import Image

from ibqlab.data import RESIZERS, resize_and_crop, resize_short_side
from ibqlab.data.resizing import centre_offset, resized_size

SIZES = [(1, 1), (7, 5), (16, 16), (17, 16), (16, 33), (31, 50), (64, 63), (99, 40), (101, 37), (23, 200), (150, 149)]


def noise(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("method", "published"), [("opencv", "ibq_uint8"), ("pil", "magvit2_uint8")])
def test_the_published_pipelines_bit_for_bit(method, published):
    facts, tensors = golden("preprocess")
    assert len(facts["items"]) == 4
    for number, item in enumerate(facts["items"]):
        picture = Image.fromarray(tensors[f"{number}/input"].numpy())
        ours = resize_and_crop(picture, item["size"], method)
        assert ours.dtype == np.uint8
        assert np.array_equal(ours, tensors[f"{number}/{published}"].numpy())


@pytest.mark.parametrize(("method", "published"), [("adm", "adm"), ("pil_bicubic", "titok"), ("pil", "maskbit")])
def test_the_pipelines_of_other_systems_bit_for_bit(method, published):
    facts, tensors = golden("peers/peer_preprocess")
    assert len(facts["cases"]) == 4
    for number, case in facts["cases"].items():
        picture = Image.fromarray(tensors[f"{number}/input"].numpy())
        ours = resize_and_crop(picture, case["size"], method)
        assert np.array_equal(ours, tensors[f"{number}/{published}"].numpy()), number


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("image_size", [16, 31])
def test_opencv_is_cv2_with_two_taps(height, width, image_size):
    import cv2  # noqa: PLC0415 - optional

    picture = noise(height, width)
    scale = image_size / min(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    whole = cv2.resize(np.asarray(picture), (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(resize_short_side(picture, image_size, "opencv"), whole)
    top, left = (new_height - image_size) // 2, (new_width - image_size) // 2
    square = whole[top : top + image_size, left : left + image_size]
    assert np.array_equal(resize_and_crop(picture, image_size, "opencv"), square)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("image_size", [16, 31])
@pytest.mark.parametrize("method", ["pil", "pil_bicubic"])
def test_pil_is_torchvision(height, width, image_size, method):
    from torchvision.transforms import InterpolationMode, functional  # noqa: PLC0415 - takes seconds

    picture = noise(height, width)
    mode = InterpolationMode.BILINEAR if method == "pil" else InterpolationMode.BICUBIC
    whole = functional.resize(picture, image_size, mode)
    assert np.array_equal(resize_short_side(picture, image_size, method), np.asarray(whole))
    square = functional.center_crop(whole, [image_size, image_size])
    assert np.array_equal(resize_and_crop(picture, image_size, method), np.asarray(square))


def test_adm_halves_before_its_last_step():
    """By averaging, so that twice the size becomes plain averages; the bicubic filter weighs more pixels."""
    assert resized_size(1000, 900, 256, "adm") == (284, 256)  # 500 × 450, then 284.4
    assert resized_size(1027, 512, 256, "adm") == (513, 256)
    assert resized_size(500, 375, 256, "adm") == (341, 256)
    picture = noise(64, 64)
    halved = picture.resize((32, 32), Image.Resampling.BOX)
    assert np.array_equal(resize_short_side(picture, 32, "adm"), np.asarray(halved))
    assert not np.array_equal(resize_short_side(picture, 32, "pil_bicubic"), np.asarray(halved))


@pytest.mark.parametrize("method", RESIZERS)
def test_the_short_side_always_fits(method):
    for width in range(1, 700, 3):
        for height in (width, 375, 500, 511):
            size = resized_size(width, height, 256, method)
            assert min(size) == 256
            ideal = 256 * max(width, height) / min(width, height)
            # "adm" loses up to a row or a column at each halving.
            assert abs(max(size) - ideal) <= {"opencv": 0.5, "adm": 2}.get(method, 1)
            assert (max(size) <= ideal) or method in ("opencv", "adm")


def test_the_long_side_is_rounded_or_cut():
    assert resized_size(500, 375, 256, "opencv") == (341, 256)
    assert resized_size(500, 333, 256, "opencv") == (384, 256)
    assert resized_size(500, 333, 256, "pil") == (384, 256)
    assert resized_size(334, 500, 256, "opencv") == (256, 383)
    assert resized_size(100, 33, 32, "opencv") == (97, 32)
    assert resized_size(100, 33, 32, "pil") == (96, 32)


def test_a_half_pixel_goes_to_the_even_neighbour():
    assert [resized_size(width, 512, 256, "opencv")[0] for width in (513, 515)] == [256, 258]
    assert [resized_size(width, 512, 256, "pil")[0] for width in (513, 515)] == [256, 257]


def test_an_odd_spare_pixel_goes_to_the_other_side():
    assert centre_offset(19, 17, 16, "opencv") == (1, 0)
    assert centre_offset(19, 17, 16, "pil") == centre_offset(19, 17, 16, "pil_bicubic") == (2, 0)
    assert centre_offset(19, 17, 16, "adm") == (1, 0)


def test_only_pil_smooths():
    """Single black and white columns at a third of the size: two taps keep what they hit, smoothing makes grey."""
    stripes = np.zeros((96, 96, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    picture = Image.fromarray(stripes)
    assert resize_and_crop(picture, 32, "pil").std() < 50
    assert resize_and_crop(picture, 32, "opencv").std() > 120


@pytest.mark.parametrize("method", RESIZERS)
def test_a_picture_of_the_right_size_is_left_alone(method):
    picture = noise(32, 40)
    assert np.array_equal(resize_short_side(picture, 32, method), np.asarray(picture))


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(ValueError, match="method must be one of 'opencv', 'pil', 'pil_bicubic', 'adm', got 'cv2'"):
        resize_and_crop(noise(4, 4), 4, "cv2")
    with pytest.raises(ValueError, match=r"must be RGB, got mode L; use picture\.convert"):
        resize_and_crop(noise(4, 4).convert("L"), 4, "pil")
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        resize_and_crop(noise(4, 4), 0, "pil")


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert resize_and_crop(noise(4, 4), 4, "pil").shape == (4, 4, 3)
    with pytest.raises(ImportError, match=r"opencv-python-headless.*pip install 'ibqlab\[data\]'"):
        resize_and_crop(noise(4, 4), 4, "opencv")
