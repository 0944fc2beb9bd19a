"""A step without arguments, recorded once and then played: all its work in one call of the host.

What is unusual: nothing goes in and nothing comes out. A step reads and writes memory that stays where it is, so that
the same recording serves every position of every image.
"""

from collections.abc import Callable
from itertools import count
from types import FunctionType

import torch

Step = Callable[[], None]
WARM_UPS = 2
"""Runs before a recording: kernels are compiled and loaded, and libraries take the memory they work in, which cannot be
done while a graph is captured."""

_numbers = count()


def record(step: Step, device: torch.device, before: Step) -> Step:
    """A step as one call.

    Args:
        step: launches the same work at every call, and never waits for its result.
        device: of the memory that it works on, the current one where it is a CUDA device.
        before: puts the memory into a state that the step can start from; called before each run that warms up.
    Returns:
        On CUDA the replay of a graph, elsewhere the step as `torch.compile` has it.
    """
    return record_graph(step, before) if device.type == "cuda" else compile_step(step)


def compile_step(step: Step) -> Step:
    """The step as `torch.compile` has it, in code of its own: it counts compilations by code, and stops at eight."""

    def call() -> None:
        step()

    code = call.__code__.replace(co_name=f"step_{next(_numbers)}")
    return torch.compile(FunctionType(code, call.__globals__, closure=call.__closure__), dynamic=False)


def record_graph(step: Step, before: Step) -> Step:
    """The step as a CUDA graph on the current device."""
    # Warmed up beside the current stream, as a capture is made: libraries keep their memory by stream.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            before()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Another thread, such as one that pins a loader's batches, may go on using CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
