"""The checkpoint in a published file: whose it is, what its settings are, and what each of its tensors is."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.base.escaping import for_terminal
from ibqlab.pretrained import names
from ibqlab.pretrained.checkpoint import Checkpoint
from ibqlab.pretrained.containers import AVERAGES
from ibqlab.pretrained.family import Facts, Family, refuse_shapes
from ibqlab.pretrained.generator_architecture import check_is_generator, infer_generator_config, refuse_tokenizer
from ibqlab.pretrained.load_report import AS_GIVEN
from ibqlab.pretrained.recognition import recognise, refuse_unread
from ibqlab.pretrained.tensor_files import CheckpointError, TensorFile, open_tensor_file, settings_beside
from ibqlab.pretrained.tokenizer_architecture import Shapes, empty_tokenizer
from ibqlab.tokenizer import TokenizerConfig


def read_published(file: TensorFile, network: str, *, prefix: str = "", **user_settings: Any) -> Checkpoint:
    """The checkpoint in a published file; errors are those of `read_checkpoint`.

    Args:
        user_settings: what the file may not tell: a tokenizer's quantizer, or a generator's num_heads and grid_size.
        prefix: of the tokenizer's names, where the file is a generator's and the tokenizer its first stage.
    """
    tensors = _all_tensors(file, prefix) if network == "tokenizer" else file.tensors
    weights, system = None, ""
    with _naming(f"{file.path}, {prefix}…" if prefix else file.path):
        if network == "generator":
            refuse_tokenizer(tensors)
        refuse_unread(tensors, network)
        if network == "tokenizer":
            family, config, roles = identify_tokenizer(file, tensors, **user_settings)
            remark = family.remark(config, settings_beside(file.path))
            title = f"{file.format}: {family.title}{f' ({remark})' if remark else ''}"
            system = family.name
            has_averages = any(role.part == "tokenizer_ema" for role in roles.values())
            weights = None if family.averaged or has_averages else AS_GIVEN
            weights = "ema" if file.holder.split("/")[-1] in AVERAGES else weights
        else:
            of_llamagen = names.is_llamagen(tensors)
            title = f"{file.format} with published names{' of LlamaGen' if of_llamagen else ''}"
            roles = names.generator_roles(tensors)
            published = [key for key, role in roles.items() if role.part == network]
            shapes = {key.removeprefix(names.TRANSFORMER): tuple(tensors[key].shape) for key in published}
            check_is_generator(shapes, tensors)
            config = infer_generator_config(shapes, **user_settings)
        decay = _decay(tensors)
    checkpoint = Checkpoint(
        path=file.path,
        network=network,
        format=f"first stage of a {title}" if prefix else title,
        config=config,
        tensors=tensors,
        roles=roles,
        reopen=lambda: _all_tensors(open_tensor_file(file.path), prefix),
        entries=file.entries if network == "tokenizer" or not file.averages else (*file.entries, "averaged weights"),
        wrappers=file.wrappers,
        stand_ins=file.stand_ins,
        weights=weights,
        ema_decay=decay,
        family=system,
    )
    if network == "generator":
        check_own_tensors(checkpoint, names.llamagen_name if of_llamagen else str)
    return checkpoint


def _all_tensors(file: TensorFile, prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, and averages that lie in a state dict of their own under names of their own."""
    stranger = next((key for key in file.tensors if key.startswith(names.SECOND)), None)
    if stranger is not None:
        raise CheckpointError(
            f"{file.path}: no tokenizer has a tensor {for_terminal(stranger, 80)!r}; rename or drop it"
        )
    in_averages = bool(file.averages) or file.holder.split("/")[-1] in AVERAGES
    if in_averages and any(key.startswith(names.AVERAGE) for key in file.tensors):
        raise CheckpointError(
            f"{file.path}: averaged weights stand twice in it, as {names.AVERAGE}… and as an entry of their own, and "
            "nothing tells which to take; save one set alone: {'model': weights}"
        )
    averages = {} if prefix else {names.SECOND + name: value for name, value in file.averages.items()}
    return names.below(prefix, file.tensors) | averages


