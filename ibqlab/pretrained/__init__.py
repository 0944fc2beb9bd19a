"""Trained tokenizers and generators: published checkpoints, runs and exports, in and out."""

from ibqlab.pretrained.checkpoint import Checkpoint, read_checkpoint
from ibqlab.pretrained.export import export_published, export_tokenizer
from ibqlab.pretrained.generators import (
    export_generator,
    export_published_generator,
    load_first_stage,
    load_generator,
)
from ibqlab.pretrained.hub import PUBLISHED, PublishedTokenizer, download_published
from ibqlab.pretrained.loading import load_tokenizer
from ibqlab.pretrained.published_generators import PUBLISHED_GENERATORS, PublishedGenerator
from ibqlab.pretrained.report import LoadReport
from ibqlab.pretrained.stored import CheckpointError

__all__ = [
    "PUBLISHED",
    "PUBLISHED_GENERATORS",
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "PublishedGenerator",
    "PublishedTokenizer",
    "download_published",
    "export_generator",
    "export_published",
    "export_published_generator",
    "export_tokenizer",
    "load_first_stage",
    "load_generator",
    "load_tokenizer",
    "read_checkpoint",
]
