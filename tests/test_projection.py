"""One map for codes and features: PCA throughout, UMAP once (it compiles for seconds)."""

import importlib
import sys

import numpy as np
import pytest
import torch

import ibqlab
from ibqlab.diagnostics import project_codes


def _random(rows, dim=8, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=(rows, dim)) * scale).astype(np.float32)


def test_pca_keeps_the_widest_directions():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(300, 2)) * [5.0, 2.0]
    axes = np.linalg.qr(rng.normal(size=(6, 2)))[0]
    points = (plane @ axes.T).astype(np.float32)
    projection = project_codes([points[:100]], points[100:], "pca")
    drawn = np.concatenate([projection.codes[0], projection.features[0]])
    distances = np.linalg.norm(points - points[0], axis=1)
    assert np.linalg.norm(drawn - drawn[0], axis=1) == pytest.approx(distances, abs=1e-3)
    assert sum(projection.explained_variance) == pytest.approx(1)
    assert projection.explained_variance[0] > 0.75


def test_pca_axes_do_not_change_sign_with_the_order_of_points():
    points = _random(50)
    first = project_codes([points], points, "pca").codes[0]
    second = project_codes([points[::-1].copy()], points, "pca").codes[0]
    assert first == pytest.approx(second[::-1], abs=1e-4)


def test_frames_share_one_space():
    still, moved = _random(20), _random(20) + 3
    projection = project_codes([still, moved, still], _random(40, seed=1), "pca")
    assert (projection.codes[0] == projection.codes[2]).all()
    steps = projection.codes[1] - projection.codes[0]
    assert steps == pytest.approx(np.broadcast_to(steps[0], steps.shape), abs=1e-4)
    assert len(projection.features) == 3
    left, right, bottom, top = projection.bounds
    everything = np.concatenate([*projection.codes, *projection.features])
    assert (left, bottom) == tuple(everything.min(0).tolist())
    assert (right, top) == tuple(everything.max(0).tolist())


def test_copies_weigh_as_much_as_they_are_many():
    points = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [4.0, 0.0]], dtype=np.float32)
    projection = project_codes([points], points, "pca")
    assert projection.codes[0][:, 0] == pytest.approx([-1, -1, -1, 3])


def test_thinning_keeps_the_same_rows_in_every_frame():
    frames = [_random(300, seed=seed) for seed in range(3)]
    projection = project_codes(frames, _random(400, seed=9), "pca", max_points=500, seed=4)
    total = sum(map(len, projection.codes)) + len(projection.features[0])
    assert 450 <= total <= 500
    assert (projection.code_ids[0] == projection.code_ids[2]).all()
    assert len(projection.features[0]) == len(projection.feature_ids[0]) == 250
    assert projection.codebook_sizes == (300, 300, 300)
    assert len(set(projection.code_ids[0].tolist())) == len(projection.codes[0])
    other = project_codes(frames, _random(400, seed=9), "pca", max_points=500, seed=5)
    assert not np.array_equal(other.code_ids[0], projection.code_ids[0])


def _counts(codes, live, seed):
    hits = np.zeros(codes, int)
    hits[np.random.default_rng(seed).permutation(codes)[:live]] = 7
    return hits


@pytest.mark.parametrize("live", [1, 25, 290])
def test_every_code_in_use_is_kept(live):
    """290 × 3 is more than the fit may hold; they are kept and placed where PCA puts them."""
    frames, features = [_random(300, seed=seed) for seed in range(3)], _random(400, seed=9)
    counts = [_counts(300, live, seed) for seed in range(3)]
    projection = project_codes(frames, features, "pca", counts=counts, max_points=200)
    everything = project_codes(frames, features, "pca")
    for ids, hits, positions in zip(projection.code_ids, counts, projection.codes, strict=True):
        assert set(np.flatnonzero(hits)) <= set(ids.tolist())
        assert len(ids) == len(positions) == len(set(ids.tolist()))
        dead = (hits == 0).sum()
        assert (hits[ids] == 0).sum() == pytest.approx(dead / 9, abs=9), (
            "as many of the dead as were kept without counts"
        )
    fitted = sum(map(len, projection.code_ids)) - projection.placed
    assert fitted <= 103
    assert (projection.placed > 700) if live == 290 else (projection.placed < 90)
    assert projection.feature_totals == (400, 400, 400)
    assert len(projection.features[0]) == 100
    assert np.isfinite(np.concatenate(projection.codes)).all()
    assert everything.placed == 0


def test_a_placed_code_stands_where_the_fit_would_have_it():
    frame, features = _random(300), _random(300, seed=1)
    hits = np.ones(300, int)
    thinned = project_codes([frame], features, "pca", counts=[hits], max_points=100)
    assert thinned.code_ids[0].tolist() == list(range(300)) and thinned.placed > 200
    # PCA is linear: two equal steps in the codes are two equal steps in the map.
    line = np.stack([frame[0], frame[0] + 1, frame[0] + 2])
    codes = np.concatenate([frame, line])
    plane = project_codes([codes], features, "pca", counts=[np.ones(303, int)], max_points=60).codes[0]
    assert plane[302] - plane[301] == pytest.approx(plane[301] - plane[300], abs=1e-4)


