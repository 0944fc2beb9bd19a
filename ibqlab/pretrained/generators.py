"""Trained generators: published checkpoints, runs and exports, in and out.

A published checkpoint holds the generator under `transformer.` and its tokenizer, the first stage, under
`first_stage_model.`. Names below the prefixes are ours already.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.base.files import UnreadableFile, parse_json
from ibqlab.config import parse, to_dict
from ibqlab.generator import AnyGenerator, SequenceConfig, generator_config, make_generator
from ibqlab.pretrained.architecture import NothingDrawn, empty_tokenizer, infer_config
from ibqlab.pretrained.checkpoint import EXPORT, Contents, newest_state
from ibqlab.pretrained.export import (
    LIGHTNING_VERSION,
    check_free,
    published_state_of,
    save_checkpoint_file,
    save_tensors,
    whole_file,
)
from ibqlab.pretrained.families import check_quantizer_is_told, refuse_other_families
from ibqlab.pretrained.generator_architecture import PARTS, TOKENS, infer_generator_config
from ibqlab.pretrained.loading import copy_tensors, load_tokenizer
from ibqlab.pretrained.names import Place, check_filled, place_published
from ibqlab.pretrained.report import LoadReport
from ibqlab.pretrained.stored import SAFETENSORS, CheckpointError, existing_path, load_pickle, open_stored
from ibqlab.runs import Run
from ibqlab.tokenizer import Tokenizer

TRANSFORMER, FIRST_STAGE, CACHE = "transformer.", "first_stage_model.", ".kv_cache."
FIRST_STAGE_FILE = "tokenizer.safetensors"
"""A generator's run keeps its tokenizer under this name."""


@dataclass(frozen=True, kw_only=True)
class GeneratorContents:
    """A generator's checkpoint as it lies in its file."""

    path: Path
    format: str
    """What it is, in words."""
    config: SequenceConfig
    """Stored with runs and exports, inferred from names and shapes in published files."""
    tensors: Mapping[str, Tensor]
    """By the file's keys, mapped."""
    places: Mapping[str, str]
    """The generator's keys in the file → names in the generator."""
    left: Mapping[str, tuple[str, ...]]
    """Group → keys that are recognised and not the generator's: the first stage, caches of keys and values."""
    reopen: Callable[[], Mapping[str, Tensor]]
    """Maps the tensors anew, so that memory of those mapped before can be let go."""
    entries: tuple[str, ...] = ()
    """What the file holds beside tensors."""
    wrappers: tuple[str, ...] = ()
    """What was taken off the file's keys."""


def load_generator(path: str | Path, *, num_heads: int | None = None, grid_size: int | None = None) -> AnyGenerator:
    """The generator of a published checkpoint, a run or an export, in evaluation mode, on the CPU.

    Its weights are its own. What became of every key of the file is in its attribute `load_report`. The tokenizer that
    decodes its tokens is `load_first_stage(path)`.

    Args:
        path: a published file of IBQ or Open-MAGVIT2, whose architecture is inferred, its bare state dict, a run folder
            (its last checkpoint), or a file from `export_generator`.
        num_heads: of a published file, which does not tell it; None: 64 channels per head, as published.
        grid_size: likewise, tokens along one side of an image; None: 16, as published.
    Returns:
        A generator; move it with `.to(device)`.
    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: no checkpoint, damaged, of another model, incomplete, or one that would have to run code.
        RunError: a folder that is no run, or a run without a checkpoint.
        ValueError: numbers that do not fit, or that were given for a file that stores its own.
    Cost: at most about 1.1 times the memory of the generator, or its largest tensor twice.
    """
    contents = open_generator(path, num_heads, grid_size)
    generator = empty_generator(contents.config)
    chosen = {name: key for key, name in contents.places.items()}
    generator.load_state_dict(dict(copy_tensors(contents, chosen)), strict=True, assign=True)
    generator.load_report = LoadReport(
        path=str(contents.path),
        format=contents.format,
        weights="raw",
        keys=len(contents.tensors),
        used=dict(contents.places),
        left=contents.left,
        entries=contents.entries,
        wrappers=contents.wrappers,
    )
    return generator.eval()


