"""Measuring on tensors that have shapes but no contents: what autograd saves, and what autocast does on CUDA."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ibqlab.costs.shapes import ShapeMeter
from ibqlab.tokenizer.group_norm import lies_channels_last

BFLOAT16_PRODUCTS = frozenset({F.conv2d, F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm})
"""What autocast computes in bfloat16, as far as these networks use it; attention is looked after apart."""
FLOAT32_NORMS = frozenset({F.group_norm, torch.pow, torch.sum})
"""What autocast computes in float32 on CUDA, likewise."""


class LinearCost(NamedTuple):
    """What grows with the images of a step, and what does not."""

    fixed: int
    per_image: int

    def of(self, images: int) -> int:
        """For so many images."""
        return self.fixed + images * self.per_image


@contextmanager
def tensors_without_contents(precision: str) -> Iterator[ShapeMeter]:
    """Inside the block new tensors have shapes alone, and the type of weights, gradients and Adam's averages.

    Args:
        precision: of a recipe, which decides the type, torch's default inside the block.
    Yields:
        What counts the operations of the block.
    """
    before, dtype = torch.get_default_dtype(), torch.float64 if precision == "64-true" else torch.float32
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"), ShapeMeter() as shapes:
            yield shapes
    finally:
        torch.set_default_dtype(before)


def fit_line(count: Callable[[int], int]) -> LinearCost:
    """The cost of any number of images, from that of two and of three.

    Args:
        count: from images to a number that is linear in them.
    """
    # A single image's tokens are a view that no fused attention takes, so it says nothing about larger batches.
    two, three = count(2), count(3)
    return LinearCost(3 * two - 2 * three, three - two)


class SavedTensors:
    """Tensors that wait for the backward pass, each storage once.

    Args:
        known: storages that are accounted for elsewhere.
    """

    def __init__(self, known: Iterable[int]):
        self.known = set(known)
        self.storages: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        """Their size."""
        return sum(storage.nbytes() for storage in self.storages.values())

    def add(self, tensor: Tensor) -> Tensor:
        """Note a tensor's storage; the tensor itself comes back."""
        # The storage itself is held, so that its address cannot be given to another one meanwhile.
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = storage
        return tensor

    def watching(self) -> AbstractContextManager:
        """Inside the block every tensor that autograd saves is noted."""
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)


class _AsOnCuda(TorchFunctionMode):
    """What autocast, fused attention and kernels of our own do on CUDA, done to meta tensors, which torch leaves alone.

    Under autocast products are taken in bfloat16, norms, powers and sums in float32. Fused attention, which takes
    vectors whose numbers lie side by side, keeps queries, keys, values and result, not the matrix between them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[Tensor, Tensor] = {}

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        attention = function is F.scaled_dot_product_attention
        fused = attention and all(a.stride(-1) == 1 for a in args[:3])
        if torch.is_autocast_enabled("cpu"):
            if attention or function in BFLOAT16_PRODUCTS:
                args = tuple(map(self._rounded, args))
            elif function in FLOAT32_NORMS:
                args = tuple(a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args)
        result = _Saved.apply(*args[:3]) if fused else function(*args, **kwargs)
        # torch's convolution without contents forgets the order of its inputs.
        turned = function is F.conv2d and any(map(lies_channels_last, args[:2]))
        return result.to(memory_format=torch.channels_last) if turned else result

    def _rounded(self, value: Any) -> Any:
        """A tensor of float32 in bfloat16; a weight's copy is made once, as autocast does it."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.bfloat16()
        if value not in self._copies:
            self._copies[value] = value.bfloat16()
        return self._copies[value]


class _Saved(torch.autograd.Function):
    """Fused attention, as far as memory goes: its inputs and its result are kept. Has no backward pass."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        result = torch.empty_like(queries)
        ctx.save_for_backward(result, queries, keys, values)
        return result


@contextmanager
def cuda_precision(mixed: bool) -> Iterator[None]:
    """The run's precision, with CUDA's rules on what stays float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed), _AsOnCuda():
        yield


def largest_block_bytes(network: nn.Module, blocks: Iterable[nn.Module], call: Callable[[], Any], mixed: bool) -> int:
    """Bytes that one block of a network keeps for its backward pass: the largest of them.

    Args:
        network: that holds the blocks, none of which is computed again.
        call: runs the network once.
        mixed: whether the run's precision is bf16-mixed.
    """
    saved, before, sizes = SavedTensors(storages_of([network])), [], []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: before.append(saved.bytes))
        block.register_forward_hook(lambda *_: sizes.append(saved.bytes - before[-1]))
    with saved.watching(), cuda_precision(mixed):
        call()
    return max(sizes)


def storages_of(networks: Iterable[nn.Module]) -> set[int]:
    """What `SavedTensors` takes as known of networks: their weights and buffers."""
    return {
        tensor.untyped_storage()._cdata
        for network in networks
        for tensor in (*network.parameters(), *network.buffers())
    }


def count_parameters(module: nn.Module | None) -> int:
    """Learned numbers of a module; 0 for none."""
    return sum(p.numel() for p in module.parameters()) if module else 0


class Parameters(NamedTuple):
    """Learned numbers, part by part; 0 for what a run has not. Those of LPIPS are frozen."""

    encoder: int = 0
    decoder: int = 0
    codebook: int = 0
    """Everything that the quantizer learns; 0 for LFQ."""
    convolutions: int = 0
    """The two 1 × 1 convolutions around the quantizer; 0 in designs without them."""
    discriminator: int = 0
    """0 where the adversarial loss is off."""
    perceptual: int = 0
    """LPIPS: its trunk and its five layers of weights; 0 where it is off."""
    embeddings: int = 0
    """A generator's, of tokens and classes."""
    blocks: int = 0
    """A generator's."""
    head: int = 0
    """A generator's, with its norm."""

    @property
    def total(self) -> int:
        """The network's own: all that encodes and decodes, or that predicts tokens."""
        return sum(self) - self.discriminator - self.perceptual

    @property
    def trained(self) -> int:
        """All that an optimiser moves."""
        return self.total + self.discriminator


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one training step of a recipe takes, on one process."""

    parameters: Parameters
    """Learned numbers, part by part."""
    forward: LinearCost
    """Operations without gradients, by images; a multiply-add is two."""
    training: LinearCost
    """Operations of a training step on one process's part of a batch, by images."""
    activations: LinearCost
    """Bytes kept for the backward pass, at the step's fullest moment; `fixed` are the weights' copies in bfloat16."""
    state_bytes: int
    """Weights, gradients, Adam's averages, averaged and frozen weights, whatever the batch."""
    checkpoint_bytes: int
    """One checkpoint on disk; a run keeps two."""
    cache_bytes: int = 0
    """Keys and values of one image while a generator samples it, float32; guidance needs twice that."""
