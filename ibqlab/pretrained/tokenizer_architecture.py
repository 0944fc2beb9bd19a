"""A tokenizer's architecture from the names and shapes of its tensors, by our names.

Nothing is asked and nothing is guessed from file names. What tensors cannot show: the nominal `resolution`, which only
places attention (256 is written, or more where there are more than nine levels, and attention_resolutions so that the
right levels have it), dropout, and all settings of losses (the published defaults). Nor do they tell IBQ from VQ: both
store one codebook. `recognition` asks where nothing else in the file tells.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.quantizers import QuantizerConfig, quantizer_config
from ibqlab.tokenizer import AutoencoderConfig, Tokenizer, TokenizerConfig

CODEBOOK = "quantizer.codes.weight"
"""Our name of the codebook."""
PUBLISHED_CODEBOOK = "quantize.embedding.weight"
"""Its name in the files of most systems."""
RESOLUTION = 256
"""Published nominal resolution in pixels."""
EMBEDDED_TOKENS = ("tok_emb.weight", "pre_emb.weight")
"""Published names of generators' tensors."""
MOST_BITS = 62
"""Lookup-free codes of more channels could not be numbered by an int64."""

Shapes = Mapping[str, tuple[int, ...]]


def empty_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """A tokenizer whose parameters have names and shapes but no memory, for weights to be put in."""
    with torch.device("meta"), NothingDrawn():
        return Tokenizer(config)


class NothingDrawn(TorchFunctionMode):
    """Leaves out draws from N(0, 1): on tensors without memory the first one imports torch's compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def convolutional_config(shapes: Shapes, design: str = "vqgan") -> AutoencoderConfig:
    """Encoder and decoder of one of the designs that `AutoencoderConfig` describes.

    Args:
        shapes: of the tokenizer's tensors by our names.
        design: which.
    Raises:
        CheckpointError: a tensor is missing without which nothing can be told, or shapes that fit no such design.
    """
    vqgan = design == "vqgan"
    levels = range(max(1, count_numbered(shapes, r"encoder\.down")))
    channels = [tensor_shape(shapes, f"encoder.down.{level}.block.0.conv2.weight", 4)[0] for level in levels]
    resolution = max(RESOLUTION, 2 ** (len(channels) - 1))
    attention = [level for level in levels if any(key.startswith(f"encoder.down.{level}.attn.") for key in shapes)]
    latent = tensor_shape(shapes, "decoder.conv_in.weight", 4)[1]
    base, in_channels = tensor_shape(shapes, "encoder.conv_in.weight", 4)[:2]
    if any(width % base for width in channels):
        raise CheckpointError(
            f"every level's channels must be a multiple of the first convolution's; got {base} and {channels}. The "
            "tensors are of another architecture, or damaged"
        )
    try:
        return AutoencoderConfig(
            design=design,
            base_channels=base,
            channel_multipliers=tuple(width // base for width in channels),
            num_res_blocks=count_numbered(shapes, r"encoder\.down\.[0-9]+\.block"),
            resolution=resolution,
            attention_resolutions=tuple(resolution // 2**level for level in attention) if vqgan else (),
            middle_attention=not vqgan or any(key.startswith("encoder.mid.attn_1.") for key in shapes),
            latent_channels=latent,
            double_latent=vqgan and tensor_shape(shapes, "encoder.conv_out.weight", 4)[0] == 2 * latent,
            in_channels=in_channels,
            out_channels=tensor_shape(shapes, "decoder.conv_out.weight", 4)[0],
        )
    except ValueError as error:
        raise CheckpointError(f"the shapes of the tensors fit no tokenizer: {error}") from None


def codebook_config(shapes: Shapes, name: str, **settings: Any) -> QuantizerConfig:
    """A quantizer with one stored codebook.

    Args:
        shapes: of the tokenizer's tensors by our names.
        name: of the quantizer.
        settings: of it, beside K and D.
    Raises:
        CheckpointError: no codebook is stored.
    """
    size, dim = tensor_shape(shapes, CODEBOOK, 2)
    return quantizer_config({"name": name, "codebook_size": size, "code_dim": dim, **settings})


def sign_config(bits: int, name: str = "lfq") -> QuantizerConfig:
    """LFQ, or its kin, of so many bits, whose codes are not stored. CheckpointError for more than an index has."""
    if bits > MOST_BITS:
        raise CheckpointError(
            f"the tensor {PUBLISHED_CODEBOOK!r} is missing, and lookup-free codes of {bits} channels cannot be numbered"
        )
    return quantizer_config({"name": name, "codebook_size": 2**bits, "code_dim": bits})


def count_numbered(shapes: Shapes, parent: str) -> int:
    """How many numbered parts a module has, from 0 on.

    Args:
        parent: its name, a regular expression.
    Raises:
        CheckpointError: a number is left out, before a network of so many parts is built.
    """
    numbers = {int(match[1]) for key in shapes if (match := re.match(rf"{parent}\.([0-9]{{1,6}})\.", key))}
    left_out = next((number for number in range(len(numbers)) if number not in numbers), None)
    if left_out is not None:
        name = re.sub(r"\[0-9\]\+", "0", parent.replace("\\", ""))
        raise CheckpointError(f"the tensors {name}.{left_out}.… are missing, and there are some of {max(numbers):,}")
    return len(numbers)


def tensor_shape(shapes: Shapes, key: str, dimensions: int, network: str = "tokenizer") -> tuple[int, ...]:
    """A tensor's shape.

    Raises:
        CheckpointError: there is none of that name, or it has another number of dimensions.
    """
    stored = PUBLISHED_CODEBOOK if key == CODEBOOK else key
    if key not in shapes:
        raise CheckpointError(f"the tensor {stored!r} is missing, which every {network} of this design has")
    if len(shapes[key]) != dimensions:
        raise CheckpointError(f"the tensor {stored!r} must have {dimensions} dimensions; got {tuple(shapes[key])}")
    return shapes[key]
