"""The published generators of IBQ and LlamaGen: they predict an image's tokens one after another, given its class.

    generator = Generator(GeneratorConfig.preset("B"))           # IBQ's; LlamaGenConfig.preset("B") is LlamaGen's
    loss = generator.loss(indices, labels)       # training: the logits of a whole batch never exist
    logits = generator(indices, labels)          # (B, T, V): position t sees the class and tokens 0 to t − 1
    indices = generator.sample(labels, cfg_scale=2.25, temperature=1.1, seed=0)     # (B, T)

What is unusual: in IBQ's the class enters twice, as the first token and as what scales, shifts and gates every block
and the head's norm; a dropped label is dropped for both. LlamaGen's is the same network without the second part.
Submodule names are those that IBQ published. Shape letters: B images · T sequence · C width · V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import BLOCKS, CODES, require, require_at_most
from ibqlab.generator.attention import KeyValueCache
from ibqlab.generator.decoding import TokenDecoding
from ibqlab.generator.layers import AdaptiveBlock, AdaptiveNorm, Block, ClassEmbedding, HeadNorm, initialise
from ibqlab.generator.sampler_network import Copies, Residual, RowMemory, SamplerNetwork, through_blocks
from ibqlab.generator.sampler_operations import Drawing
from ibqlab.generator.sampling import Prediction, TokenGenerator
from ibqlab.generator.sequence import SequenceConfig, block_parts, check_inputs, check_positive, position_table


@dataclass(frozen=True, kw_only=True)
class WholeTokenSettings:
    """What generators that draw a token at once, IBQ's and LlamaGen's, have beside the settings of `SequenceConfig`."""

    modulates: ClassVar[bool]
    """Whether the class scales, shifts and gates every block and the head's norm; else it is the first token alone."""

    vocabulary_size: int = 16384
    """V, the tokenizer's codebook size, at least 2. Paper: 16,384."""

    depth: int = 16
    """Blocks, at least 1. Paper: 16 (B), 20 (L), 24 (XL), 30 (XXL)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "depth")
        require_at_most("depth", self.depth, BLOCKS)
        require_at_most("vocabulary_size", self.vocabulary_size, CODES)
        size = self.vocabulary_size
        require(size >= 2, f"vocabulary_size must be at least 2; got {size}. Use the tokenizer's codebook_size.")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(WholeTokenSettings, SequenceConfig):
    """The published generator of IBQ. The defaults are IBQ-B."""

    modulates: ClassVar[bool] = True
    config_name: ClassVar[str] = "ibq"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "B": {"depth": 16, "num_heads": 16, "width": 1024, "gate_scale": 1e-3},
        "L": {"depth": 20, "num_heads": 20, "width": 1280, "gate_scale": 1e-3},
        "XL": {"depth": 24, "num_heads": 24, "width": 1536, "gate_scale": 1e-4},
        "XXL": {"depth": 30, "num_heads": 30, "width": 1920, "gate_scale": 1e-5},
    }

    gate_scale: float = 1e-3
    """The blocks' gates start at this share of other weights, ≥ 0: near 0 every block starts as the identity.
    Published: 1e-3 (B, L), 1e-4 (XL), 1e-5 (XXL)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.gate_scale
        require(scale >= 0, f"gate_scale must be ≥ 0; got {scale}. Published: 1e-3 to 1e-5.")


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig(WholeTokenSettings, SequenceConfig):
    """The published class-conditional generator of LlamaGen. The defaults are its B for images of 256 pixels.

    Source: published LlamaGen generator code.
    """

    modulates: ClassVar[bool] = False
    config_name: ClassVar[str] = "llamagen"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "B": {"depth": 12, "num_heads": 12, "width": 768},
        "L": {"depth": 24, "num_heads": 16, "width": 1024},
        "XL": {"depth": 36, "num_heads": 20, "width": 1280},
        "XXL": {"depth": 48, "num_heads": 24, "width": 1536},
        "3B": {"depth": 24, "num_heads": 32, "width": 3200},
    }

    depth: int = 12
    """Blocks, at least 1. Published: 12 (B), 24 (L), 36 (XL), 48 (XXL), 24 (3B)."""

    grid_size: int = 16
    """Tokens along one side of an image, at least 1: T = grid_size². Published: 16 for images of 256 pixels (B, L), 24
    for those of 384 (all sizes)."""

    width: int = 768
    """C, channels of a token, a multiple of 4·num_heads. Published: 768 (B), 1024 (L), 1280 (XL), 1536 (XXL), 3200
    (3B)."""

    num_heads: int = 12
    """Attention heads, at least 1. Published: 64 channels each, in 3B 100."""


