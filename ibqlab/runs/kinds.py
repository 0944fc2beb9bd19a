"""What a run is of, read from its settings alone: a tokenizer, a generator, somebody's monitored model, or the lab."""

from collections.abc import Mapping
from typing import Any

MONITORED = "monitored"
"""`kind` in the settings of a run that `ibqlab.monitor` wrote of somebody's own model; other runs have no such key."""
LAB = "lab"
"""Key in the settings of a run that the lab made: a quantizer alone, on features. Other runs have no such key."""


def kind_of(config: Mapping[str, Any]) -> str:
    """The kind of a run: "tokenizer", "generator", "monitored" or "lab"."""
    if is_monitored(config):
        return MONITORED
    if is_lab(config):
        return LAB
    return "generator" if isinstance(config.get("generator"), dict) else "tokenizer"


def is_monitored(config: Mapping[str, Any]) -> bool:
    """Whether a monitor wrote the run: it holds no weights, and the settings of its model are its owner's."""
    return config.get("kind") == MONITORED


def is_lab(config: Mapping[str, Any]) -> bool:
    """Whether the lab made the run, as playground and features_lab do: it has no encoder and keeps no checkpoints."""
    return isinstance(config.get(LAB), dict)


def quantizer_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """name, codebook_size and code_dim of a tokenizer's or a monitored run, as far as its settings tell."""
    if is_monitored(config):
        own = config.get("settings")
        own = own if isinstance(own, dict) else {}
        return {"name": own.get("quantizer", own.get("name")), **config}
    tokenizer = config.get("tokenizer")
    quantizer = tokenizer.get("quantizer") if isinstance(tokenizer, dict) else None
    return quantizer if isinstance(quantizer, dict) else {}
