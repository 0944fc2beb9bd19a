"""Whether a run fits into the memory of the device that trains it, told before anything is made.

A rough count from below costs nothing. Where it comes near the memory there is, the recipe's own cost is counted, which
takes seconds.
"""

import torch

from ibqlab.base.checks import gib, memory_bytes
from ibqlab.quantizers.base import QuantizerConfig, make_quantizer
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.recipes.run_config import RunConfig

NEAR = 0.02
"""Share of the memory from which on the rough count is not trusted."""


def require_fits(config: RunConfig) -> None:
    """Refuse a run that needs more memory than its device has.

    Args:
        config: of the run.
    Raises:
        ValueError: it does not fit; the message gives both sizes and the settings to lower.
    Cost: nothing for small runs; seconds where memory may be short.
    """
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    available = torch.cuda.get_device_properties(0).total_memory if on_gpu else memory_bytes()
    needed = least_bytes(config)
    if available is None or needed < NEAR * available:
        return
    if needed <= available:
        from ibqlab.costs.run_cost import count_run  # noqa: PLC0415 - torch's counter takes a while to import

        needed = max(needed, count_run(config).memory_bytes)
    if needed > available:
        device = "the GPU" if on_gpu else "this machine"
        raise ValueError(
            f"one process of this run needs at least {gib(needed)} of memory, {device} "
            f"has {gib(available)}; lower batch_size, or raise accumulate, or lower the sizes of networks, codebook "
            "and record. `ibqlab plan` counts what each takes"
        )


def least_bytes(config: RunConfig) -> int:
    """Bytes that one process needs at the very least: weights with Adam's averages, a batch and what is recorded."""
    at_once = config.batch_size // (config.processes * config.accumulate)
    pixels = config.data.image_size**2
    if isinstance(config, GeneratorTrainConfig):
        words = getattr(config.generator, "vocabulary_size", 0) + config.generator.num_classes
        tokens = at_once * config.generator.num_tokens
        return 4 * config.generator.width * (4 * words + 2 * tokens) + 12 * at_once * pixels
    autoencoder, quantizer = config.tokenizer.autoencoder, config.tokenizer.quantizer
    # Images and reconstructions; of designs with levels, also two tensors at full resolution.
    images = 4 * at_once * pixels * (6 + 2 * getattr(autoencoder, "base_channels", 0))
    recorded = config.record.snapshot_images * pixels * 6
    return codebook_bytes(quantizer) + images + recorded


def codebook_bytes(config: QuantizerConfig) -> int:
    """Bytes of a quantizer's weights and, of those that learn, of their gradients and Adam's averages.

    Returns:
        float32; 0 for a user's quantizer that cannot be made without memory, so that the count stays one from below.
    """
    from ibqlab.pretrained.tokenizer_architecture import NothingDrawn  # noqa: PLC0415 - imports all of pretrained

    try:
        with torch.device("meta"), NothingDrawn():
            quantizer = make_quantizer(config)
    except Exception:
        return 0
    weights = sum(value.nbytes * (4 if value.requires_grad else 1) for value in quantizer.parameters())
    return weights + sum(value.nbytes for value in quantizer.buffers())
