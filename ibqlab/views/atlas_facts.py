"""What the folder of an atlas says of itself, read without anything that makes one."""

from pathlib import Path
from typing import Any

from ibqlab.base.files import UnreadableFile, is_ordinary, parse_json, read_text

FACTS_BYTES = 2**28
"""Largest file of facts that is looked at; it names every image."""


def is_atlas(folder: Path) -> bool:
    """Whether a folder holds an atlas."""
    return is_ordinary(folder / "index.html") and is_ordinary(folder / "data" / "facts.js")


def atlas_facts(folder: Path) -> dict[str, Any]:
    """What its page says once, "name" among it, as `facts` in atlas/gather.py gives it; {} where it cannot be read."""
    try:
        text = read_text(folder / "data" / "facts.js", FACTS_BYTES)
        return parse_json(text.partition(",")[2].rstrip().removesuffix(");"), "facts.js")
    except (OSError, UnreadableFile):
        return {}
