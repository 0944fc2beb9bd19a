"""What goes wrong in an update: an error at the first one, later a warning, each kind once."""

import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile leaves alone, where a compiled step calls it; nothing is imported for it."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


class Trouble:
    """Tells of mistakes without ending a training that runs."""

    def __init__(self):
        self.step: Any = -1
        """Of the update in progress."""
        self.raises = True
        """Whether nothing was measured yet, so that a mistake is one of the call and shows at once."""
        self._told: set[str] = set()

    def warn(self, message: str) -> None:
        """Each kind once: a loop has thousands of steps."""
        kind = re.sub(r"[0-9]+", "", message)[:40]
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(f"monitor, step {self.step}: {message}", stacklevel=5)

    def checked(self, read: Callable[[], Any]) -> Any:
        """What is read; None with a warning where it is not what it must be, an error at the first update."""
        try:
            return read()
        except Exception as error:  # whatever it is, it must not end somebody's training
            if self.raises:
                raise
            self.warn(str(error) or type(error).__name__)
            return None
