"""Numbers, indices and vectors of the public Python functions: what is none is one message, at every function.

A function is covered by listing it in CALLS with honest arguments; each argument is then replaced by every hostile
thing of its kind.
"""

import dataclasses
import math
import traceback

import numpy as np
import pytest
import torch

from ibqlab import diagnostics, generator, metrics, quantizers, tokens
from ibqlab.base.checks import finite_number, whole_number
from ibqlab.quantizers.vectors import to_vectors

DRAW = torch.Generator().manual_seed(0)
FEATURES, CODEBOOK = torch.randn(12, 4, generator=DRAW), torch.randn(8, 4, generator=DRAW)
INDICES = torch.arange(12) % 8
GRID = INDICES.repeat(2).reshape(6, 4)
COUNTS = torch.bincount(INDICES, minlength=8)
PICTURES = torch.rand(2, 3, 8, 8, generator=DRAW)
ROWS = torch.randn(30, 4, generator=DRAW)

CALLS = {
    "count_indices": (diagnostics.count_indices, {"indices": INDICES, "codebook_size": 8}),
    "measure_usage": (
        diagnostics.measure_usage,
        {
            "indices": INDICES,
            "codebook_size": 8,
            "definition": "one_batch",
            "tokens_per_image": 2,
            "images_per_batch": 2,
        },
    ),
    "measure_usage_of_counts": (diagnostics.measure_usage_of_counts, {"counts": COUNTS, "definition": "any_hit"}),
    "perplexity": (diagnostics.perplexity, {"counts": COUNTS}),
    "nearest_distances": (diagnostics.nearest_distances, {"queries": FEATURES, "points": CODEBOOK}),
    "code_feature_distances": (diagnostics.code_feature_distances, {"codebook": CODEBOOK, "features": FEATURES}),
    "norm_statistics": (diagnostics.norm_statistics, {"x": FEATURES}),
    "softmax_perplexity": (diagnostics.softmax_perplexity, {"features": FEATURES, "codebook": CODEBOOK}),
    "exact_neighbours": (diagnostics.exact_neighbours, {"points": FEATURES, "k": 3}),
    "gradient_reach": (diagnostics.gradient_reach, {"gradient": CODEBOOK, "threshold": 1e-3}),
    "token_entropy": (tokens.token_entropy, {"indices": GRID, "codebook_size": 8}),
    "bits_per_pixel": (tokens.bits_per_pixel, {"bits": 1.0, "tokens": 4, "height": 4, "width": 4}),
    "index_permutation": (tokens.index_permutation, {"codebook_size": 8, "seed": 0}),
    "measure_ngrams": (
        tokens.measure_ngrams,
        {"training": GRID, "validation": GRID, "codebook_size": 8, "grid": (2, 2), "labels": ([0] * 6, [1] * 6)},
    ),
    "report_tokens": (
        tokens.report_tokens,
        {"training": GRID, "validation": GRID, "codebook_size": 8, "grid": (2, 2), "image_size": (4, 4)},
    ),
    "project_codes": (
        lambda features, counts, **rest: diagnostics.project_codes(
            [CODEBOOK], features, "pca", counts=[counts], **rest
        ),
        {"features": FEATURES, "counts": COUNTS, "max_points": 50, "seed": 0, "neighbours": 5},
    ),
    "index_backprop": (
        quantizers.index_backprop,
        {"features": FEATURES, "codebook": CODEBOOK, "entropy_temperature": 0.01, "entropy_epsilon": 1e-5},
    ),
    "nearest_code": (quantizers.nearest_code, {"features": FEATURES, "codebook": CODEBOOK}),
    "mixture_of_codes": (
        quantizers.mixture_of_codes,
        {"features": FEATURES, "codebook": CODEBOOK, "temperature": 1.0},
    ),
    "rotate_to_codes": (quantizers.rotate_to_codes, {"features": FEATURES, "codes": FEATURES}),
    "straight_through": (quantizers.straight_through, {"features": FEATURES, "codes": FEATURES}),
    "factorize_indices": (quantizers.factorize_indices, {"indices": INDICES, "bits": (1, 2)}),
    "join_indices": (quantizers.join_indices, {"parts": (INDICES % 2, INDICES // 2), "bits": (1, 2)}),
    "inception_score": (metrics.inception_score, {"logits": ROWS, "splits": 2, "seed": 0}),
    "inception_score of splits": (metrics.inception_score, {"logits": ROWS, "split_size": 7}),
    "kernel_distance": (
        metrics.kernel_distance,
        {"samples": ROWS, "reference": ROWS, "subsets": 3, "subset_size": 10, "seed": 0},
    ),
    "precision_recall": (metrics.precision_recall, {"samples": ROWS, "reference": ROWS, "neighbours": 3}),
    "psnr": (metrics.psnr, {"x": PICTURES, "y": PICTURES}),
    "ssim": (metrics.ssim, {"x": PICTURES, "y": PICTURES}),
    "truncate_to_uint8": (metrics.truncate_to_uint8, {"images": PICTURES}),
    "linear_cross_entropy": (
        generator.linear_cross_entropy,
        {"hidden": FEATURES, "weight": CODEBOOK, "targets": INDICES},
    ),
}

NUMBERS = {
    "NaN": math.nan,
    "infinity": math.inf,
    "negative": -1,
    "complex": 1j,
    "text": "3",
    "list": [1],
    "thousands of digits": -(10**5000),
    "meta": torch.zeros((), device="meta"),
}
WHOLE = NUMBERS | {"fraction": 1.5, "none": None, "true": True, "large": 10**30}
TENSORS = {
    "none": None,
    "text": "x",
    "objects": np.array([[{}]]),
    "complex": torch.ones(12, 4, dtype=torch.complex64),
    "sparse": torch.eye(12, 4).to_sparse(),
    "other dimension": torch.ones(12, 5, dtype=torch.bool),
    "no axis": torch.tensor(1.0 + 0j),
}
VECTORS = TENSORS | {
    "whole numbers": torch.ones(12, 4, dtype=torch.int64),
    "no dimension": torch.zeros(12, 0),
    "one axis": torch.zeros(4),
    "three axes": torch.zeros(2, 3, 4),
    "float8": torch.zeros(12, 4).to(torch.float8_e4m3fn),
}
WHOLES = TENSORS | {
    "floats": torch.rand(12),
    "mask": torch.ones(12, dtype=torch.bool),
    "ragged": [[1], [2, 3]],
    "words": ["1", "2"],
    "beyond 64 bits": [10**30],
    "iterator": iter([1]),
    "set": {1, 2},
    "bytes": b"123",
}
PAIRS = {"none": None, "empty": [], "text": "xy", "number": 3, "negative": (-1, -2), "floats": (2.0, 2.0)}
PAIRS |= {"trues": (True, True), "nones": (None, None), "one": (1,), "mappings": [{}, {}], "infinite": (math.inf, 1)}
MAY_BE_NONE = {("index_backprop", "entropy_temperature"), ("measure_ngrams", "labels"), ("gradient_reach", "gradient")}


def hostile(name, argument, honest):
    """What may stand in an argument's place, by its kind."""
    if isinstance(honest, torch.Tensor):
        kinds = VECTORS if honest.is_floating_point() else WHOLES
        if honest.ndim == 4:
            kinds = TENSORS | {"whole numbers": torch.ones(2, 3, 8, 8, dtype=torch.int64)}
    elif isinstance(honest, tuple):
        kinds = PAIRS
    elif isinstance(honest, str):
        kinds = {"none": None, "list": ["any_hit"], "mapping": {}, "other": "any hit"}
    else:
        kinds = NUMBERS if isinstance(honest, float) else WHOLE
    skipped = {"none"} if (name, argument) in MAY_BE_NONE else set()
    skipped |= {"negative"} if argument == "bits" and isinstance(honest, float) else set()
    return [kind for kind in kinds if kind not in skipped], kinds


CASES = [
    (name, argument, kind)
    for name, (_, arguments) in CALLS.items()
    for argument, honest in arguments.items()
    for kind in hostile(name, argument, honest)[0]
]


@pytest.mark.parametrize(("name", "argument", "kind"), CASES, ids=lambda word: word.replace(" ", "_"))
def test_what_does_not_fit_is_one_message(name, argument, kind):
    call, arguments = CALLS[name]
    wrong = hostile(name, argument, arguments[argument])[1][kind]
    with pytest.raises(ValueError) as caught:
        call(**arguments | {argument: wrong})
    # Raised here on purpose, not by NumPy or torch further down.
    place = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert "/ibqlab/" in place.filename
    assert place.line.startswith("raise") or place.name == "require"
    assert type(caught.value) is ValueError and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", CALLS)
def test_honest_arguments_are_taken(name):
    """Or the test above would pass for the wrong reason."""
    call, arguments = CALLS[name]
    assert call(**arguments) is not None


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_is_nobodys_business(name):
    """`torch.set_default_device("cuda")` is usual in notebooks; on "meta" every mistake shows without a GPU."""
    call, arguments = CALLS[name]
    plain = repr(call(**arguments))
    with torch.device("meta"):
        assert repr(call(**arguments)) == plain


@pytest.mark.parametrize(
    "name", ["nearest_distances", "code_feature_distances", "softmax_perplexity", "exact_neighbours", "psnr"]
)
@pytest.mark.parametrize("state", ["autocast", "float16"])
def test_neither_autocast_nor_the_default_type_changes_a_result(name, state):
    call, arguments = CALLS[name]
    plain = call(**arguments)
    before = torch.get_default_dtype()
    try:
        if state == "float16":
            torch.set_default_dtype(torch.float16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=state == "autocast"):
            again = call(**arguments)
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(*(out if isinstance(out, tuple) else [out] for out in (plain, again)), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other)) and getattr(one, "dtype", 0) == getattr(
            other, "dtype", 0
        )


def test_vectors_come_as_snapshots_hold_them():
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    plain = diagnostics.norm_statistics(torch.from_numpy(array))
    for same in (array, array.astype(">f8"), array[::-1], np.asfortranarray(array), array.tolist()):
        assert diagnostics.norm_statistics(same) == plain
    assert to_vectors(array, "x").dtype == torch.float32


@pytest.mark.parametrize("scale", [1e18, 1e30])
def test_squares_that_overflow_float32_give_the_right_distances(scale):
    """Codes of norm 10¹⁹ are finite, so their norms and distances are."""
    codes, features = CODEBOOK * scale, FEATURES * scale
    assert diagnostics.norm_statistics(codes).mean == pytest.approx(
        diagnostics.norm_statistics(CODEBOOK).mean * scale, rel=1e-5
    )
    expected = torch.cdist(FEATURES.double(), CODEBOOK.double()).amin(1) * scale
    assert torch.allclose(diagnostics.nearest_distances(features, codes).double(), expected, rtol=1e-5)
    assert torch.isfinite(diagnostics.softmax_perplexity(features, codes)).all()
    indices, gaps = diagnostics.exact_neighbours(features, 3)
    assert np.array_equal(indices, diagnostics.exact_neighbours(FEATURES, 3)[0]) and np.isfinite(gaps).all()


def test_psnr_is_that_of_the_mean_squared_error():
    x, y = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1)
    assert metrics.psnr(x, y).dtype == torch.float64
    assert float(metrics.psnr(x, y)) == pytest.approx(20.0, abs=1e-6)
    assert float(metrics.psnr(x, x)) == math.inf


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_come_in_every_type(value):
    assert whole_number("n", value, 1) == 3 and type(whole_number("n", value, 1)) is int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**70, "n must be at most 9,223,372,036,854,775,807; got"),
        (-(10**5000), "n must be at least 1; got a number of 16,610 bits; try 1"),
        (True, "n must be a whole number; got True; try 1"),
        (2.0, "n must be a whole number; got 2.0; try 1"),
        ("\x1b[31m" * 99, "n must be a whole number; got '"),
    ],
    ids=["large", "digits", "true", "float", "text"],
)
def test_messages_about_whole_numbers(value, message):
    with pytest.raises(ValueError) as caught:
        whole_number("n", value, 1, hint="; try 1")
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 120 and str(caught.value).isprintable()


