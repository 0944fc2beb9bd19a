"""Data: batches that depend on their number alone, splits that share nothing, and broken files that are named."""

import os
import pickle
import re
import sys
from dataclasses import replace
from fnmatch import fnmatch
from itertools import pairwise

import numpy as np
import pytest
import torch
from golden import golden
from PIL import Image

from ibqlab.data import (
    PHOTOS,
    BrokenImages,
    DataConfig,
    FileSource,
    Sample,
    first_images,
    open_data,
    resize_short_side,
    to_model_range,
    to_uint8,
    training_batches,
    validation_batches,
)
from ibqlab.data import photos as photos_module
from ibqlab.data.broken import UnreadableName
from ibqlab.data.file_list import NO_CLASS, pack_names
from ibqlab.data.folder import list_folder
from ibqlab.data.photos import PhotosSource, largest_crop, split_columns
from ibqlab.data.pictures import read_rgb
from ibqlab.data.splits import exclude_names


class Numbers:
    """A source whose images say which index and seed they were asked for."""

    classes = ("number",)
    fingerprint = description = "numbers"
    endless = False

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def get(self, index: int, seed: int) -> Sample:
        assert 0 <= index < self.length
        return Sample(torch.tensor(list(seed.to_bytes(8, "big")), dtype=torch.uint8).expand(3, 1, 8), index)


@pytest.fixture
def folder(tmp_path):
    """Twelve images in two class folders, deep and shallow, with files beside them that are no images."""
    rng = np.random.default_rng(0)
    for number in range(12):
        place = tmp_path / ("cat" if number % 2 else "dog/young")
        place.mkdir(parents=True, exist_ok=True)
        suffix = ("png", "JPG", "webp", "bmp")[number % 4]
        picture = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"{number:02}.{suffix}")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "thumbnail.png").write_bytes(b"")
    return tmp_path


def folder_config(path, **settings) -> DataConfig:
    return DataConfig(source=str(path), **{"image_size": 16, "validation_share": 0.3, **settings})


def train(source, steps: int, **settings):
    settings = {"batch_size": 4, "seed": 7, "start_step": 0} | settings
    return list(training_batches(source, steps=steps, **settings))


def names_of(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def same(one, other) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


# Batches by number


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    indices = torch.cat([batch.labels for batch in train(Numbers(10), 10)]).tolist()
    epochs = [indices[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))


def test_resume_in_the_middle_of_an_epoch_goes_on_exactly():
    source = Numbers(10)
    assert same(train(source, 9)[4:], train(source, 5, start_step=4))


def test_every_position_has_its_own_seed():
    seeds = torch.cat([batch.images[:, 0, 0] for batch in train(Numbers(10), 25)])
    assert len({tuple(seed.tolist()) for seed in seeds}) == 100
    assert seeds[:, 0].max() < 128, "seeds must fit into int64"


def test_another_seed_gives_other_batches():
    source = Numbers(10)
    one, other = train(source, 5), train(source, 5, seed=8)
    assert [b.labels.tolist() for b in one] != [b.labels.tolist() for b in other]
    assert not any(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batches_of_one(world_size):
    source = Numbers(10)
    ranks = [train(source, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [torch.cat([batch.labels for batch in step]) for step in zip(*ranks, strict=True)]
    pixels = [torch.cat([batch.images for batch in step]) for step in zip(*ranks, strict=True)]
    whole = train(source, 6)
    assert all(torch.equal(ours, batch.labels) for ours, batch in zip(joined, whole, strict=True))
    assert all(torch.equal(ours, batch.images) for ours, batch in zip(pixels, whole, strict=True))


def test_loader_processes_change_nothing():
    source = open_data(DataConfig(), "train")
    assert same(train(source, 3), train(source, 3, workers=2))


def test_loading_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    source = open_data(DataConfig(), "train")
    train(source, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_can_be_walked_twice():
    batches = training_batches(Numbers(10), batch_size=4, seed=0, start_step=0, steps=3)
    assert same(list(batches), list(batches))
    assert len(list(batches)) == 3


class Processes(Numbers):
    """A source whose labels are the processes that loaded them."""

    def get(self, index: int, seed: int) -> Sample:
        return super().get(index, seed)._replace(label=os.getpid())


def test_batches_walked_twice_are_loaded_by_the_same_processes():
    batches = validation_batches(Processes(8), images=8, batch_size=2, workers=2)
    first, second = ({int(label) for batch in batches for label in batch.labels} for _ in range(2))
    assert first == second and len(first) == 2 and os.getpid() not in first


def test_a_batch_may_be_larger_than_an_epoch():
    (batch,) = train(Numbers(3), 1, batch_size=7)
    assert batch.images.shape == (7, 3, 1, 8)
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("images", "expected"), [(9, 9), (100, 10), (1, 1)])
def test_validation_is_the_same_set_for_any_number_of_ranks(world_size, images, expected):
    settings = {"images": images, "batch_size": 4, "world_size": world_size}
    ranks = [validation_batches(Numbers(10), rank=rank, **settings) for rank in range(world_size)]
    seen = [label for batches in ranks for batch in batches for label in batch.labels.tolist()]
    assert sorted(seen) == list(range(expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "batch_size=5 for 2 processes. Use batch_size=4 or 6"),
        ({"batch_size": 1, "world_size": 2}, "Use batch_size=2 or 4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2, world_size=2"),
        ({"seed": -1}, "at least 0; got -1"),
        ({"start_step": -1}, "at least 0; got 7, -1"),
        ({"workers": -1}, "workers must be at least 0; got -1"),
    ],
)
def test_bad_sharing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        train(Numbers(10), 1, **settings)
    if "seed" not in settings and "start_step" not in settings:
        with pytest.raises(ValueError, match=message):
            validation_batches(Numbers(10), images=4, **{"batch_size": 4, **settings})


def test_validation_of_no_image_is_refused():
    with pytest.raises(ValueError, match="images=0"):
        validation_batches(Numbers(10), images=0, batch_size=4)


# Pixels


def test_pixels_survive_the_model_range():
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = to_model_range(pixels)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), pixels)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.999])).tolist() == [0, 255, 255]


