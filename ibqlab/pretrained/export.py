"""Trained networks as files for others: one safetensors file with its settings, or a checkpoint with published names.

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
from ibqlab.generator import AnyGenerator, LlamaGenConfig
from ibqlab.pretrained import names
from ibqlab.pretrained.load_report import AS_GIVEN, WEIGHTS
from ibqlab.pretrained.loading import load_first_stage, load_generator
from ibqlab.pretrained.reading import EXPORT, read_checkpoint
from ibqlab.pretrained.tokenizer_architecture import CODEBOOK, PUBLISHED_CODEBOOK
from ibqlab.recipes.plugins import plugin_of, plugin_of_design
from ibqlab.tokenizer import Tokenizer, TokenizerConfig

PUBLISHED_ORDER = ("encoder.", "decoder.", names.DISCRIMINATOR, "quantize.", "quant_conv.", "post_quant_conv.")
"""Parts of a published state dict in its order. The published loader wants a weight ahead of its average."""
PUBLISHED_DESIGNS = ("vqgan", "magvit2")
"""Designs that the code of IBQ and Open-MAGVIT2 builds."""
BLOCK_ORDER = {"magvit2": ("norm1", "norm2", "conv1", "conv2", "nin_shortcut")}
"""Order of a residual block's parts in published files, where it is not ours. Blocks here keep the order in which their
parts are used, in which optimisers of older runs number the parameters."""
BLOCK = re.compile(r"(.*\.(?:block|mid_block)\.\d+)\.(\w+)\.")
"""A residual block and its part in a parameter's name."""
PUBLISHED_DECAY = 0.999
LIGHTNING_VERSION = "2.2.0"
"""The version that the published code asks for; Lightning converts checkpoints that name no version."""


def export_tokenizer(
    tokenizer: Tokenizer | str | Path,
    target: str | Path,
    weights: str | None = None,
    *,
    family: str | None = None,
    num_heads: int | tuple[int, int] | None = None,
) -> Path:
    """Write one set of a tokenizer's weights and its settings as a safetensors file, which `load_tokenizer` reads.

    Every tensor comes back equal in every bit and of the same type. A quantizer or a design out of a plugin is not in
    it: the file names the plugin and its hash, and whoever loads it must have run it.

    Args:
        tokenizer: a tokenizer, or whatever `load_tokenizer` takes: a run folder, a published file.
        target: the file to write, ending in .safetensors.
        weights: "ema" or "raw". Of a path: which to take, "ema" unless said. Of a tokenizer: which its weights are,
            for the file to say so; unless said they can be loaded as either.
        family, num_heads: of a path to a published file that does not tell them, as of `load_tokenizer`.
    Returns:
        The file's path.
    Raises:
        FileExistsError: the target is there already.
        ValueError: another ending, another value of weights; and whatever `load_tokenizer` raises.
        RunError: the disk is full or the folder may not be written to.
    """
    target = _free_target(target)
    if weights is not None:
        require_choice("weights", weights, WEIGHTS)
    if isinstance(tokenizer, Tokenizer):
        config, label, tensors = tokenizer.config, weights or AS_GIVEN, tokenizer.state_dict()
    else:
        checkpoint = read_checkpoint(tokenizer, family=family, num_heads=num_heads)
        keys = checkpoint.choose(weights or "ema")
        config, label = checkpoint.config, checkpoint.weights or weights or "ema"
        warning = checkpoint.load_report(label, {}).warning
        if warning:
            warnings.warn(f"{for_terminal(tokenizer)}: {warning}", stacklevel=2)
        tensors = {name: checkpoint.tensors[key].reshape(checkpoint.shapes[name]) for name, key in keys.items()}
    plugins = filter(None, (plugin_of(config.quantizer.config_name), plugin_of_design(config.autoencoder.design)))
    named = {plugin.file_name: plugin.sha256 for plugin in plugins}
    needed = {"plugins": named} if named else {}
    return _write_export(target, {"weights": label, "tokenizer": to_dict(config), **needed}, tensors)