def load_first_stage(path: str | Path, *, quantizer: str | None = None) -> Tokenizer:
    """The tokenizer that a generator's tokens belong to, from the generator's own checkpoint.

    Args:
        path: a published generator's file, or the run folder of a generator of ours.
        quantizer: of a published file, as in `load_tokenizer`.
    Returns:
        A tokenizer in evaluation mode, on the CPU. What became of every key of the first stage is in its attribute
        `load_report`.
    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: the file holds no tokenizer; the message says what to do.
    """
    path = existing_path(path)
    if path.is_dir():
        kept = path / FIRST_STAGE_FILE
        if not kept.is_file():
            raise CheckpointError(f"{path} holds no {FIRST_STAGE_FILE}; give the tokenizer: load_tokenizer(PATH)")
        anew = Run(path).config.get("index_permutation", -1)
        if anew >= 0:
            raise CheckpointError(
                f"{path} numbers the codes anew (index_permutation {anew}), to measure what their order is worth; no "
                "tokenizer decodes its tokens. Train with index_permutation=-1 to draw images"
            )
        return load_tokenizer(kept, "raw")
    stored = open_stored(path)
    tensors = _below(FIRST_STAGE, stored.tensors)
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tokenizer (no tensor {FIRST_STAGE}…); give the one that the generator was trained on: "
            "load_tokenizer(PATH)"
        )
    try:
        refuse_other_families(tensors)
        quantizer = check_quantizer_is_told(stored, tensors, quantizer)
        config = infer_config({key: tuple(value.shape) for key, value in tensors.items()}, quantizer)
        places = place_published(tensors, empty_tokenizer(config))
    except CheckpointError as error:
        raise CheckpointError(f"{path}, {FIRST_STAGE}…: {error}") from None
    contents = Contents(
        path=path,
        format=f"first stage of a {stored.format}",
        config=config,
        tensors=tensors,
        places=places,
        reopen=lambda: _below(FIRST_STAGE, open_stored(path).tensors),
        entries=stored.entries,
        wrappers=stored.wrappers,
    )
    chosen = contents.choose("raw")
    tokenizer = empty_tokenizer(config)
    tokenizer.load_state_dict(dict(copy_tensors(contents, chosen)), strict=True, assign=True)
    tokenizer.load_report = contents.report("raw", {key: name for name, key in chosen.items()})
    return tokenizer.eval()


def export_generator(generator: AnyGenerator | str | Path, target: str | Path) -> Path:
    """Write a generator's weights and its settings as a safetensors file, which `load_generator` reads.

    Every tensor comes back equal in every bit and of the same type. The tokenizer is not in it: `export_tokenizer`.

    Args:
        generator: a generator, or whatever `load_generator` takes.
        target: the file to write, ending in .safetensors.
    Returns:
        The file's path.
    Raises:
        FileExistsError: the target is there already.
        ValueError: another ending; and whatever `load_generator` raises.
        RunError: the disk is full or the folder may not be written to.
    """
    target = Path(target)
    require(target.suffix == ".safetensors", f"target must end in .safetensors, got {target.name!r}")
    check_free(target)
    if isinstance(generator, str | Path):
        generator = load_generator(generator)
    with whole_file(target) as unfinished:
        save_tensors(generator.state_dict(), unfinished, {EXPORT: json.dumps({"generator": to_dict(generator.config)})})
    return target


def export_published_generator(
    source: AnyGenerator | str | Path, target: str | Path, tokenizer: Tokenizer | None = None
) -> Path:
    """Write a checkpoint with published names: the generator, and its tokenizer as the first stage.

    Args:
        source: a generator, or whatever `load_generator` takes.
        target: the file to write, usually .ckpt.
        tokenizer: the first stage; None: the one in `source`.
    Returns:
        The file's path.
    Raises:
        FileExistsError: the target is there already.
        ValueError: no tokenizer, or a quantizer that the published format cannot hold; and whatever `load_generator`
            raises.
        RunError: the disk is full or the folder may not be written to.
    """
    target = Path(target)
    check_free(target)
    named = isinstance(source, str | Path)
    require(
        named or tokenizer is not None,
        "a published checkpoint holds the tokenizer, too; got a generator alone. Give tokenizer=…",
    )
    first = tokenizer or load_first_stage(source)
    generator = load_generator(source) if named else source
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": {key: value.detach().cpu() for key, value in published_generator_state(generator, first).items()},
    }
    save_checkpoint_file(content, target)
    return target


