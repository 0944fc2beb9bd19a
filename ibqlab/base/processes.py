"""The processes of a job: which one this is, and sums, maxima and lists over all of them.

Without a job of several processes each function gives the value itself.
"""

import os

import torch.distributed as dist
from torch import Tensor


def share_of_work() -> tuple[int, int]:
    """This process's number and how many there are: what torchrun, or whoever else, sets as RANK and WORLD_SIZE."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """The device of this process: of several on one machine, "cuda" means one each.

    Args:
        device: "cpu", "cuda", or one by its number, which is taken as it is.
    """
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


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
    return list(dict.fromkeys(name for process_names in lists for name in process_names))