def test_bad_pixels_are_refused():
    with pytest.raises(ValueError, match=r"uint8.*got torch\.float32"):
        to_model_range(torch.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))


# Photographs


@pytest.mark.parametrize("image_size", [32, 64, 200])
@pytest.mark.parametrize(("height", "width"), [(427, 640), (300, 451), (512, 512)])
def test_regions_of_a_photograph_share_no_pixel(image_size, height, width):
    regions = split_columns(width, image_size)
    assert regions["train"].stop == regions["validation"].start
    assert (regions["train"].start, regions["validation"].stop) == (0, width)
    assert all(columns.stop - columns.start >= image_size for columns in regions.values())


def test_no_crop_reaches_into_the_other_region(monkeypatch):
    """Crops of a picture that holds each pixel's column: what training sees and what validation sees lie apart."""

    def columns_as_colour(photo, path):
        return np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (80, 200, 3))

    monkeypatch.setattr(photos_module, "_read", columns_as_colour)
    seen = {}
    for split in ("train", "validation"):
        source = PhotosSource(image_size=32, split=split, flip=True)
        seen[split] = {int(v) for i in range(300) for v in source.get(i, seed=i).image[0, 0]}
    assert seen["train"] == set(range(160))
    assert seen["validation"] == set(range(160, 200))


def test_a_crop_comes_from_the_seed_and_a_validation_crop_from_its_number():
    source = open_data(DataConfig(), "train")
    assert torch.equal(source.get(0, 5).image, source.get(99, 5).image)
    assert not torch.equal(source.get(0, 5).image, source.get(0, 6).image)
    fixed = open_data(DataConfig(), "validation")
    assert torch.equal(fixed.get(3, 5).image, fixed.get(3, 6).image)
    assert not torch.equal(fixed.get(3, 5).image, fixed.get(4, 5).image)
    assert source.get(0, 5).image.shape == (3, 32, 32)
    assert source.get(0, 5).image.dtype == torch.uint8


def test_half_of_the_training_crops_are_mirrored_and_none_without_flip():
    flipping, straight = open_data(DataConfig(), "train"), open_data(DataConfig(flip=False), "train")
    mirrored = 0
    for seed in range(200):
        one, other = flipping.get(0, seed).image, straight.get(0, seed).image
        assert torch.equal(one, other) or torch.equal(one, other.flip(-1))
        mirrored += not torch.equal(one, other)
    assert 70 < mirrored < 130


def test_photographs_are_endless():
    source = open_data(DataConfig(), "validation")
    assert source.endless
    assert len(source) >= 1024
    batches = validation_batches(source, images=len(source) + 3, batch_size=len(source))
    assert [len(batch.images) for batch in batches] == [len(source), 3]


def test_the_largest_possible_crop_is_named_and_works():
    with pytest.raises(ValueError, match="largest possible is") as error:
        open_data(DataConfig(image_size=4096), "train")
    largest = int(str(error.value).split("largest possible is ")[1].split(".")[0])
    assert largest >= 128
    for split in ("train", "validation"):
        assert open_data(DataConfig(image_size=largest), split).get(0, 0).image.shape == (3, largest, largest)
    with pytest.raises(ValueError, match=f"largest possible is {largest}"):
        open_data(DataConfig(image_size=largest + 1), "train")
    assert largest_crop(100, 300) == 100
    assert largest_crop(300, 101) == 50


