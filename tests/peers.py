"""Golden values of other systems' tokenizers against ours, opened by `load_tokenizer`: all that their published code
gave, from features to every gradient."""

import json
from pathlib import Path
from typing import Any

import torch
from golden import golden, golden_file
from torch import Tensor

from ibqlab.pretrained import load_tokenizer
from ibqlab.pretrained.published_files import identify_tokenizer
from ibqlab.pretrained.tensor_files import TensorFile
from ibqlab.tokenizer import Tokenizer

FORWARD, GRADIENT, DOUBLE = 1e-5, 1e-4, 1e-6
"""Tolerances of the golden values, relative to the largest number of a tensor."""


def same(actual: Tensor, expected: Tensor, tolerance: float = FORWARD) -> None:
    """Equal to a share of the largest number."""
    actual, expected = actual.detach().double(), expected.double()
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(expected.abs().max(), 1e-12)


def stored_file(name: str, folder: Path) -> Path:
    """The published container of a set of golden values; a bare state dict of its tensors where there is none."""
    facts, tensors = golden(f"peers/{name}")
    if "weights" in facts:
        return golden_file(f"peers/{facts['weights'].rstrip('/')}")
    start = "state_dict/"
    state = {key.removeprefix(start): value.float() for key, value in tensors.items() if key.startswith(start)}
    torch.save(state, folder / f"{name}.pt")
    return folder / f"{name}.pt"


def opened(name: str, folder: Path, **told: Any) -> Tokenizer:
    """The tokenizer of a set of golden values, in float32, every key of its file accounted for."""
    tokenizer = load_tokenizer(stored_file(name, folder), **told).float()
    report = tokenizer.load_report
    assert report.accounted == report.keys
    return tokenizer


def check_forward(name: str, tokenizer: Tokenizer, low: float = -1.0, part: str = "out") -> None:
    """Features, indices, code vectors, reconstructions and losses of evaluation.

    Args:
        name: of the golden set.
        tokenizer: opened.
        low: least value of the system's images, −1 or 0; the largest is 1.
        part: prefix of the tensors.
    """
    _, values = golden(f"peers/{name}")
    values |= {key.replace(f"{part}/", "now/", 1): value for key, value in values.items() if key.startswith(f"{part}/")}
    double = type(tokenizer)(tokenizer.config).double().eval()
    double.load_state_dict(tokenizer.state_dict())
    with torch.no_grad():
        for net, dtype, tolerance in ((tokenizer, torch.float32, FORWARD), (double, torch.float64, DOUBLE)):
            images = values["x"].to(dtype)
            out = net.encode(images, value_range=(low, 1))
            assert torch.equal(out.indices.flatten(), values["now/indices"].flatten().long())
            assert torch.equal(net.encode_indices(images, value_range=(low, 1)), out.indices)
            prefix = "f64" if dtype == torch.float64 else "now"
            if prefix == "f64" and part != "out":
                continue
            encoded = net.encoder(images * 2 - 1 if low == 0 else images)
            if prefix == "now":
                same(encoded, values["now/encoder_out"], tolerance)
                same(out.quantized, values["now/z_q"], tolerance)
                decoded = in_range(net.decode_indices(out.indices), low)
                same(decoded, values["now/x_rec_from_indices"], tolerance)
            same(net.quant_conv(encoded), values[f"{prefix}/h"], tolerance)
            same(in_range(net.decode(out.quantized), low), values[f"{prefix}/x_rec"], tolerance)


def in_range(images: Tensor, low: float) -> Tensor:
    """Reconstructions in [−1, 1] in the range of a system's images."""
    return (images + 1) / 2 if low == 0 else images


