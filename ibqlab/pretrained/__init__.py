"""Trained tokenizers: published checkpoints, runs and exports, in and out."""

from ibqlab.pretrained.checkpoint import Checkpoint, read_checkpoint
from ibqlab.pretrained.export import export_published, export_tokenizer
from ibqlab.pretrained.hub import PUBLISHED, PublishedTokenizer, download_published
from ibqlab.pretrained.loading import load_tokenizer
from ibqlab.pretrained.report import LoadReport
from ibqlab.pretrained.stored import CheckpointError

__all__ = [
    "PUBLISHED",
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "PublishedTokenizer",
    "download_published",
    "export_published",
    "export_tokenizer",
    "load_tokenizer",
    "read_checkpoint",
]
