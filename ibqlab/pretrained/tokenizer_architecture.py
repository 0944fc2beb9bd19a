"""A tokenizer's architecture from the names and shapes of its published tensors.

Nothing is asked and nothing is guessed from file names. What tensors cannot show: the nominal `resolution`, which only
places attention (256 is written, or more where there are more than nine levels, and attention_resolutions so that the
right levels have it), dropout, and all settings of losses (the published defaults). Nor do they tell IBQ from VQ: both
store one codebook. `families` asks where nothing else in the file tells; here "ibq" is taken unless `quantizer` says
otherwise.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ibqlab.base.escaping import for_terminal
from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.quantizers import QuantizerConfig, quantizer_config
from ibqlab.tokenizer import AutoencoderConfig, Tokenizer, TokenizerConfig

CODEBOOK = "quantize.embedding.weight"
"""The codebook's published name."""
RESOLUTION = 256
"""Published nominal resolution in pixels."""
EMBEDDED_TOKENS = ("tok_emb.weight", "pre_emb.weight")
"""Published names of generators' tensors."""
MOST_BITS = 62
"""Lookup-free codes of more channels could not be numbered by an int64."""

Shapes = Mapping[str, tuple[int, ...]]


def infer_config(shapes: Shapes, quantizer: str | None = None) -> TokenizerConfig:
    """The tokenizer that published tensors belong to.

    Args:
        shapes: shape of every tensor by published name; names of other parts are passed over.
        quantizer: registered name of the quantizer; None: "ibq", or "lfq" where no codebook is stored.
    Raises:
        CheckpointError: the tensors are of another model, or one is missing without which nothing can be told.
        ValueError: an unknown quantizer.
    """
    _check_is_tokenizer(shapes)
    autoencoder = _autoencoder(shapes)
    return TokenizerConfig(autoencoder=autoencoder, quantizer=_quantizer(shapes, autoencoder, quantizer))


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


def _check_is_tokenizer(shapes: Shapes) -> None:
    if "encoder.conv_in.weight" in shapes:
        return
    if any(key.startswith(("transformer.", "cls_embedding.")) or key in EMBEDDED_TOKENS for key in shapes):
        raise CheckpointError(
            "this is an autoregressive generator (it embeds tokens), not a tokenizer; use load_generator. The one "
            "that it was trained on is load_first_stage(path), where the file holds it"
        )
    first = ", ".join(dict.fromkeys(key.split(".")[0] for key in shapes))
    raise CheckpointError(
        "this is no image tokenizer of IBQ's or Open-MAGVIT2's design, which has a tensor encoder.conv_in.weight; "
        f"its tensors' names begin with {for_terminal(first, 120)}"
    )


def _autoencoder(shapes: Shapes) -> AutoencoderConfig:
    magvit2 = any(key.startswith("encoder.mid_block.") for key in shapes)
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
            design="magvit2" if magvit2 else "vqgan",
            base_channels=base,
            channel_multipliers=tuple(width // base for width in channels),
            num_res_blocks=count_numbered(shapes, r"encoder\.down\.[0-9]+\.block"),
            resolution=resolution,
            attention_resolutions=() if magvit2 else tuple(resolution // 2**level for level in attention),
            latent_channels=latent,
            double_latent=not magvit2 and tensor_shape(shapes, "encoder.conv_out.weight", 4)[0] == 2 * latent,
            in_channels=in_channels,
            out_channels=tensor_shape(shapes, "decoder.conv_out.weight", 4)[0],
        )
    except ValueError as error:
        raise CheckpointError(f"the shapes of the tensors fit no tokenizer: {error}") from None


def _quantizer(shapes: Shapes, autoencoder: AutoencoderConfig, name: str | None) -> QuantizerConfig:
    unstored = CODEBOOK not in shapes and (name == "lfq" or (name is None and autoencoder.design == "magvit2"))
    if unstored:
        magvit2 = autoencoder.design == "magvit2"
        bits = autoencoder.latent_channels if magvit2 else tensor_shape(shapes, "quant_conv.weight", 4)[0]
        if bits <= MOST_BITS:
            return quantizer_config({"name": "lfq", "codebook_size": 2**bits, "code_dim": bits})
    size, dim = tensor_shape(shapes, CODEBOOK, 2)
    return quantizer_config({"name": name or "ibq", "codebook_size": size, "code_dim": dim})


def count_numbered(shapes: Shapes, parent: str) -> int:
    """How many numbered parts a module has: one more than the largest number after its name, a regular expression."""
    numbers = {int(match[1]) for key in shapes if (match := re.match(rf"{parent}\.([0-9]{{1,6}})\.", key))}
    return max(numbers, default=-1) + 1


def tensor_shape(shapes: Shapes, key: str, dimensions: int, network: str = "tokenizer") -> tuple[int, ...]:
    """A tensor's shape.

    Raises:
        CheckpointError: there is none of that name, or it has another number of dimensions.
    """
    if key not in shapes:
        raise CheckpointError(f"the tensor {key!r} is missing, which every {network} of this design has")
    if len(shapes[key]) != dimensions:
        raise CheckpointError(f"the tensor {key!r} must have {dimensions} dimensions; got {tuple(shapes[key])}")
    return shapes[key]
