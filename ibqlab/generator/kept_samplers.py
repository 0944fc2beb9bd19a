"""Samplers are kept between calls, beside their generators and not in them: copies and files know nothing of it.

A sampler holds the weights once more, caches, and CUDA graphs, which take seconds to record. It goes when its generator
does, when that goes back to training, and when anything went wrong in it.
"""

import threading
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ibqlab.generator.recording import record
from ibqlab.generator.sampler import Request, Sampler, lanes_for
from ibqlab.generator.sampling_dtype import dtype_name

_samplers: WeakKeyDictionary[nn.Module, dict[torch.dtype, Sampler]] = WeakKeyDictionary()
_one_at_a_time = threading.Lock()
"""Two threads would write into the same memory."""


class SamplerMemoryError(RuntimeError):
    """A device has not the memory that a sampler keeps; the message names what to change."""


def draw_with_sampler(
    generator: nn.Module, request: Request, dtype: torch.dtype, *, compiled: bool, progress: bool
) -> Int[Tensor, "B T"]:
    """Tokens of new images, by the generator's sampler of this type, which is made where there is none.

    Args:
        generator: in eval mode.
        request: what to draw.
        dtype: to draw in.
        compiled: record the step; else it runs as it stands.
        progress: show a bar over the tokens.
    Raises:
        ValueError: scores that are no numbers.
        SamplerMemoryError: the device has too little memory.
    """
    with _one_at_a_time:
        try:
            recorder = record if compiled else None
            # What is kept must be open to calls inside and outside `torch.inference_mode`.
            with torch.inference_mode(mode=False):
                return _sampler_for(generator, request, dtype).draw(generator, request, recorder, progress=progress)
        except torch.OutOfMemoryError as error:
            said = str(error).splitlines()[0]
        except BaseException:
            # Its caches may hold what is no number, and its position may be anywhere.
            forget_sampler(generator)
            raise
        forget_sampler(generator)
    # Raised out here, where no traceback holds the sampler's memory any more.
    lanes = lanes_for(dtype, request.labels.device, len(request.labels))
    raise SamplerMemoryError(
        f"out of memory: drawing in {dtype_name(dtype)} keeps the generator's weights once more, and keys and values "
        f'of {lanes} images. Use dtype="bfloat16", which takes half of what float32 does; or compiled=False and '
        'dtype="float32" with fewer images at a time (ibqlab sample --no-compiled --dtype float32 --batch-size 8). '
        f"torch says: {said}"
    )


def forget_sampler(generator: nn.Module) -> None:
    """Free what is kept for a generator."""
    _samplers.pop(generator, None)


def _sampler_for(generator: nn.Module, request: Request, dtype: torch.dtype) -> Sampler:
    by_type = _samplers.setdefault(generator, {})
    lanes = lanes_for(dtype, request.labels.device, len(request.labels))
    is_guided = request.guided_positions() > 0
    if dtype in by_type and not by_type[dtype].fits(generator, lanes, is_guided=is_guided):
        del by_type[dtype]  # before the next one is made, or both would be there at once
    if dtype not in by_type:
        by_type[dtype] = Sampler(generator, dtype, lanes, is_guided=is_guided)
    return by_type[dtype]
