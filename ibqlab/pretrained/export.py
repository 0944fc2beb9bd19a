"""Trained tokenizers as files for others: one safetensors file with its settings, or a checkpoint with published names.

Files appear under their name when they are complete, and never in place of one that is there.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ibqlab.base.checks import require, require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, explained, replacing_path, sweep
from ibqlab.config import to_dict
from ibqlab.pretrained.architecture import CODEBOOK
from ibqlab.pretrained.checkpoint import AS_GIVEN, EXPORT, Checkpoint, open_contents, read_checkpoint
from ibqlab.pretrained.names import DECAY, DISCRIMINATOR, OUR_CODEBOOK, UPDATES, average_name, published_name
from ibqlab.pretrained.report import WEIGHTS
from ibqlab.tokenizer import Tokenizer

PUBLISHED_ORDER = ("encoder.", "decoder.", DISCRIMINATOR, "quantize.", "quant_conv.", "post_quant_conv.")
"""Parts of a published state dict in its order. The published loader wants a weight ahead of its average."""
PUBLISHED_DECAY = 0.999
LIGHTNING_VERSION = "2.2.0"
"""The version that the published code asks for; Lightning converts checkpoints that name no version."""


def export_tokenizer(tokenizer: Tokenizer | str | Path, target: str | Path, weights: str | None = None) -> Path:
    """Write one set of a tokenizer's weights and its settings as a safetensors file, which `load_tokenizer` reads.

    Every tensor comes back equal in every bit and of the same type.

    Args:
        tokenizer: a tokenizer, or whatever `load_tokenizer` takes: a run folder, a published file.
        target: the file to write, ending in .safetensors.
        weights: "ema" or "raw". Of a path: which to take, "ema" unless said. Of a tokenizer: which its weights are,
            for the file to say so; unless said they can be loaded as either.
    Returns:
        The file's path.
    Raises:
        FileExistsError: the target is there already.
        ValueError: another ending, another value of weights; and whatever `load_tokenizer` raises.
        RunError: the disk is full or the folder may not be written to.
    """
    target = Path(target)
    require(target.suffix == ".safetensors", f"target must end in .safetensors, got {target.name!r}")
    if weights is not None:
        require_choice("weights", weights, WEIGHTS)
    check_free(target)
    if isinstance(tokenizer, Tokenizer):
        config, label, tensors = tokenizer.config, weights or AS_GIVEN, tokenizer.state_dict()
    else:
        contents = open_contents(tokenizer)
        chosen = contents.choose(weights or "ema")
        config, label = contents.config, contents.only or weights or "ema"
        warning = contents.report(label, {}).warning if label in WEIGHTS else ""
        if warning:
            warnings.warn(f"{for_terminal(tokenizer)}: {warning}", stacklevel=2)
        tensors = {name: contents.tensors[key] for name, key in chosen.items()}
    header = json.dumps({"weights": label, "tokenizer": to_dict(config)})
    with whole_file(target) as unfinished:
        save_tensors(tensors, unfinished, {EXPORT: header})
    return target


def export_published(source: str | Path, target: str | Path) -> Path:
    """Write a checkpoint that the published code loads: a Lightning .ckpt with published names.

    It holds the tokenizer as trained and averaged, and the discriminator where the source has one. The frozen LPIPS
    network is left out, and so are buffers of the quantizer's upkeep, which the published code has not. Where the
    source has no averaged weights, none are made up, and the published code must be told use_ema: False.

    Args:
        source: a run folder, or another checkpoint that `read_checkpoint` takes.
        target: the file to write, usually .ckpt.
    Returns:
        The file's path.
    Raises:
        FileExistsError: the target is there already.
        ValueError: a quantizer with more to it than one learned codebook, which the published format cannot hold; and
            whatever `read_checkpoint` raises.
        RunError: the disk is full or the folder may not be written to.
    """
    target = Path(target)
    check_free(target)
    checkpoint = read_checkpoint(source)
    content = {
        "epoch": 0,
        "global_step": checkpoint.step,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": _published_state(checkpoint),
        EXPORT: {"quantizer": checkpoint.config.quantizer.config_name},
    }
    save_checkpoint_file(content, target)
    return target


def save_checkpoint_file(content: Mapping[str, object], target: Path) -> None:
    """Write a file that `torch.load` reads, whole or not at all and in place of none.

    Raises:
        FileExistsError: the target is there already.
        RunError: the disk is full or the folder may not be written to.
    """
    # Through a stream: torch's own writer would tell of a full disk without its cause.
    with whole_file(target) as unfinished, open(unfinished, "wb") as stream:
        torch.save(content, stream)


def save_tensors(tensors: Mapping[str, Tensor], target: Path, header: dict[str, str]) -> None:
    """Write tensors as a safetensors file with text in its header.

    Raises:
        OSError: the system did not let the file be written; whoever knows the file's final name explains it.
        RunError: the library has another complaint.
    """
    from safetensors import SafetensorError  # noqa: PLC0415 - reading runs needs none of it
    from safetensors.torch import save_file  # noqa: PLC0415 - as above

    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, target, header)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise RunError(f"{target}: cannot be written ({error}); make room, or choose another folder") from error


def published_state_of(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """A tokenizer's weights as they are by their published names, in the published order.

    Raises:
        ValueError: a quantizer with more to it than one learned codebook.
    """
    tensors = _without_upkeep(tokenizer.state_dict())
    _check_publishable(tokenizer.config.quantizer.config_name, tensors)
    weights = {published_name(name): value for name, value in tensors.items()}
    return {key: weights[key] for part in PUBLISHED_ORDER for key in weights if key.startswith(part)}


def _published_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights by their published names, in the published order."""
    tokenizer = _without_upkeep(checkpoint.tokenizer)
    _check_publishable(checkpoint.config.quantizer.config_name, tokenizer)
    weights = {published_name(name): value for name, value in tokenizer.items()}
    weights |= {DISCRIMINATOR + name: value for name, value in (checkpoint.discriminator or {}).items()}
    state = {key: weights[key] for part in PUBLISHED_ORDER for key in weights if key.startswith(part)}
    averages = {published_name(name): value for name, value in (checkpoint.tokenizer_ema or {}).items()}
    averages |= {DISCRIMINATOR + name: value for name, value in (checkpoint.discriminator_ema or {}).items()}
    if averages:
        state[DECAY] = torch.tensor(checkpoint.ema_decay or PUBLISHED_DECAY, dtype=torch.float32)
        state[UPDATES] = torch.tensor(-1, dtype=torch.int32)
    return state | {average_name(key): averages[key] for key in state if key in averages}


