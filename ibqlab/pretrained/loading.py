"""Trained networks, ready to use, from any checkpoint.

A network is built without memory and takes over copies of the file's tensors (`Checkpoint.copy_tensors`). So loading
holds the network and little more, whatever else is in the file.
"""

import warnings
from pathlib import Path

from ibqlab.base.checks import require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.generator import AnyGenerator
from ibqlab.pretrained.checkpoint import Checkpoint
from ibqlab.pretrained.load_report import WEIGHTS
from ibqlab.pretrained.names import FIRST_STAGE
from ibqlab.pretrained.published_files import read_published
from ibqlab.pretrained.reading import read_checkpoint
from ibqlab.pretrained.tensor_files import CheckpointError, existing_path, open_tensor_file
from ibqlab.runs import Run
from ibqlab.tokenizer import Tokenizer

FIRST_STAGE_FILE = "tokenizer.safetensors"
"""A generator's run keeps its tokenizer under this name."""


def load_tokenizer(
    path: str | Path,
    weights: str = "ema",
    *,
    family: str | None = None,
    quantizer: str | None = None,
    num_heads: int | tuple[int, int] | None = None,
) -> Tokenizer:
    """The tokenizer of a published checkpoint, a run or an export, in evaluation mode, on the CPU.

    Its weights are its own: the file may be changed or deleted, and the tokenizer trained. They keep the file's number
    type (published: float32); call `.float()` to compute with a file stored in half precision. What became of every
    key of the file is in its attribute `load_report`.

    Args:
        path: a published file of one of `available_families`, whose architecture is inferred, a folder of config.json
            and weights (diffusers, TiTok), a run folder (its last checkpoint), or a file from `export_tokenizer`.
        weights: "ema", the averaged weights (IBQ, Open-MAGVIT2 and SimVQ are evaluated with them; a warning says so
            where the run is too short for them to mean anything), or "raw", the weights as trained. A file of a family
            that publishes one set, and an export, give theirs for either.
        family: whose file it is, where its names do not tell: "ibq", "vqgan" and "ldm" share theirs. None: as the file
            tells; one that does not tell is refused.
        quantizer: of a file with those names, where it is another than its family's. "vq" says "vqgan", too.
        num_heads: of a file whose attention heads no shape and no config.json tells, of TiTok also two, (encoder,
            decoder); None: the published ones.
    Returns:
        A tokenizer; move it with `.to(device)`.
    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: no checkpoint, damaged, of another model, incomplete, without averaged weights where those are
            asked for, or with objects where weights must be.
        RunError: a folder that is no run, a run without a checkpoint or without averaged weights.
        ValueError: another value of weights, family or quantizer, or heads that do not fit.
    Cost: at most about 1.1 times the memory of the tokenizer, whatever else is in the file.
    """
    require_choice("weights", weights, WEIGHTS)
    checkpoint = read_checkpoint(path, family=family, quantizer=quantizer, num_heads=num_heads)
    return _load(checkpoint, weights)


def load_generator(path: str | Path, *, num_heads: int | None = None, grid_size: int | None = None) -> AnyGenerator:
    """The generator of a published checkpoint, a run or an export, in evaluation mode, on the CPU.

    Its weights are its own, in the file's number type. What became of every key of the file is in its attribute
    `load_report`. The tokenizer that decodes its tokens is `load_first_stage(path)`; a file of LlamaGen holds none.

    Args:
        path: a published file of IBQ, Open-MAGVIT2 or LlamaGen (by class, B to 3B), whose architecture is inferred, its
            bare state dict, a run folder (its last checkpoint), or a file from `export_generator`.
        num_heads: of a published file, which does not tell it; None: as published for its width.
        grid_size: likewise, tokens along one side of an image; None: 16, as published. LlamaGen published grids of 16
            and 24: None is 24 for XL, XXL and 3B, and refused for B and L, which have both.
    Returns:
        A generator; move it with `.to(device)`.
    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: no checkpoint, damaged, of another model, incomplete, or with objects where weights must be.
        RunError: a folder that is no run, or a run without a checkpoint.
        ValueError: numbers that do not fit, or that were given for a file that stores its own.
    Cost: at most about 1.1 times the memory of the generator, whatever else is in the file.
    """
    return _load(read_checkpoint(path, "generator", num_heads=num_heads, grid_size=grid_size), "raw")


def load_first_stage(path: str | Path, *, family: str | None = None, quantizer: str | None = None) -> Tokenizer:
    """The tokenizer that a generator's tokens belong to, from the generator's own checkpoint.

    Args:
        path: a published generator's file, or the run folder of a generator of ours.
        family, quantizer: of a published file, as in `load_tokenizer`.
    Returns:
        A tokenizer in evaluation mode, on the CPU. What became of every key of the first stage is in its attribute
        `load_report`.
    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: the file holds no tokenizer; the message says what to do.
    """
    path = existing_path(path)
    if path.is_dir():
        tokenizer = path / FIRST_STAGE_FILE
        if not tokenizer.is_file():
            raise CheckpointError(f"{path} holds no {FIRST_STAGE_FILE}; give the tokenizer: load_tokenizer(PATH)")
        permutation = Run(path).config.get("index_permutation", -1)
        if permutation >= 0:
            raise CheckpointError(
                f"{path} numbers the codes anew (index_permutation {permutation}), to measure what their order is "
                "worth; no tokenizer decodes its tokens. Train with index_permutation=-1 to draw images"
            )
        return load_tokenizer(tokenizer, "raw")
    file = open_tensor_file(path)
    if not any(key.startswith(FIRST_STAGE) for key in file.tensors):
        raise CheckpointError(
            f"{path} holds no tokenizer (no tensor {FIRST_STAGE}…); give the one that the generator was trained on: "
            "load_tokenizer(PATH), in a command --tokenizer PATH"
        )
    return _load(read_published(file, "tokenizer", prefix=FIRST_STAGE, family=family, quantizer=quantizer), "raw")


def _load(checkpoint: Checkpoint, weights: str) -> Tokenizer | AnyGenerator:
    keys = checkpoint.choose(weights)
    report = checkpoint.load_report(weights, {key: name for name, key in keys.items()})
    if report.warning:
        warnings.warn(f"{for_terminal(report.path)}: {report.warning}", stacklevel=3)
    network = checkpoint.empty_network()
    network.load_state_dict(dict(checkpoint.copy_tensors(keys)), strict=True, assign=True)
    network.load_report = report
    return network.eval()
