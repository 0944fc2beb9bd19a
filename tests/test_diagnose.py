"""Arrays that `diagnose` cannot take as they are: each is named, with the rule and what to type instead."""

import re

import numpy as np
import pytest
import torch

from ibqlab.monitor import diagnose

TOKENS, CODES, DIM = 40, 16, 6
FEATURES = np.random.default_rng(0).standard_normal((TOKENS, DIM)).astype(np.float32)
CODEBOOK = np.random.default_rng(1).standard_normal((CODES, DIM)).astype(np.float32)
INDICES = np.arange(TOKENS) % CODES


@pytest.mark.parametrize(
    ("features", "codebook", "says"),
    [
        (FEATURES, CODEBOOK.T, r"codebook must be \(K, D\).*got \(6, 16\).*Use codebook.T"),
        (torch.zeros(2, DIM, 5, 4), CODEBOOK.T, r"features \(2, 6, 5, 4\).*Use codebook.T"),
        (FEATURES.T, CODEBOOK, r"features must be \(N, D\).*D = 6; got \(6, 40\).*Use features.T"),
        (FEATURES.T, CODEBOOK.T, "Use features.T and codebook.T"),
        (FEATURES[:, :5], CODEBOOK, r"codebook's dimension D = 6.*got \(40, 5\)"),
        (torch.from_numpy(FEATURES).to_sparse(), CODEBOOK, r"features .*torch.sparse_coo. Use features.to_dense"),
        (FEATURES, torch.from_numpy(CODEBOOK).to_sparse(), r"codebook .*torch.sparse_coo. Use codebook.to_dense"),
        (torch.empty(TOKENS, DIM, device="meta"), CODEBOOK, "features .*on the device meta"),
        (torch.nested.nested_tensor([torch.zeros(9, DIM)], layout=torch.jagged), CODEBOOK, "features .*nested"),
        (np.ma.masked_greater(FEATURES, 1), CODEBOOK, r"features must have no masked numbers"),
        (FEATURES, np.ma.masked_greater(CODEBOOK, 1), r"codebook must have no masked numbers"),
        (FEATURES, torch.nn.Embedding(CODES, DIM), "got Embedding.*Use codebook.weight"),
        (torch.from_numpy(FEATURES).to(torch.float8_e4m3fn), CODEBOOK, r"got torch.float8_e4m3fn. Use features.float"),
        ("features.npy", CODEBOOK, "features must be floating-point numbers.*got str"),
        ([[1.0, 2.0], [1.0]], CODEBOOK, "features must be .* lists of equal length"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_arrays_that_do_not_fit_are_named(features, codebook, says):
    with pytest.raises(ValueError, match=re.compile(says, re.DOTALL)):
        diagnose(features, codebook)


@pytest.mark.parametrize("indices", [torch.empty(TOKENS, device="meta").long(), np.ma.masked_equal(INDICES, 3)])
def test_indices_without_numbers_are_named(indices):
    with pytest.raises(ValueError, match=r"indices must .*(meta|masked)"):
        diagnose(FEATURES, CODEBOOK, indices)


@pytest.mark.parametrize(
    "features",
    [FEATURES.astype(">f4"), FEATURES[::-1][::-1], FEATURES.astype(np.longdouble), np.ma.masked_array(FEATURES)],
    ids=["other byte order", "negative strides", "long double", "nothing masked"],
)
def test_arrays_that_torch_does_not_take_are_copied(features):
    assert diagnose(features, CODEBOOK).numbers == diagnose(FEATURES, CODEBOOK).numbers
