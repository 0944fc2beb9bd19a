"""Calls of torch on tensors that have shapes but no contents: their results' shapes, and how many operations they are.

What is unusual: torch works out many a shape in Python, which takes up to three milliseconds a call, and a network
repeats its layers. So each kind of call is made once, and after that its results are made from memory.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def _addmm_operations(total: Tensor, left: Tensor, right: Tensor, **_: Any) -> int:
    """A product that is added to a gradient in place (codebook's, head's), which torch does not count."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


OPERATIONS = {**flop_registry, torch.ops.aten.addmm_: _addmm_operations}
"""How to count the operations of a call, by function."""


class Layout(NamedTuple):
    """All there is to a tensor without contents; its storage is its own and no larger."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        """A new tensor like it."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class Argument(NamedTuple):
    """A result that is one of the call's own arguments, as functions that work in place return it."""

    key: int | str
    """Its position, or its name."""


class Call(NamedTuple):
    """What is known of a call from the layouts of its tensors and from its other arguments."""

    operations: int
    """A multiply-add counts as two."""
    result: Any
    """A Layout, a tuple of them, or an Argument; None where each call is to be made."""


class ShapeMeter(TorchDispatchMode):
    """Inside the block tensors of the meta device are worked on, and convolutions, products and attention counted."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        """Of all calls so far; a multiply-add counts as two."""
        self._calls: dict[tuple, Call] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        key = (function, *map(_describe, args), *kwargs, *map(_describe, kwargs.values()))
        call = self._calls.get(key)
        if call is None or call.result is None:
            result = function(*args, **kwargs)
        elif type(call.result) is Layout:
            result = call.result.make()
        elif type(call.result) is Argument:
            result = (kwargs if type(call.result.key) is str else args)[call.result.key]
        else:
            result = tuple(layout and layout.make() for layout in call.result)
        if call is None:
            count = OPERATIONS.get(function._overloadpacket)
            operations = count(*args, **kwargs, out_val=result) if count else 0
            call = self._calls[key] = Call(operations, _how_to_make(result, args, kwargs))
        self.operations += call.operations
        return result


def _describe(value: Any) -> Any:
    """What a call's result can depend on: of a tensor its layout, of a number its type, too, because 1 equals 1.0."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_describe, value))
    return type(value), value


def _how_to_make(result: Any, args: tuple, kwargs: dict) -> Any:
    """`Call.result`: None for views, whose storage is their arguments', and for whatever is no plain tensor."""
    arguments = {**dict(enumerate(args)), **kwargs}
    for key, value in arguments.items():
        if value is result:
            return Argument(key)
    inputs = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    layouts = []
    for tensor in result if isinstance(result, tuple) else (result,):
        if tensor is None and isinstance(result, tuple):
            layouts.append(None)  # a gradient that is not wanted
            continue
        if type(tensor) is not Tensor or tensor.device.type != "meta":
            return None
        layout, storage = Layout(tensor.shape, tensor.stride(), tensor.dtype), tensor.untyped_storage()
        if storage._cdata in storages or storage.nbytes() != layout.make().untyped_storage().nbytes():
            return None
        storages.add(storage._cdata)
        layouts.append(layout)
    return tuple(layouts) if isinstance(result, tuple) else layouts[0]
