"""Sums, maxima, broadcasts and lists over the processes of a training job; without one, the value itself."""

import torch.distributed as dist
from torch import Tensor


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place where there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def average_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes, in place where there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def same_on_all_processes(values: Tensor) -> Tensor:
    """The first process's values on every process."""
    if dist.is_available() and dist.is_initialized():
        values = values.contiguous()
        dist.broadcast(values, src=0)
    return values


def largest_over_processes(values: Tensor) -> Tensor:
    """Element-wise maximum over all processes, in place where there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def names_of_all_processes(names: list[str]) -> list[str]:
    """The names that any process has, each once, the first process's first."""
    if not (dist.is_available() and dist.is_initialized()):
        return names
    lists: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, names)
    return list(dict.fromkeys(name for part in lists for name in part))
