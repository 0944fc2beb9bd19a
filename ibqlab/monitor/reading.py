"""What a row and a snapshot are measured on: the codebook, some features with their codes, and the fixed probe."""

from typing import NamedTuple

import torch
from torch import Tensor

from ibqlab.monitor import inputs
from ibqlab.monitor.trouble import Trouble


class Reading(NamedTuple):
    """What an update gave, checked; None where it was not given or is not what it must be."""

    codes: Tensor | None
    """(K, D), finite."""
    sample: Tensor | None
    """(n, D) float32: some of the features, finite."""
    chosen: Tensor | None
    """(n,) their codes, −1 for a token without one."""
    probe: Tensor | None
    """(m, D) float32: some of the features of a fixed batch, the same ones each time; where a snapshot is due."""
    dim: int | None
    """D."""


def read_tensors(
    given: inputs.UpdateInputs, flat: Tensor, codebook_size: int, most: tuple[int, int], trouble: Trouble
) -> Reading:
    """Read what an update was given.

    Args:
        given: tensors, or functions that give them.
        flat: (N,) the step's indices.
        codebook_size: K.
        most: features that are looked at, evenly spread, and likewise of the fixed probe; 0 where no snapshot is due.
        trouble: told of what is not what it must be.
    """
    codes = trouble.checked(
        lambda: _finite_codes(inputs.codebook_of(given.codebook, codebook_size, flat.device), codebook_size, trouble)
    )
    dim = None if codes is None else codes.shape[1]
    tokens = trouble.checked(lambda: _tokens(given.features, dim, len(flat)))
    sample = chosen = None
    if tokens is not None:
        dim = tokens.shape[1]
        rows = inputs.sample_rows(len(tokens), most[0])
        sample = tokens[rows.to(tokens.device)].float()
        if len(tokens) == len(flat):
            chosen = flat[rows.to(flat.device)]
        elif len(flat):
            trouble.warn(
                f"features must be one per index; got {len(tokens)} features and {len(flat)} indices, so the "
                "quantization error is left out. Pass features and indices of one forward pass"
            )
        sample, chosen = _finite(sample, chosen, trouble)
    probe = trouble.checked(lambda: _probe(given.probe, dim, most[1])) if most[1] else None
    return Reading(codes, sample, chosen, probe, dim)


def _finite_codes(codebook: object, codebook_size: int, trouble: Trouble) -> Tensor | None:
    if codebook is None:
        return None
    codes = inputs.checked_codebook(codebook, codebook_size)
    if bool(torch.isfinite(codes.sum())) or bool(torch.isfinite(codes).all()):  # a sum takes a twentieth of it
        return codes
    trouble.warn("codebook must be finite; it holds NaN or infinity, so what is measured on codes is left out")
    return None


def _tokens(features: inputs.Given, dim: int | None, indices: int) -> Tensor | None:
    """(N, D); None where there are none, as in a process whose share of the batch is empty."""
    features = inputs.value_of(features, "features")
    is_empty = not indices and isinstance(features, Tensor) and not features.numel()
    return None if features is None or is_empty else inputs.to_tokens(features, dim)


def _finite(sample: Tensor, chosen: Tensor | None, trouble: Trouble) -> tuple[Tensor | None, Tensor | None]:
    """A sample and its codes without rows of NaN or infinity; None where none is left."""
    good = torch.isfinite(sample).all(1)
    broken = len(sample) - int(good.sum())
    if not broken:
        return sample, chosen
    trouble.warn(f"features must be finite; {broken} of {len(sample)} rows looked at hold NaN or infinity, left out")
    if broken == len(sample):
        return None, None
    return sample[good], None if chosen is None else chosen[good.to(chosen.device)]


def _probe(given: inputs.Given, dim: int | None, most: int) -> Tensor | None:
    """Some rows of the fixed batch's features; their number and order alone decide which, so they are the same ones."""
    features = inputs.value_of(given, "probe")
    if features is None:
        return None
    tokens = inputs.to_tokens(features, dim, "probe")
    return tokens[inputs.sample_rows(len(tokens), most).to(tokens.device)].float()
