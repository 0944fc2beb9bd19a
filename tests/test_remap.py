"""Indices of the codes that are kept: the published values, both ways, and the order of β in the same quantizer."""

import numpy as np
import pytest
import torch
from golden import golden

from ibqlab.quantizers import IndexRemap, build_quantizer


def assert_near(ours, theirs, tolerance):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-12)


class TestGoldenValues:
    def test_positions_and_back(self):
        facts, stored = golden("peers/taming_quantizer_options")
        remap = IndexRemap(stored["used"], facts["unknown_index"])
        flat = remap.to_positions(stored["indices"])
        assert torch.equal(flat[:, None], stored["remap/flat/indices"])
        assert torch.equal(flat.view(2, 3, 4), stored["remap/sane/indices"])
        assert remap.size == len(stored["used"]) + 1 and (flat == len(stored["used"])).any()
        for shape in ("flat", "sane"):
            quantizer = build_quantizer("vq", codebook_size=24, code_dim=6)
            quantizer.codes.weight.data.copy_(stored["codebook"])
            codes = quantizer.decode(remap.to_codes(stored[f"remap/{shape}/indices"]).view(2, 3, 4))
            assert torch.equal(codes, stored[f"remap/{shape}/codes_from_indices"])

    @pytest.mark.parametrize("legacy", [0, 1])
    @pytest.mark.parametrize(
        ("tag", "dtype", "tolerance"), [("f64", torch.float64, 1e-6), ("f32", torch.float32, 1e-4)]
    )
    def test_the_side_of_beta(self, legacy, tag, dtype, tolerance):
        facts, stored = golden("peers/taming_quantizer_options")
        side, beta = "codebook" if legacy else "encoder", facts["config"]["beta"]
        quantizer = build_quantizer("vq", codebook_size=24, code_dim=6, beta=beta, beta_on=side).to(dtype)
        quantizer.codes.weight.data.copy_(stored["codebook"])
        z = stored["z"].to(dtype).requires_grad_()
        out = quantizer(z)
        (out.quantized.square().sum() + out.loss).backward()
        assert torch.equal(out.indices.flatten(), stored["indices"])
        for ours, key in (
            (out.loss, "loss"),
            (out.quantized, "z_q"),
            (z.grad, "grad_z"),
            (quantizer.codes.weight.grad, "grad_codebook"),
        ):
            assert_near(ours, stored[f"legacy{legacy}/{tag}/{key}"], tolerance)


USED = [7, 2, 9, 2]


def test_a_number_that_stands_twice_keeps_its_first_position():
    remap = IndexRemap(USED, 0)
    assert remap.to_positions(torch.tensor([[7, 2], [9, 2]])).tolist() == [[0, 1], [2, 1]]
    assert remap.to_codes([0, 1, 2, 3]).tolist() == USED


@pytest.mark.parametrize(("unknown", "position", "code"), [("extra", 4, 7), (2, 2, 9), (0, 0, 7)])
def test_codes_that_are_not_kept(unknown, position, code):
    remap = IndexRemap(np.array(USED), unknown)
    positions = remap.to_positions(torch.tensor([0, 7, 1000]))
    assert positions.tolist() == [position, 0, position]
    assert remap.to_codes(positions).tolist() == [code, 7, code]
    assert remap.size == (5 if unknown == "extra" else 4)


def test_random_positions_are_drawn_at_every_call():
    remap, strange = IndexRemap(range(10, 20)), torch.arange(10).repeat(40)
    first, second = remap.to_positions(strange), remap.to_positions(strange)
    assert not torch.equal(first, second) and first.unique().tolist() == list(range(10))
    again = [remap.to_positions(strange, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)
    assert remap.to_positions(torch.arange(10, 20)).tolist() == list(range(10))


def test_positions_of_nothing_are_nothing():
    assert IndexRemap(USED).to_positions(torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: IndexRemap([]), "used must be a list of the codes kept, at least one"),
        (lambda: IndexRemap([[1, 2]]), r"used must be a list .* got \(1, 2\)"),
        (lambda: IndexRemap([3, -1]), "numbers of codes, 0 or more; got -1"),
        (lambda: IndexRemap(USED, 4), "unknown must be 'random', 'extra' or a position, 0 to 3; got 4"),
        (lambda: IndexRemap(USED, "other"), "unknown must be 'random'.*got 'other'"),
        (lambda: IndexRemap(USED, True), "unknown must be .*got True"),
        (lambda: IndexRemap(USED).to_positions(torch.tensor([-2])), "indices must be 0 or more; got -2"),
        (lambda: IndexRemap(USED).to_codes([4]), r"positions .*0 … 3 \(4 codes are kept\)"),
        (lambda: IndexRemap(USED).to_positions(torch.zeros(2)), "whole numbers"),
    ],
)
def test_what_is_no_index_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
