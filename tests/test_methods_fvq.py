"""`fvq`: the bridge against a transformer put together from torch's own parts, and what learns through it."""

import pytest
import torch
from clusters import continues_alike, plain_usage, train
from torch import nn
from torch.nn import functional as F

from ibqlab.quantizers import build_quantizer


def built(size=10, dim=3, **settings):
    torch.manual_seed(1)
    small = {"bridge_patch": 4, "bridge_width": 8, "bridge_heads": 2}
    return build_quantizer("fvq", codebook_size=size, code_dim=dim, codebook_init="normal", **small | settings)


def opened(quantizer):
    """The quantizer with a bridge that is no longer the identity."""
    nn.init.normal_(quantizer.codes.recover.weight)
    nn.init.normal_(quantizer.codes.recover.bias)
    return quantizer


def naive_bridge(codes):
    """Compress, process, recover, with `nn.MultiheadAttention` and affine-free norms."""
    weight = codes.weight
    padded = torch.cat([weight, weight.new_zeros(2, 3)])  # 10 codes in patches of 4
    tokens = codes.compress(padded.reshape(3, 12))
    norm = nn.LayerNorm(8, eps=1e-6, elementwise_affine=False)
    for block in codes.process:
        attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=weight.dtype)
        attention.in_proj_weight.data, attention.in_proj_bias.data = block.qkv.weight.data, block.qkv.bias.data
        attention.out_proj.load_state_dict(block.merge.state_dict())
        normed = norm(tokens)[None]
        tokens = tokens + attention(normed, normed, normed)[0][0]
        tokens = tokens + block.reduce(F.gelu(block.expand(norm(tokens)), approximate="tanh"))
    return weight + codes.recover(norm(tokens)).reshape(12, 3)[:10]


def test_the_bridge_is_a_transformer_over_patches():
    quantizer = opened(built().double())
    torch.testing.assert_close(quantizer.codebook, naive_bridge(quantizer.codes), atol=1e-10, rtol=0)


def test_it_starts_as_the_identity():
    quantizer = built()
    assert torch.equal(quantizer.codebook, quantizer.codes.weight)


def test_values_and_gradients_are_those_of_vq_over_the_bridged_codes():
    quantizer = opened(built().double())
    z = torch.randn(1, 3, 6, 1, dtype=torch.float64, requires_grad=True)
    inputs = [z, *quantizer.parameters()]
    out = quantizer(z)
    ours = torch.autograd.grad(out.loss + out.quantized.sin().sum(), inputs)
    tokens, codes = z[0, :, :, 0].T, quantizer.codebook
    index = torch.cdist(tokens, codes).argmin(1)
    loss = 0.25 * F.mse_loss(tokens, codes[index].detach()) + F.mse_loss(codes[index], tokens.detach())
    theirs = torch.autograd.grad(loss + (tokens + (codes[index] - tokens).detach()).sin().sum(), inputs)
    assert torch.equal(out.indices.flatten(), index)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


def test_it_goes_as_the_package_goes_with_the_same_bridge():
    package = pytest.importorskip("vector_quantize_pytorch")
    quantizer = opened(built())

    class Bridge(nn.Module):
        def forward(self, codes):
            return quantizer.codebook[None]

    theirs = package.VectorQuantize(
        dim=3,
        codebook_size=10,
        vq_bridge=Bridge(),
        rotation_trick=False,
        commitment_weight=1.0,
        threshold_ema_dead_code=0,
    )
    z = torch.randn(1, 6, 3)
    quantized, indices, _ = theirs(z)
    out = quantizer(z.permute(0, 2, 1)[..., None])
    assert torch.equal(out.indices[..., 0], indices)
    torch.testing.assert_close(out.quantized[..., 0].permute(0, 2, 1), quantized)


def test_chosen_codes_have_the_gradient_and_all_stored_codes_learn():
    quantizer = opened(built())
    quantizer(torch.randn(1, 3, 1, 1)).loss.backward()
    assert (quantizer.codebook_gradient.norm(dim=1) > 0).sum() == 1
    assert (quantizer.codes.weight.grad.norm(dim=1) > 0).all()


def test_on_clusters_more_codes_are_used_than_by_vq():
    torch.manual_seed(0)
    quantizer = build_quantizer("fvq", codebook_size=16, code_dim=2, bridge_patch=2)
    assert train(quantizer) > plain_usage()


def test_the_largest_codebook_passes_the_bridge():
    """In patches of 256, so that it takes no time; the default of 16 makes 16,384 tokens of it."""
    torch.manual_seed(0)
    quantizer = build_quantizer("fvq", codebook_size=2**18, code_dim=2, bridge_patch=256, bridge_width=8)
    quantizer(torch.randn(1, 2, 2, 2)).loss.backward()
    assert quantizer.codes.weight.grad.isfinite().all()


def test_it_resumes():
    assert continues_alike(built(8, 2))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"multiple of bridge_heads; got 9 and 2\. Use bridge_width=8"):
        built(bridge_width=9)
    with pytest.raises(ValueError, match="bridge_patch must be at least 1; got 0"):
        built(bridge_patch=0)
    with pytest.raises(ValueError, match="does not apply to fvq"):
        build_quantizer("fvq", codebook_init="kmeans")