def test_every_photograph_has_a_licence_and_a_credit():
    assert len({photo.name for photo in PHOTOS}) == len(PHOTOS)
    assert all(photo.licence and photo.credit for photo in PHOTOS)


def test_without_scikit_image_two_photographs_remain(monkeypatch):
    everything = open_data(DataConfig(), "train")
    found = photos_module.find_spec
    monkeypatch.setattr(photos_module, "find_spec", lambda name: None if name == "skimage" else found(name))
    source = open_data(DataConfig(), "train")
    assert source.description.endswith("china, flower")
    assert (source.fingerprint == everything.fingerprint) == (source.description == everything.description)
    monkeypatch.setattr(photos_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        open_data(DataConfig(), "train")


def test_photographs_are_read_without_importing_the_packages(monkeypatch):
    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in ("sklearn", "skimage")]

    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    open_data(DataConfig(), "train").get(0, 0)
    assert not loaded()


# Digits


def test_digits_are_split_by_class_and_share_no_scan():
    train_split, validation = (open_data(DataConfig(source="digits", image_size=8), s) for s in ("train", "validation"))
    assert (len(train_split), len(validation)) == (1437, 360)
    counts = np.bincount(validation.labels, minlength=10)
    assert np.abs(counts - 360 / 1797 * np.bincount(validation.labels + train_split.labels)).max() < 1
    assert len(set(validation.labels[:60])) == 10, "the first images must be a fair sample"
    scans = {image.tobytes() for image in train_split.images} & {image.tobytes() for image in validation.images}
    assert not scans
    assert train_split.fingerprint != validation.fingerprint


def test_digits_are_the_scans_never_mirrored():
    from sklearn.datasets import load_digits  # noqa: PLC0415 - a second that other tests need not spend

    source = open_data(DataConfig(source="digits", image_size=8, flip=True), "train")
    known = {(image * 255 / 16).round().astype(np.uint8).tobytes(): label for image, label in _scans(load_digits)}
    for index in range(50):
        sample = source.get(index, seed=index)
        assert known[sample.image[0].numpy().tobytes()] == sample.label
        assert torch.equal(sample.image[0], sample.image[2])
    large = open_data(DataConfig(source="digits", image_size=32), "train").get(0, 0).image
    assert large.shape == (3, 32, 32)
    assert large.max() <= source.get(0, 0).image.max()


def _scans(load):
    bunch = load()
    return zip(bunch.images, bunch.target.tolist(), strict=True)


def test_digits_end():
    source = open_data(DataConfig(source="digits", image_size=8), "validation")
    assert not source.endless
    assert sum(len(batch.labels) for batch in validation_batches(source, images=500, batch_size=100)) == 360


# Folders


def test_a_folder_is_found_classified_and_split(folder):
    parts = [open_data(folder_config(folder), split) for split in ("train", "validation")]
    names = [set(names_of(part)) for part in parts]
    assert len(names[0]) + len(names[1]) == len(names[0] | names[1]) == 12
    assert min(map(len, names)) >= 1
    for part in parts:
        assert part.classes == ["cat", "dog"]
        for index, name in enumerate(names_of(part)):
            sample = part.get(index, 0)
            assert part.classes[sample.label] == name.split("/")[0]
            assert sample.image.shape == (3, 16, 16)
            assert sample.broken == ()


def test_a_new_file_moves_no_other(folder):
    before = set(names_of(open_data(folder_config(folder), "validation")))
    for number in range(20):
        Image.new("RGB", (16, 16)).save(folder / f"cat/new{number}.png")
    after = set(names_of(open_data(folder_config(folder), "validation")))
    assert {name for name in after if "new" not in name} == before
    assert len(after) > len(before)


def test_the_share_of_a_large_folder_is_kept(tmp_path):
    for number in range(400):
        (tmp_path / f"{number}.png").touch()
    assert 24 <= len(open_data(folder_config(tmp_path, validation_share=0.1), "validation")) <= 56


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_small_folder_fills_both_splits(tmp_path, share):
    for number in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    for split in ("train", "validation"):
        assert len(open_data(folder_config(tmp_path, validation_share=share), split)) == 1


