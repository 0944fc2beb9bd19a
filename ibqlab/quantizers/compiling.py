"""Functions that torch.compile leaves as they are written."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def never_compiled(function: Callable) -> Callable:
    """Run a function over blocks as written also inside torch.compile, which then cuts its graph there.

    What torch.compiler.disable does, but that imports the whole compiler at once, two seconds of every start. Here it
    is asked for only in a process in which something has imported the compiler.

    Args:
        function: such as one with a hand-made gradient, which tracing would take apart.
    """
    # At most one: torch's own wrapper. A list, because torch.compile can follow additions to it while it traces.
    disabled: list[Callable] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call
