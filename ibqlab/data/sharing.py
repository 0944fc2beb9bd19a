"""Work that several processes share without talking to each other: each takes its part and its device."""

import os


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