def _without_upkeep(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith("quantizer.upkeep.")}


def _check_publishable(quantizer: str, tensors: Mapping[str, Tensor]) -> None:
    more = [name for name in tensors if name.startswith("quantizer.") and name != OUR_CODEBOOK]
    require(
        not more,
        f"the published format holds one codebook ({CODEBOOK}) or none; the quantizer {quantizer!r} also has "
        f"{', '.join(more[:4])}. Use export_tokenizer, which holds any quantizer",
    )


class TargetExists(RunError, FileExistsError):
    """A file that is there already and was not changed."""

    def __init__(self, target: Path) -> None:
        super().__init__(f"{target} is there already and was not changed; choose another name, or delete it first")


def check_free(target: Path) -> None:
    """Raise FileExistsError or FileNotFoundError unless a file can be made there in place of none."""
    with explained(target):
        if target.exists() or target.is_symlink():
            raise TargetExists(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: there is no such folder to write {target.name} into; make it first")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """An empty file to write that becomes the target when the block ends well, and is gone otherwise."""
    sweep(target.parent)
    with replacing_path(target, publish=_publish) as unfinished:
        yield unfinished


def _publish(unfinished: Path, target: Path) -> None:
    """Give a file its name unless another has it: of two exports at once, the first one stands."""
    try:
        os.link(unfinished, target)
    except FileExistsError:
        raise TargetExists(target) from None
    except OSError:
        # Some disks have no hard links.
        check_free(target)
        os.replace(unfinished, target)
