"""Distances, norms and softmax perplexity against their definitions written out whole."""

import inspect
import math

import numpy as np
import pytest
import torch

from ibqlab.diagnostics import (
    code_feature_distances,
    exact_neighbours,
    geometry,
    nearest_distances,
    norm_statistics,
    softmax_perplexity,
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that their seams are tested too."""
    monkeypatch.setattr(geometry, "_BLOCK_ELEMENTS", 100)


def _random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("small_blocks")
def test_nearest_distances_equal_the_full_table():
    queries, points = _random(37, 5), _random(23, 5)
    assert torch.allclose(nearest_distances(queries, points), torch.cdist(queries, points).amin(1), atol=1e-6)


def test_nearest_distances_keep_small_gaps_far_from_the_origin():
    points = _random(6, 4) + 1000
    gap = torch.tensor([0.0, 0.0, 0.25, 0.0])
    assert torch.allclose(nearest_distances(points + gap, points), torch.full((6,), 0.25), atol=1e-3)
    assert nearest_distances(points, points).max() == 0


def test_half_precision_is_computed_in_float32():
    queries, points = _random(9, 8).bfloat16(), _random(7, 8).bfloat16()
    distances = nearest_distances(queries, points)
    assert distances.dtype == torch.float32
    assert torch.allclose(distances, nearest_distances(queries.float(), points.float()))


def test_code_feature_distances_tell_the_two_gaps_apart():
    codebook = torch.tensor([[0.0, 0.0], [10.0, 0.0]])  # the second code was left behind
    features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [0.0, 0.0]])
    gaps = code_feature_distances(codebook, features)
    assert gaps.feature_to_code == pytest.approx(3 / 4)
    assert gaps.code_to_feature == pytest.approx((0 + 9) / 2)


def test_norm_statistics_of_known_vectors():
    statistics = norm_statistics(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    assert (statistics.mean, statistics.std) == (3.0, 2.0)
    assert norm_statistics(torch.ones(1, 4)).std == 0.0


@pytest.mark.usefixtures("small_blocks")
def test_softmax_perplexity_equals_its_definition():
    features, codebook = _random(31, 6), _random(17, 6)
    p = (features.double() @ codebook.double().T).softmax(1)
    expected = (-(p * p.log()).sum(1)).exp()
    assert torch.allclose(softmax_perplexity(features, codebook).double(), expected, rtol=1e-5)


def test_softmax_perplexity_reaches_both_ends():
    codebook = torch.eye(16)
    assert torch.allclose(softmax_perplexity(torch.zeros(3, 16), codebook), torch.full((3,), 16.0))
    # Logits of 10⁴ would overflow an unguarded exponential.
    assert softmax_perplexity(1e4 * codebook, codebook).tolist() == [1.0] * 16


@pytest.mark.usefixtures("small_blocks")
def test_exact_neighbours_equal_a_full_sort():
    points = _random(40, 3)
    indices, distances = exact_neighbours(points, 7)
    full, order = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").sort(1)
    assert (indices == order[:, :7].numpy()).all()
    assert distances == pytest.approx(full[:, :7].numpy(), abs=1e-5)
    assert (indices.dtype, distances.dtype) == (np.int32, np.float32)


def test_exact_neighbours_put_each_point_first_among_its_copies():
    points = torch.cat([torch.full((5, 2), 3.0), torch.tensor([[9.0, 9.0]])])
    indices, distances = exact_neighbours(points, 3)
    assert indices[:, 0].tolist() == list(range(6))
    assert (distances[:5] == 0).all()
    assert distances[5, 1] == pytest.approx(72**0.5)
    with pytest.raises(ValueError, match="1 to 6, the number of points; got 7"):
        exact_neighbours(points, 7)


@pytest.mark.parametrize("function", [nearest_distances, softmax_perplexity])
def test_different_dimensions_are_named(function):
    # The plain function: under test its shapes are checked by annotation as well, before its own message.
    with pytest.raises((ValueError, TypeError), match=r"same dimension|Type-check error"):
        inspect.unwrap(function)(torch.ones(3, 4), torch.ones(3, 5))


def test_empty_sets_are_named():
    with pytest.raises(ValueError, match="at least one vector"):
        nearest_distances(torch.ones(2, 3), torch.ones(0, 3))
    with pytest.raises(ValueError, match="at least one vector"):
        norm_statistics(torch.ones(0, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["features", "codebook"])
def test_what_is_not_finite_is_refused(value, place):
    vectors = {"features": torch.randn(6, 3), "codebook": torch.randn(4, 3)}
    vectors[place][1, 2] = value
    features, codebook = vectors["features"], vectors["codebook"]
    with pytest.raises(ValueError, match=r"must be finite.*take a snapshot before it"):
        norm_statistics(vectors[place])
    with pytest.raises(ValueError, match="queries and points must be finite"):
        code_feature_distances(codebook, features)
    with pytest.raises(ValueError, match="features and codebook must be finite"):
        softmax_perplexity(features, codebook)
