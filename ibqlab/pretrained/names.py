"""Published names: which key of a published state dict is which tensor of ours.

A generator's file holds the generator under `transformer.`, where names are ours already, and its tokenizer, the first
stage, under `first_stage_model.`. LlamaGen's holds the generator alone, under names of its own.

Submodules of ours carry their published names, all but the codebook. Averaged weights (EMA) are stored under the
parameter's name with its dots removed, which cannot be undone from the name alone; so every name is built from the
parameter it belongs to, and none is taken apart.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ibqlab.base.escaping import for_terminal
from ibqlab.pretrained.tensor_files import NUMBER_TYPES, CheckpointError
from ibqlab.pretrained.tokenizer_architecture import CODEBOOK, PUBLISHED_CODEBOOK

AVERAGE = "model_ema."
DECAY, UPDATES = f"{AVERAGE}decay", f"{AVERAGE}num_updates"
DISCRIMINATOR = "loss.discriminator."
PERCEPTUAL = "loss.perceptual_loss."
TRANSFORMER, FIRST_STAGE, CACHE = "transformer.", "first_stage_model.", ".kv_cache."
LLAMAGEN = {
    "cls_embedding": "class_emb",
    "tok_embeddings": "tok_emb",
    "layers": "blocks",
    "norm": "head_nm",
    "output": "head",
}
"""First parts of names in LlamaGen's generators, in the published order → in ours; the rest of a name is the same."""
LLAMAGEN_TOKENS, LLAMAGEN_CLASSES = "tok_embeddings.weight", "cls_embedding."
"""What tells LlamaGen's generators: VQGAN-LC's tokenizers have the first name, too, and not the second."""
SECOND = "averages/"
"""Ahead of the names of averages that a file holds as a second state dict with the names of the first."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Ends of names of batch-norm buffers, which are not averaged."""


class TensorRole(NamedTuple):
    """What a tensor of a file is."""

    part: str
    """"tokenizer", "tokenizer_ema", "discriminator", "discriminator_ema", "perceptual loss", "bookkeeping",
    "generator", "first stage (tokenizer)" or "caches of keys and values"."""
    name: str
    """Its name in that part."""


def published_name(name: str) -> str:
    """A tokenizer tensor's published name."""
    return PUBLISHED_CODEBOOK if name == CODEBOOK else name


def average_name(published: str) -> str:
    """The published name of a parameter's averaged weights, from its own published name."""
    return AVERAGE + published.replace(".", "")


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of the name."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def tokenizer_roles(
    tensors: Mapping[str, Tensor], tokenizer: nn.Module, roles: Mapping[str, TensorRole], title: str = "a tokenizer"
) -> dict[str, TensorRole]:
    """What every tensor of a tokenizer's file is, its averages among them.

    Args:
        tensors: by the file's names.
        tokenizer: of the architecture that the file holds; only names and shapes are looked at.
        roles: what each tensor is by its name alone; of averages (`model_ema.…`) no matter what.
        title: whose file it is, for the message.
    Raises:
        CheckpointError: a tensor of the tokenizer is missing or has another shape, or a key is none of the known ones.
    """
    parameters = {name for name, _ in tokenizer.named_parameters()}
    known = {key: role for key, role in roles.items() if not _is_average(key)}
    _refuse_doubles(known)
    key_of = {role.name: key for key, role in known.items() if role.part == "tokenizer"}
    averaged = any(_is_average(key) for key in tensors)
    model: dict[str, Tensor] = {}
    for name, value in tokenizer.state_dict().items():
        key = key_of.setdefault(name, published_name(name))
        known[key], model[key] = TensorRole("tokenizer", name), value
        if averaged and name in parameters:
            known[average_name(key)], model[average_name(key)] = TensorRole("tokenizer_ema", name), value
    ours = tokenizer.state_dict()
    for key, (part, name) in list(known.items()):
        if part == "tokenizer" and name not in ours:
            del known[key]
        elif part == "discriminator" and average_name(key) in tensors and not name.endswith(STATISTICS):
            known[average_name(key)] = TensorRole("discriminator_ema", name)
            model[average_name(key)] = tensors[key]
    check_complete(tensors, known, model, network=title)
    return {key: known[key] for key in tensors}


def second_roles(averages: Iterable[str], roles: Mapping[str, TensorRole]) -> dict[str, TensorRole]:
    """What the tensors of a second state dict are: averages of the parts that those of the first are."""
    first = {key: roles[key.removeprefix(SECOND)] for key in averages}
    return {
        key: TensorRole(f"{part}_ema" if part in ("tokenizer", "discriminator") else part, name)
        for key, (part, name) in first.items()
    }


