"""Distances between sets of features against literal computations; extractors; the cache."""

import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from golden import golden

from ibqlab.base.cache import cache_folder, content_key, load_arrays, save_arrays
from ibqlab.data import DigitsSource
from ibqlab.metrics import (
    FeatureExtractor,
    Features,
    RunningStatistics,
    available_extractors,
    build_extractor,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    register_extractor,
)
from ibqlab.metrics.digits_classifier import DigitsExtractor
from ibqlab.metrics.extractors import is_published_inception, metric_name

pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this file's own; the digits network is trained once in it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("IBQLAB_CACHE", str(folder))
        yield folder


def feature_statistics(rows):
    """Mean and covariance of features that are all there at once."""
    running = RunningStatistics(rows.shape[1])
    running.update(torch.as_tensor(rows))
    return running.result()


def clouds(rows, dimension, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dimension, dimension))
    return rng.normal(size=(rows, dimension)) @ mix + 5, rng.normal(size=(rows + 7, dimension)) @ mix * 1.2 + 5.3


@pytest.mark.parametrize("name", ["full_rank", "rank_deficient"])
def test_published_frechet_distances(name):
    facts, values = golden("metrics")
    a, b = (feature_statistics(values[f"fid/{name}/f{side}"]) for side in "12")
    # The published script takes means and roots of singular products in float32 and by matrix root.
    assert frechet_distance(a, b) == pytest.approx(facts["fid"][name], rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(facts["fid"][name], rel=1e-7)


def test_frechet_distance_equals_the_literal_formula():
    a, b = clouds(300, 12)
    literal = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        np.cov(a.T) + np.cov(b.T) - 2 * scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    )
    assert frechet_distance(feature_statistics(a), feature_statistics(b)) == pytest.approx(literal, rel=1e-9)
    assert frechet_distance(feature_statistics(a), feature_statistics(a)) == pytest.approx(0, abs=1e-6)


def test_running_statistics_equal_those_of_all_features_at_once():
    rows = torch.from_numpy(clouds(101, 6)[0] + 1e4)
    running = RunningStatistics(6)
    for part in rows.split([1, 50, 49, 1]):
        running.update(part)
    np.testing.assert_allclose(running.result().mean, rows.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(running.result().covariance, np.cov(rows.numpy().T), rtol=1e-9)
    assert running.result().count == 101


def test_kernel_distance_equals_the_literal_one_on_the_same_subsets():
    a, b = clouds(60, 5)
    rng, literal = np.random.RandomState(2020), []
    for _ in range(4):
        x, y = (rows[rng.choice(len(rows), 30, replace=False)] for rows in (a, b))
        k = [[(p @ q / 5 + 1) ** 3 for q in np.concatenate([x, y])] for p in np.concatenate([x, y])]
        k = np.array(k)
        same = sum(k[i, j] for half in (range(30), range(30, 60)) for i in half for j in half if i != j) / (30 * 29)
        literal.append(same - 2 * k[:30, 30:].mean())
    score = kernel_distance(a, b, subsets=4, subset_size=30)
    assert score.mean == pytest.approx(np.mean(literal), rel=1e-9)
    assert score.deviation == pytest.approx(np.std(literal), rel=1e-9)


def test_precision_and_recall_equal_brute_force():
    rng = np.random.default_rng(1)
    samples, reference = rng.normal(size=(80, 4)) * 0.6 + 0.4 + 100, rng.normal(size=(90, 4)) + 100

    def inside(points, centres):
        radii = [sorted(np.linalg.norm(c - other) for other in centres)[3] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    found = precision_recall(samples, reference)
    assert found.precision == pytest.approx(inside(samples, reference))
    assert found.recall == pytest.approx(inside(reference, samples))
    assert found.precision > found.recall + 0.1, "narrow samples are good but cover little"


def test_inception_score_in_consecutive_splits_and_shuffled():
    logits = np.random.default_rng(0).normal(size=(250, 7)) * 3

    def literal(rows):
        p = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
        return np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())

    consecutive = inception_score(logits, split_size=100)
    assert consecutive.parts == 3
    assert consecutive.mean == pytest.approx(np.mean([literal(logits[i : i + 100]) for i in (0, 100, 200)]))
    order = np.random.RandomState(2020).permutation(250)
    shuffled = [literal(part) for part in np.split(logits[order], 5)]
    assert inception_score(logits, splits=5).mean == pytest.approx(np.mean(shuffled))
    assert inception_score(logits, splits=5).deviation == pytest.approx(np.std(shuffled))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: kernel_distance(a, a, subset_size=9), "at least 9 rows"),
        (lambda a: precision_recall(a[:3], a), "at least 4 rows"),
        (lambda a: kernel_distance(a, a[:, :2], subset_size=4), "one feature dimension"),
        (lambda a: frechet_distance(feature_statistics(a), feature_statistics(a[:, :2])), "one feature dimension"),
        (lambda a: feature_statistics(a[:1]), "at least 2 images"),
        (lambda a: inception_score(a, splits=9), "at least 9 rows"),
        (lambda a: feature_statistics(a / 0), "finite"),
        (lambda a: RunningStatistics(3).result(), "at least 2 images"),
    ],
)
def test_too_few_or_unfit_features_are_refused(call, message):
    with pytest.raises(ValueError, match=message), np.errstate(all="ignore"):
        call(np.ones((8, 3)))


