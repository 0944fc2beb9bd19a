"""`vq_projected`: the published equations, which weights learn, and what its codebook is."""

import pytest
import torch
from clusters import continues_alike, train
from torch.nn import functional as F

from ibqlab.quantizers import build_quantizer


def built(size=12, dim=6, projected=3, **settings):
    torch.manual_seed(1)
    return build_quantizer("vq_projected", codebook_size=size, code_dim=dim, projected_dim=projected, **settings)


def published(tokens, quantizer, beta=0.25):
    """LlamaGen's quantizer between two linear layers, N × K distances and all."""
    back, codes = quantizer.codes.map, quantizer.codes.weight
    unit = F.normalize(tokens @ quantizer.project.weight.T + quantizer.project.bias, dim=-1)
    embedding = F.normalize(codes, dim=-1)
    distances = unit.square().sum(1, keepdim=True) + embedding.square().sum(1) - 2 * unit @ embedding.T
    index = distances.argmin(1)
    chosen = embedding[index]
    loss = (chosen - unit.detach()).square().mean() + beta * (chosen.detach() - unit).square().mean()
    return (unit + (chosen - unit).detach()) @ back.weight.T + back.bias, index, loss


def test_values_and_gradients_are_the_published_ones():
    quantizer = built().double()
    z = torch.randn(2, 6, 5, 1, dtype=torch.float64, requires_grad=True)
    inputs = [z, *quantizer.parameters()]
    out = quantizer(z)
    ours = torch.autograd.grad(out.loss + out.quantized.sin().sum(), inputs)
    tokens = z.permute(0, 2, 3, 1).reshape(-1, 6)
    quantized, index, loss = published(tokens, quantizer)
    theirs = torch.autograd.grad(loss + quantized.sin().sum(), inputs)
    assert torch.equal(out.indices.flatten(), index)
    torch.testing.assert_close(out.quantized.permute(0, 2, 3, 1).reshape(-1, 6), quantized, atol=1e-10, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=1e-10, rtol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


def test_it_chooses_as_the_package_does():
    package = pytest.importorskip("vector_quantize_pytorch")
    ours = built()
    theirs = package.VectorQuantize(
        dim=6, codebook_size=12, codebook_dim=3, use_cosine_sim=True, rotation_trick=False, threshold_ema_dead_code=0
    ).eval()
    theirs.project_in.load_state_dict(ours.project.state_dict())
    theirs.project_out.load_state_dict(ours.codes.map.state_dict())
    theirs._codebook.embed.data.copy_(ours.codes.unit_codes()[None])
    z = torch.randn(2, 7, 6)
    quantized, indices, _ = theirs(z)
    out = ours.eval()(z.permute(0, 2, 1)[..., None])
    assert torch.equal(out.indices[..., 0], indices)
    torch.testing.assert_close(out.quantized[..., 0].permute(0, 2, 1), quantized)


def test_the_codebook_is_every_code_projected_back():
    quantizer = built().eval()
    out = quantizer(torch.randn(1, 6, 4, 4))
    assert quantizer.codebook.shape == (12, 6)
    assert torch.equal(out.quantized[0].flatten(1).T, quantizer.codebook[out.indices.flatten()])
    lengths = quantizer.codes.unit_codes().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(12))


def test_chosen_codes_alone_take_gradient():
    quantizer = built()
    out = quantizer(torch.randn(1, 6, 3, 1))
    (out.loss + out.quantized.square().sum()).backward()
    learned = quantizer.codebook_gradient.norm(dim=1) > 0
    assert learned.nonzero()[:, 0].tolist() == out.indices.unique().tolist()


def test_permuted_codes_have_permuted_indices():
    quantizer = built().eval()
    z = torch.randn(1, 6, 4, 4)
    before = quantizer.encode(z)
    order = torch.randperm(12)
    quantizer.codes.weight.data = quantizer.codes.weight.data[order]
    assert torch.equal(order[quantizer.encode(z)], before)


def test_clusters_around_the_origin_share_the_codes_and_clusters_to_one_side_do_not():
    """Codes are told apart by angle alone, and features far from the origin have all nearly the same."""
    around, aside = (train(built(16, 2, 2), centre=centre) for centre in (0.0, 3.0))
    assert around >= 0.5
    assert aside <= 0.25


def test_zero_features_and_one_token_give_numbers():
    quantizer = built()
    z = torch.zeros(1, 6, 1, 1, requires_grad=True)
    out = quantizer(z)
    (out.loss + out.quantized.sum()).backward()
    assert out.loss.isfinite() and z.grad.isfinite().all()


def test_it_resumes():
    assert continues_alike(built(8, 2, 2))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="projected_dim must be at least 1; got 0"):
        built(projected=0)
    with pytest.raises(ValueError, match=r'does not apply to vq_projected.*use "uniform"'):
        built(codebook_init="kmeans")
