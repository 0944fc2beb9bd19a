"""A generator's architecture from the names and shapes of its published tensors.

What tensors cannot show: the number of heads (published: 64 channels each), the grid (published: 16 × 16 tokens),
dropouts and the scale that gates start at (the published defaults, which only training reads).
"""

from collections.abc import Iterable

from ibqlab.base.checks import require
from ibqlab.generator import FactorizedGeneratorConfig, GeneratorConfig, SequenceConfig
from ibqlab.pretrained.names import FIRST_STAGE
from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.pretrained.tokenizer_architecture import Shapes, count_numbered, tensor_shape

HEAD_DIM = 64
"""Channels of a head in every published generator."""
GRID_SIZE = 16
MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""What hidden widths are tried to be multiples of; published: 256."""
TOKENS, PARTS, CLASSES = "tok_emb.weight", ("pre_emb.weight", "post_emb.weight"), "class_emb.embedding_table.weight"


def infer_generator_config(
    shapes: Shapes, num_heads: int | None = None, grid_size: int | None = None
) -> SequenceConfig:
    """The generator that published tensors belong to.

    Args:
        shapes: shape of every tensor by published name, without the prefix `transformer.`.
        num_heads: attention heads; None: the width / 64.
        grid_size: tokens along one side of an image; None: 16.
    Raises:
        CheckpointError: the tensors are of another model, or one is missing without which nothing can be told.
        ValueError: a number of heads that does not divide the width, or none given where the rule does not fit.
    """
    factorized = PARTS[0] in shapes
    words, width = _shape(shapes, PARTS[0] if factorized else TOKENS)
    prefix = "spatial_blocks" if factorized else "blocks"
    shared = {
        "width": width,
        "num_heads": _heads(width, num_heads),
        "num_classes": _shape(shapes, CLASSES)[0] - 1,
        "grid_size": grid_size or GRID_SIZE,
        "hidden_multiple": _multiple(width, _shape(shapes, f"{prefix}.0.feed_forward.w1.weight")[0]),
    }
    try:
        if not factorized:
            return GeneratorConfig(vocabulary_size=words, depth=count_numbered(shapes, "blocks"), **shared)
        return FactorizedGeneratorConfig(
            bits=(_bits(words), _bits(_shape(shapes, PARTS[1])[0])),
            spatial_depth=count_numbered(shapes, "spatial_blocks"),
            factorized_depth=count_numbered(shapes, "factorized_blocks"),
            **shared,
        )
    except ValueError as error:
        raise CheckpointError(f"the shapes of the tensors fit no generator: {error}") from None


def check_is_generator(names: Iterable[str], tensors: Iterable[str]) -> None:
    """Raise CheckpointError unless the names are a generator's.

    Args:
        names: of the generator's tensors, without prefix.
        tensors: keys of the whole file.
    """
    if TOKENS in names or PARTS[0] in names:
        return
    if any(key.startswith(("encoder.", FIRST_STAGE)) for key in tensors):
        raise CheckpointError("this is a tokenizer, not a generator over its tokens; use load_tokenizer")
    first = ", ".join(dict.fromkeys(key.split(".")[0] for key in tensors))
    raise CheckpointError(
        f"this is no generator of IBQ's or Open-MAGVIT2's design, which has a tensor {TOKENS} or {PARTS[0]}; its "
        f"tensors' names begin with {first:.120}"
    )


def _heads(width: int, num_heads: int | None) -> int:
    if num_heads is None:
        require(
            width % HEAD_DIM == 0,
            f"the number of heads cannot be told from shapes; published generators have {HEAD_DIM} channels per head, "
            f"which does not divide this one's width {width}. Give num_heads=…",
        )
        return width // HEAD_DIM
    require(
        num_heads >= 1 and width % (4 * num_heads) == 0,
        f"num_heads must leave every head a multiple of 4 channels; got {num_heads} heads for the width {width}. "
        f"Published generators have {HEAD_DIM} channels per head",
    )
    return num_heads


def _multiple(width: int, hidden: int) -> int:
    least = 8 * width // 3
    fits = (multiple for multiple in (*MULTIPLES, hidden) if -(-least // multiple) * multiple == hidden)
    multiple = next(fits, None)
    if multiple is None:
        raise CheckpointError(
            f"the feed-forward layers' hidden width must be 8/3 of the width, rounded up; got {hidden} for {width}. "
            "The tensors are of another architecture"
        )
    return multiple


def _bits(size: int) -> int:
    if size < 2 or size & (size - 1):
        raise CheckpointError(f"a part of a token has a power of two of values; got {size}")
    return size.bit_length() - 1


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    return tensor_shape(shapes, key, 2, "generator")
