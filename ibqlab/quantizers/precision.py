"""The process's switches for products of float32: set to exact for a while, then put back as they were.

What is unusual: torch has two interfaces to them, `torch.set_float32_matmul_precision` and, from 2.9 on,
`fp32_precision` under `torch.backends`. The older one raises when it is read after the newer one was used, and a newer
switch reads as what it inherits, so that writing back what was read would pin it. Neither interface tells this; both
are left here as they were found.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

Switch = tuple[str, str]
"""Backend and operation, as torch names them."""
PRODUCTS: tuple[Switch, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
"""The switches of matrix products on GPUs and on CPUs."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside the block float32 is multiplied as float32, on every device."""
    newer = {switch: own_value(switch) for switch in PRODUCTS} if has_newer_switches() else {}
    for switch in newer:
        # With these the older switch can be read whatever was chosen.
        write_switch(switch, "ieee")
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for switch, value in newer.items():
            write_switch(switch, value)


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
