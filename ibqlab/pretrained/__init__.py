"""Trained tokenizers and generators: published checkpoints, runs and exports, in and out.

The main idea: whatever kind of file it is, and whichever of the two networks it holds, one function opens it and says
what every key is (`read_checkpoint`, a `Checkpoint`). Nothing in a file is executed, and no key is ignored silently.
Whose tokenizer a file holds is told by `recognition`; each system is a `family`, one file under `families`, that says
how its names translate and what its settings are. Tokenizers and generators differ in how the architecture is inferred
from shapes (`tokenizer_architecture`, `generator_architecture`). Start with `loading`, which makes a network of a
checkpoint, then `reading` and `published_files`.
"""

from ibqlab.pretrained.checkpoint import Checkpoint
from ibqlab.pretrained.export import export_generator, export_published, export_published_generator, export_tokenizer
from ibqlab.pretrained.family import Facts, Family, available_families, register_family
from ibqlab.pretrained.hub import (
    PUBLISHED,
    PUBLISHED_GENERATORS,
    PublishedGenerator,
    PublishedTokenizer,
    download_published,
    list_published,
)
from ibqlab.pretrained.load_report import LoadReport
from ibqlab.pretrained.loading import load_first_stage, load_generator, load_tokenizer
from ibqlab.pretrained.reading import held_weights, is_generator, read_checkpoint
from ibqlab.pretrained.tensor_files import CheckpointError

__all__ = [
    "PUBLISHED",
    "PUBLISHED_GENERATORS",
    "Checkpoint",
    "CheckpointError",
    "Facts",
    "Family",
    "LoadReport",
    "PublishedGenerator",
    "PublishedTokenizer",
    "available_families",
    "download_published",
    "export_generator",
    "export_published",
    "export_published_generator",
    "export_tokenizer",
    "held_weights",
    "is_generator",
    "list_published",
    "load_first_stage",
    "load_generator",
    "load_tokenizer",
    "read_checkpoint",
    "register_family",
]
