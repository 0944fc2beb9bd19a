"""The rotation trick as a preset: the matrix written out, the reference library, and which codes learn."""

import pytest
import torch
from torch.nn import functional as F

from ibqlab.quantizers import build_quantizer, quantizer_config

CODES, DIM = 12, 5


def tokens():
    drawn = torch.randn(30, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.requires_grad_()


def grid(z):
    """Tokens (N, D) as features (1, D, 1, N)."""
    return z.T[None, :, None]


def built(name="vq_rotation", **settings):
    torch.manual_seed(0)
    return build_quantizer(
        name, **{"codebook_size": CODES, "code_dim": DIM, "codebook_init": "normal", **settings}
    ).double()


def test_value_and_gradient_are_those_of_the_rotation_matrix():
    quantizer = built()
    mine, theirs = tokens(), tokens()
    out = quantizer(grid(mine))
    codes = quantizer.codebook.detach()[out.indices.flatten()]
    values = []
    for z, c in zip(theirs, codes, strict=True):
        with torch.no_grad():
            a, b = z / z.norm(), c / c.norm()
            r = (a + b) / (a + b).norm()
            rotation = torch.eye(DIM, dtype=z.dtype) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
            scale = c.norm() / z.norm()
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(DIM, dtype=z.dtype))
        values.append(scale * rotation @ z)
    values = torch.stack(values)
    torch.testing.assert_close(values, codes)
    torch.testing.assert_close(out.quantized, grid(values), atol=1e-10, rtol=0)
    weights = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.quantized * grid(weights)).sum().backward()
    (values * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)


def test_the_reference_library_agrees_in_value_and_gradient():
    library = pytest.importorskip("vector_quantize_pytorch")
    reference = library.VectorQuantize(
        dim=DIM, codebook_size=CODES, rotation_trick=True, commitment_weight=0.0
    ).double()
    quantizer = built()
    reference._codebook.embed.data.copy_(quantizer.codebook[None])
    mine, theirs = tokens(), tokens()
    out = quantizer(grid(mine))
    values, indices, _ = reference(theirs[None], freeze_codebook=True)
    assert torch.equal(out.indices.flatten(), indices[0])
    torch.testing.assert_close(out.quantized, grid(values[0]), atol=1e-6, rtol=1e-6)
    out.quantized.pow(3).sum().backward()
    values.pow(3).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-6)


def test_it_is_vq_but_for_the_gradient_to_the_features():
    turned, plain = built(), built("vq")
    assert quantizer_config({"name": "vq_rotation"}).gradient == "rotation"
    outs = turned(grid(tokens())), plain(grid(tokens()))
    torch.testing.assert_close(outs[0].quantized, outs[1].quantized)
    for out in outs:
        out.loss.backward()
    assert torch.equal(turned.codebook_gradient, plain.codebook_gradient)


def test_only_chosen_codes_learn_and_most_collapse():
    torch.manual_seed(0)
    quantizer = build_quantizer("vq_rotation", codebook_size=16, code_dim=2, codebook_init="normal")
    data = torch.tensor([[3.0, 0], [0, 3.0], [-2.0, -2.0]]).repeat_interleave(20, 0)
    data = data + 0.1 * torch.randn_like(data)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for step in range(30):
        out = quantizer(grid(data))
        optimizer.zero_grad()
        out.loss.backward()
        if step == 0:
            learning = quantizer.codebook_gradient.norm(dim=1) > 0
            assert learning.nonzero()[:, 0].tolist() == out.indices.unique().tolist()
            assert learning.float().mean() < 0.5
        optimizer.step()
    assert len(quantizer.encode(grid(data)).unique()) < 8


def test_features_without_direction_give_no_nan():
    z = torch.zeros(1, DIM, 1, 3, dtype=torch.float64, requires_grad=True)
    out = built()(z)
    (out.quantized.sum() + out.loss).backward()
    assert out.quantized.isfinite().all() and z.grad.isfinite().all()
    assert F.mse_loss(out.quantized, z) == 0


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="did you mean 'rotation'"):
        quantizer_config({"name": "vq_rotation", "gradient": "rotate"})
