"""From a tokenizer and the runs over it to one report, and what may not stand beside it."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ibqlab.data import DataConfig, open_data
from ibqlab.generating.token_statistics import (
    describe_all,
    describe_tokenizer,
    encode_images,
    generators_over,
    save_token_figure,
)
from ibqlab.generator import GeneratorConfig
from ibqlab.plots import token_scaling_table
from ibqlab.quantizers import quantizer_config
from ibqlab.recipes.generator_config import GeneratorRecordConfig, GeneratorTrainConfig
from ibqlab.runs import Run
from ibqlab.tokenizer import Tokenizer, TokenizerConfig
from ibqlab.tokenizer.autoencoder import AutoencoderConfig
from ibqlab.training import TrainConfig

DATA = DataConfig(source="digits", image_size=8)
T = 16


def make_tokenizer(seed=0):
    autoencoder = AutoencoderConfig(
        base_channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        attention_resolutions=(),
        resolution=8,
        latent_channels=8,
    )
    torch.manual_seed(seed)
    quantizer = quantizer_config({"name": "ibq", "codebook_size": 12, "code_dim": 8})
    return Tokenizer.from_config(TokenizerConfig(autoencoder=autoencoder, quantizer=quantizer))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_run(path, tokenizer, *, finish=True, positions=True, **settings):
    """A folder as a generator's training leaves it."""
    config = GeneratorTrainConfig(
        data=DATA,
        generator=GeneratorConfig(vocabulary_size=12, depth=1, width=16, num_heads=2, num_classes=10, grid_size=4),
        record=GeneratorRecordConfig(validation_images=40),
    )
    run = Run.start(path, replace(config, **settings))
    run.write_provenance(tokenizer={"fingerprint": tokenizer.fingerprint()})
    for step, nats in ((0, math.log(12)), (1, 1.0)):
        run.log({"step": step, "validation_loss": nats, "validation_loss_unconditional": nats + 0.5})
        if positions:
            curve = np.linspace(nats + 0.1, nats - 0.1, T, dtype=np.float32)
            run.save_snapshot(step, position_loss=curve, position_loss_unconditional=curve + 0.5)
    run.log({"step": 2, "loss": 0.9})
    if finish:
        run.finish("finished")
    return run


def describe(tokenizer, **settings):
    return describe_tokenizer(tokenizer, DATA, **{"images": 200, "validation_images": 40} | settings)


class TestEncoding:
    def test_tokens_are_those_of_the_tokenizer_and_its_mode_stays(self, tokenizer):
        tokenizer.train()
        found = encode_images(tokenizer, DATA, "validation", images=10, batch_size=4)
        assert tokenizer.training
        tokenizer.eval()
        source = open_data(DATA, "validation")
        samples = [source.get(number, 0) for number in range(10)]
        expected = tokenizer.encode_indices(torch.stack([sample.image for sample in samples])).flatten(1)
        assert np.array_equal(found.indices, expected.numpy())
        assert found.labels.tolist() == [sample.label for sample in samples]

    def test_a_source_that_ends_is_read_once(self, tokenizer):
        whole = len(open_data(DATA, "train"))
        found = encode_images(tokenizer, DATA, "train", images=10_000, batch_size=512)
        assert found.indices.shape == (whole, T)
        assert len(encode_images(tokenizer, DATA, "train", images=7, batch_size=4).indices) == 7

    def test_impossible_requests_are_refused(self, tokenizer):
        with pytest.raises(ValueError, match="at least 1; got 0 and 64"):
            encode_images(tokenizer, DATA, "train", images=0)
        with pytest.raises(ValueError, match="multiples of the downsampling 2"):
            encode_images(tokenizer, replace(DATA, image_size=9), "train", images=4)


