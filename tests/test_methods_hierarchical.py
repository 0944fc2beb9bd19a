"""Hierarchical quantization: coarse codes first, finer ones that know of them."""

import pytest
import torch
from torch.nn import functional as F

from ibqlab.quantizers import build_quantizer, quantizer_config

SIZE, DIM = 6, 4


def image(height=6, width=8):
    drawn = torch.randn(2, DIM, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.requires_grad_()


def built(**settings):
    torch.manual_seed(0)
    inner = {"name": "vq", "codebook_size": SIZE, "code_dim": DIM, "codebook_init": "normal", "beta_on": "encoder"}
    return build_quantizer("hierarchical", **{"inner": inner, **settings}).double()


def two_levels(z, quantizer):
    """The algorithm written plainly, for two levels of nearest codes."""
    (top, bottom), codes = (part.codebook for part in quantizer.parts), quantizer.codes

    def nearest(cells, codebook):
        rows = cells.permute(0, 2, 3, 1)
        chosen = torch.cdist(rows.flatten(0, 2), codebook).argmin(1).view(rows.shape[:3])
        vectors = codebook[chosen].permute(0, 3, 1, 2)
        loss = 0.25 * (cells - vectors.detach()).square().mean() + (vectors - cells.detach()).square().mean()
        return cells + (vectors - cells).detach(), chosen, loss

    def apply(layer, cells):
        return F.linear(cells.permute(0, 2, 3, 1), layer.weight, layer.bias).permute(0, 3, 1, 2)

    e_top, k_top, loss_top = nearest(apply(codes.inward[0], F.avg_pool2d(z, 2)), top)
    raised = F.interpolate(e_top, scale_factor=2, mode="nearest")
    e_bottom, k_bottom, loss_bottom = nearest(apply(codes.inward[1], torch.cat([z, raised], 1)), bottom)
    value = apply(codes.outward[0], raised) + apply(codes.outward[1], e_bottom)
    indices = k_top.repeat_interleave(2, 1).repeat_interleave(2, 2) * SIZE + k_bottom
    return value, indices, (loss_top + loss_bottom) / 2


@pytest.mark.parametrize("disturbed", [False, True])
def test_value_indices_loss_and_gradients_are_those_of_the_algorithm(disturbed):
    quantizer, reference = built(), built()
    if disturbed:  # the maps as training may leave them
        for one in (quantizer, reference):
            torch.manual_seed(1)
            for weight in (*one.codes.inward.parameters(), *one.codes.outward.parameters()):
                weight.data.add_(0.3 * torch.randn_like(weight))
    mine, theirs = image(), image()
    out = quantizer(mine)
    value, indices, loss = two_levels(theirs, reference)
    torch.testing.assert_close(out.quantized, value, atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    assert torch.equal(out.indices, indices)
    (out.quantized.pow(3).sum() + out.loss).backward()
    (value.pow(3).sum() + loss).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)
    for ours, its in zip(quantizer.parameters(), reference.parameters(), strict=True):
        assert ours.grad.norm() > 0
        torch.testing.assert_close(ours.grad, its.grad, atol=1e-10, rtol=0)


def test_it_begins_as_residual_quantization_over_halved_grids():
    quantizer, features = built().eval(), image().detach()
    top = quantizer.parts[0].decode(quantizer.parts[0].encode(F.avg_pool2d(features, 2))).double()
    raised = F.interpolate(top, scale_factor=2, mode="nearest")
    rest = quantizer.parts[1].decode(quantizer.parts[1].encode(features - raised)).double()
    torch.testing.assert_close(quantizer(features).quantized, raised + rest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (2, 2), (1, 1), (1, 6)])
@pytest.mark.parametrize("levels", [1, 3])
def test_grids_of_every_shape_decode_to_what_evaluation_gives(shape, levels):
    quantizer = built(levels=levels).eval()
    features = image(*shape).detach()
    out = quantizer(features)
    assert torch.equal(out.indices, quantizer.encode(features))
    torch.testing.assert_close(quantizer.decode(out.indices), out.quantized)
    torch.testing.assert_close(quantizer.codebook[out.indices].permute(0, 3, 1, 2), out.quantized)


def test_a_finer_level_learns_from_what_lies_above():
    quantizer, features = built(), image()
    quantizer(features).quantized.square().sum().backward()
    above = quantizer.codes.inward[1].weight.grad[:, DIM:]
    assert above.norm() > 0


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="levels must be from 1 to 8"):
        quantizer_config({"name": "hierarchical", "levels": 9})
    with pytest.raises(ValueError, match="inner must be settings of a quantizer of single tokens"):
        quantizer_config({"name": "residual", "inner": {"name": "hierarchical"}})
