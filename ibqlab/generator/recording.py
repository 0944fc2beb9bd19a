"""A step without arguments, recorded once and then played: all its work in one call of the host.

What is unusual: nothing goes in and nothing comes out. A step reads and writes memory that stays where it is, so that
the same recording serves every position of every image.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from types import FunctionType

import torch

Step = Callable[[], None]
WARM_UPS = 2
"""Runs before a recording: kernels are compiled and loaded, and libraries take the memory they work in, which cannot be
done while a graph is captured."""

_numbers = count()
_free_streams: defaultdict[int, list[torch.cuda.Stream]] = defaultdict(list)
"""By the device's number, those of recordings that are gone."""


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
    graph = torch.cuda.CUDAGraph()
    # Warmed up and captured on one stream: libraries keep the memory that they work in by stream.
    current, stream = torch.cuda.current_stream(), _stream_of(graph, torch.cuda.current_device())
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                before()
                step()
    finally:
        # After an error, too: the step's memory is freed then, and must not be given away while kernels write to it.
        current.wait_stream(stream)
    # Another thread, such as one that pins a loader's batches, may go on using CUDA meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _stream_of(graph: torch.cuda.CUDAGraph, device: int) -> torch.cuda.Stream:
    """A stream that no other recording has while this one lives.

    Torch's own stream for captures is on the device of the process's first capture, and all captures share it. From
    torch 2.12 on a graph that goes takes the memory that cuBLAS had on its stream with it, under other graphs of that
    stream (pytorch/pytorch#193402). Streams are used again, because that memory, 32 MiB each, may also stay.
    """
    free = _free_streams[device]
    stream = free.pop() if free else torch.cuda.Stream(device)
    weakref.finalize(graph, free.append, stream).atexit = False
    return stream
