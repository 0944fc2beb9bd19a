"""Published names: which key of a published state dict is which tensor of ours.

Submodules of ours carry their published names, all but the codebook. Averaged weights (EMA) are stored under the
parameter's name with its dots removed, which cannot be undone from the name alone; so every name is built from the
parameter it belongs to, and none is taken apart.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ibqlab.pretrained.architecture import CODEBOOK
from ibqlab.pretrained.stored import CheckpointError

OUR_CODEBOOK = "quantizer.codes.weight"
AVERAGE = "model_ema."
DECAY, UPDATES = f"{AVERAGE}decay", f"{AVERAGE}num_updates"
DISCRIMINATOR = "loss.discriminator."
PERCEPTUAL = "loss.perceptual_loss."
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Ends of names of batch-norm buffers, which are not averaged."""


class Place(NamedTuple):
    """Where a tensor of a file belongs."""

    part: str
    """"tokenizer", "tokenizer_ema", "discriminator", "discriminator_ema", "perceptual loss" or "bookkeeping"."""
    name: str
    """Its name there."""


def published_name(name: str) -> str:
    """A tokenizer tensor's published name."""
    return CODEBOOK if name == OUR_CODEBOOK else name


def average_name(published: str) -> str:
    """The published name of a parameter's averaged weights, from its own published name."""
    return AVERAGE + published.replace(".", "")


def place_published(tensors: Mapping[str, Tensor], tokenizer: nn.Module) -> dict[str, Place]:
    """Where every tensor of a published file belongs.

    Args:
        tensors: by published name.
        tokenizer: of the architecture that the file holds; only names and shapes are looked at.
    Raises:
        CheckpointError: a tensor of the tokenizer is missing or has another shape, or a key has no known place.
    """
    parameters = {name for name, _ in tokenizer.named_parameters()}
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Place] = {}
    averaged = any(key.startswith(AVERAGE) and key not in (DECAY, UPDATES) for key in tensors)
    for name, value in tokenizer.state_dict().items():
        key = published_name(name)
        places[key], shapes[key] = Place("tokenizer", name), tuple(value.shape)
        if averaged and name in parameters:
            places[average_name(key)], shapes[average_name(key)] = Place("tokenizer_ema", name), tuple(value.shape)
    for key, value in tensors.items():
        if key.startswith(DISCRIMINATOR):
            name = key.removeprefix(DISCRIMINATOR)
            places[key] = Place("discriminator", name)
            if average_name(key) in tensors and not name.endswith(STATISTICS):
                places[average_name(key)] = Place("discriminator_ema", name)
                shapes[average_name(key)] = tuple(value.shape)
        elif key.startswith(PERCEPTUAL):
            places[key] = Place("perceptual loss", key.removeprefix(PERCEPTUAL))
        elif key in (DECAY, UPDATES):
            places[key] = Place("bookkeeping", key.removeprefix(AVERAGE))
    check_filled(tensors, places, shapes)
    return {key: places[key] for key in tensors}


def check_filled(
    tensors: Mapping[str, Tensor],
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    kind: str = "tokenizer",
) -> None:
    """Every place has its tensor, every tensor its place, and every tensor of the model its shape.

    Raises:
        CheckpointError: the message lists what is missing, what is left over and what has another shape.
    """
    arrived = {key: tuple(tensors[key].shape) for key in shapes if key in tensors}
    differ = [f"{key} {shape}, not {shapes[key]}" for key, shape in arrived.items() if shape != shapes[key]]
    findings = [
        _list("missing", [key for key in places if key not in tensors]),
        _list("unknown", [key for key in tensors if key not in places]),
        _list("of another shape", differ),
    ]
    if any(findings):
        raise CheckpointError(
            f"the tensors must be those of one {kind}, all of them and no others (perceptual loss, discriminator, "
            f"averages and first stage aside); {'; '.join(filter(None, findings))}. Give the file as it was saved"
        )


def _list(kind: str, keys: Iterable[str], shown: int = 4) -> str:
    keys = list(keys)
    more = f" and {len(keys) - shown:,} more" if len(keys) > shown else ""
    return f"{len(keys):,} {kind} ({', '.join(keys[:shown])}{more})" if keys else ""