def test_a_flat_folder_has_one_class(tmp_path):
    for number in range(3):
        Image.new("RGB", (20, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    source = open_data(folder_config(tmp_path), "train")
    assert len(source.classes) == 1
    assert source.get(0, 0).label == 0


def test_a_validation_folder_of_its_own(folder, tmp_path_factory):
    own = tmp_path_factory.mktemp("own")
    (own / "dog").mkdir()
    Image.new("RGB", (16, 16)).save(own / "dog" / "a.png")
    Image.new("RGB", (16, 16)).save(own / "b.png")
    config = folder_config(folder, validation_source=str(own))
    validation = open_data(config, "validation")
    assert len(open_data(config, "train")) == 12
    assert dict(zip(names_of(validation), validation.labels, strict=True)) == {"dog/a.png": 1, "b.png": -1}
    assert sorted(validation.get(index, 0).label for index in range(2)) == [-1, 1]
    (own / "dog").rename(own / "wolf")
    with pytest.raises(ValueError, match="among the 2 classes of source; got wolf"):
        open_data(config, "validation")


def test_crops_of_a_folder(folder):
    train_split, validation = (open_data(folder_config(folder), split) for split in ("train", "validation"))
    assert torch.equal(train_split.get(0, 3).image, train_split.get(0, 3).image)
    assert len({train_split.get(0, seed).image.numpy().tobytes() for seed in range(20)}) > 5
    assert torch.equal(validation.get(0, 3).image, validation.get(0, 4).image)


@pytest.mark.parametrize(("resize", "published"), [("pil", "magvit2_uint8"), ("opencv", "ibq_uint8")])
def test_resize_and_centre_crop_as_published(tmp_path, resize, published):
    facts, tensors = golden("preprocess")
    for number, item in enumerate(facts["items"]):
        own = tmp_path / str(number)
        own.mkdir()
        Image.fromarray(tensors[f"{number}/input"].numpy()).save(own / "a.png")
        Image.fromarray(tensors[f"{number}/input"].numpy()).save(own / "b.png")
        source = open_data(folder_config(own, image_size=item["size"], resize=resize), "validation")
        assert torch.equal(source.get(0, 0).image.permute(1, 2, 0), tensors[f"{number}/{published}"])


@pytest.mark.parametrize("resize", ["pil", "opencv"])
def test_training_crops_are_parts_of_the_resized_picture(tmp_path, resize):
    """Every training crop lies in the picture that the setting gives, and every place along the long side occurs."""
    noise = np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    config = folder_config(tmp_path, resize=resize, flip=False, validation_source=str(tmp_path))
    source = open_data(config, "train")
    whole = resize_short_side(Image.fromarray(noise), 16, resize).transpose(2, 0, 1)
    assert whole.shape == (3, 16, 24)
    crops = {whole[:, :, left : left + 16].tobytes() for left in range(9)}
    assert {source.get(0, seed).image.numpy().tobytes() for seed in range(200)} == crops


def test_labels_are_those_of_torchvision(folder):
    from torchvision.datasets import ImageFolder  # noqa: PLC0415 - seconds that other tests need not spend

    for name in ("Zebra", "äffchen", "bird", "10", "9"):
        (folder / name).mkdir()
        Image.new("RGB", (16, 16)).save(folder / name / "a.png")
    # torchvision would take the hidden folder for a class.
    (folder / ".hidden" / "thumbnail.png").unlink()
    (folder / ".hidden").rmdir()
    theirs = ImageFolder(str(folder))
    ours = open_data(folder_config(folder, validation_source=str(folder)), "train")
    assert ours.classes == theirs.classes
    expected = {path.removeprefix(f"{folder}/"): label for path, label in theirs.samples}
    assert dict(zip(names_of(ours), ours.labels.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        (("00.png",), ["dog/young/00.png"]),
        (("0*.JPG",), ["cat/01.JPG", "cat/05.JPG", "cat/09.JPG"]),
        (("cat/*", "00.png"), ["cat/*", "dog/young/00.png"]),
        (("dog/young/04.png",), ["dog/young/04.png"]),
    ],
)
def test_excluded_images_are_in_neither_part(folder, exclude, left_out):
    def everything(**settings) -> set[str]:
        return {name for split in ("train", "validation") for name in names_of(open_data(config(**settings), split))}

    def config(**settings) -> DataConfig:
        return folder_config(folder, **settings)

    before, after = everything(), everything(exclude=exclude)
    assert before - after == {name for name in before if any(fnmatch(name, pattern) for pattern in left_out)}
    own = open_data(config(exclude=exclude, validation_source=str(folder)), "validation")
    assert set(names_of(own)) == before, "a validation source of its own stays whole"


def test_excluding_moves_no_image_to_the_other_part(folder):
    config = folder_config(folder)
    validation = names_of(open_data(config, "validation"))
    dropped = names_of(open_data(config, "train"))[0]
    assert names_of(open_data(replace(config, exclude=(dropped,)), "validation")) == validation


def test_exclusions_that_cannot_be_meant_are_refused(folder):
    for pattern in ("00.PNG", "cat/00.png", "missing*"):
        with pytest.raises(ValueError, match=r"every name in exclude must fit.*fits none of the 12 images"):
            open_data(folder_config(folder, exclude=("00.png", pattern)), "train")
    with pytest.raises(ValueError, match="exclude must leave at least one image"):
        open_data(folder_config(folder, exclude=("*",)), "train")


def test_a_name_with_brackets_may_be_written_as_it_is(folder):
    Image.new("RGB", (16, 16)).save(folder / "cat" / "a[1].png")
    assert exclude_names(list_folder(folder), ["a[1].png"]).tolist() == [*range(6), *range(7, 13)]


def test_names_survive_packing(tmp_path):
    names = ["a", "", "ä/ß.png", "\udcff.png", "日本"]
    packed = pack_names(names)
    assert packed.all() == names
    assert [packed.name(position) for position in range(5)] == names
    assert packed.encoded(np.array([4, 0])) == ["日本".encode(), b"a"]


def test_a_listing_is_compact(tmp_path):
    """No Python object per image: what a loader process is sent is little more than the letters of the names."""
    for number in range(2000):
        (tmp_path / f"n01440764_{number}.JPEG").touch()
    listing = list_folder(tmp_path)
    letters = sum(len(name) for name in listing.names.all())
    assert len(pickle.dumps(listing)) < letters + 2000 * 20 + 2000


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_common_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "a.tif"
    pixels = np.full((4, 4), 65535, dtype=np.uint16)
    white = Image.fromarray(pixels) if mode == "I;16" else Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    assert white.mode == mode
    white.save(path if mode not in ("LA", "P") else path.with_suffix(".png"))
    picture = read_rgb(next(tmp_path.iterdir()))
    assert picture.mode == "RGB"
    assert np.asarray(picture).min() == 255


def test_a_fingerprint_follows_the_content(folder):
    config = folder_config(folder)
    before = open_data(config, "train").fingerprint
    assert open_data(replace(config, flip=False), "train").fingerprint == before
    name = open_data(config, "train").name(0)
    (folder / name).write_bytes(b"shorter")
    assert open_data(config, "train").fingerprint != before


def test_a_folder_has_the_fingerprint_that_the_first_versions_gave_it(tmp_path):
    for number in range(12):
        suffix = (".png", ".jpg", ".JPEG", ".webp")[number % 4]
        file = tmp_path / ("10", "2", "b")[number % 3] / f"{number}{suffix}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(number))
    config = DataConfig(source=str(tmp_path), image_size=8, validation_share=0.3)
    train, validation = open_data(config, "train"), open_data(config, "validation")
    assert (train.fingerprint, len(train)) == ("ca8ae2e2a1855031", 11)
    assert (validation.fingerprint, len(validation)) == ("4ebba33de006b747", 1)
    assert list(train.classes) == ["10", "2", "b"]
    assert open_data(DataConfig(source="digits", image_size=8), "train").fingerprint == "5398712e92bf742a"


def test_linked_folders_are_followed_and_circles_end(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (16, 16)).save(outside / "linked.png")
    (folder / "bird").symlink_to(outside)
    (folder / "dog" / "circle").symlink_to(folder)
    source = open_data(folder_config(folder, validation_source=str(folder)), "train")
    assert len(source) == 13
    assert source.classes == ["bird", "cat", "dog"]


def damage(folder, count: int) -> list[str]:
    """Truncate the first `count` training images; their names."""
    names = names_of(open_data(folder_config(folder), "train"))[:count]
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 3])
    return names


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_collected_once_and_replaced_in_training(folder, workers, recwarn):
    names = damage(folder, 2)
    source = open_data(folder_config(folder), "train")
    batches = train(source, 8, workers=workers)
    assert all(len(batch.images) == 4 for batch in batches)
    collector = BrokenImages()
    for batch in batches:
        collector.add(batch.broken)
    assert sorted(collector.names) == sorted(names)
    told = collector.report(12)
    assert told.startswith("2 of 12 images unreadable: ") and told.endswith("), left out")
    assert all(name in told for name in names) and re.search(r" \((image file is truncated|Truncated|\S)", told)
    assert not [w for w in recwarn if "unreadable" in str(w.message)]


