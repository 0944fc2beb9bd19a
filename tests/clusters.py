"""A tiny run on clustered features of two dimensions: what a method does to codes that begin far from them."""

import copy
import io

import torch

from ibqlab.quantizers import build_quantizer

CLUSTERS = 16


def clustered_features(tokens=128, seed=0, centre=3.0):
    """(1, 2, tokens, 1): 16 clusters on a circle of radius 2 around (centre, centre)."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.arange(tokens) % CLUSTERS * (2 * torch.pi / CLUSTERS)
    centres = centre + 2 * torch.stack([angle.cos(), angle.sin()])
    return (centres + 0.05 * torch.randn(2, tokens, generator=generator))[None, :, :, None]


def train(quantizer, steps=30, progress=None, seed=0, centre=3.0):
    """Adam on the quantizer's own loss and reconstruction of fixed clusters; what `usage` it has at the end."""
    torch.manual_seed(seed)
    parameters = list(quantizer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.05) if parameters else None
    quantizer.train()
    for step in range(steps):
        quantizer.progress = step / steps if progress is None else progress
        features = clustered_features(seed=step, centre=centre).requires_grad_()
        out = quantizer(features)
        loss = out.loss + (out.quantized - features).square().mean()
        if optimizer and loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return usage(quantizer, centre)


def usage(quantizer, centre=3.0):
    """Share of codes that the clusters use in evaluation."""
    indices = quantizer.eval().encode(clustered_features(tokens=512, seed=1000, centre=centre))
    return len(indices.unique()) / quantizer.config.codebook_size


def plain_usage(size=CLUSTERS, **settings):
    """The same run of the published VQ."""
    torch.manual_seed(0)
    return train(build_quantizer("vq", codebook_size=size, code_dim=2, beta_on="encoder", **settings))


def continues_alike(quantizer, steps=3):
    """Whether a copy with the stored state goes on to the last bit as the quantizer itself does."""
    train(quantizer, steps, progress=0.5)
    stored = io.BytesIO()
    torch.save(quantizer.state_dict(), stored)
    stored.seek(0)
    twin = copy.deepcopy(quantizer)
    for value in twin.state_dict().values():
        value.zero_()
    twin.load_state_dict(torch.load(stored, weights_only=True))
    for one in (quantizer, twin):
        train(one, steps, progress=0.5, seed=7)
    states = quantizer.state_dict(), twin.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def permutes_alike(quantizer):
    """Whether codes in another order give the same choices in that order."""
    z, order = torch.randn(1, 3, 4, 4), torch.randperm(quantizer.config.codebook_size)
    before = quantizer.eval().encode(z)
    quantizer.codes.weight.data = quantizer.codes.weight.data[order]
    return torch.equal(order[quantizer.encode(z)], before)
