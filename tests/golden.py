"""Values that the published code produced, kept beside the repository and not in it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"


def golden_file(name: str) -> Path:
    """The path of one golden file; skips the test where they are not at hand. The folder is as in `golden`."""
    folder = Path(os.environ.get("IBQLAB_GOLDEN", DEFAULT_FOLDER))
    if not folder.is_dir():
        pytest.skip(f"golden values not at hand ({folder} is no folder; IBQLAB_GOLDEN names another)")
    return folder / name


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One set of golden values; skips the test where they are not at hand.

    Args:
        name: of the set, such as "tokenizer_attn". The folder is ../shared/golden, or the one in IBQLAB_GOLDEN.
    Returns:
        The description (JSON) and the tensors by name, of stored type; empty for a set without tensors.
    """
    tensors = golden_file(f"{name}.safetensors")
    return json.loads(golden_file(f"{name}.json").read_text()), load_file(tensors) if tensors.is_file() else {}
