"""Thousands of samples as files: the same ones however the work is cut up, killed or shared out."""

import json
import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_files import dead_process
from test_pretrained_generators import tiny_tokenizer
from test_transformer import SMALL, make

from ibqlab.base.files import temporary_beside
from ibqlab.cli import main
from ibqlab.data import DataConfig, open_data
from ibqlab.generating import sample_shards
from ibqlab.generating.class_labels import read_classes
from ibqlab.generating.drawing import draw_images
from ibqlab.generating.sampling_runs import SampleRequest, sample_images
from ibqlab.generator import SamplingConfig
from ibqlab.metrics.evaluated_images import open_images
from ibqlab.plots import plot_gallery
from ibqlab.pretrained import export_generator, export_tokenizer
from ibqlab.runs import RunError

SAMPLING = SamplingConfig(cfg_scale=2.0, top_p=0.9)
REQUEST = {"images_per_class": 4, "seed": 7, "shard_size": 5}


def draw(folder, sampling=SAMPLING, generator=None, tokenizer=None, **changes):
    request = SampleRequest(**(REQUEST | changes))
    pair = generator or make(SMALL).double(), tokenizer or tiny_tokenizer()
    return sample_images(*pair, folder, sampling, request, progress=False)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("samples") / "all")


def test_every_image_is_drawn_by_its_own_seed(samples):
    with np.load(samples) as stored:
        pictures, labels = stored["arr_0"], stored["arr_1"]
    assert pictures.shape == (12, 6, 6, 3) and pictures.dtype == np.uint8
    order = np.random.default_rng(7).permutation(12)
    assert labels.tolist() == (order // 4).tolist() and sorted(order) == list(range(12))
    pair = make(SMALL).double(), tiny_tokenizer()
    for place in (0, 5, 11):
        number = int(order[place])
        alone = draw_images(*pair, torch.tensor([number // 4]), seed=7 + number, **vars(SAMPLING))
        assert np.array_equal(alone[0], pictures[place])


def test_shards_hold_picture_class_and_seed(samples):
    names = sorted(path.name for path in samples.parent.iterdir())
    assert names == ["manifest.json", *(f"samples-{n:06d}.tar" for n in range(3)), "samples.npz"]
    with tarfile.open(samples.parent / "samples-000002.tar") as tar:
        assert tar.getnames()[:3] == ["000000010.png", "000000010.cls", "000000010.json"]
        assert json.load(tar.extractfile("000000010.json")) == {"seed": 17, "class": 2}
    manifest = json.loads((samples.parent / "manifest.json").read_text())
    assert manifest["images"] == 12 and manifest["sampling"]["cfg_scale"] == 2.0


def test_metrics_and_training_read_what_was_written(samples):
    images = open_images(samples)
    assert images.count == 12 and tuple(images.side) == (6, 6)
    data = DataConfig(source=str(samples.parent), image_size=6, validation_share=0.3)
    source = open_data(data, "train")
    assert 0 < len(source) < 12 and source.get(0, 0).image.shape == (3, 6, 6)


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 7}])
def test_batches_change_nothing(tmp_path, samples, changes):
    assert contents(draw(tmp_path / "again", **changes).parent) == contents(samples.parent)


SHARED = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_sampling_runs import draw
draw(sys.argv[1])
"""


@pytest.mark.usefixtures("warm_start")
def test_two_processes_draw_what_one_draws(tmp_path, samples):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(tmp_path / "shared"), os.path.dirname(__file__)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for child in children:
        assert child.wait(timeout=120) == 0, child.stderr.read().decode()
    assert contents(tmp_path / "shared") == contents(samples.parent)


class Killed(Exception):
    pass


def test_a_killed_command_goes_on_where_it_stopped(tmp_path, samples):
    generator, calls = make(SMALL).double(), []
    plain = generator.sample

    def sample(labels, **settings):
        calls.append(len(labels))
        if len(calls) == 5:
            raise Killed
        return plain(labels, **settings)

    generator.sample = sample
    with pytest.raises(Killed):
        draw(tmp_path / "again", generator=generator, batch_size=2)
    assert [path.name for path in sorted((tmp_path / "again").glob("*.tar"))] == ["samples-000000.tar"]
    generator.sample, drawn = lambda labels, **s: (drawn.append(len(labels)), plain(labels, **s))[1], []
    assert contents(draw(tmp_path / "again", generator=generator).parent) == contents(samples.parent)
    assert sum(drawn) == 7
    drawn.clear()
    assert draw(tmp_path / "again", generator=generator) == tmp_path / "again" / "samples.npz" and not drawn


def test_other_samples_are_left_alone(tmp_path, samples):
    before = contents(samples.parent)
    other = make(SMALL).double()
    with torch.no_grad():
        other.head.weight += 1
    for changes, says in (
        ({"sampling": SamplingConfig(cfg_scale=3.0)}, "sampling differ"),
        ({"seed": 8}, "seed differ"),
        ({"dtype": "float32"}, "dtype differ"),
        ({"generator": other}, "generator differ"),
        ({"classes": (1,)}, "images, classes differ"),
    ):
        with pytest.raises(RunError, match=says):
            draw(samples.parent, **changes)
    assert contents(samples.parent) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and holds no samples"):
        draw(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classes": (3,)}, "classes must lie in 0 to 2"),
        ({"classes": (-1,)}, "classes must be ≥ 0"),
        ({"images_per_class": 0}, "images_per_class must be at least 1"),
        ({"seed": -1}, "seed must be ≥ 0"),
        ({"dtype": "half"}, "dtype must be one of 'auto', 'float32', .* got 'half'"),
        ({"tokenizer": tiny_tokenizer("magvit2")}, "vocabulary must be the tokenizer's codebook"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        draw(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_a_folder_says_its_number_type_which_earlier_ones_did_not(tmp_path, samples):
    manifest = json.loads((samples.parent / "manifest.json").read_text())
    assert manifest["dtype"] == "float64"  # that of the weights, on a CPU
    shutil.copytree(samples.parent, tmp_path / "earlier")
    del manifest["dtype"]
    (tmp_path / "earlier" / "manifest.json").write_text(json.dumps(manifest))
    assert draw(tmp_path / "earlier") == tmp_path / "earlier" / "samples.npz"
    single = draw(tmp_path / "single", dtype="float32", images_per_class=1)
    assert json.loads((single.parent / "manifest.json").read_text())["dtype"] == "float32"


def test_a_full_disk_leaves_whole_shards(tmp_path, monkeypatch, samples):
    add, added = tarfile.TarFile.addfile, []

    def full(self, *rest):
        added.append(1)
        if len(added) > 20:
            raise OSError(28, "No space left on device")
        add(self, *rest)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(RunError, match="disk or a quota is full"):
        draw(tmp_path / "full")
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["manifest.json", "samples-000000.tar"]
    monkeypatch.setattr(tarfile.TarFile, "addfile", add)
    assert contents(draw(tmp_path / "full").parent) == contents(samples.parent)


@pytest.mark.parametrize("content", [b"", b"cut", b"another", b"no tar"])
def test_a_damaged_shard_is_drawn_again(tmp_path, samples, content):
    shutil.copytree(samples.parent, tmp_path / "again")
    (tmp_path / "again" / "samples.npz").unlink()
    shard = tmp_path / "again" / "samples-000001.tar"
    whole = {b"cut": shard.read_bytes()[:3000], b"another": (tmp_path / "again" / "samples-000000.tar").read_bytes()}
    shard.write_bytes(whole.get(content, content))
    assert contents(draw(tmp_path / "again").parent) == contents(samples.parent)


def test_the_first_moment_leaves_nothing_in_the_way(tmp_path, samples):
    (tmp_path / "again").mkdir()
    part = f".manifest.json.{dead_process()}-{temporary_beside(tmp_path / 'x').name[-21:]}"
    for name in (part, ".drawing-0.lock"):
        (tmp_path / "again" / name).touch()
    assert contents(draw(tmp_path / "again").parent) == contents(samples.parent)


def test_classes_by_number_range_and_name():
    names = ["cat", "dog", "0-1", "fish"]
    assert read_classes("3,0-1,dog", names, 4) == (3, 2, 1)
    assert read_classes("0-2", [], 3) == (0, 1, 2) and read_classes("", names, 4) == ()
    assert read_classes(["fish", 0], names, 4) == (3, 0)
    for wrong in ("dgo", "4", "2-1", "1-", "-1", "1.5", "0--3", "0-99999999", "9" * 5000):
        with pytest.raises(ValueError, match=r"classes (are numbers|must lie)"):
            read_classes(wrong, names, 4)


def test_the_command_draws_by_card_and_settings(tmp_path):
    generator = export_generator(make(SMALL), tmp_path / "gen.safetensors")
    tokenizer = export_tokenizer(tiny_tokenizer(), tmp_path / "tok.safetensors")
    command = ["sample", str(generator), "top_p=0.8", "--card", "ibq_b", "--tokenizer", str(tokenizer)]
    command += ["--images-per-class", "2", "--dtype", "bfloat16", "--no-compiled"]
    command += ["--classes", "0,2", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0 and "evaluate_generation" in done.output
    folder = tmp_path / "out"
    assert f"picture: {folder / 'samples.png'}" in done.output
    assert f"ibqlab run generation_gallery generator={generator} tokenizer={tokenizer}" in done.output
    with Image.open(folder / "samples.png") as picture:
        assert picture.format == "PNG"
    table = pd.read_csv(folder / "samples.csv")
    assert table.to_dict("list") == {"image": [0, 1, 2, 3], "class": [0, 0, 2, 2], "seed": [0, 1, 2, 3]}
    assert (
        open_data(DataConfig(source=str(folder), image_size=6, validation_share=0.5), "train").get(0, 0).image.numel()
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["classes"] == [0, 2] and manifest["images"] == 4 and manifest["dtype"] == "bfloat16"
    sampling = manifest["sampling"]
    assert (sampling["cfg_scale"], sampling["temperature"], sampling["top_p"]) == (2.25, 1.1, 0.8)
    for wrong, says in (("temprature=1", "did you mean 'temperature'"), ("top_p=2", "top_p must lie above 0 to 1")):
        refused = CliRunner().invoke(main, [*command, wrong])
        assert refused.exit_code == 2 and says in refused.output
    refused = CliRunner().invoke(main, [*command, "--dtype", "bfloat"])
    assert refused.exit_code == 2 and "did you mean 'bfloat16'" in refused.output
    refused = CliRunner().invoke(main, [*command[:-4], "--classes", "0,a", "--output", str(tmp_path / "other")])
    assert refused.exit_code == 2 and "classes are numbers like 0,7,12, ranges like 0-3, or names" in refused.output
    assert not (tmp_path / "other").exists()


def test_the_picture_shows_the_first_images_of_the_first_classes(samples, tmp_path, monkeypatch):
    folder = shutil.copytree(samples.parent, tmp_path / "all")
    seen = {}

    def drawn(images, rows, columns, caption):
        seen.update(images=images, rows=rows, columns=columns, caption=caption)
        return plot_gallery(images, rows, columns, caption=caption)

    monkeypatch.setattr("ibqlab.plots.plot_gallery", drawn)
    monkeypatch.setattr(sample_shards, "COLUMNS", 3)
    assert sample_shards.save_sample_picture(folder, ["cat", "dog"]) == folder / "samples.png"
    assert (seen["rows"], seen["columns"]) == (["cat", "dog", "class 2"], ["image 1", "image 2", "image 3"])
    assert seen["caption"] == "all: guidance 2.0, temperature 1.0; the first images of 3 of 3 classes"
    with np.load(samples) as stored:
        place = np.argsort(np.random.default_rng(7).permutation(12))
        wanted = [[stored["arr_0"][place[4 * row + column]] for column in range(3)] for row in range(3)]
    assert np.array_equal(seen["images"], np.array(wanted))
    assert pd.read_csv(folder / "samples.csv")["seed"].tolist() == [7, 8, 9, 11, 12, 13, 15, 16, 17]
    (folder / "samples-000001.tar").write_bytes(b"cut")
    before = (folder / "samples.png").read_bytes()
    with pytest.raises(RunError, match=r"samples-000001\.tar is missing or damaged"):
        sample_shards.save_sample_picture(folder, [])
    assert (folder / "samples.png").read_bytes() == before