def published_generator_state(generator: AnyGenerator, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights of both stages as they are, by their published names and in the published order.

    Raises:
        ValueError: a quantizer with more to it than one learned codebook.
    """
    state = {FIRST_STAGE + key: value for key, value in published_state_of(tokenizer).items()}
    return state | {TRANSFORMER + key: value for key, value in generator.state_dict().items()}


def is_generator(path: str | Path) -> bool:
    """Whether a checkpoint, a run or an export is a generator's; False where nothing is there."""
    try:
        path = existing_path(path)
    except FileNotFoundError:
        return False
    if path.is_dir():
        return (path / "config.yaml").is_file() and "generator" in Run(path).config
    stored = open_stored(path)
    if EXPORT in stored.metadata:
        return '"generator"' in stored.metadata[EXPORT]
    return any(key.removeprefix(TRANSFORMER) in (TOKENS, PARTS[0]) for key in stored.tensors)


def empty_generator(config: SequenceConfig) -> AnyGenerator:
    """A generator whose parameters have names and shapes but no memory, for weights to be put in."""
    with torch.device("meta"), NothingDrawn():
        return make_generator(config)


def open_generator(path: str | Path, num_heads: int | None, grid_size: int | None) -> GeneratorContents:
    """Open a checkpoint and find every key's place; arguments and errors are those of `load_generator`."""
    path = existing_path(path)
    if path.is_dir():
        contents = _open_run(path)
    else:
        stored = open_stored(path)
        if EXPORT not in stored.metadata:
            return _open_published(path, num_heads, grid_size)
        contents = _open_export(path)
    given = {"num_heads": num_heads, "grid_size": grid_size}
    for name, value in given.items():
        require(
            value in (None, getattr(contents.config, name)),
            f"{name} is asked of published files, which do not tell it; {path} holds {getattr(contents.config, name)}. "
            f"Leave {name} out",
        )
    return contents


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _open_published(path: Path, num_heads: int | None, grid_size: int | None) -> GeneratorContents:
    stored = open_stored(path)
    prefix = TRANSFORMER if any(key.startswith(TRANSFORMER) for key in stored.tensors) else ""
    first = tuple(key for key in stored.tensors if key.startswith(FIRST_STAGE))
    caches = tuple(key for key in stored.tensors if CACHE in key and key not in first)
    mine = {
        key: key.removeprefix(prefix)
        for key in stored.tensors
        if key not in {*first, *caches} and key.startswith(prefix)
    }
    with _explained(path):
        refuse_other_families(stored.tensors)
        _check_is_generator({*mine.values()}, stored.tensors)
        shapes = {name: tuple(stored.tensors[key].shape) for key, name in mine.items()}
        config = infer_generator_config(shapes, num_heads, grid_size)
        others = {key: key for key in stored.tensors if key not in {*mine, *first, *caches}}
        _check_complete(config, {name: stored.tensors[key] for key, name in (mine | others).items()})
    groups = {"first stage (tokenizer)": first, "caches of keys and values": caches}
    return GeneratorContents(
        path=path,
        format=f"{stored.format} with published names",
        config=config,
        tensors=stored.tensors,
        places=mine,
        left={name: keys for name, keys in groups.items() if keys},
        reopen=lambda: open_stored(path).tensors,
        entries=stored.entries,
        wrappers=stored.wrappers,
    )


def _open_export(path: Path) -> GeneratorContents:
    stored = open_stored(path)
    try:
        settings = parse_json(stored.metadata[EXPORT], "header")
    except UnreadableFile as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); export it again") from None
    if "generator" not in settings:
        raise CheckpointError(f"{path} is a tokenizer's export, not a generator's; use load_tokenizer")
    config = generator_config(settings["generator"])
    with _explained(path):
        _check_complete(config, stored.tensors)
    return GeneratorContents(
        path=path,
        format=f"{SAFETENSORS} exported by ibqlab",
        config=config,
        tensors=stored.tensors,
        places={key: key for key in stored.tensors},
        left={},
        reopen=lambda: open_stored(path).tensors,
    )


def _open_run(path: Path) -> GeneratorContents:
    from ibqlab.recipes.generator_config import GeneratorTrainConfig  # noqa: PLC0415 - training reads checkpoints

    run = Run(path)
    if "generator" not in run.config:
        raise CheckpointError(f"{path} is a tokenizer's run, not a generator's; use load_tokenizer")
    config = parse(GeneratorTrainConfig, run.config, source=f"run {run.name}").generator
    file, step, state = newest_state(run)
    with _explained(path):
        _check_complete(config, state["model"])
    return GeneratorContents(
        path=path,
        format=f"run at step {step}",
        config=config,
        tensors=state["model"],
        places={name: name for name in state["model"]},
        left={},
        reopen=(lambda: load_pickle(file)["state"]["model"]) if file else (lambda: state["model"]),
        entries=tuple(entry for entry in state if entry != "model"),
    )


def _check_is_generator(names: set[str], tensors: Mapping[str, Any]) -> None:
    if TOKENS in names or PARTS[0] in names:
        return
    if any(key.startswith(("encoder.", FIRST_STAGE)) for key in tensors):
        raise CheckpointError("this is a tokenizer, not a generator over its tokens; use load_tokenizer")
    first = ", ".join(dict.fromkeys(key.split(".")[0] for key in tensors))
    raise CheckpointError(
        f"this is no generator of IBQ's or Open-MAGVIT2's design, which has a tensor {TOKENS} or {PARTS[0]}; its "
        f"tensors' names begin with {first:.120}"
    )


def _check_complete(config: SequenceConfig, tensors: Mapping[str, Tensor]) -> None:
    like = empty_generator(config).state_dict()
    check_filled(tensors, {name: Place("generator", name) for name in like}, like, kind="generator")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors about a file's contents name the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