def test_the_seed_chooses_which_readable_image_stands_in(folder):
    names = damage(folder, 2)
    source = open_data(folder_config(folder), "train")
    samples = [source.get(0, seed) for seed in range(40)]
    assert all(sample.broken[0] == names[0] and set(sample.broken) <= set(names) for sample in samples)
    assert torch.equal(source.get(0, 5).image, samples[5].image), "the same seed, the same image"
    whole = [{tuple(source.get(index, seed).image[:, 0, 0].tolist()) for seed in range(40)} for index in range(2, 7)]
    standing_in = {tuple(sample.image[:, 0, 0].tolist()) for sample in samples}
    assert sum(bool(standing_in & pixels) for pixels in whole) >= 3, "not always the neighbour"
    assert source.get(len(source) - 1, 5).broken == ()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_unreadable_image_is_left_out_of_validation(folder, workers, batch_size):
    source = open_data(folder_config(folder, validation_source=str(folder)), "validation")
    order = names_of(source)
    whole = next(iter(validation_batches(source, images=10, batch_size=10)))
    (folder / order[2]).write_bytes(b"nothing")
    source = open_data(folder_config(folder, validation_source=str(folder)), "validation")
    batches = list(validation_batches(source, images=10, batch_size=batch_size, workers=workers))
    kept = [0, 1, *range(3, 10)]
    assert [number for batch in batches for number in batch.numbers] == kept
    assert torch.equal(torch.cat([batch.images for batch in batches if len(batch.images)]), whole.images[kept])
    assert torch.equal(torch.cat([batch.labels for batch in batches]), whole.labels[kept])
    assert [name for batch in batches for name in batch.broken] == [order[2]]
    first = first_images(source, 3)
    assert first.numbers == (0, 1, 3) and torch.equal(first.images, whole.images[[0, 1, 3]])


