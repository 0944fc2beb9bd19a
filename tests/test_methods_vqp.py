"""The adapter of vector-quantize-pytorch: the class's own values, indices of its levels, and what is refused."""

import sys

import pytest
import torch

from ibqlab.quantizers import build_quantizer

library = pytest.importorskip("vector_quantize_pytorch")
DIM = 4
CASES = {
    "VectorQuantize": (12, {"rotation_trick": False}),
    "SimVQ": (12, {}),
    "FSQ": (3 * 4 * 5 * 4, {"levels": [3, 4, 5, 4]}),
    "LFQ": (16, {"entropy_loss_weight": 0.1}),
    "ResidualVQ": (36, {"num_quantizers": 2}),
    "ResidualSimVQ": (36, {"num_quantizers": 2}),
    "ResidualFSQ": (27**2, {"num_quantizers": 2, "levels": [3, 3, 3]}),
    "ResidualLFQ": (256, {"num_quantizers": 2}),
}


def tokens():
    drawn = torch.randn(1, DIM, 1, 20, generator=torch.Generator().manual_seed(0))
    return drawn.requires_grad_()


def built(cls, **settings):
    size, arguments = CASES[cls]
    torch.manual_seed(0)
    return build_quantizer(
        "vqp", **{"cls": cls, "arguments": arguments, "codebook_size": size, "code_dim": DIM, **settings}
    )


@pytest.mark.parametrize("cls", CASES)
def test_values_loss_and_gradient_are_the_classes_own(cls):
    quantizer, reference = built(cls), built(cls).codes.module
    mine, theirs = tokens(), tokens()
    torch.manual_seed(1)
    out = quantizer(mine)
    torch.manual_seed(1)
    values, indices, *loss = reference(theirs[0, :, 0].T[None])
    loss = loss[0].sum() if loss else torch.zeros(())
    torch.testing.assert_close(out.quantized[0, :, 0].T, values[0])
    torch.testing.assert_close(out.loss, loss)
    assert len(out.indices.unique()) == len(indices[0].unique(dim=0))
    (out.quantized.square().sum() + out.loss).backward()
    (values.square().sum() + loss).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("cls", CASES)
def test_indices_lie_in_the_codebook_and_decode_to_what_evaluation_gives(cls):
    quantizer = built(cls)
    assert quantizer.codebook.shape == (quantizer.config.codebook_size, DIM)
    indices = quantizer.encode(tokens())
    assert quantizer.training and quantizer.codes.module.training
    out = quantizer.eval()(tokens())
    assert torch.equal(out.indices, indices) and torch.equal(quantizer.decode(indices), out.quantized)
    torch.testing.assert_close(out.quantized, quantizer.codebook[indices].permute(0, 3, 1, 2))
    values = quantizer.codes.module(tokens()[0, :, 0].T[None])[0]
    torch.testing.assert_close(out.quantized[0, :, 0].T, values[0], atol=1e-5, rtol=1e-5)


def test_a_forward_pass_without_upkeep_leaves_the_averages_alone():
    quantizer = built("VectorQuantize")
    before = quantizer.codebook.clone()
    with quantizer.without_upkeep():
        quantizer(tokens())
    assert torch.equal(quantizer.codebook, before)
    quantizer(tokens())
    assert not torch.equal(quantizer.codebook, before)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ImportError, match="needs vector-quantize-pytorch; type pip install vector-quantize-pytorch"):
        built("SimVQ")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cls": "SimVq"}, "did you mean 'SimVQ'"),
        ({"cls": "FSQ", "codebook_size": 100}, "codebook_size must be 240 for FSQ.*Use codebook_size=240"),
        ({"cls": "SimVQ", "arguments": {"dimm": 3}}, "SimVQ refuses the arguments.*It takes dim, codebook_size"),
        ({"cls": "SimVQ", "codebook_init": "normal"}, "does not apply to vqp.*Leave it out"),
        ({"cls": "SimVQ", "loss_weight": -1.0}, "loss_weight must be ≥ 0"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        built(**{"cls": "FSQ", **settings}) if settings["cls"] in CASES else build_quantizer("vqp", **settings)