class TestDescription:
    def test_baselines_without_any_generator(self, tokenizer):
        report = describe(tokenizer)
        assert report.table["name"].tolist()[-1] == "mix_class"
        assert (report.grid, report.image_size) == ((4, 4), (8, 8))
        row = report.table.iloc[0]
        assert row.bits_per_token == pytest.approx(math.log2(12))
        assert (row.training_images, row.validation_images) == (200, 40)
        assert row.bits_per_pixel == pytest.approx(math.log2(12) * T / 64)

    def test_images_of_one_class_have_no_baseline_by_class(self, tokenizer):
        photos = DataConfig(source="photos", image_size=8)
        report = describe_tokenizer(tokenizer, photos, images=64, validation_images=16)
        assert report.table["name"].tolist()[-1] == "mix"

    def test_a_generators_loss_becomes_bits_by_position(self, tokenizer, tmp_path):
        run = make_run(tmp_path / "gen", tokenizer)
        table = describe(tokenizer, generators=[run]).table.set_index("name")
        assert table.loc["gen with class", "bits_per_token"] == pytest.approx(1 / math.log(2), rel=1e-6)
        assert table.loc["gen without class", "bits_per_token"] == pytest.approx(1.5 / math.log(2), rel=1e-6)
        assert table.loc["gen with class", ["given_class", "permuted"]].tolist() == [True, False]
        assert table.loc["gen without class", ["given_class", "permuted"]].tolist() == [False, False]
        report = describe(tokenizer, generators={"mine": run})
        assert report.positions["mine with class"] == pytest.approx(np.linspace(1.1, 0.9, T) / math.log(2), rel=1e-6)

    def test_without_snapshots_the_mean_is_taken(self, tokenizer, tmp_path):
        report = describe(tokenizer, generators=[make_run(tmp_path / "gen", tokenizer, positions=False)])
        assert report.bits("gen with class") == pytest.approx(1 / math.log(2))
        assert "gen with class" not in report.positions

    def test_numbering_anew_is_told(self, tokenizer, tmp_path):
        run = make_run(tmp_path / "gen", tokenizer, index_permutation=0)
        assert describe(tokenizer, generators=[run]).table["permuted"].tolist()[-2:] == [True, True]

    def test_settings_that_change_no_validation_image_do_not_matter(self, tokenizer, tmp_path):
        run = make_run(tmp_path / "gen", tokenizer, data=replace(DATA, flip=False, workers=1))
        assert "gen with class" in describe(tokenizer, generators=[run]).table["name"].tolist()


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"finish": False}, "is running; a generator's loss counts when its run is finished"),
            ({"data": replace(DATA, source="photos")}, "trained on other images: pass data="),
            ({"record": GeneratorRecordConfig(validation_images=41)}, "pass validation_images=41"),
        ],
    )
    def test_a_run_that_measured_something_else(self, tokenizer, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            describe(tokenizer, generators=[make_run(tmp_path / "gen", tokenizer, **settings)])

    def test_a_run_over_another_tokenizer(self, tokenizer, tmp_path):
        other = make_tokenizer(seed=1)
        with pytest.raises(ValueError, match=f"over tokenizer {other.fingerprint()}, this one is"):
            describe(tokenizer, generators=[make_run(tmp_path / "gen", other)])

    def test_a_tokenizers_run(self, tokenizer, tmp_path):
        run = Run.start(tmp_path / "tokenizer", TrainConfig())
        run.finish("finished")
        with pytest.raises(ValueError, match="is no run of a generator"):
            describe(tokenizer, generators=[run])

    def test_a_run_without_validation(self, tokenizer, tmp_path):
        run = make_run(tmp_path / "gen", tokenizer)
        run.truncate_metrics(-1)
        with pytest.raises(ValueError, match="holds no validation_loss"):
            describe(tokenizer, generators=[run])

    def test_two_runs_of_one_name(self, tokenizer, tmp_path):
        runs = [make_run(tmp_path / folder / "gen", tokenizer) for folder in "ab"]
        with pytest.raises(ValueError, match="share a name"):
            describe(tokenizer, generators=runs)


def test_each_tokenizer_gets_the_finished_generators_over_it(tokenizer, tmp_path):
    other = make_tokenizer(seed=1)
    ours = make_run(tmp_path / "ours", tokenizer)
    theirs = make_run(tmp_path / "theirs", other, index_permutation=3)
    unfinished = make_run(tmp_path / "unfinished", tokenizer, finish=False)
    trained = Run.start(tmp_path / "tokenizer", TrainConfig())
    trained.finish("finished")
    runs = [ours, theirs, unfinished, trained]
    assert generators_over(tokenizer, runs) == [ours]
    reports = describe_all({"A": tokenizer, "B": other}, DATA, runs=runs, images=100, validation_images=40)
    table = token_scaling_table(reports)
    generators = table[table["kind"] == "generator"]
    assert generators.groupby("tokenizer")["name"].first().to_dict() == {
        "A": "ours without class",
        "B": "theirs without class",
    }
    assert generators["permuted"].tolist() == [False, False, True, True]


def test_the_figure_is_saved_with_both_tables(tokenizer, tmp_path):
    report = describe(tokenizer)
    save_token_figure(report, tmp_path / "link", "IBQ")
    assert (tmp_path / "link.png").is_file()
    assert len(pd.read_csv(tmp_path / "link.csv")) == len(report.table) + 2 * T
    assert pd.read_csv(tmp_path / "link_table.csv")["name"].tolist() == report.table["name"].tolist()