def test_reports_of_broken_images():
    collector = BrokenImages()
    assert collector.report(3) is None
    collector.add(["a.jpg", "a.jpg"])
    assert collector.report(3) == "1 of 3 images unreadable: a.jpg, left out"
    collector.add([UnreadableName(f"{number}.jpg", "torn") for number in range(1200)])
    assert collector.report(5000) == "1,201 of 5,000 images unreadable: a.jpg, 0.jpg, 1.jpg (torn), …, left out"


def test_only_broken_images_is_an_error(folder):
    names = damage(folder, len(open_data(folder_config(folder), "train")))
    held_out = names_of(open_data(folder_config(folder, unreadable="stop"), "validation"))
    settings = {"validation_source": str(folder), "exclude": tuple(held_out)}
    source = open_data(folder_config(folder, **settings), "train")
    with pytest.raises(ValueError, match=rf"all {len(names)} train images in .* fail, .*They are \S+.*, …\. Replace"):
        source.get(0, 0)


@pytest.mark.parametrize("broken", ["validation", "train"])
def test_training_and_validation_have_a_readable_image_each_where_there_are_two(folder, broken):
    config = folder_config(folder)
    before = {split: open_data(config, split) for split in ("train", "validation")}
    names = {split: names_of(source) for split, source in before.items()}
    for name in names[broken]:
        (folder / name).write_bytes(b"nothing")
    after = {split: names_of(open_data(config, split)) for split in ("train", "validation")}
    (moved,) = set(after[broken]) - set(names[broken])
    other = "train" if broken == "validation" else "validation"
    assert after[other] == [name for name in names[other] if name != moved]
    batch = first_images(open_data(config, "validation"), 12)
    assert len(batch.images) == (1 if broken == "validation" else len(names["validation"]) - 1)
    assert len(train(open_data(config, "train"), 3)) == 3


def test_a_split_whose_parts_can_be_read_stays_as_it_was(folder):
    config = folder_config(folder)
    before = {split: open_data(config, split).fingerprint for split in ("train", "validation")}
    strict = {split: open_data(replace(config, unreadable="stop"), split).fingerprint for split in before}
    assert before == strict
    order = names_of(open_data(config, "validation"))
    content = (folder / order[0]).read_bytes()
    (folder / order[0]).write_bytes(bytes(len(content)))
    assert {split: open_data(config, split).fingerprint for split in before} == before


