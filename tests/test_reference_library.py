"""Quantizers of the core against vector-quantize-pytorch; those of `methods` have such a test in their own files."""

import pytest
import torch

from ibqlab.quantizers import build_quantizer

library = pytest.importorskip("vector_quantize_pytorch")
CODES, DIM = 12, 4


def tokens(scale=1.0):
    drawn = torch.randn(30, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (scale * drawn).requires_grad_()


def compare(quantizer, reference, scale=1.0, **arguments):
    """Values, loss and the gradient of both to the tokens."""
    mine, theirs = tokens(scale), tokens(scale)
    out = quantizer(mine.T[None, :, None])
    values, indices, loss = reference(theirs[None], **arguments)
    torch.testing.assert_close(out.quantized[0, :, 0].T, values[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    (out.quantized.pow(3).sum() + out.loss).backward()
    (values.pow(3).sum() + loss).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-10, rtol=0)
    return out.indices.flatten(), indices[0]


def test_lfq():
    reference = library.LFQ(
        dim=DIM, entropy_loss_weight=0.1, commitment_loss_weight=0.25, force_quantization_f32=False
    ).double()
    # Mild logits: the library cuts chances off at 10⁻⁵ inside its logarithms.
    quantizer = build_quantizer("lfq", codebook_size=2**DIM, entropy_temperature=1.0, entropy_epsilon=0.0).double()
    ours, theirs = compare(quantizer, reference, scale=0.3, inv_temperature=1.0)
    bits = [ours // 2**channel % 2 for channel in range(DIM)]
    # Its first channel is the most significant bit, ours the least.
    assert torch.equal(sum(bit * 2 ** (DIM - 1 - channel) for channel, bit in enumerate(bits)), theirs.long())


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_simvq(gradient):
    torch.manual_seed(0)
    quantizer = build_quantizer("simvq", codebook_size=CODES, code_dim=DIM, gradient=gradient).double()
    reference = library.SimVQ(dim=DIM, codebook_size=CODES, rotation_trick=gradient == "rotation").double()
    reference.frozen_codebook.copy_(quantizer.codes.anchors)
    reference.code_transform.weight.data.copy_(quantizer.codes.map.weight)
    quantizer.codes.map.bias.data.zero_()  # the library's map has none
    ours, theirs = compare(quantizer, reference)
    assert torch.equal(ours, theirs)
    expected = reference.code_transform.weight.grad
    torch.testing.assert_close(quantizer.codes.map.weight.grad, expected, atol=1e-10, rtol=0)


def test_moving_averages():
    """One step: the library smooths, weighs and divides alike."""
    torch.manual_seed(0)
    quantizer = build_quantizer("vq_ema", codebook_size=CODES, code_dim=DIM, ema_decay=0.8)
    reference = library.VectorQuantize(dim=DIM, codebook_size=CODES, decay=0.8, rotation_trick=False)
    book = reference._codebook
    for values in (book.embed, book.embed_avg):
        values.data.copy_(quantizer.codebook[None])
    z = tokens().detach().float()
    quantizer(z.T[None, :, None])
    reference(z[None])
    torch.testing.assert_close(quantizer.codebook, reference.codebook, atol=1e-5, rtol=1e-5)