class Decoding(TokenDecoding):
    """A generator of whole tokens part of the way through images: the logits of `forward`, one position at a time.

    Args: as in `TokenDecoding`.
    Cost: each position is computed once; keys and values are kept, 2·T·C numbers per block and image.
    """

    def __init__(self, generator: "Generator", labels: Int[Tensor, " B"]) -> None:
        super().__init__(generator, labels, len(generator.blocks))
        # Once per image instead of once per token: a third of all weights is read for these alone.
        self.modulations = [block.modulation(self.condition) for block in generator.blocks]  # depth · 6 of (B, 1, C)
        self.head_modulation = generator.head_nm.modulation(self.condition)

    def embed(self, tokens: Int[Tensor, "B new"]) -> Float[Tensor, "B new C"]:
        return self.generator.dropout(self.generator.tok_emb(tokens))

    def through_blocks(
        self, x: Float[Tensor, "B new C"], table: Float[Tensor, "new pairs 2"], caches: Sequence[KeyValueCache]
    ) -> Float[Tensor, "B new C"]:
        for block, modulation, cache in zip(self.generator.blocks, self.modulations, caches, strict=True):
            x = block.apply_modulation(x, table, modulation, cache)
        return x

    def logits(self, earlier_parts: Sequence[Int[Tensor, " B"]] = ()) -> Float[Tensor, "B V"]:
        model = self.generator
        return model.head(model.head_nm.apply_modulation(self.hidden, self.head_modulation))[:, 0]

    def truncate(self, rows: int) -> None:
        super().truncate(rows)
        self.modulations = [tuple(value[:rows] for value in modulation) for modulation in self.modulations]
        self.head_modulation = tuple(value[:rows] for value in self.head_modulation)


class GeneratorNetwork(SamplerNetwork):
    """A generator of whole tokens for one recorded position at a time.

    Args: `generator`, `dtype` and `rows` as in `SamplerNetwork`.
    """

    def __init__(self, generator: "Generator", dtype: torch.dtype, rows: int) -> None:
        super().__init__(generator, dtype, rows, generator.blocks, is_adapted=generator.config.modulates)
        self.tokens = self.empty_copy(generator.tok_emb.weight)
        self.norm = self.empty_copy(generator.head_nm.rmsnorm.weight)
        self.head = self.empty_copy(generator.head.weight)

    def copies(self, generator: "Generator") -> Copies:
        for weights, block in zip(self.blocks, generator.blocks, strict=True):
            yield from self.block_copies(weights, block)
        yield self.tokens, generator.tok_emb.weight
        yield self.norm, generator.head_nm.rmsnorm.weight
        yield self.head, generator.head.weight

    def begin(self, generator: "Generator", labels: Int[Tensor, " R"]) -> None:
        condition = generator.class_emb(labels)  # (R, 1, C)
        self.rows.x.copy_(condition[:, 0])
        modulated = [*generator.blocks, generator.head_nm]
        values = [value[:, 0] for module in modulated for value in module.modulation(condition)]
        if values:  # LlamaGen's class is the first token and nothing else
            memory = [*self.rows.modulations, self.rows.last_modulation]
            torch._foreach_copy_([target for targets in memory for target in targets], values)

    def scores(
        self,
        rows: RowMemory,
        earlier_parts: Sequence[Int[Tensor, " L"]],
        drawing: Drawing,
        operations: ModuleType,
    ) -> Float[Tensor, "R V"]:
        residual = through_blocks(
            *(Residual(rows.x), self.blocks, rows.modulations, rows.caches, self.table),
            position=drawing.position,
            drawing=drawing,
            operations=operations,
        )
        scale, shift = rows.last_modulation
        _, normed = operations.add_and_normalise(*residual, weight=self.norm, scale=scale, shift=shift)
        return operations.score(normed, self.head)

    def embed(self, tokens: Int[Tensor, " L"]) -> Float[Tensor, "L C"]:
        return nn.functional.embedding(tokens, self.tokens)