def check_quantizer(name: str, tokenizer: Tokenizer, gradients: dict[str, str], terms: dict[str, str]) -> None:
    """The quantizer in training on the golden features: values, losses and gradients, in float32 and float64.

    Args:
        name: of the golden set.
        tokenizer: opened.
        gradients: golden name → parameter of the quantizer.
        terms: golden loss → formula over our terms and the loss, such as "0.25 * commitment".
    """
    _, values = golden(f"peers/{name}")
    for dtype, word in ((torch.float64, "f64"), (torch.float32, "f32")):
        tolerance = DOUBLE if word == "f64" else GRADIENT
        quantizer = _copy(tokenizer, dtype).quantizer
        features = values["out/h"].to(dtype).requires_grad_()
        out = quantizer(features)
        assert torch.equal(out.indices.flatten(), values["train/indices"].flatten().long())
        total = (values["train/w"].to(dtype) * out.quantized).sum() + out.loss
        total.backward()
        same(out.quantized, values[f"train/{word}/z_q"], tolerance)
        same(total, values[f"train/{word}/total"], tolerance)
        for golden_name, formula in terms.items():
            value = torch.as_tensor(eval(formula, {"loss": out.loss, **out.terms}))
            same(value, values[f"train/{word}/{golden_name}"], tolerance)
        same(features.grad, values[f"train/{word}/grad_h"], tolerance)
        for golden_name, parameter in gradients.items():
            gradient = quantizer.get_parameter(parameter).grad
            expected = values[f"train/{word}/{golden_name}"]
            same(gradient.view(expected.shape), expected, tolerance)


def check_training(name: str, tokenizer: Tokenizer, low: float = -1.0, squared: bool = False) -> None:
    """Gradients of the whole network in training: those that are stored, and the norm of every one.

    Args:
        name: of the golden set.
        tokenizer: opened.
        low: as in `check_forward`.
        squared: whether the reconstruction loss is the mean square and not the mean distance.
    """
    facts, values = golden(f"peers/{name}")
    named = {ours: key for key, ours in tokenizer.load_report.used.items()}
    for dtype, word in ((torch.float64, "f64"), (torch.float32, "f32")):
        tolerance = DOUBLE if word == "f64" else GRADIENT
        net = _copy(tokenizer, dtype)
        images = values["x"].to(dtype)
        out = net(images * 2 - 1 if low == 0 else images)
        error = images - in_range(out.reconstruction, low)
        reconstruction = error.square().mean() if squared else error.abs().mean()
        total = reconstruction + out.quantizer.loss
        total.backward()
        expected = facts["train_model"][word]
        assert abs(float(total.detach()) - expected["total"]) <= tolerance * abs(expected["total"])
        gradients = {named[ours]: p.grad for ours, p in net.named_parameters() if p.grad is not None}
        norms = expected.get("grad_norms", {})
        largest = max(norms.values(), default=0)
        for key, norm in norms.items():
            assert abs(float(gradients[key].norm()) - norm) <= tolerance * largest, key
        start = f"train_model/{word}/grad/"
        for key, value in values.items():
            if key.startswith(start):
                gradient = gradients[key.removeprefix(start)]
                same(gradient.view(value.shape), value, tolerance)


def _copy(tokenizer: Tokenizer, dtype: torch.dtype) -> Tokenizer:
    """The same weights in another type, in training mode."""
    copy = Tokenizer(tokenizer.config).to(dtype)
    copy.load_state_dict(tokenizer.state_dict())
    return copy.train()


def full_size(model: str, **told: Any) -> tuple[str, Any, dict[str, int]]:
    """Family, settings and the number of keys of each part of a full-size list, on the device meta."""
    listed = json.loads(golden_file("peers/peers_state_dict_keys.json").read_text())[model]
    tensors = {
        key: torch.empty(shape, device="meta", dtype=getattr(torch, dtype.removeprefix("torch.")))
        for key, (shape, dtype) in listed.items()
    }
    file = TensorFile(path=Path("file"), format="state dict", tensors=tensors)
    family, config, roles = identify_tokenizer(file, tensors, **told)
    assert roles.keys() == tensors.keys()
    parts: dict[str, int] = {}
    for role in roles.values():
        parts[role.part] = parts.get(role.part, 0) + 1
    return family.name, config, parts
