"""The weights in what a file holds: a state dict, at any depth, under names that wrappers changed.

Training loops save {"model": weights, "optimizer": …}, Lightning {"state_dict": weights, …}, and launchers put a dict
around that. Entries known to hold weights are followed down until tensors come. A second whole state dict beside
the first, under a name of averaged weights, is read as well (LlamaGen's `ema`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibqlab.base.escaping import for_terminal
from ibqlab.pretrained.stand_ins import StandIn, StoredTensor

HOLDERS = ("state_dict", "model", "module")
"""Entries under which files hold their tensors: Lightning's, many training loops', DeepSpeed's."""
AVERAGES = ("ema", "model_ema", "ema_state_dict", "state_dict_ema", "ema_model")
"""Entries under which training loops hold averaged weights as a second state dict."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and training loops put ahead of every name."""
COMPILED = "._orig_mod."
"""What torch.compile of a part puts inside a name."""
EXPANDED_BYTES = 2**26
"""A tensor that repeats its numbers may claim so many bytes, whatever it stores; some files hold such counters."""
MakeTensors = Callable[[Mapping[Any, Any]], dict[str, Tensor]]


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the message says what stands there and what to do."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """State dicts of a file."""

    tensors: dict[str, Tensor]
    """By the file's names without wrappers."""
    averages: dict[str, Tensor]
    """Averaged weights by the same names; {} where the file has none as a state dict of its own."""
    holder: str
    """Entries that lead to the tensors, with / between them; "" where the file is the state dict itself."""
    wrappers: tuple[str, ...]
    """What was taken off the tensors' names, in words."""
    entries: tuple[str, ...]
    """What lies beside the state dicts, with / between the names of nested entries."""