def test_umap_places_codes_in_use_among_their_neighbours():
    near, far = _random(60, scale=0.1), _random(60, seed=1, scale=0.1) + 20
    codes = np.concatenate([near, far])
    projection = project_codes([codes], codes + 0.01, "umap", counts=[np.ones(120, int)], max_points=80)
    assert projection.placed == 80 and len(projection.codes[0]) == 120
    here, there = projection.codes[0][:60], projection.codes[0][60:]
    spread = np.linalg.norm(here - here.mean(0), axis=1).max()
    assert np.linalg.norm(there.mean(0) - here.mean(0)) > 2 * spread


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([np.ones(10, int), np.ones(10, int)], r"one array \(K,\) per snapshot of codes, 1 here; got 2"),
        (np.ones(10, int), "got ndarray of shape"),
        ([np.arange(25)], r"counts\[0\] must hold hits per code, shape \(10,\); got shape \(25,\): pass count_indices"),
    ],
)
def test_other_things_than_counts_are_refused(counts, message):
    with pytest.raises((ValueError, TypeError), match=rf"{message}|[Tt]ype-check error"):
        project_codes([_random(10)], _random(10), "pca", counts=counts)


@pytest.mark.parametrize("method", ["pca", "umap"])
@pytest.mark.parametrize("size", [1e19, 1e38, 1e-30])
def test_codes_of_any_finite_size_have_a_position(method, size):
    codes = _random(30)
    codes[3] = size
    projection = project_codes([codes, codes], _random(40, seed=1), method)
    assert np.isfinite(np.concatenate([*projection.codes, *projection.features])).all()
    assert np.isfinite(projection.bounds).all()
    if method == "umap":
        ordinary = np.delete(projection.codes[0], 3, axis=0)
        assert np.ptp(ordinary, axis=0).min() > 0.1, "the others do not fall into one point"
    whole = project_codes([codes * np.float32(1e-3) if size == 1e38 else codes * 0 + size], codes, method="pca")
    assert np.isfinite(whole.codes[0]).all()


def test_few_features_leave_their_points_to_the_codes():
    projection = project_codes([_random(900)], _random(20, seed=1), "pca", max_points=500)
    assert (len(projection.codes[0]), len(projection.features[0])) == (480, 20)


def test_tensors_and_arrays_give_the_same_map():
    codes, features = _random(30), _random(50, seed=1)
    array = project_codes([codes], features, "pca")
    tensor = project_codes([torch.from_numpy(codes).requires_grad_()], torch.from_numpy(features), "pca")
    assert (array.codes[0] == tensor.codes[0]).all()


def test_one_dimension_and_one_point_do_not_break_pca():
    flat = project_codes([_random(5, dim=1)], _random(5, dim=1, seed=1), "pca")
    assert (flat.codes[0][:, 1] == 0).all()
    assert flat.explained_variance == pytest.approx((1, 0))
    same = project_codes([np.ones((4, 3), np.float32)], np.ones((4, 3), np.float32), "pca")
    assert (same.codes[0] == 0).all()


def test_nan_names_the_frame_and_the_remedy():
    broken = _random(10)
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"codes\[1\] must be finite; 1 of 10 rows .*project the snapshots before"):
        project_codes([_random(10), broken], _random(10), "pca")
    with pytest.raises(ValueError, match=r"features\[0\] must be finite"):
        project_codes([_random(10)], broken, "pca")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tsne"}, "method must be one of 'umap', 'pca'; got 'tsne'"),
        ({"max_points": 3}, "max_points must be at least 10"),
        ({"neighbours": 1}, "neighbours must be at least 2"),
        ({"features": [_random(4), _random(4)]}, "one per snapshot of codes; got 2 for 1"),
    ],
)
def test_settings_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        project_codes(**{"codes": [_random(10)], "features": _random(10), "method": "pca", **arguments})


def test_too_few_distinct_points_for_umap_point_to_pca():
    with pytest.raises(ValueError, match=r"at least 5 distinct points; got 1 .*pass method='pca'"):
        project_codes([np.ones((50, 4), np.float32)], np.ones((50, 4), np.float32), "umap")


def test_missing_umap_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match="pip install umap-learn"):
        project_codes([_random(20)], _random(20, seed=1), "umap")


def test_umap_separates_clusters_repeats_itself_and_takes_few_points(recwarn):
    near, far = _random(60, scale=0.1), _random(60, seed=1, scale=0.1) + 20
    frames = [np.concatenate([near, far]), np.concatenate([near, far])]
    threads = torch.get_num_threads()
    projection = project_codes(frames, near + 0.01, "umap")
    assert torch.get_num_threads() == threads
    positions = projection.codes[0]
    spread = np.linalg.norm(positions[:60] - positions[:60].mean(0), axis=1).max()
    assert np.linalg.norm(positions[60:].mean(0) - positions[:60].mean(0)) > 2 * spread
    assert np.isfinite(positions).all()
    assert projection.neighbours == 15
    assert projection.explained_variance is None
    assert (projection.codes[0] == projection.codes[1]).all()
    again = project_codes(frames, near + 0.01, "umap")
    assert all((a == b).all() for a, b in zip(again.codes, projection.codes, strict=True))
    few = project_codes([_random(4)], _random(3, seed=1), "umap")
    assert few.neighbours == 6
    assert np.isfinite(few.codes[0]).all()
    assert not [str(warning.message) for warning in recwarn if "umap" in str(warning.filename)]


def test_importing_diagnostics_needs_no_plotting_library(monkeypatch):
    for name in ("umap", "sklearn", "matplotlib", "numba"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    for name in [name for name in sys.modules if name.startswith("ibqlab.diagnostics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(ibqlab, "diagnostics", None)
    assert importlib.import_module("ibqlab.diagnostics").project_codes is not project_codes
