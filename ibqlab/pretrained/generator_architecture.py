"""A generator's architecture from the names and shapes of its published tensors.

What tensors cannot show: the number of heads (published for IBQ and Open-MAGVIT2: 64 channels each), the grid
(published: 16 × 16 tokens), dropouts and the scale that gates start at (the published defaults, which only training
reads). LlamaGen published other numbers of heads, and two grids: its numbers are looked up by width, and asked for
where that does not settle them, because a wrong one would draw noise without an error.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from ibqlab.base.checks import require
from ibqlab.generator import FactorizedGeneratorConfig, GeneratorConfig, LlamaGenConfig, SequenceConfig
from ibqlab.pretrained.hub import PUBLISHED_GENERATORS
from ibqlab.pretrained.names import FIRST_STAGE, LLAMAGEN_CLASSES, LLAMAGEN_TOKENS, is_llamagen
from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.pretrained.tokenizer_architecture import Shapes, count_numbered, tensor_shape

HEAD_DIM = 64
"""Channels of a head in every published generator of IBQ and Open-MAGVIT2."""
GRID_SIZE = 16
"""Of every published generator of IBQ and Open-MAGVIT2."""
MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""What hidden widths are tried to be multiples of; published: 256."""
TOKENS, PARTS, CLASSES = "tok_emb.weight", ("pre_emb.weight", "post_emb.weight"), "class_emb.embedding_table.weight"


class Layout(NamedTuple):
    """Names from which a design's sizes are read."""

    tokens: str
    """Embedding of the tokens, or of their first part."""
    classes: str
    """Embedding of the classes."""
    blocks: str
    """The blocks along the image, ahead of their numbers."""


LAYOUTS = {
    "ibq": Layout(TOKENS, CLASSES, "blocks"),
    "magvit2": Layout(PARTS[0], CLASSES, "spatial_blocks"),
    "llamagen": Layout(LLAMAGEN_TOKENS, f"{LLAMAGEN_CLASSES}embedding_table.weight", "layers"),
}


def infer_generator_config(
    shapes: Shapes, num_heads: int | None = None, grid_size: int | None = None
) -> SequenceConfig:
    """The generator that published tensors belong to.

    Args:
        shapes: shape of every tensor by published name, without the prefix `transformer.`.
        num_heads: attention heads; None: the width / 64, in LlamaGen's as published for the width.
        grid_size: tokens along one side of an image; None: 16, in LlamaGen's as published for the width.
    Raises:
        CheckpointError: the tensors are of another model, or one is missing without which nothing can be told.
        ValueError: a number of heads that does not divide the width, or none given where the rule does not fit.
    """
    design = "llamagen" if is_llamagen(shapes) else "magvit2" if PARTS[0] in shapes else "ibq"
    layout = LAYOUTS[design]
    words, width = _shape(shapes, layout.tokens)
    if design == "llamagen":
        num_heads = _published_heads(width) if num_heads is None else num_heads
        grid_size = _published_grid(width) if grid_size is None else grid_size
    shared = {
        "width": width,
        "num_heads": _heads(width, num_heads),
        "num_classes": _shape(shapes, layout.classes)[0] - 1,
        "grid_size": GRID_SIZE if grid_size is None else grid_size,
        "hidden_multiple": _multiple(width, _shape(shapes, f"{layout.blocks}.0.feed_forward.w1.weight")[0]),
    }
    depth = count_numbered(shapes, layout.blocks)
    try:
        if design == "magvit2":
            return FactorizedGeneratorConfig(
                bits=(_bits(words), _bits(_shape(shapes, PARTS[1])[0])),
                spatial_depth=depth,
                factorized_depth=count_numbered(shapes, "factorized_blocks"),
                **shared,
            )
        config = LlamaGenConfig if design == "llamagen" else GeneratorConfig
        return config(vocabulary_size=words, depth=depth, **shared)
    except ValueError as error:
        raise CheckpointError(f"the shapes of the tensors fit no generator: {error}") from None


def _published_heads(width: int) -> int:
    """Attention heads of LlamaGen's published generator of this width."""
    heads = {preset["width"]: preset["num_heads"] for preset in LlamaGenConfig.presets.values()}
    require(
        width in heads,
        "the number of heads cannot be told from shapes, and LlamaGen published none of the width "
        f"{width} (but {', '.join(map(str, heads))}). Give num_heads=… (--num-heads)",
    )
    return heads[width]


def _published_grid(width: int) -> int:
    """Tokens along a side in LlamaGen's published generators of this width, where that is one number."""
    presets = {name: preset["width"] for name, preset in LlamaGenConfig.presets.items()}
    entries = [entry for entry in PUBLISHED_GENERATORS.values() if entry.design == LlamaGenConfig.config_name]
    sizes = {entry.file: entry.grid_size for entry in entries if presets[entry.preset] == width}
    published = ", ".join(f"{size} in {file}" for file, size in sizes.items()) or "none of this width"
    require(
        len(set(sizes.values())) == 1,
        f"the grid cannot be told from shapes (published: {published}), and with a wrong one every token stands in a "
        "wrong place. Give grid_size=16 for images of 256 pixels, 24 for 384; once is enough with `ibqlab export FILE "
        "TARGET.safetensors --grid-size 16`",
    )
    return next(iter(sizes.values()))


def refuse_tokenizer(names: Collection[str]) -> None:
    """Raise CheckpointError where the names of a whole file are a tokenizer's, of whatever family, or have some."""
    if not any(name.startswith("encoder.") for name in names):
        return
    if is_llamagen(names) or any(name in names for name in (TOKENS, PARTS[0])):
        raise CheckpointError(
            "tensors of a tokenizer (encoder.…) and of a generator stand side by side in one file, which holds the "
            f"weights of one model, or its tokenizer under {FIRST_STAGE}; save the generator alone"
        )
    raise CheckpointError("this is a tokenizer, not a generator over its tokens; use load_tokenizer")


def check_is_generator(names: Iterable[str], tensors: Iterable[str]) -> None:
    """Raise CheckpointError unless the names are those of a generator that draws images by class.

    Args:
        names: of the generator's tensors, without prefix.
        tensors: keys of the whole file.
    """
    if any(name.startswith(f"{LLAMAGEN_CLASSES}cap_proj.") for name in names):
        raise CheckpointError(
            f"this is LlamaGen's generator of images from text ({LLAMAGEN_CLASSES}cap_proj…), and ibqlab has none of "
            "the language model that it needs; its generators by class are read (list them: ibqlab download)"
        )
    if TOKENS in names or PARTS[0] in names or is_llamagen(names):
        return
    if any(key.startswith(FIRST_STAGE) for key in tensors):
        raise CheckpointError("this is a tokenizer, not a generator over its tokens; use load_tokenizer")
    first = ", ".join(dict.fromkeys(key.split(".")[0] for key in tensors))
    raise CheckpointError(
        f"this is no generator of IBQ's or Open-MAGVIT2's design, which has a tensor {TOKENS} or {PARTS[0]}, and none "
        f"of LlamaGen's, which has {LLAMAGEN_TOKENS} and {LLAMAGEN_CLASSES}…; its tensors' names begin with "
        f"{first:.120}"
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
        f"Published generators have {HEAD_DIM} channels per head, LlamaGen's largest 100",
    )
    return num_heads


def _multiple(width: int, hidden: int) -> int:
    least = 8 * width // 3
    fits = (multiple for multiple in (*MULTIPLES, max(hidden, 1)) if -(-least // multiple) * multiple == hidden)
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