def find_weights(path: Path, content: Mapping[Any, Any], make_tensors: MakeTensors = dict) -> Weights:
    """The state dict in a file's content, and its averaged weights.

    Where averaged weights are the only state dict, they are `tensors`, and `holder` says so.

    Args:
        path: of the file; for messages.
        content: what the file holds.
        make_tensors: makes a mapping's tensors of their descriptions.
    Raises:
        CheckpointError: no tensors by name at the end of the way; averages that are not of the same names and shapes;
            two tensors that get one name.
    """
    way, levels = _descend(content, (*HOLDERS, *AVERAGES))
    averages_at = None
    if not any(name in AVERAGES for name in way):
        beside = ((depth, name) for depth, level in enumerate(levels) for name in AVERAGES if _is_dict(level, name))
        averages_at = next(beside, None)
    if not way:
        _refuse_stand_ins(path, {name: value for name, value in content.items() if name in (*HOLDERS, *AVERAGES)})
    tensors, wrappers = unwrap_names(path, _tensors_of(path, levels[-1], make_tensors))
    averages: dict[str, Tensor] = {}
    if averages_at:
        depth, name = averages_at
        _, below = _descend(levels[depth][name], HOLDERS)
        if all(isinstance(key, str) and _is_tensor(value) for key, value in below[-1].items()):
            averages, _ = unwrap_names(path, _tensors_of(path, below[-1], make_tensors))
            _check_same_names(path, "/".join((*way[:depth], name)), tensors, averages)
        else:
            averages_at = None  # averages of another form, such as a counter and a list: an entry like others
    followed = {*enumerate(way), averages_at}
    entries = (
        "/".join((*way[:depth], str(key)))
        for depth, level in enumerate(levels[:-1])
        for key in level
        if (depth, key) not in followed
    )
    return Weights(tensors=tensors, averages=averages, holder="/".join(way), wrappers=wrappers, entries=tuple(entries))


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is an ordinary one whose numbers lie in the file.

    Raises:
        CheckpointError: a sparse, quantized or empty-handed tensor, or one that claims more numbers than are stored.
    """
    for name, value in tensors.items():
        kind = _unusable(value)
        if kind:
            raise CheckpointError(
                f"{path}: the tensor {for_terminal(name)!r} {kind}; a checkpoint holds plain tensors. Save "
                "{name: value.detach().cpu().to_dense().contiguous() for each}, or give the file as it was published"
            )


def unwrap_names(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors by the names that they have without wrappers, and what was taken off.

    Raises:
        CheckpointError: there is no tensor, or two would get one name.
    """
    names, wrappers = list(tensors), []
    if not names:
        raise CheckpointError(f"{path} holds no tensor; copy or download it again, or save model.state_dict()")
    while prefix := next((start for start in PREFIXES if all(name.startswith(start) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
        wrappers.append(f"prefix {prefix}")
    if any(COMPILED in name for name in names):
        names = [name.replace(COMPILED, ".") for name in names]
        wrappers.append(f"{COMPILED} inside names")
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path}: without {', '.join(wrappers)} two tensors have one name; save one model alone")
    return dict(zip(names, tensors.values(), strict=True)), tuple(wrappers)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | StoredTensor)


def _is_dict(level: Mapping[Any, Any], name: str) -> bool:
    return isinstance(level.get(name), dict) and bool(level[name])


def _descend(content: Mapping[Any, Any], holders: tuple[str, ...]) -> tuple[list[str], list[Mapping[Any, Any]]]:
    """Entries followed from holder to holder, and the dict before the first, after the first, and so on."""
    way: list[str] = []
    levels = [content]
    seen = {id(content)}
    while name := next((name for name in holders if _is_dict(levels[-1], name)), None):
        if id(levels[-1][name]) in seen:  # a dict that holds itself
            break
        way.append(name)
        levels.append(levels[-1][name])
        seen.add(id(levels[-1]))
    return way, levels


def _tensors_of(path: Path, level: Mapping[Any, Any], make_tensors: MakeTensors) -> dict[str, Tensor]:
    """A level's tensors, all of them usable."""
    strangers = [key for key, value in level.items() if not (isinstance(key, str) and _is_tensor(value))]
    if len(strangers) < len(level) or all(isinstance(level[key], StandIn) for key in strangers):
        _refuse_stand_ins(path, level)
    if strangers or not level:
        entries = ", ".join(for_terminal(key, 40) for key in strangers[:6]) or "nothing"
        raise CheckpointError(
            f"{path}: must hold tensors by name, or under {' or '.join(map(repr, HOLDERS))}; got {entries} instead. "
            "Save model.state_dict()."
        )
    tensors = make_tensors(level)
    check_tensors(path, tensors)
    return tensors


def _refuse_stand_ins(path: Path, level: Mapping[Any, Any]) -> None:
    """Where weights must stand, an object that was not made is an error."""
    for key, value in level.items():
        if isinstance(value, StandIn):
            raise CheckpointError(
                f"{path}: {for_terminal(key, 80)!r} must be weights and is an object of {for_terminal(value, 80)}, "
                "which is not made here; save tensors alone: model.state_dict()"
            )


def _check_same_names(path: Path, entry: str, tensors: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    """Averaged weights must be of the names and shapes of those that they average."""
    missing = [name for name in tensors if name not in averages]
    unknown = [name for name in averages if name not in tensors]
    other = [name for name in tensors if name in averages and tensors[name].shape != averages[name].shape]
    faults = {"missing": missing, "unknown": unknown, "of another shape": other}
    if any(faults.values()):
        found = "; ".join(
            f"{len(names):,} {fault} ({for_terminal(names[0], 80)})" for fault, names in faults.items() if names
        )
        raise CheckpointError(
            f"{path}: the averaged weights under {entry!r} are not those of the weights beside them: {found}. Save one "
            "of the two alone: {'model': weights}"
        )


def _unusable(value: Tensor) -> str:
    """What is wrong with a stored tensor; "" for an ordinary one."""
    if value.layout != torch.strided:
        return f"is sparse ({value.layout})"
    if value.is_meta:
        return "has a shape and no numbers (device meta)"
    if value.is_quantized:
        return f"is quantized ({value.dtype})"
    stored_bytes = value.untyped_storage().nbytes()
    claimed_bytes = value.numel() * value.element_size()  # nbytes is 0 again where 2⁶⁴ are claimed
    if claimed_bytes > max(stored_bytes, EXPANDED_BYTES):
        return f"claims {claimed_bytes:,} bytes {tuple(value.shape)} and stores {stored_bytes:,}"
    return ""