def export_generator(generator: AnyGenerator | str | Path, target: str | Path) -> Path:
    """Write a generator's weights and its settings as a safetensors file, which `load_generator` reads.

    Every tensor comes back equal in every bit and of the same type. The tokenizer is not in it: `export_tokenizer`.

    Args:
        generator: a generator, or whatever `load_generator` takes.
        target: the file to write, ending in .safetensors; what comes back and errors are those of `export_tokenizer`.
    """
    target = _free_target(target)
    if isinstance(generator, str | Path):
        generator = load_generator(generator)
    return _write_export(target, {"generator": to_dict(generator.config)}, generator.state_dict())


def export_published(source: str | Path, target: str | Path, *, family: str | None = None) -> Path:
    """Write a checkpoint that the published code loads: a Lightning .ckpt with published names.

    It holds the tokenizer as trained and averaged, and the discriminator where the source has one. The frozen LPIPS
    network is left out, and so are buffers of the quantizer's upkeep, which the published code has not. Where the
    source has no averaged weights, none are made up, and the published code must be told use_ema: False.

    Args:
        source: a run folder, or another checkpoint that `read_checkpoint` takes.
        target: the file to write, usually .ckpt.
        family: of a published file that does not tell it, as of `load_tokenizer`.
    Returns:
        The file's path.
    Raises:
        FileExistsError: the target is there already.
        ValueError: a quantizer with more to it than one learned codebook, which the published format cannot hold; and
            whatever `read_checkpoint` raises.
        RunError: the disk is full or the folder may not be written to.
    """
    target = check_free(target)
    checkpoint = read_checkpoint(source, family=family)
    state = published_tokenizer_state(
        checkpoint.config,
        checkpoint.tokenizer,
        tokenizer_ema=checkpoint.tokenizer_ema,
        discriminator=checkpoint.discriminator,
        discriminator_ema=checkpoint.discriminator_ema,
        decay=checkpoint.ema_decay,
    )
    header = {EXPORT: {"quantizer": checkpoint.config.quantizer.config_name}}
    save_checkpoint_file(_lightning(state, checkpoint.step) | header, target)
    return target


def export_published_generator(
    source: AnyGenerator | str | Path, target: str | Path, tokenizer: Tokenizer | None = None
) -> Path:
    """Write a checkpoint with published names: the generator, and its tokenizer as the first stage.

    LlamaGen's files hold the generator alone, under `model`, as its own code reads and trains it.

    Args:
        source: a generator, or whatever `load_generator` takes.
        target: the file to write, usually .ckpt.
        tokenizer: the first stage; None: the one in `source`. Left out for LlamaGen's.
    Raises:
        ValueError: no tokenizer, or one for a generator of LlamaGen's; and whatever `export_published` and
            `load_generator` raise.
    """
    target = check_free(target)
    generator = load_generator(source) if isinstance(source, str | Path) else source
    if isinstance(generator.config, LlamaGenConfig):
        require(
            tokenizer is None,
            "a file of LlamaGen holds the generator alone; got a tokenizer, too. Leave it out and write it into a file "
            "of its own: export_tokenizer",
        )
        content = {"model": _on_cpu(llamagen_state(generator))}
    else:
        require(
            generator is not source or tokenizer is not None,
            "a published checkpoint holds the tokenizer, too; got a generator alone. Give tokenizer=…",
        )
        state = published_generator_state(generator, tokenizer or load_first_stage(source))
        content = _lightning(_on_cpu(state), step=0)
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


