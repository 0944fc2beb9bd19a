"""The rough count of a run's memory: what a quantizer stores is what is counted of it."""

import pytest

from ibqlab.costs.fitting import codebook_bytes
from ibqlab.quantizers import make_quantizer, quantizer_config
from ibqlab.quantizers.trials import small_settings


@pytest.mark.parametrize("name", ["ibq", "vq_projected", "vq_ema", "simvq", "vqgan_lc", "fsq", "residual"])
def test_the_weights_that_a_quantizer_stores_are_counted(name):
    """Four numbers for each that learns: its gradient and Adam's two averages beside it."""
    config = quantizer_config({"name": name, **small_settings(name)})
    quantizer = make_quantizer(config)
    learn = sum(weight.nbytes for weight in quantizer.parameters() if weight.requires_grad)
    stored = {**dict(quantizer.named_parameters()), **dict(quantizer.named_buffers())}
    assert codebook_bytes(config) == sum(value.nbytes for value in stored.values()) + 3 * learn


def test_codes_of_few_numbers_are_counted_as_they_are_stored():
    config = quantizer_config({"name": "vq_projected", "codebook_size": 2**20, "code_dim": 256, "projected_dim": 8})
    assert 16 * 2**23 < codebook_bytes(config) < 16 * 2**23 + 2**20