@pytest.mark.parametrize("value", [math.nan, -math.inf, 10**400, True, "1", None, 1j, [1.0]], ids=[*"abcdefgh"])
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match=r"^n must be a finite number; got "):
        finite_number("n", value)
    assert finite_number("n", np.float32(0.5)) == finite_number("n", torch.tensor(0.5)) == 0.5


CONFIGS = {name: quantizers.quantizer_config({"name": name}) for name in quantizers.available_quantizers()}
CONFIGS |= {"generator": generator.GeneratorConfig(), "factorized": generator.FactorizedGeneratorConfig()}
CONFIGS |= {"llamagen": generator.LlamaGenConfig()}
CONFIGS |= {"sampling": generator.SamplingConfig()}
NUMBER_FIELDS = [
    (name, field.name, kind)
    for name, config in CONFIGS.items()
    for field in dataclasses.fields(config)
    if field.type in (int, float) or field.name in ("cfg_scale", "temperature", "cfg_interval")
    for kind in (*NUMBERS, "none", "large")
    if kind != "negative" and not (field.name == "cfg_interval" and kind == "meta")
]


@pytest.mark.parametrize(("name", "field", "kind"), NUMBER_FIELDS)
def test_settings_made_in_python_are_checked_like_those_of_a_recipe(name, field, kind):
    wrong = (WHOLE | {"large": 10**40})[kind]
    with pytest.raises(ValueError, match=rf"{field}(\[0\])? must be "):
        dataclasses.replace(CONFIGS[name], **{field: wrong})


def test_numbers_of_numpy_are_the_same_settings():
    plain = quantizers.quantizer_config({"name": "ibq", "codebook_size": 64, "beta": 0.5})
    same = dataclasses.replace(plain, codebook_size=np.int64(64), beta=np.float64(0.5))
    assert same == plain and type(same.codebook_size) is int and type(same.beta) is float
    with pytest.raises(ValueError, match=r"beta must be a number that float32 holds, to 3\.4e\+38; got 1e\+300"):
        dataclasses.replace(plain, beta=1e300)
