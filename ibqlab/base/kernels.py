"""Whether Triton's kernels can run on a device, found out once by running one.

Every computation that has a kernel of its own also has a form in PyTorch's operations. Those are what runs on a CPU and
wherever a kernel cannot: without Triton, with one that is too old, without the C compiler that it calls, on an old
card. So a caller asks `kernels_run_on` and never has to catch anything.
"""

import importlib
import importlib.util
import re
import warnings
from functools import cache

import torch

OLDEST_TRITON = (3, 6)
"""The version that comes with torch 2.11."""
OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the first cards with bfloat16 in their tensor cores (A100)."""


def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device; where a CUDA device cannot, one warning says why and what to do.

    Args:
        device: of the tensors at hand, with its number where it has one.
    Cost: the first question about a device compiles a small kernel, a second; later ones nothing.
    """
    if device.type != "cuda":
        return False
    return _run_on_card(torch.cuda.current_device() if device.index is None else device.index)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device multiplies bfloat16 in its tensor cores, rather than by emulation."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


@cache
def _run_on_card(number: int) -> bool:
    """Whether they run on the card of this number; cards of different kinds may sit in one machine."""
    problem = triton_problem()
    if not problem and torch.cuda.get_device_capability(number) < OLDEST_CAPABILITY:
        problem = f"{torch.cuda.get_device_name(number)} is older than they are written for"
    if not problem:
        try:
            _try_kernel(torch.device("cuda", number))
        except Exception as error:
            # A compiler, a driver, a linker: whatever it is, there is another form.
            problem = f"a trial failed with {type(error).__name__}: {error}"
    if problem:
        warnings.warn(
            f"cuda:{number} runs without ibqlab's own kernels, several times slower: {problem:.300}. Results are the "
            "same. Use a card from A100 on, the Triton that torch brings (pip install triton), and a C compiler (gcc).",
            stacklevel=3,
        )
    return not problem


def triton_problem() -> str:
    """Why Triton cannot be used in this process, whatever the device; "" where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.import_module("triton").__version__
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TRITON:
        return f"Triton {version} is installed, and {'.'.join(map(str, OLDEST_TRITON))} is the oldest that will do"
    return ""


def _try_kernel(device: torch.device) -> None:
    """Run a small kernel on a card; raises whatever goes wrong."""
    from ibqlab.base.trial_kernel import count_up  # noqa: PLC0415 - imports Triton

    numbers = torch.zeros(16, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        count_up[(1,)](numbers, SIZE=16)
    if numbers.tolist() != list(range(16)):
        raise RuntimeError("it gave wrong numbers")
