"""The adapter of vector-quantize-pytorch: the class's own values, indices of its levels, and what is refused."""

import sys

import pytest
import torch

from ibqlab.config import to_dict
from ibqlab.diagnostics.alarm_rules import facts_of
from ibqlab.quantizers import INITIALISATIONS, build_quantizer
from ibqlab.quantizers.methods.vqp import CLASSES, REFUSED

library = pytest.importorskip("vector_quantize_pytorch")
DIM = 4
CASES = {
    "VectorQuantize": (12, {"rotation_trick": False}),
    "SimVQ": (12, {}),
    "FSQ": (3 * 4 * 5 * 4, {"levels": [3, 4, 5, 4]}),
    "FSP": (3 * 4 * 5 * 4, {"levels": [3, 4, 5, 4]}),
    "LFQ": (16, {"entropy_loss_weight": 0.1}),
    "LatentQuantize": (3 * 4 * 5 * 4, {"levels": [3, 4, 5, 4]}),
    "ResidualVQ": (36, {"num_quantizers": 2}),
    "ResidualSimVQ": (36, {"num_quantizers": 2}),
    "ResidualFSQ": (27**2, {"num_quantizers": 2, "levels": [3, 3, 3]}),
    "ResidualLFQ": (256, {"num_quantizers": 2}),
    "GroupedResidualVQ": (4**4, {"num_quantizers": 2, "groups": 2}),
    "GroupedResidualFSQ": (9**2, {"num_quantizers": 1, "groups": 2, "levels": [3, 3]}),
    "GroupedResidualLFQ": (4**4, {"num_quantizers": 2, "groups": 2}),
    "BinaryMapper": (16, {}),
}
SEVERAL = [
    ("VectorQuantize", 36, {"heads": 2, "separate_codebook_per_head": True}),
    ("FSQ", 9**2, {"levels": [3, 3], "num_codebooks": 2}),
    ("LFQ", 2**4, {"num_codebooks": 2}),
    ("LatentQuantize", 9**2, {"levels": [3, 3], "num_codebooks": 2}),
    ("LatentQuantize", 4**3, {"levels": 4, "codebook_dim": 3}),
]
"""Classes, sizes and arguments under which an index has several digits, or vectors are projected."""


def tokens():
    drawn = torch.randn(1, DIM, 1, 20, generator=torch.Generator().manual_seed(0))
    return drawn.requires_grad_()