def digit_pictures(size):
    source = DigitsSource(image_size=size, split="validation")
    return torch.from_numpy(source.images)[:, None].expand(-1, 3, -1, -1) / 255, torch.tensor(source.labels)


def test_the_digits_network_reads_digits_and_is_always_the_same(cache):
    extractor = DigitsExtractor()
    images, labels = digit_pictures(8)
    assert (extractor(images).logits.argmax(1) == labels).float().mean() > 0.97
    assert extractor(images).features.shape == (360, 64)
    (stored,) = (cache / "digits-cnn").glob("*.npz")
    with zipfile.ZipFile(stored) as archive:
        assert "classify.weight.npy" in archive.namelist()
    assert DigitsExtractor().weights == extractor.weights
    stored.unlink()
    assert DigitsExtractor().weights == extractor.weights, "trained again: bit-identical"


def test_digits_distance_orders_damage():
    extractor, (images, _) = DigitsExtractor(), digit_pictures(16)
    clean = feature_statistics(extractor(images[::2]).features)
    noise = torch.randn(images[1::2].shape, generator=torch.Generator().manual_seed(0))
    distances = [
        frechet_distance(clean, feature_statistics(extractor((images[1::2] + s * noise).clamp(0, 1)).features))
        for s in (0, 0.3, 1)
    ]
    assert distances == sorted(distances)
    assert distances[2] > 3 * distances[0]


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights of the right architecture, made without the published file."""
    from torch_fidelity import feature_extractor_inceptionv3 as module  # noqa: PLC0415 - takes seconds

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"], verbose=False)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), file)
    return file


def test_inception_on_8_bit_images_is_torch_fidelitys_own_pass(inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: PLC0415

    images = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8)
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    ours = build_extractor("inception-tensorflow", weights=inception_file, expected_sha256=None)
    features, logits = theirs(images)
    out = ours(images.float() / 255)
    assert torch.equal(out.features, features)
    torch.testing.assert_close(out.logits, logits)
    assert not is_published_inception(ours)
    assert metric_name("fid", ours).startswith("Fréchet distance (inception-v3-compat")


def test_inception_behind_pytorch_fids_input(inception_file):
    images = torch.rand(1, 3, 20, 24)
    ours = build_extractor("inception-pytorch-fid", weights=inception_file, expected_sha256=None)
    resized = torch.nn.functional.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
    assert torch.equal(ours(images).features, ours.trunk(2 * resized - 1).flatten(1))
    other = build_extractor("inception-tensorflow", weights=inception_file, expected_sha256=None)
    assert not torch.allclose(ours(images).features, other(images).features, rtol=1e-2)


def test_inception_needs_the_published_file(inception_file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="begins with 6726825d"):
        build_extractor("inception-tensorflow", weights=inception_file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"96 MB.*weights-inception-2015-12-05-6726825d\.pth.*hub/checkpoints"):
        build_extractor("inception-pytorch-fid")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save(Payload(), tmp_path / "bad.pth")
    with pytest.raises(Exception, match="eights"):
        build_extractor("inception-tensorflow", weights=tmp_path / "bad.pth", expected_sha256=None)
    assert not (tmp_path / "ran").exists()


def test_own_extractors_register_by_name():
    @register_extractor("test-mean-colour")
    class MeanColour(torch.nn.Module):
        name, dimension, weights, smallest_side = "mean-colour", 3, "none", 1

        def forward(self, images):
            return Features(images.mean((2, 3)), None)

    extractor = build_extractor("test-mean-colour")
    assert isinstance(extractor, FeatureExtractor)
    assert "test-mean-colour" in available_extractors()
    assert metric_name("fid", extractor) == "Fréchet distance (mean-colour)"
    with pytest.raises(ValueError, match="exists already"):
        register_extractor("digits")(MeanColour)
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        build_extractor("digit")


def test_the_cache_stores_arrays_whole_and_without_pickles():
    key = content_key(images="abc", weights="def")
    assert load_arrays("kind", key) is None
    save_arrays("kind", key, {"mean": np.arange(3.0)})
    np.testing.assert_array_equal(load_arrays("kind", key)["mean"], np.arange(3.0))
    file = cache_folder() / "kind" / f"{key}.npz"
    assert [entry.name for entry in file.parent.iterdir()] == [file.name], "nothing half written is left"
    file.write_bytes(file.read_bytes()[:40])
    assert load_arrays("kind", key) is None, "a damaged entry is computed again"
    np.savez(file, pickled=np.array([{}], dtype=object))
    assert load_arrays("kind", key) is None


def test_keys_depend_on_every_part():
    keys = {content_key(images=a, weights=b) for a in ("1", "2") for b in ("1", "2")}
    assert len(keys) == 4
    assert content_key(a=1, b=2) == content_key(b=2, a=1)
    assert all(key.isalnum() for key in keys), "keys are names of files"


def test_an_unwritable_cache_only_warns(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("IBQLAB_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="IBQLAB_CACHE"):
        save_arrays("kind", "key", {"a": np.zeros(1)})
    assert load_arrays("kind", "key") is None