def published_generator_state(generator: AnyGenerator, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights of both stages as they are, by their published names and in the published order.

    Raises:
        ValueError: a quantizer with more to it than one learned codebook.
    """
    first_stage = published_tokenizer_state(tokenizer.config, tokenizer.state_dict())
    state = {names.FIRST_STAGE + key: value for key, value in first_stage.items()}
    return state | {names.TRANSFORMER + key: value for key, value in generator.state_dict().items()}


def llamagen_state(generator: AnyGenerator) -> dict[str, Tensor]:
    """The weights of a generator of LlamaGen's as they are, by their published names and in the published order."""
    state = {names.llamagen_name(name): value for name, value in generator.state_dict().items()}
    first_parts = list(names.LLAMAGEN)
    order = sorted(state, key=lambda name: first_parts.index(name.split(".")[0]))
    return {name: state[name] for name in order}


def published_tokenizer_state(
    config: TokenizerConfig,
    tokenizer: Mapping[str, Tensor],
    *,
    tokenizer_ema: Mapping[str, Tensor] | None = None,
    discriminator: Mapping[str, Tensor] | None = None,
    discriminator_ema: Mapping[str, Tensor] | None = None,
    decay: float | None = None,
) -> dict[str, Tensor]:
    """A tokenizer's weights by their published names, in the published order; arguments as in `Checkpoint`.

    Raises:
        ValueError: a quantizer with more to it than one learned codebook, or an autoencoder of another design.
    """
    require(
        config.autoencoder.design in PUBLISHED_DESIGNS,
        f"the published code builds autoencoders of the designs {', '.join(PUBLISHED_DESIGNS)}; got "
        f"{config.autoencoder.design!r}. Use export_tokenizer, which holds any design (in a command "
        "a TARGET that ends in .safetensors)",
    )
    tokenizer = {name: value for name, value in tokenizer.items() if not name.startswith("quantizer.upkeep.")}
    extra_names = [name for name in tokenizer if name.startswith("quantizer.") and name != CODEBOOK]
    require(
        not extra_names,
        f"the published format holds one codebook ({PUBLISHED_CODEBOOK}) or none; the quantizer "
        f"{config.quantizer.config_name!r} also has {', '.join(extra_names[:4])}. Use export_tokenizer, which holds "
        "any quantizer",
    )
    weights = _published_names(_in_published_order(tokenizer, config.autoencoder.design), discriminator)
    state = {key: weights[key] for prefix in PUBLISHED_ORDER for key in weights if key.startswith(prefix)}
    averages = _published_names(tokenizer_ema, discriminator_ema)
    if averages:
        state[names.DECAY] = torch.tensor(decay or PUBLISHED_DECAY, dtype=torch.float32)
        state[names.UPDATES] = torch.tensor(-1, dtype=torch.int32)
    return state | {names.average_name(key): averages[key] for key in state if key in averages}


def _in_published_order(tokenizer: Mapping[str, Tensor], design: str) -> dict[str, Tensor]:
    """A tokenizer's tensors, those of each residual block in the order of the design's published files."""
    parts = BLOCK_ORDER.get(design)
    if parts is None:
        return dict(tokenizer)
    blocks: dict[str, list[tuple[int, str]]] = {}  # block, or a name outside of blocks → places and names
    for name in tokenizer:
        match = BLOCK.match(name)
        block, place = (match[1], parts.index(match[2])) if match else (name, 0)
        blocks.setdefault(block, []).append((place, name))
    in_order = (sorted(names_in_block, key=lambda item: item[0]) for names_in_block in blocks.values())  # stable
    return {name: tokenizer[name] for block in in_order for _, name in block}


def _published_names(
    tokenizer: Mapping[str, Tensor] | None, discriminator: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    named = {names.published_name(name): value for name, value in (tokenizer or {}).items()}
    return named | {names.DISCRIMINATOR + name: value for name, value in (discriminator or {}).items()}


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu() for key, value in state.items()}


def _lightning(state: Mapping[str, Tensor], step: int) -> dict[str, object]:
    return {"epoch": 0, "global_step": step, "pytorch-lightning_version": LIGHTNING_VERSION, "state_dict": state}


def _free_target(target: str | Path) -> Path:
    target = Path(target)
    require(target.suffix == ".safetensors", f"target must end in .safetensors, got {target.name!r}")
    return check_free(target)


def _write_export(target: Path, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    from safetensors import SafetensorError  # noqa: PLC0415 - reading runs needs none of it
    from safetensors.torch import save_file  # noqa: PLC0415 - as above

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(target) as unfinished:
        try:
            save_file(tensors, unfinished, {EXPORT: json.dumps(settings)})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number:  # the system's own error, which `whole_file` explains with the file's final name
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise RunError(f"{unfinished}: cannot be written ({error}); make room, or choose another folder") from error
    return target


class TargetExists(RunError, FileExistsError):
    """A file that is there already and was not changed."""

    def __init__(self, target: Path) -> None:
        super().__init__(f"{target} is there already and was not changed; choose another name, or delete it first")


def check_free(target: str | Path) -> Path:
    """The path of a file to make. FileExistsError or FileNotFoundError unless it can be made there in place of none."""
    target = Path(target)
    with explained(target):
        if target.exists() or target.is_symlink():
            raise TargetExists(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: there is no such folder to write {target.name} into; make it first")
    return target


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
