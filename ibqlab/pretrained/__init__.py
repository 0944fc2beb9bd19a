"""Trained tokenizers, ready to use."""

from ibqlab.pretrained.loading import load_tokenizer

__all__ = ["load_tokenizer"]