def identify_tokenizer(
    file: TensorFile,
    tensors: Mapping[str, Tensor],
    *,
    family: str | None = None,
    quantizer: str | None = None,
    num_heads: Any = None,
) -> tuple[Family, TokenizerConfig, dict[str, names.TensorRole]]:
    """Family, settings and the role of every tensor of a published tokenizer; no tensor's numbers are needed.

    Args:
        file: the file.
        tensors: those of the tokenizer, by the file's names without a first stage's prefix.
        family, quantizer, num_heads: what the user said, as in `read_checkpoint`.
    Returns:
        The last has a role for every tensor, averages of a second state dict (`names.SECOND`) among them.
    Raises:
        CheckpointError: no file of a known family, or one that does not tell which; ValueError: as `read_checkpoint`.
    """
    averages = {key for key in tensors if key.startswith(names.SECOND)}
    tensors = {key: value for key, value in tensors.items() if key not in averages}
    known = recognise(file, tensors, family, quantizer)
    keys = dict.fromkeys(tensors)  # without the tensors, since families may keep it
    by_name = {key: known.role(key, keys) for key in keys}
    shapes = {role.name: tuple(tensors[key].shape) for key, role in by_name.items() if role.part == "tokenizer"}
    facts = Facts(quantizer=quantizer or file.quantizer, num_heads=num_heads, settings=settings_beside(file.path))
    config = _inferred(known, shapes, facts, is_told=quantizer is not None or num_heads is not None)
    roles = names.tokenizer_roles(tensors, empty_tokenizer(config), by_name, known.title)
    known.check(tensors, config)
    require(
        quantizer in (None, config.quantizer.config_name),
        f"{known.title} has the quantizer {config.quantizer.config_name!r}; got quantizer={quantizer!r}. Leave it out",
    )
    return known, config, roles | names.second_roles(averages, roles)


def _inferred(known: Family, shapes: Shapes, facts: Facts, *, is_told: bool) -> TokenizerConfig:
    """What a family makes of shapes; whatever stands in its way is the file's fault, unless the user said something."""
    try:
        config = known.infer(shapes, facts)
    except CheckpointError:
        raise
    except KeyError as error:
        raise refuse_shapes(known.title, f"there is no tensor {error}") from error
    except (ArithmeticError, LookupError, ValueError) as error:
        if is_told and isinstance(error, ValueError):
            raise
        raise refuse_shapes(known.title, str(error)) from error
    if not isinstance(config, TokenizerConfig):
        raise TypeError(f"{type(known).__name__}.infer must return a TokenizerConfig; got {type(config).__name__}")
    return config


def _decay(tensors: Mapping[str, Tensor]) -> float | None:
    """Decay of the averages, where the file tells it."""
    decay = tensors.get(names.DECAY)
    if decay is None:
        return None
    if decay.numel() != 1 or decay.is_complex():
        raise CheckpointError(
            f"{names.DECAY} must be one number; got {tuple(decay.shape)} of {decay.dtype}. The file is damaged"
        )
    return float(decay)


def check_own_tensors(checkpoint: Checkpoint, name_in_file: Callable[[str], str] = str) -> None:
    """A checkpoint must have the tensors that its settings ask for; averages may be there for some of them.

    Args:
        name_in_file: what a message calls a tensor of ours.
    """
    network, model = checkpoint.network, checkpoint.empty_network().state_dict()
    averages = checkpoint.part(f"{network}_ema")
    with _naming(checkpoint.path):
        arrived, expected = (
            {name_in_file(name): value for name, value in tensors.items()}
            for tensors in (checkpoint.part(network), model)
        )
        names.check_complete(arrived, expected, expected, network=f"a {network}")
        averaged = {name: value for name, value in model.items() if name in averages}
        names.check_complete(averages, averaged, averaged, network=f"a {network}")


@contextmanager
def _naming(file: Path | str) -> Iterator[None]:
    """Errors about a file's contents name the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