def called(module, features):
    """What a module of the package gives for features, vectors first, tokens in rows."""
    rows = features[0, :, 0].T[None]
    if type(module).__name__ == "BinaryMapper":
        one_hot, indices, loss = module(rows[0], return_indices=True)
        bits = torch.tensor([[code >> bit & 1 for bit in range(DIM)] for code in range(2**DIM)])
        return (one_hot @ (2.0 * bits - 1))[None], indices[None], loss
    if type(module).__name__ != "LatentQuantize":
        return module(rows)
    quantized, *rest = module(rows.mT)
    return quantized.mT, *rest


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
    values, indices, *loss = called(reference, theirs)
    loss = loss[0].sum() if loss else torch.zeros(())
    torch.testing.assert_close(out.quantized[0, :, 0].T, values[0])
    torch.testing.assert_close(out.loss, loss)
    if cls != "LatentQuantize":  # whose own indices are not those of its values
        digits = indices.view(quantizer.codes.groups, out.indices.numel(), -1).transpose(0, 1)
        assert len(out.indices.unique()) == len(digits.unique(dim=0))
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
    values = called(quantizer.codes.module, tokens())[0]
    torch.testing.assert_close(out.quantized[0, :, 0].T, values[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("cls", "size", "arguments"), SEVERAL)
def test_several_codebooks_in_one_class(cls, size, arguments):
    quantizer = built(cls, codebook_size=size, arguments=arguments).eval()
    out = quantizer(tokens())
    values = called(quantizer.codes.module, tokens())[0]
    torch.testing.assert_close(out.quantized[0, :, 0].T, values[0], atol=1e-5, rtol=1e-5)
    assert out.indices.max() < size and torch.equal(quantizer.decode(out.indices), out.quantized)


@pytest.mark.parametrize("cls", CASES)
def test_a_network_that_is_filled_from_a_file_decodes_as_the_stored_one(cls):
    """The package has tensors that no file holds, which a network without memory lacked."""
    stored = built(cls)
    with torch.device("meta"):
        filled = built(cls)
    filled.load_state_dict(stored.state_dict(), assign=True)
    assert torch.equal(filled.eval().codebook, stored.eval().codebook)


def test_every_public_class_is_known():
    """A class of a later version of the package shows here."""
    public = {name for name, value in vars(library).items() if isinstance(value, type)}
    assert public == {*CLASSES, *REFUSED} and set(CASES) == set(CLASSES)


@pytest.mark.parametrize("cls", REFUSED)
def test_classes_without_codes_for_tokens_are_refused_in_words(cls):
    with pytest.raises(ValueError, match=f"cls cannot be {cls}: "):
        build_quantizer("vqp", cls=cls)


def test_the_index_of_latent_values_that_have_learned_is_that_of_the_nearest():
    """The class's own is cut off after sums of floats, and counts values where they started."""
    quantizer = built("LatentQuantize")
    with torch.no_grad():
        for values in quantizer.codes.module.values_per_latent:
            values.add_(0.07 * torch.arange(len(values)))
    codebook = quantizer.eval().codebook
    expected = torch.cdist(tokens()[0, :, 0].T, codebook).argmin(1)
    assert torch.equal(quantizer.encode(tokens()).flatten(), expected)


def test_a_forward_pass_without_upkeep_leaves_the_averages_alone():
    quantizer = built("VectorQuantize")
    before = quantizer.codebook.clone()
    with quantizer.without_upkeep():
        quantizer(tokens())
    assert torch.equal(quantizer.codebook, before)
    quantizer(tokens())
    assert not torch.equal(quantizer.codebook, before)


PROJECTED = [
    ("FSQ", {"levels": [3, 3]}, 9),
    ("ResidualFSQ", {"num_quantizers": 2, "levels": [3, 3]}, 81),
    ("LFQ", {}, 8),
    ("LFQ", {"has_projections": True}, 16),
]
"""Grids behind a learned map, whose codes move with it."""


@pytest.mark.parametrize(("cls", "arguments", "size"), [*((c, a, k) for c, (k, a) in CASES.items()), *PROJECTED])
def test_it_is_called_a_fixed_grid_where_no_code_moves(cls, arguments, size):
    quantizer = built(cls, arguments=arguments, codebook_size=size)
    start = quantizer.config.codebook_init
    before = quantizer.codebook.detach().clone()
    out = quantizer(tokens())
    (out.quantized.square().sum() + out.loss).backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.sub_(0 if parameter.grad is None else 0.1 * parameter.grad)
    # LatentQuantize has values to be trained, which only an argument of it trains.
    stayed = torch.equal(quantizer.codebook, before) and cls != "LatentQuantize"
    assert start == ("grid" if stayed else "library")
    settings = to_dict(quantizer.config)
    # Earlier versions wrote "grid" for every class.
    assert to_dict(build_quantizer(**settings | {"codebook_init": "grid"}).config) == settings
    assert facts_of({"tokenizer": {"quantizer": settings}}).fixed == (start == "grid")
    assert INITIALISATIONS[start] == {"grid": "fixed grid", "library": "its library's"}[start]


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
        ({"cls": "FSQ", "arguments": {"channel_first": True}}, "must not say how tensors lie; got channel_first"),
        ({"cls": "ResidualVQ", "arguments": {"quantize_dropout": True}}, "must not have quantize_dropout"),
        ({"cls": "VectorQuantize", "arguments": {"heads": 2}}, "write into arguments separate_codebook_per_head"),
        ({"cls": "GroupedResidualVQ", "codebook_size": 99}, "codebook_size must be 81 for GroupedResidualVQ"),
        ({"cls": "BinaryMapper", "codebook_size": 99}, "codebook_size must be 16 for BinaryMapper"),
        ({"cls": "BinaryMapper", "arguments": {"bits": 3}}, "bits must be code_dim, 4"),
        ({"cls": "BinaryMapper", "arguments": {"deterministic_on_eval": False}}, "evaluation must give the same"),
        ({"cls": "SimVQ", "loss_weight": -1.0}, "loss_weight must be ≥ 0"),
        (
            {"cls": "ResidualVQ", "arguments": {"num_quantizers": 0}},
            "num_quantizers must be a whole number, at least 1",
        ),
        ({"cls": "ResidualVQ", "arguments": {"num_quantizers": "2"}}, "at least 1; got '2'"),
        ({"cls": "VectorQuantize", "arguments": {"heads": 0}}, "heads must be a whole number, at least 1; got 0"),
        ({"cls": "VectorQuantize", "arguments": {"dim": 8}}, "dim is code_dim = .*got 8. Leave it out"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        built(**{"cls": "FSQ", **settings}) if settings["cls"] in CASES else build_quantizer("vqp", **settings)
