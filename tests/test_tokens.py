"""Entropies and n-gram baselines on streams whose bits are known in closed form."""

import math
import time

import numpy as np
import pytest
import torch

from ibqlab.tokens.entropy import (
    bits_per_image,
    bits_per_pixel,
    bits_per_token,
    index_permutation,
    token_entropy,
)
from ibqlab.tokens.ngrams import BASELINES, measure_ngrams
from ibqlab.tokens.report import ModelCost, report_tokens
from ibqlab.training import recipe_config, train
from ibqlab.training.generator.token_source import open_tokens

GRID = (4, 6)
T = 24


def uniform(images, codes, seed=0):
    return np.random.default_rng(seed).integers(0, codes, (images, T))


def markov(images, stay, codes, seed=0):
    """Rows of a chain that keeps its code with chance `stay` and else draws any code; every row starts anew."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, codes, (images, *GRID))
    keeps = rng.random(rows.shape) < stay
    for column in range(1, GRID[1]):
        rows[:, :, column] = np.where(keeps[:, :, column], rows[:, :, column - 1], rows[:, :, column])
    return rows.reshape(images, T)


def copies(images, codes, seed=0):
    """The first row at random, every other row a copy of the one above."""
    first = np.random.default_rng(seed).integers(0, codes, (images, 1, GRID[1]))
    return np.broadcast_to(first, (images, *GRID)).reshape(images, T)


def bits(training, validation, codes, **settings):
    found = measure_ngrams(training, validation, codes, GRID, **settings)
    return {name: values.mean() for name, values in found.items()}


class TestEntropy:
    def test_uniform_tokens_have_log2_k_bits(self):
        entropy = token_entropy(uniform(20_000, 16), 16)
        assert entropy.position == pytest.approx(np.full(T, 4), abs=0.002)
        assert entropy.marginal == pytest.approx(4, abs=1e-4)
        assert (entropy.images, entropy.codebook_size, entropy.lower_bound) == (20_000, 16, False)

    def test_a_constant_has_none(self):
        entropy = token_entropy(np.full((5, T), 3), 16)
        assert entropy.position.tolist() == [0] * T
        assert (entropy.marginal, entropy.unseen) == (0, 0)

    def test_positions_are_told_apart(self):
        tokens = np.broadcast_to(np.arange(T), (50, T))
        entropy = token_entropy(tokens, T)
        assert entropy.position.tolist() == [0] * T
        assert entropy.marginal == pytest.approx(math.log2(T) + (T - 1) / (2 * 50 * T * math.log(2)))

    def test_the_correction_is_miller_and_madows(self):
        entropy = token_entropy(np.array([[0], [0], [1], [2]]), 8)
        assert entropy.position_plug_in[0] == pytest.approx(1.5)
        assert entropy.position[0] == pytest.approx(1.5 + 2 / (2 * 4 * math.log(2)))

    def test_the_correction_removes_most_of_the_bias(self):
        entropy = token_entropy(uniform(200, 32), 32)
        assert entropy.position_plug_in.mean() < 4.9
        assert entropy.position.mean() == pytest.approx(5, abs=0.02)

    def test_fewer_images_than_codes_are_called_a_lower_bound(self):
        entropy = token_entropy(uniform(64, 262_144), 262_144)
        assert entropy.position_plug_in.max() <= entropy.cap == 6
        assert entropy.unseen > 0.99
        assert entropy.lower_bound
        assert "uncorrected it cannot exceed log₂ 64 = 6.0 bits" in str(entropy)


class TestBaselines:
    def test_uniform_tokens_cost_log2_k_everywhere(self):
        for name, value in bits(uniform(2000, 16), uniform(500, 16, seed=1), 16).items():
            assert value == pytest.approx(4, abs=0.01), name

    def test_a_constant_costs_nothing_but_without_counting(self):
        found = bits(np.full((100, T), 3), np.full((10, T), 3), 16)
        assert found.pop("uniform") == 4
        assert all(0 <= value < 0.001 for value in found.values())

    def test_the_unigram_reaches_the_entropy_of_uneven_codes(self):
        draw = np.random.default_rng(0).choice
        chances = [1 / 2, 1 / 4, 1 / 8, 1 / 8]
        training, validation = draw(4, (3000, T), p=chances), draw(4, (3000, T), p=chances)
        assert bits(training, validation, 4)["unigram"] == pytest.approx(1.75, abs=0.01)

    def test_the_left_bigram_reaches_the_entropy_rate_of_a_markov_chain(self):
        stay, codes = 0.75, 8
        found = measure_ngrams(markov(3000, stay, codes), markov(2000, stay, codes, seed=1), codes, GRID)
        same = stay + (1 - stay) / codes
        other = (1 - stay) / codes
        rate = -same * math.log2(same) - (codes - 1) * other * math.log2(other)
        left = found["left"].reshape(GRID)
        assert left[:, 0] == pytest.approx(np.full(GRID[0], 3), abs=0.01)
        assert left[:, 1:].mean() == pytest.approx(rate, abs=0.03)
        assert found["upper"].mean() == pytest.approx(3, abs=0.01)
        assert found["mix"].mean() == pytest.approx(left.mean(), abs=0.02)

    def test_the_upper_bigram_needs_nothing_for_copies_of_the_row_above(self):
        found = measure_ngrams(copies(2000, 16), copies(500, 16, seed=1), 16, GRID)
        upper, mix = found["upper"].reshape(GRID), found["mix"].reshape(GRID)
        assert upper[0] == pytest.approx(np.full(GRID[1], 4), abs=0.02)
        assert upper[1:].max() < 0.01
        assert mix[1:].max() < 0.01
        assert found["left"].mean() == pytest.approx(4, abs=0.05)

    def test_the_mix_knows_what_only_both_neighbours_together_tell(self):
        rng = np.random.default_rng(0)

        def sums(images):
            rows = rng.integers(0, 4, (images, *GRID))
            for row in range(1, GRID[0]):
                for column in range(1, GRID[1]):
                    rows[:, row, column] = (rows[:, row - 1, column] + rows[:, row, column - 1]) % 4
            return rows.reshape(images, T)

        found = measure_ngrams(sums(2000), sums(500), 4, GRID)
        assert found["left"].mean() == pytest.approx(2, abs=0.01)
        assert found["mix"].reshape(GRID)[1:, 1:].max() < 0.1

    def test_position_tells_what_the_place_decides(self):
        tokens = np.broadcast_to(np.arange(T), (100, T))
        found = bits(tokens, tokens[:10], T)
        assert found["unigram"] == pytest.approx(math.log2(T), abs=0.01)
        assert found["position"] < 0.01
        assert found["mix"] < 0.01

    def test_the_class_tells_what_it_decides(self):
        labels = np.arange(400) % 4
        tokens = np.broadcast_to(labels[:, None], (400, T))
        found = bits(tokens, tokens[:40], 4, labels=(labels, labels[:40]))
        assert found["unigram"] == pytest.approx(2, abs=0.01)
        assert found["class"] < 0.01
        assert found["mix_class"] < 0.01
        assert list(found) == list(BASELINES)
        none = bits(tokens, tokens[:40], 4, labels=(np.full(400, -1), np.full(40, -1)))
        assert none["class"] == pytest.approx(2, abs=0.01)

    def test_a_code_never_seen_costs_finitely(self):
        found = bits(np.zeros((50, T), dtype=int), np.full((5, T), 7), 8)
        assert all(math.isfinite(value) for value in found.values())
        assert found["unigram"] > 3

    def test_few_images_of_many_codes_cost_hardly_more_than_uniform_ones(self):
        found = bits(uniform(30, 4096), uniform(30, 4096, seed=1), 4096)
        assert all(value < 12.5 for value in found.values())

    def test_no_baseline_depends_on_the_numbering(self):
        training, validation = markov(300, 0.8, 50), markov(100, 0.8, 50, seed=1)
        labels = np.arange(300) % 3, np.arange(100) % 3
        ours = measure_ngrams(training, validation, 50, GRID, labels=labels)
        training, validation = (index_permutation(50, 7).numpy()[tokens] for tokens in (training, validation))
        theirs = measure_ngrams(training, validation, 50, GRID, labels=labels)
        for name in BASELINES:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-12), name
        assert token_entropy(validation, 50).position == pytest.approx(
            token_entropy(markov(100, 0.8, 50, seed=1), 50).position, rel=1e-12
        )

    def test_codebooks_of_262144_codes_take_about_a_second(self):
        codes = 262_144
        began = time.process_time()
        found = bits(uniform(2000, codes), uniform(500, codes, seed=1), codes)
        assert time.process_time() - began < 5
        assert found["mix"] == pytest.approx(18, abs=0.02)

    def test_the_largest_codebook_fits_into_its_keys(self):
        last = np.full((20, T), 2**20 - 1)
        found = bits(last, last[:3], 2**20, labels=(np.zeros(20, int), np.zeros(3, int)))
        assert found["uniform"] == 20
        assert found["mix"] < 0.01

    def test_tensors_and_stored_tokens_are_taken_too(self):
        tokens = uniform(50, 16)
        expected = bits(tokens, tokens[:9], 16)
        assert bits(torch.from_numpy(tokens), torch.from_numpy(tokens[:9]).int(), 16) == expected
        assert bits(tokens.astype(np.uint16), tokens[:9].astype(">u2"), 16) == expected
        assert bits(tokens.tolist(), tokens[:9].tolist(), 16) == expected

    @pytest.mark.parametrize(
        ("training", "validation", "codes", "grid", "message"),
        [
            (np.zeros((3, 4, 6), int), np.zeros((3, T), int), 4, GRID, r"reshape\(n, -1\)"),
            (np.zeros((3, T)), np.zeros((3, T), int), 4, GRID, r"whole numbers; got torch.float64"),
            (np.zeros((0, T), int), np.zeros((3, T), int), 4, GRID, "at least one image"),
            (np.zeros((3, T), int), np.zeros((0, T), int), 4, GRID, "at least one image"),
            (np.zeros((1, T), int), np.zeros((3, T), int), 4, GRID, "at least two training images"),
            (np.full((3, T), 4), np.zeros((3, T), int), 4, GRID, "0 to 3 .*got 4 to 4"),
            (np.zeros((3, T), int), np.full((3, T), -1), 4, GRID, "validation must lie in 0 to 3"),
            (np.zeros((3, T), int), np.zeros((3, T), int), 4, (4, 4), "h·w = T"),
            (np.zeros((3, T), int), np.zeros((3, 16), int), 4, GRID, "validation of T = 16"),
            (np.zeros((3, T), int), np.zeros((3, T), int), 2**20 + 1, GRID, "at most 1,048,576"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, training, validation, codes, grid, message):
        with pytest.raises(ValueError, match=message):
            measure_ngrams(training, validation, codes, grid)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ((np.zeros(3, int), np.zeros(2, int)), r"validation labels .*here \(3,\)"),
            ((np.zeros(3), np.zeros(3, int)), "training labels must be whole numbers"),
            ((np.full(3, -2), np.zeros(3, int)), "must lie in −1"),
        ],
    )
    def test_labels_that_do_not_fit_are_refused(self, labels, message):
        with pytest.raises(ValueError, match=message):
            measure_ngrams(np.zeros((3, T), int), np.zeros((3, T), int), 4, GRID, labels=labels)


class TestUnits:
    def test_nats_tokens_and_pixels(self):
        assert bits_per_token(math.log(16_384)) == pytest.approx(14)
        assert bits_per_image(14, 256) == 3584
        # The published tokenizer: 256 tokens of 14 bits for 256 × 256 pixels.
        assert bits_per_pixel(14, 256, 256, 256) == 0.0546875
        with pytest.raises(ValueError, match="height must be at least 1; got 0"):
            bits_per_pixel(14, 256, 0, 256)

    def test_a_permutation_gives_every_code_another_number_and_can_be_undone(self):
        tokens = uniform(10, 16)
        order = index_permutation(16, 3)
        assert sorted(order.tolist()) == list(range(16))
        assert not np.array_equal(order[tokens], tokens)
        assert np.array_equal(order.argsort()[order[tokens]], tokens)
        assert torch.equal(order, index_permutation(16, 3)) and not torch.equal(order, index_permutation(16, 4))
        with pytest.raises(ValueError, match="seed must be at least 0; got -1"):
            index_permutation(16, -1)

    def test_a_permutation_is_the_one_that_runs_have_always_had(self):
        """A run begun before resumes with the same numbers only if these stay."""
        assert index_permutation(12, 1).tolist() == [1, 4, 6, 8, 11, 0, 5, 3, 2, 9, 10, 7]

    def test_a_run_sees_its_tokens_under_that_permutation(self, tmp_path):
        tokenizer = {
            "autoencoder.channel_multipliers": [1, 1],
            "autoencoder.resolution": 8,
            "quantizer.codebook_size": 32,
        }
        settings = {f"tokenizer.{name}": value for name, value in tokenizer.items()}
        settings |= {"data.source": "digits", "data.image_size": 8, "steps": 1}
        run = train(recipe_config("builtin/smoke", settings), tmp_path / "tokenizer", progress=False)
        generator = {
            "name": "ibq",
            "vocabulary_size": 32,
            "num_classes": 10,
            "grid_size": 4,
            "width": 16,
            "num_heads": 2,
        }
        settings = {"generator": generator | {"depth": 1}, "tokenizer": str(run.path), "data.image_size": 8}
        plain, permuted = (
            open_tokens(recipe_config("builtin/digits_generator", settings | {"index_permutation": seed}), tmp_path)
            for seed in (-1, 3)
        )
        batch, cpu = next(iter(plain.training_batches(0, 0, 1))), torch.device("cpu")
        expected = index_permutation(32, 3)[plain.tokens(batch, cpu).indices]
        assert torch.equal(permuted.tokens(batch, cpu).indices, expected)


class TestReport:
    def test_a_generator_stands_beside_the_baselines_in_every_unit(self):
        tokens = uniform(200, 16)
        models = {
            "generator": ModelCost(bits=3.0),
            "generator, class": ModelCost(bits=np.full(T, 2.0), given_class=True, permuted=True),
        }
        report = report_tokens(tokens, tokens[:50], 16, GRID, (16, 24), models=models)
        table = report.table.set_index("name")
        assert list(table.index) == ["uniform", "unigram", "position", "left", "upper", "mix", *models]
        row = table.loc["generator, class"]
        assert (row.bits_per_token, row.bits_per_image, row.share_of_uniform) == (2, 48, 0.5)
        assert row.bits_per_pixel == 48 / (16 * 24)
        assert table.loc["uniform", "bits_per_pixel"] == 4 * T / (16 * 24)
        assert table["given_class"].tolist() == [False] * 7 + [True]
        assert table["permuted"].tolist() == [False] * 7 + [True]
        assert set(table["usage"]) == {1.0}
        assert set(table["usage_tokens"]) == {200 * T}
        assert table["perplexity"].iloc[0] == pytest.approx(16, rel=0.01)
        assert set(table["validation_images"]) == {50}
        assert "generator" not in report.positions
        assert report.positions["generator, class"].tolist() == [2.0] * T
        assert report.bits("mix") == pytest.approx(report.positions["mix"].mean())
        assert report.entropy.images == 200

    def test_one_code_has_no_share_of_nothing(self):
        report = report_tokens(np.zeros((3, T), int), np.zeros((1, T), int), 1, GRID, (4, 6))
        assert report.table["bits_per_token"].tolist() == [0] * 6
        assert report.table["share_of_uniform"].isna().all()

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("mix", 3.0, "'mix' is a baseline"),
            ("g", np.ones(T - 1), r"\(24,\); got \(23,\)"),
            ("g", math.nan, "finite"),
            ("g", -1.0, "≥ 0"),
        ],
    )
    def test_costs_that_cannot_stand_there_are_refused(self, name, value, message):
        with pytest.raises(ValueError, match=message):
            report_tokens(uniform(9, 4), uniform(9, 4), 4, GRID, (4, 6), models={name: ModelCost(bits=value)})

    def test_an_image_without_pixels_is_refused(self):
        with pytest.raises(ValueError, match=r"image_size\[1\] must be at least 1; got 0"):
            report_tokens(uniform(9, 4), uniform(9, 4), 4, GRID, (4, 0))
