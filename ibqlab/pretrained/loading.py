"""A trained tokenizer, ready to use, from any checkpoint.

The tokenizer is built without memory and takes over copies of the file's tensors, the largest first and some at a time;
the file is mapped anew for each portion, so that what was copied is let go. At its peak loading holds the tokenizer and
one portion (or the largest tensor twice), whatever else is in the file.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from ibqlab.base.checks import require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.pretrained.architecture import empty_tokenizer
from ibqlab.pretrained.checkpoint import open_contents
from ibqlab.pretrained.report import WEIGHTS
from ibqlab.tokenizer import Tokenizer

PORTION = 2**26
"""Bytes copied before the file is mapped anew."""


@runtime_checkable
class Mapped(Protocol):
    """An opened checkpoint."""

    tensors: Mapping[str, Tensor]
    """By the file's keys, mapped."""

    reopen: Callable[[], Mapping[str, Tensor]]
    """Maps them anew."""


def load_tokenizer(path: str | Path, weights: str = "ema", *, quantizer: str | None = None) -> Tokenizer:
    """The tokenizer of a published checkpoint, a run or an export, in evaluation mode, on the CPU.

    Its weights are its own: the file may be changed or deleted, and the tokenizer trained. They keep the file's number
    type (published: float32); call `.float()` to compute with a file stored in half precision. What became of every
    key of the file is in its attribute `load_report`.

    Args:
        path: a published file of IBQ or Open-MAGVIT2, whose architecture is inferred, a run folder (its last
            checkpoint), or a file from `export_tokenizer`.
        weights: "ema", the averaged weights (published results use them; a warning says so where the run is too short
            for them to mean anything), or "raw", the weights as trained. An export of a tokenizer holds one set, given
            for either.
        quantizer: of a published file, which stores the same tensors for IBQ and VQ: "ibq" or "vq" (also for a VQGAN
            of taming-transformers or latent-diffusion). None: as the file tells – "ibq" with averaged weights, "lfq"
            where no codebook is stored; a file that does not tell is refused.
    Returns:
        A tokenizer; move it with `.to(device)`.
    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: no checkpoint, damaged, of another model, incomplete, without averaged weights where those are
            asked for, or one that would have to run code.
        RunError: a folder that is no run, a run without a checkpoint or without averaged weights.
        ValueError: another value of weights or quantizer.
    Cost: at most about 1.1 times the memory of the tokenizer, or it and its codebook where that is larger.
    """
    require_choice("weights", weights, WEIGHTS)
    contents = open_contents(path, quantizer)
    chosen = contents.choose(weights)
    report = contents.report(weights, {key: name for name, key in chosen.items()})
    if report.warning:
        warnings.warn(f"{for_terminal(report.path)}: {report.warning}", stacklevel=2)
    tokenizer = empty_tokenizer(contents.config)
    copies = dict(copy_tensors(contents, chosen))
    tokenizer.load_state_dict(copies, strict=True, assign=True)
    tokenizer.load_report = report
    return tokenizer.eval()


def copy_tensors(contents: Mapped, chosen: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Every chosen tensor by its name, in memory of its own.

    Args:
        contents: an opened checkpoint.
        chosen: names → keys of the file.
    """
    sizes = {name: contents.tensors[key].nbytes for name, key in chosen.items()}
    tensors, copied = contents.reopen(), 0
    for name in sorted(chosen, key=sizes.__getitem__, reverse=True):
        if copied > PORTION:
            del tensors
            tensors, copied = contents.reopen(), 0
        yield name, tensors[chosen[name]].clone()
        copied += sizes[name]
