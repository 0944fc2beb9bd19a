"""Published names: which key of a published state dict is which tensor of ours.

Submodules of ours carry their published names, all but the codebook. Averaged weights (EMA) are stored under the
parameter's name with its dots removed, which cannot be undone from the name alone; so every name is built from the
parameter it belongs to, and none is taken apart.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ibqlab.base.escaping import for_terminal
from ibqlab.pretrained.architecture import CODEBOOK
from ibqlab.pretrained.stored import NUMBER_TYPES, CheckpointError

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
    like: dict[str, Tensor] = {}
    places: dict[str, Place] = {}
    averaged = any(key.startswith(AVERAGE) and key not in (DECAY, UPDATES) for key in tensors)
    for name, value in tokenizer.state_dict().items():
        key = published_name(name)
        places[key], like[key] = Place("tokenizer", name), value
        if averaged and name in parameters:
            places[average_name(key)], like[average_name(key)] = Place("tokenizer_ema", name), value
    for key, value in tensors.items():
        if key.startswith(DISCRIMINATOR):
            name = key.removeprefix(DISCRIMINATOR)
            places[key] = Place("discriminator", name)
            if average_name(key) in tensors and not name.endswith(STATISTICS):
                places[average_name(key)] = Place("discriminator_ema", name)
                like[average_name(key)] = value
        elif key.startswith(PERCEPTUAL):
            places[key] = Place("perceptual loss", key.removeprefix(PERCEPTUAL))
        elif key in (DECAY, UPDATES):
            places[key] = Place("bookkeeping", key.removeprefix(AVERAGE))
    check_filled(tensors, places, like)
    return {key: places[key] for key in tensors}


def check_filled(
    tensors: Mapping[str, Tensor],
    places: Mapping[str, Place],
    like: Mapping[str, Tensor],
    *,
    kind: str = "tokenizer",
) -> None:
    """Every place has its tensor, every tensor its place, and every tensor of the model its shape and kind of number.

    Args:
        tensors: what arrived, by the file's keys.
        places: where each belongs.
        like: tensors of the model, by the same keys; they may be without memory.
        kind: what the model is, for the message.
    Raises:
        CheckpointError: the message lists what is missing, what is left over, and what has another shape or type.
    """
    pairs = {key: (tensors[key], like[key]) for key in like if key in tensors}
    differ = [
        f"{key} {tuple(value.shape)}, not {tuple(model.shape)}"
        for key, (value, model) in pairs.items()
        if value.shape != model.shape
    ]
    types = [
        f"{key} {value.dtype}, not {model.dtype}"
        for key, (value, model) in pairs.items()
        if not _same_kind(value, model)
    ]
    findings = [
        _list("missing", [key for key in places if key not in tensors]),
        _list("unknown", [key for key in tensors if key not in places]),
        _list("of another shape", differ),
        _list("of another type", types),
    ]
    if any(findings):
        raise CheckpointError(
            f"the tensors must be those of one {kind}, all of them and no others (perceptual loss, discriminator, "
            f"averages and first stage aside); {'; '.join(filter(None, findings))}. Give the file as it was saved"
        )


def _same_kind(value: Tensor, model: Tensor) -> bool:
    """Whether a stored tensor can stand for one of the model: any of the usual float types, or the very same type."""
    return value.dtype in NUMBER_TYPES if model.is_floating_point() else value.dtype == model.dtype


def _list(kind: str, keys: Iterable[str], shown: int = 4) -> str:
    keys = [for_terminal(key) for key in keys]
    more = f" and {len(keys) - shown:,} more" if len(keys) > shown else ""
    return f"{len(keys):,} {kind} ({', '.join(keys[:shown])}{more})" if keys else ""