class Generator(TokenGenerator):
    """A transformer over a tokenizer's tokens: log p(image | class) = Σ_t log p(token t | tokens before t, class).

    Args:
        config: the architecture. Weights are drawn from torch's global random state as published: N(0, 0.02²), the
            class's part scaled down, the head 0, so that the first loss is ln V.
    Source: IBQ, eq. 11; published IBQ and LlamaGen generator code and configurations.
    """

    decoding = Decoding
    network = GeneratorNetwork

    def __init__(self, config: GeneratorConfig | LlamaGenConfig) -> None:
        super().__init__()
        width, block = config.width, AdaptiveBlock if config.modulates else Block
        self.config = config
        self.tok_emb = nn.Embedding(config.vocabulary_size, width)
        self.class_emb = ClassEmbedding(config.num_classes, width, config.label_dropout)
        self.dropout = nn.Dropout(config.token_dropout)
        self.blocks = nn.ModuleList(block(*block_parts(config)) for _ in range(config.depth))
        self.head_nm = AdaptiveNorm(width) if config.modulates else HeadNorm(width)
        self.head = nn.Linear(width, config.vocabulary_size, bias=False)
        initialise(self)
        nn.init.zeros_(self.head.weight)
        if isinstance(config, GeneratorConfig):
            self._scale_condition(config.gate_scale)

    @torch.no_grad()
    def _scale_condition(self, gate_scale: float) -> None:
        for block in self.blocks:
            block.scale_condition(gate_scale)
        self.head_nm.ada_lin[1].weight.mul_(0.5)

    def forward(self, indices: Int[Tensor, "B T"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B T V"]:
        """Scores of every token at every position, each from the class and the tokens before that position.

        The last token of `indices` is therefore predicted and never looked at.

        Args:
            indices: tokens in rows from the top left, 0 to V − 1, in a tensor, an array or lists; T may be any
                beginning of the image, 1 to grid_size². For a grid (B, h, w) use `.flatten(1)`.
            labels: classes, 0 to num_classes − 1, or num_classes for none in particular.
        Returns:
            Logits; their softmax over V is the distribution of the token at that position.
        Raises:
            ValueError: shapes, types or values that do not fit; the message says what to type.
        Cost: B·T·V numbers of memory; `loss` does without. Waits once for the device, to check the values.
        """
        return self.head(self.hidden_states(indices, labels))

    def hidden_states(self, indices: Int[Tensor, "B T"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B T C"]:
        """What the head multiplies: `head.weight` times these are the logits of `forward`.

        Args and Raises: as in `forward`.
        """
        config = self.config
        indices, labels = check_inputs(indices, labels, config, self.tok_emb.weight.device)
        condition = self.class_emb(labels)
        # The class stands where token −1 would: position t is predicted from the class and tokens 0 to t − 1.
        x = self.dropout(torch.cat([condition, self.tok_emb(indices[:, :-1])], dim=1))  # (B, T, C)
        table = position_table(config, x, x.shape[1])
        modulating = (condition,) if config.modulates else ()
        for block in self.blocks:
            x = block(x, table, *modulating)
        return self.head_nm(x, *modulating)

    def predictions(self, hidden: Float[Tensor, "B T C"], indices: Int[Tensor, "B T"]) -> list[Prediction]:
        return [(hidden, self.head, indices)]