def _is_average(key: str) -> bool:
    return key.startswith(AVERAGE) and key not in (DECAY, UPDATES)


def generator_roles(tensors: Mapping[str, Tensor]) -> dict[str, TensorRole]:
    """What every tensor of a published generator's file is; what is none of the known ones counts as the generator's.

    Args:
        tensors: by published name, with or without the prefix `transformer.`.
    """
    prefix = TRANSFORMER if any(key.startswith(TRANSFORMER) for key in tensors) else ""
    ours = _renamer(LLAMAGEN) if is_llamagen(tensors) else str
    first_stage = {key: TensorRole("first stage (tokenizer)", key) for key in tensors if key.startswith(FIRST_STAGE)}
    caches = {key: TensorRole("caches of keys and values", key) for key in tensors if CACHE in key}
    generator = {key: TensorRole("generator", ours(key.removeprefix(prefix))) for key in tensors}
    _refuse_doubles(generator | caches | first_stage)
    return generator | caches | first_stage


def _refuse_doubles(roles: Mapping[str, TensorRole]) -> None:
    """Raise CheckpointError where two tensors of a file would be one of ours, of which one would be lost."""
    first: dict[TensorRole, str] = {}
    for key, role in roles.items():
        other = first.setdefault(role, key)
        if other != key and role.part in ("tokenizer", "generator", "discriminator"):
            raise CheckpointError(
                f"the tensors {for_terminal(other)!r} and {for_terminal(key)!r} are two names of one; the file mixes "
                "the names of two systems. Save one model alone"
            )


def is_llamagen(names: Collection[str]) -> bool:
    """Whether these are names of a generator of LlamaGen's."""
    return LLAMAGEN_TOKENS in names and any(name.startswith(LLAMAGEN_CLASSES) for name in names)


def llamagen_name(name: str) -> str:
    """The name in LlamaGen's files of a tensor of our generator."""
    return _renamer({ours: theirs for theirs, ours in LLAMAGEN.items()})(name)


def _renamer(first_parts: Mapping[str, str]) -> Callable[[str], str]:
    """Replaces a name's first part where it is one of these."""

    def rename(name: str) -> str:
        first, dot, rest = name.partition(".")
        return first_parts.get(first, first) + dot + rest

    return rename


def check_complete(
    tensors: Mapping[str, Tensor], names: Collection[str], model: Mapping[str, Tensor], *, network: str = "a tokenizer"
) -> None:
    """Every expected tensor is there and no other, each with the shape and kind of number that the model has.

    Args:
        tensors: what arrived, by the file's keys.
        names: keys that belong to the file.
        model: tensors of the model, by the same keys; they may be without memory.
        network: what the model is, for the message.
    Raises:
        CheckpointError: the message lists what is missing, what is left over, and what has another shape or type.
    """
    pairs = {key: (tensors[key], model[key]) for key in model if key in tensors}
    shapes = [
        f"{key} {tuple(value.shape)}, not {tuple(expected.shape)}"
        for key, (value, expected) in pairs.items()
        if not is_same_shape(value.shape, expected.shape)
    ]
    types = [
        f"{key} {value.dtype}, not {expected.dtype}"
        for key, (value, expected) in pairs.items()
        # Any of the usual float types may stand for another; whole numbers and flags keep their type.
        if value.dtype not in (NUMBER_TYPES if expected.is_floating_point() else (expected.dtype,))
    ]
    findings = [
        _list("missing", [key for key in names if key not in tensors]),
        _list("unknown", [key for key in tensors if key not in names]),
        _list("of another shape", shapes),
        _list("of another type", types),
    ]
    if any(findings):
        raise CheckpointError(
            f"the tensors must be those of {network}, all of them and no others (perceptual loss, discriminator, "
            f"averages and first stage aside); {'; '.join(filter(None, findings))}. Give the file as it was saved"
        )


def is_same_shape(stored: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a stored tensor holds the numbers of an expected one in their order.

    A 1 × 1 convolution (C, D, 1, 1) and a linear layer (C, D) do: systems write the same layer either way.
    """
    shapes = [tuple(shape) for shape in (stored, expected)]
    return len({shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape for shape in shapes}) == 1


def _list(kind: str, keys: Iterable[str], limit: int = 4) -> str:
    keys = [for_terminal(key) for key in keys]
    ending = f" and {len(keys) - limit:,} more" if len(keys) > limit else ""
    return f"{len(keys):,} {kind} ({', '.join(keys[:limit])}{ending})" if keys else ""
