"""Grouped quantization: each group is the inner quantizer on its channels, whatever it is."""

import pytest
import torch

from ibqlab.quantizers import build_quantizer, quantizer_config

SIZE, DIM = 5, 6


def tokens():
    drawn = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.requires_grad_()


def grid(z):
    """Tokens (N, D) as features (1, D, 1, N)."""
    return z.T[None, :, None]


@pytest.mark.parametrize("name", ["vq", "ibq", "vq_rotation", "diveq"])
@pytest.mark.parametrize("shared", [False, True])
def test_value_loss_and_gradients_are_those_of_the_groups(name, shared):
    torch.manual_seed(0)
    inner = {"name": name, "codebook_size": SIZE, "codebook_init": "normal"}
    quantizer = build_quantizer("grouped", groups=3, code_dim=DIM, shared=shared, inner=inner).double()
    mine, theirs = tokens(), tokens()
    torch.manual_seed(2)
    out = quantizer(grid(mine))
    ((out.quantized**3).sum() + out.loss).backward()
    gradients = [part.codebook_gradient.clone() for part in quantizer.codes.parts]
    quantizer.zero_grad()
    torch.manual_seed(2)
    outs = [part(grid(piece)) for part, piece in zip(quantizer.parts, theirs.split(2, 1), strict=True)]
    value, loss = torch.cat([one.quantized for one in outs], 1), sum(one.loss for one in outs) / 3
    torch.testing.assert_close(out.quantized, value, atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    indices = [one.indices for one in outs]
    assert torch.equal(out.indices, (indices[0] * SIZE + indices[1]) * SIZE + indices[2])
    ((value**3).sum() + loss).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)
    for part, gradient in zip(quantizer.codes.parts, gradients, strict=True):
        torch.testing.assert_close(part.codebook_gradient, gradient, atol=1e-10, rtol=0)
    if name == "vq":
        torch.testing.assert_close(loss, 1.25 * (value - grid(theirs)).square().mean())


def test_few_codes_make_many_combinations_and_each_learns_by_its_parts():
    torch.manual_seed(0)
    quantizer = build_quantizer(
        "grouped", codebook_size=16, code_dim=2, inner={"name": "vq", "codebook_init": "normal"}
    )
    data = torch.randn(60, 2)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for _ in range(30):
        optimizer.zero_grad()
        quantizer(grid(data)).loss.backward()
        optimizer.step()
    used = [len(digit.unique()) for digit in quantizer.codes.digits(quantizer.encode(grid(data)))]
    assert len(quantizer.encode(grid(data)).unique()) > max(used) >= 2
    learning = quantizer.codebook_gradient.norm(dim=1) > 0
    first, second = (part.codebook_gradient.norm(dim=1) > 0 for part in quantizer.parts)
    assert torch.equal(learning.view(4, 4), first[:, None] | second[None])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"groups": 0}, "groups must be from 1 to 24, got 0"),
        ({"groups": 4, "code_dim": 6}, "code_dim must be a multiple of groups = 4; got 6. Use 4"),
        ({"code_dim": 6, "inner": {"name": "vq", "code_dim": 6}}, "code_dim must be 12 for 2 parts"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        quantizer_config({"name": "grouped", **settings})