def test_a_folder_with_one_readable_image_is_refused_with_the_others_names(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.png", (16, 16))
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    says = r"one readable image each; of the 3 in .* only one is\. Unreadable: \d\.png, \d\.png \(.*validation_source"
    with pytest.raises(ValueError, match=says):
        open_data(folder_config(tmp_path), "train")


def test_large_parts_are_not_searched_for_readable_images(tmp_path, monkeypatch):
    for number in range(400):
        (tmp_path / f"{number:03}.png").touch()
    tried = []
    read = FileSource.read
    monkeypatch.setattr(FileSource, "read", lambda self, position: tried.append(position) or read(self, position))
    assert len(open_data(folder_config(tmp_path), "train")) > 200
    assert not tried


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least one image .*holds none\. Name another folder"):
        open_data(folder_config(tmp_path), "train")
    with pytest.raises(ValueError, match=r"there is none at .*missing"):
        open_data(folder_config(tmp_path / "missing"), "train")
    with pytest.raises(ValueError, match="Did you mean 'photos'"):
        open_data(DataConfig(source="photo"), "train")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"at least 2; got 1 .*validation_source"):
        open_data(folder_config(tmp_path), "train")
    with pytest.raises(ValueError, match="that is a file"):
        open_data(folder_config(tmp_path / "a.png"), "train")
    with pytest.raises(ValueError, match="validation_source must be an existing folder; got"):
        open_data(folder_config(tmp_path, validation_source=str(tmp_path / "missing")), "validation")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1 pixel; got 0"),
        ({"source": " "}, "source must name the images"),
        ({"validation_share": 0.0}, "validation_share must lie between 0 and 1.*got 0.0"),
        ({"validation_share": 1.0}, "got 1.0"),
        ({"workers": -1}, "workers must be at least 0; got -1"),
        ({"workers": 100_000}, r"workers must be at most 256 .*got 100,000"),
        ({"image_size": 10**12}, r"image_size must be at most 16,384 .*got 1,000,000,000,000"),
        ({"unreadable": "ignore"}, "unreadable must be one of 'skip', 'stop'"),
        ({"validation_share": 0.5}, "folders and shards only.*'photos'.*got 0.5.*validation_share=0.1"),
        ({"validation_source": "x"}, "folders and shards only.*'photos'.*validation_source=None"),
        ({"resize": "open_cv"}, "resize must be one of 'opencv', 'pil'.*did you mean 'opencv'"),
        ({"exclude": ("a.png",)}, "'photos' has no file names.*exclude="),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_a_misspelt_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'validation'; got 'val'"):
        open_data(DataConfig(), "val")


# What a folder may hold beside images


def save(path, size=(16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (1, 2, 3)).save(path)


def test_every_suffix_that_is_read_is_listed(tmp_path):
    names = ["a.jfif", "b.JPE", "c.tga", "d.jp2", "e.png", "f.avif"]
    for name, kind in zip(names, ("JPEG", "JPEG", "TGA", "JPEG2000", "PNG", "AVIF"), strict=True):
        Image.new("RGB", (16, 16)).save(tmp_path / name, format=kind)
    source = open_data(folder_config(tmp_path, validation_source=str(tmp_path)), "train")
    assert names_of(source) == names
    assert all(source.get(index, 0).broken == () for index in range(6))


def test_files_that_are_left_out_are_counted_and_suspects_named(tmp_path):
    for name in ("a.png", "b.png", "c.heic", "d.heic", "e.psd", "labels.csv", "README"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"3 files in .* left out.*: 2 \.heic, 1 \.psd; such as [cde]\."):
        source = open_data(folder_config(tmp_path), "train")
    assert "files left out: 2 .heic, 1 without suffix, 1 .csv, 1 .psd" in source.description


def test_usual_companions_are_left_out_without_a_warning(folder, recwarn):
    assert "files left out: 1 .txt" in open_data(folder_config(folder), "train").description
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]


def test_what_is_no_ordinary_file_turns_out_unreadable_with_the_reason(tmp_path):
    save(tmp_path / "z.png")
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to(tmp_path / "nowhere")
    source = open_data(folder_config(tmp_path, validation_source=str(tmp_path)), "train")
    broken = [source.get(index, 0).broken[0] for index in range(4)]
    assert [(name, name.reason.partition(";")[0]) for name in broken] == [
        ("a.png", "is a pipe"),
        ("b.png", "a link that leads back to itself"),
        ("c.png", "is a device"),
        ("d.png", "there is no such file"),
    ]


