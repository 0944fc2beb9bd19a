"""The process's switches for products of float32: set for a while, then put back as they were.

What is unusual: torch has two interfaces to them, `torch.set_float32_matmul_precision` and, from 2.9 on,
`fp32_precision` under `torch.backends`. The older one raises when it is read after the newer one was used, and a newer
switch reads as what it inherits, so that writing back what was read would pin it. Neither interface tells this; both
are left here as they were found.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Switch = tuple[str, str]
"""Backend and operation, as torch names them."""
PRODUCTS: tuple[Switch, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
"""The switches of matrix products on GPUs and on CPUs."""
OLDER_NAMES = {"ieee": "highest", "tf32": "high"}
"""What the older interface calls a precision; choosing it there sets the newer switches of `PRODUCTS`, too."""


class _Holders:
    """The threads that are inside `float32_products` now. The switches are the process's, so they share one choice."""

    def __init__(self):
        self.changed = threading.Condition()
        self.threads: list[int] = []
        self.precision = ""
        self.older = ""
        self.newer: dict[Switch, str] = {}

    def take(self, precision: str) -> None:
        """Enter: the first thread sets the switches, one that wants another precision waits for the others to leave."""
        with self.changed:
            if threading.get_ident() in self.threads and precision != self.precision:
                raise RuntimeError(f"products of {precision} inside a block of {self.precision}; leave that one first")
            self.changed.wait_for(lambda: not self.threads or self.precision == precision)
            if not self.threads:
                self._set(precision)
            self.threads.append(threading.get_ident())

    def give_back(self) -> None:
        """Leave: the last thread puts the switches back."""
        with self.changed:
            self.threads.remove(threading.get_ident())
            if not self.threads:
                self.restore()
                self.changed.notify_all()

    def _set(self, precision: str) -> None:
        self.precision = precision
        self.newer = {switch: own_value(switch) for switch in PRODUCTS} if has_newer_switches() else {}
        for switch in self.newer:
            # With these the older switch can be read whatever was chosen.
            write_switch(switch, "ieee")
        self.older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(OLDER_NAMES[precision])

    def restore(self) -> None:
        """Put both interfaces back as they were."""
        torch.set_float32_matmul_precision(self.older)
        for switch, value in self.newer.items():
            write_switch(switch, value)


_holders = _Holders()


def _start_again_in_child() -> None:
    """A forked process has none of the threads that were inside, and would wait for them."""
    global _holders
    held, _holders = _holders, _Holders()
    if held.threads:
        held.restore()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_start_again_in_child)


@contextmanager
def float32_products(precision: str = "ieee") -> Iterator[None]:
    """Inside the block float32 is multiplied as this says, whatever the process has chosen.

    Threads that are inside at one time share the switches; the last to leave puts them back. What a process chooses
    while a thread is inside is lost.

    Args:
        precision: "ieee", as float32 on every device; or "tf32", operands rounded to 11 bits on a GPU.
    Raises:
        RuntimeError: this thread is inside with another precision.
    """
    _holders.take(precision)
    try:
        yield
    finally:
        _holders.give_back()


def autocast_device(device: torch.device) -> str:
    """The device's name for `torch.autocast`, which does not know tensors of shapes alone: they pass for the CPU's."""
    return "cpu" if device.type == "meta" else device.type


def has_newer_switches() -> bool:
    """Whether this torch has `fp32_precision`."""
    return hasattr(torch._C, "_get_fp32_precision_getter")


def read_switch(switch: Switch) -> str:
    """A newer switch as it acts: "ieee", "tf32", "bf16" or "none", its own value or an inherited one."""
    return torch._C._get_fp32_precision_getter(*switch)


def write_switch(switch: Switch, value: str) -> None:
    """Set a newer switch; "none" lets it inherit."""
    torch._C._set_fp32_precision_setter(*switch, value)


def own_value(switch: Switch) -> str:
    """A newer switch's own value: "none" where it inherits what it reads as."""
    value, parent = read_switch(switch), parent_of(switch)
    if value == "none" or parent is None or read_switch(parent) != value:
        return value
    # Own or inherited? One that inherits follows its parent.
    parents_own = own_value(parent)
    write_switch(parent, "tf32" if value == "ieee" else "ieee")
    followed = read_switch(switch) != value
    write_switch(parent, parents_own)
    return "none" if followed else value


def parent_of(switch: Switch) -> Switch | None:
    """The switch that another one inherits from: its backend's, then that of all backends."""
    backend, operation = switch
    if operation != "all":
        return backend, "all"
    return None if backend == "generic" else ("generic", "all")
