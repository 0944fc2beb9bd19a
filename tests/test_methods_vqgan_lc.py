"""`vqgan_lc`: the published loss over projected anchors, tables from files, and what learns."""

import dataclasses

import numpy as np
import pytest
import torch
from clusters import continues_alike, plain_usage
from clusters import train as train_on_clusters
from safetensors.torch import save_file

from ibqlab.pretrained import load_tokenizer
from ibqlab.quantizers import build_quantizer
from ibqlab.recipes.recipe_files import recipe_config
from ibqlab.training import train


def built(size=12, dim=3, anchor_dim=5, **settings):
    torch.manual_seed(1)
    return build_quantizer("vqgan_lc", codebook_size=size, code_dim=dim, anchor_dim=anchor_dim, **settings)


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_values_and_gradients_are_the_published_ones(projector):
    quantizer = built(projector=projector).double()
    z = torch.randn(2, 3, 5, 1, dtype=torch.float64, requires_grad=True)
    inputs = [z, *quantizer.parameters()]
    out = quantizer(z)
    ours = torch.autograd.grad(out.loss + out.quantized.sin().sum(), inputs)
    tokens = z.permute(0, 2, 3, 1).reshape(-1, 3)
    layers = [*quantizer.codes.layers]
    projection = layers[0] if projector == "linear" else torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])
    codes = projection(quantizer.codes.anchors)
    index = torch.cdist(tokens, codes).argmin(1)
    chosen = codes[index]
    loss = (chosen.detach() - tokens).square().mean() + 0.33 * (chosen - tokens.detach()).square().mean()
    quantized = tokens + (chosen - tokens).detach()
    theirs = torch.autograd.grad(0.1 * loss + quantized.sin().sum(), inputs)
    assert torch.equal(out.indices.flatten(), index)
    torch.testing.assert_close(out.quantized.permute(0, 2, 3, 1).reshape(-1, 3), quantized, atol=1e-10, rtol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_anchors_come_from_a_file_and_stay(tmp_path, kind):
    table, path = torch.randn(12, 5, dtype=torch.float64), tmp_path / f"table.{kind}"
    if kind == "npy":
        np.save(path, table.numpy())
    else:
        save_file({"codebook": table}, path)
    quantizer = built(anchors=str(path))
    assert torch.equal(quantizer.codes.anchors, table.float())
    train_on_clusters(
        build_quantizer("vqgan_lc", codebook_size=12, code_dim=2, anchor_dim=5, anchors=str(path)), steps=2
    )
    assert torch.equal(quantizer.state_dict()["codes.anchors"], table.float())


def test_a_checkpoint_brings_the_anchors_whose_file_is_gone(tmp_path):
    path = tmp_path / "table.npy"
    np.save(path, np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32))
    anchors = {"name": "vqgan_lc", "codebook_size": 12, "code_dim": 8, "anchor_dim": 5, "anchors": str(path)}
    small = {"data.source": "digits", "data.image_size": 8, "tokenizer.autoencoder.channel_multipliers": [1, 1]}
    small |= {"tokenizer.quantizer": anchors, "tokenizer.autoencoder.latent_channels": 8, "batch_size": 2, "steps": 1}
    config = recipe_config("builtin/smoke", small)
    run = train(config, tmp_path / "run", progress=False)
    path.unlink()
    longer = train(dataclasses.replace(config, steps=2), tmp_path / "run", progress=False)
    assert longer.metrics["step"].max() == 2
    from_it = dataclasses.replace(config, start_from=str(run.path))
    assert train(from_it, tmp_path / "other", progress=False).metrics["step"].max() == 1
    with pytest.raises(FileNotFoundError, match="anchors: no file"):
        train(config, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
    loaded = load_tokenizer(tmp_path / "run", "raw").quantizer.codes.anchors
    assert loaded.isfinite().all() and loaded.any()


def test_one_gradient_moves_every_code_though_chosen_ones_have_it():
    quantizer = built()
    before = quantizer.codebook.detach().clone()
    quantizer(torch.randn(1, 3, 1, 1)).loss.backward()
    assert (quantizer.codebook_gradient.norm(dim=1) > 0).sum() == 1
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.sub_(parameter.grad)
    assert ((quantizer.codebook - before).norm(dim=1) > 0).all()


def test_on_clusters_more_codes_are_used_than_by_vq():
    assert train_on_clusters(built(16, 2, 16, quantization_weight=1.0, beta=1.0), steps=60) > plain_usage()


def test_permuted_anchors_have_permuted_indices():
    quantizer = built().eval()
    z, order = torch.randn(1, 3, 4, 4), torch.randperm(12)
    before = quantizer.encode(z)
    quantizer.codes.anchors.copy_(quantizer.codes.anchors[order].clone())
    assert torch.equal(order[quantizer.encode(z)], before)


def test_it_resumes():
    assert continues_alike(built(8, 2))


def test_bad_settings_are_refused(tmp_path):
    path = str(tmp_path / "table.npy")
    with pytest.raises(FileNotFoundError, match=r"no file .*table\.npy\. Give the .npy or .safetensors file"):
        built(anchors=path)
    np.save(path, np.zeros((11, 5), dtype=np.float32))
    with pytest.raises(ValueError, match=r"are \(11, 5\), settings say \(12, 5\); set codebook_size=11"):
        built(anchors=path)
    np.save(path, np.full((12, 5), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        built(anchors=path)
    with pytest.raises(ValueError, match=r"must be a \.npy or \.safetensors file; got 'table\.pth'"):
        built(anchors="table.pth")
    with pytest.raises(ValueError, match="does not apply to vqgan_lc"):
        built(codebook_init="kmeans")