def test_folders_may_lie_so_deep_and_no_deeper(tmp_path):
    save(tmp_path / "/".join(["x"] * 64) / "a.png")
    assert list_folder(tmp_path).names.all() == ["x/" * 64 + "a.png"]
    (tmp_path / "/".join(["x"] * 65)).mkdir()
    with pytest.raises(ValueError, match=r"may lie 64 deep; got .*Name a folder further down"):
        list_folder(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cat cannot be listed \(permission denied; .*dot in front of its name"):
        list_folder(folder)


def test_names_that_are_no_utf8_are_read_and_told_escaped(tmp_path):
    root = os.fsencode(tmp_path)
    os.mkdir(root + b"/caf\xe9")
    for number in range(2):
        save(tmp_path / "plain.png")
        os.rename(root + b"/plain.png", root + b"/caf\xe9/%d\xff.png" % number)
    source = open_data(folder_config(tmp_path, validation_source=str(tmp_path)), "train")
    assert source.classes == ["caf\\udce9"]
    assert names_of(source) == ["caf\\udce9/0\\udcff.png", "caf\\udce9/1\\udcff.png"]
    assert source.get(0, 0).broken == ()
    for text in (*source.classes, *names_of(source), source.description):
        text.encode("utf-8")
    rest = open_data(folder_config(tmp_path, exclude=("0\\udcff.png",), validation_source=str(tmp_path)), "train")
    assert names_of(rest) == names_of(source)[1:]
    os.truncate(root + b"/caf\xe9/0\xff.png", 10)
    assert source.get(0, 0).broken == ("caf\\udce9/0\\udcff.png",)


def test_impossible_names_of_folders_are_no_such_folder(tmp_path):
    for name in ("x" * 300, "x/" * 3000, "a\0b"):
        with pytest.raises(ValueError, match="there is none at"):
            open_data(DataConfig(source=name), "train")


def test_the_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    config = DataConfig(source=f"~/{folder.name}", validation_source=f"~/{folder.name}", image_size=16)
    assert len(open_data(config, "train")) == len(open_data(config, "validation")) == 12


# Classes


def test_folders_without_images_are_no_classes_and_named(folder):
    (folder / "bird").mkdir()
    with pytest.warns(UserWarning, match=r"1 folders in .* hold no image and are no class: bird\. .*2 classes remain"):
        assert open_data(folder_config(folder), "train").classes == ["cat", "dog"]


def test_numbers_sorted_as_text_are_told(tmp_path):
    for number in range(12):
        save(tmp_path / str(number) / "a.png")
    with pytest.warns(UserWarning, match=r"class number 2 is folder '10'.*such as 002"):
        source = open_data(folder_config(tmp_path, validation_source=str(tmp_path)), "train")
    assert source.classes == ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]


def test_classes_without_a_training_image_are_told(folder):
    with pytest.warns(UserWarning, match="1 of 2 classes of .* have no training image: dog"):
        source = open_data(folder_config(folder, exclude=("dog/*",)), "train")
    assert "dog" in source.classes


def test_validation_classes_do_not_matter_where_training_has_none(folder, tmp_path_factory):
    flat = tmp_path_factory.mktemp("flat")
    save(flat / "a.png")
    source = open_data(folder_config(flat, validation_source=str(folder)), "validation")
    assert source.classes == [NO_CLASS]
    assert set(source.labels.tolist()) == {0}


# Unreadable images and strips


@pytest.mark.parametrize("workers", [0, 1])
def test_stopping_at_an_unreadable_image_names_it_and_the_setting(folder, workers):
    (name,) = damage(folder, 1)
    source = open_data(folder_config(folder, unreadable="stop"), "train")
    with pytest.raises(ValueError, match=rf"^every image must be readable .*'stop'; {name} in .*data\.unreadable=skip"):
        train(source, 4, workers=workers)
    assert source.get(1, 0).broken == ()


def test_reasons_of_unreadable_images_are_told(folder):
    damage(folder, 1)
    (batch,) = validation_batches(open_data(folder_config(folder), "train"), images=4, batch_size=4, workers=1)
    ((name,),) = [batch.broken]
    assert len(batch.images) == 3 and name.reason


def test_a_thousand_unreadable_images_in_a_row_are_enough(tmp_path):
    for number in range(1500):
        (tmp_path / f"{number:04}.png").touch()
    source = open_data(folder_config(tmp_path, validation_source=str(tmp_path)), "train")
    with pytest.raises(ValueError, match=r"1,000 in a row of the train images in .* fail, the last with"):
        source.get(0, 0)


@pytest.mark.parametrize("resize", ["pil", "opencv"])
@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (101, 1)])
def test_a_strip_is_unreadable_with_the_reason_and_without_resizing(tmp_path, size, resize, monkeypatch):
    save(tmp_path / "a.png", size)
    save(tmp_path / "b.png", (100, 1))
    source = open_data(
        folder_config(tmp_path, validation_source=str(tmp_path), resize=resize, image_size=64), "validation"
    )
    samples = [source.get(index, 0) for index in range(2)]
    assert all(sample.image.shape == (3, 64, 64) for sample in samples)
    ((name,),) = [sample.broken for sample in samples if sample.broken]
    assert name == "a.png"
    assert f"{size[0]:,} × {size[1]:,} pixels" in name.reason
    assert "100 times as long as wide" in name.reason


def test_impossible_numbers_of_images_are_refused(folder):
    source = open_data(folder_config(folder), "train")
    with pytest.raises(ValueError, match=r"batch_size must be at most 1,048,576 .*got 1,000,000,000"):
        train(source, 1, batch_size=10**9)
    with pytest.raises(ValueError, match="images must be at most 1,000,000,000; got 1,000,000,000,000"):
        validation_batches(source, images=10**12, batch_size=4)
    with pytest.raises(ValueError, match="workers must be at most 256; got 100,000"):
        train(source, 1, workers=100_000)
