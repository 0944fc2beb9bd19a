"""The published generator of Open-MAGVIT2: tokens of 2^18 codes as two small ones, predicted one after the other.

    generator = FactorizedGenerator(FactorizedGeneratorConfig.preset("B"))
    loss = generator.loss(indices, labels)       # indices as LFQ gives them, 0 to 2^18 − 1
    scores = generator(indices, labels)          # scores.pre (B, T, 64), scores.post (B, T, 4096)

What is unusual: two transformers in one. The spatial blocks go along the image and give each position a context; the
factorised blocks go along the two parts of one token, [context, first part], and see nothing else of the image. They
use the first two rows of the grid's position table, so a context's query and key are zero vectors. The class enters as
the first token only. Submodule names are the published ones. Shape letters: B images · T sequence · C width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import BLOCKS, CODES, require, require_at_most
from ibqlab.generator.attention import KeyValueCache
from ibqlab.generator.decoding import TokenDecoding
from ibqlab.generator.layers import Block, ClassEmbedding, RMSNorm, initialise
from ibqlab.generator.sampler_network import (
    BlockModulation,
    Copies,
    Residual,
    RowMemory,
    SamplerNetwork,
    through_blocks,
)
from ibqlab.generator.sampler_operations import Drawing
from ibqlab.generator.sampling import Prediction, TokenGenerator
from ibqlab.generator.sequence import SequenceConfig, block_parts, check_inputs, check_positive, position_table
from ibqlab.quantizers.lfq import factorize_indices, join_indices


@dataclass(frozen=True, kw_only=True)
class FactorizedGeneratorConfig(SequenceConfig):
    """The published generator of Open-MAGVIT2. The defaults are its B.

    The numbers of heads in the presets are a reading: 64 channels each, as in IBQ's generator.
    """

    config_name: ClassVar[str] = "magvit2"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "B": {"spatial_depth": 24, "factorized_depth": 2, "num_heads": 16, "width": 1024},
        "L": {"spatial_depth": 36, "factorized_depth": 3, "num_heads": 20, "width": 1280},
        "XL": {"spatial_depth": 48, "factorized_depth": 4, "num_heads": 24, "width": 1536},
    }

    bits: tuple[int, int] = (6, 12)
    """Bits of a token's index in its first and its second part, each at least 1; their sum is LFQ's code_dim.
    Published: 6 and 12."""

    spatial_depth: int = 24
    """Blocks along the image, at least 1. Published: 24 (B), 36 (L), 48 (XL)."""

    factorized_depth: int = 2
    """Blocks along the parts of a token, at least 1. Published: 2 (B), 3 (L), 4 (XL)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "spatial_depth", "factorized_depth")
        require_at_most("spatial_depth", self.spatial_depth, BLOCKS)
        require_at_most("factorized_depth", self.factorized_depth, BLOCKS)
        for count in self.bits:
            require_at_most("bits of a part", count, CODES.bit_length() - 1)
        good = min(self.bits) >= 1 and sum(self.bits) < 63
        require(good, f"bits must be two numbers of at least 1 that sum to at most 62; got {self.bits}. Use (6, 12).")

    @property
    def vocabulary_size(self) -> int:
        """V = 2^(sum of bits), the tokenizer's codebook size."""
        return 2 ** sum(self.bits)


class FactorizedLogits(NamedTuple):
    """Scores of both parts of every token."""

    pre: Float[Tensor, "B T V_pre"]
    """Of the first part, from the class and the tokens before the position."""

    post: Float[Tensor, "B T V_post"]
    """Of the second part, from the same and the position's own first part."""


class FactorizedDecoding(TokenDecoding):
    """Open-MAGVIT2's generator part of the way through images: two draws per token.

    The spatial blocks give a position's context; the factorised blocks then go along [context, first part].

    Args: as in `TokenDecoding`.
    Source: published Open-MAGVIT2 sampling code.
    """

    parts = 2

    def __init__(self, generator: "FactorizedGenerator", labels: Int[Tensor, " B"]) -> None:
        super().__init__(generator, labels, len(generator.spatial_blocks))
        # The first two rows, also where an image has a single token.
        self.pair_table = position_table(generator.config, self.condition, 2)
        self.pair_caches: list[KeyValueCache] = []

    def embed(self, tokens: Int[Tensor, "B new"]) -> Float[Tensor, "B new C"]:
        return self.generator.dropout(self.generator.embed(tokens)[0])

    def through_blocks(
        self, x: Float[Tensor, "B new C"], table: Float[Tensor, "new pairs 2"], caches: Sequence[KeyValueCache]
    ) -> Float[Tensor, "B new C"]:
        for block, cache in zip(self.generator.spatial_blocks, caches, strict=True):
            x = block(x, table, cache)
        return x

    def logits(self, earlier_parts: Sequence[Int[Tensor, " B"]] = ()) -> Float[Tensor, "B V"]:
        model, part = self.generator, len(earlier_parts)
        if part == 0:
            # A new token: the factorised blocks see nothing of the tokens before it but the context.
            self.pair_caches = [KeyValueCache(2) for _ in model.factorized_blocks]
        x = model.pre_emb(earlier_parts[0])[:, None] if earlier_parts else self.hidden
        for block, cache in zip(model.factorized_blocks, self.pair_caches, strict=True):
            x = block(x, self.pair_table[part : part + 1], cache)
        return model.head[part](model.norm(x))[:, 0]

    def join(self, parts: Sequence[Int[Tensor, " B"]]) -> Int[Tensor, " B"]:
        return join_indices(parts, self.generator.config.bits)

    def truncate(self, rows: int) -> None:
        super().truncate(rows)
        self.pair_caches = []


class FactorizedNetwork(SamplerNetwork):
    """Open-MAGVIT2's generator for one recorded position at a time: both parts of a token are drawn inside it.

    Args: `generator`, `dtype` and `rows` as in `SamplerNetwork`.
    """

    parts = 2

    def __init__(self, generator: "FactorizedGenerator", dtype: torch.dtype, rows: int) -> None:
        super().__init__(generator, dtype, rows, generator.spatial_blocks, is_adapted=False)
        config, pairs = generator.config, generator.factorized_blocks
        self.worth = 2 ** config.bits[0]
        self.pair_blocks = [self.empty_block(block) for block in pairs]
        self.rows.caches.extend(self.empty_cache(rows, config.num_heads, 2, config.head_dim) for _ in pairs)
        # The first two rows, also where an image has a single token.
        self.pair_table = position_table(config, self.rows.x, 2)
        self.pair_positions = torch.arange(2, device=self.device).chunk(2)
        self.embeddings = [self.empty_copy(table.weight) for table in (generator.pre_emb, generator.post_emb)]
        self.norm = self.empty_copy(generator.norm.weight)
        self.heads = [self.empty_copy(head.weight) for head in generator.head]

    def copies(self, generator: "FactorizedGenerator") -> Copies:
        blocks = [*generator.spatial_blocks, *generator.factorized_blocks]
        for weights, block in zip([*self.blocks, *self.pair_blocks], blocks, strict=True):
            yield from self.block_copies(weights, block)
        yield self.norm, generator.norm.weight
        modules = generator.pre_emb, generator.post_emb, *generator.head
        for weights, module in zip([*self.embeddings, *self.heads], modules, strict=True):
            yield weights, module.weight

    def begin(self, generator: "FactorizedGenerator", labels: Int[Tensor, " R"]) -> None:
        self.rows.x.copy_(generator.class_emb(labels)[:, 0])

    def scores(
        self,
        rows: RowMemory,
        earlier_parts: Sequence[Int[Tensor, " L"]],
        drawing: Drawing,
        operations: ModuleType,
    ) -> Float[Tensor, "R V"]:
        part, spatial = len(earlier_parts), len(self.blocks)
        if part == 0:
            residual = through_blocks(
                *(Residual(rows.x), self.blocks, rows.modulations, rows.caches[:spatial], self.table),
                position=drawing.position,
                drawing=drawing,
                operations=operations,
            )
        else:
            first = nn.functional.embedding(earlier_parts[0], self.embeddings[0]).to(rows.x.dtype)
            residual = Residual(first.repeat(len(rows.x) // len(first), 1))
        unmodulated = [BlockModulation()] * len(self.pair_blocks)
        residual = through_blocks(
            *(residual, self.pair_blocks, unmodulated, rows.caches[spatial:], self.pair_table),
            position=self.pair_positions[part],
            drawing=drawing,
            operations=operations,
        )
        _, normed = operations.add_and_normalise(*residual, weight=self.norm)
        return operations.score(normed, self.heads[part])

    def embed(self, tokens: Int[Tensor, " L"]) -> Float[Tensor, "L C"]:
        parts = tokens % self.worth, tokens // self.worth
        first, second = (
            nn.functional.embedding(part, table) for part, table in zip(parts, self.embeddings, strict=True)
        )
        return first + second


class FactorizedGenerator(TokenGenerator):
    """log p(image | class) = Σ_t log p(pre_t | tokens before t, class) + log p(post_t | pre_t, tokens before t, class).

    Args:
        config: the architecture. Weights are drawn from torch's global random state as for IBQ's generator: N(0, 0.02²)
            and the heads 0, so that the first loss is ln 2 times the sum of the bits.
    Source: Open-MAGVIT2 (arXiv 2409.04410), asymmetric token factorisation; published code for the graph.
    """

    decoding = FactorizedDecoding
    network = FactorizedNetwork

    def __init__(self, config: FactorizedGeneratorConfig) -> None:
        super().__init__()
        width, sizes = config.width, [2**count for count in config.bits]
        self.config = config
        self.pre_emb, self.post_emb = (nn.Embedding(size, width) for size in sizes)
        self.class_emb = ClassEmbedding(config.num_classes, width, config.label_dropout)
        self.dropout = nn.Dropout(config.token_dropout)
        self.spatial_blocks = nn.ModuleList(Block(*block_parts(config)) for _ in range(config.spatial_depth))
        self.factorized_blocks = nn.ModuleList(Block(*block_parts(config)) for _ in range(config.factorized_depth))
        self.norm = RMSNorm(width)
        self.head = nn.ModuleList(nn.Linear(width, size, bias=False) for size in sizes)
        initialise(self)
        for head in self.head:
            nn.init.zeros_(head.weight)

    def forward(self, indices: Int[Tensor, "B T"], labels: Int[Tensor, " B"]) -> FactorizedLogits:
        """Scores of both parts at every position; those of the second part are for the first part in `indices`.

        Args:
            indices: tokens in rows from the top left, 0 to 2^(sum of bits) − 1; T may be any beginning of the image,
                1 to grid_size². For a grid (B, h, w) use `.flatten(1)`; for two parts, `join_indices(parts, bits)`.
            labels: classes, 0 to num_classes − 1, or num_classes for none in particular.
        Returns:
            Logits of the first and of the second part.
        Raises:
            ValueError: shapes, types or values that do not fit; the message says what to type.
        """
        hidden = self.hidden_states(indices, labels)
        return FactorizedLogits(*(head(hidden[:, :, part]) for part, head in enumerate(self.head)))

    def hidden_states(self, indices: Int[Tensor, "B T"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B T 2 C"]:
        """What the heads multiply: head[0] the states [:, :, 0], head[1] the states [:, :, 1].

        Args and Raises: as in `forward`.
        """
        # Two passes: along the image, (B, T, C), then along the two parts of each token.
        config = self.config
        indices, labels = check_inputs(indices, labels, config, self.pre_emb.weight.device)
        tokens, first = self.embed(indices)
        x = self.dropout(torch.cat([self.class_emb(labels), tokens[:, :-1]], dim=1))
        table = position_table(config, x, x.shape[1])
        for block in self.spatial_blocks:
            x = block(x, table)
        # Every position becomes a sequence of its own, two long: [context, first part].
        x = torch.stack([x, first], dim=2).flatten(0, 1)  # (B·T, 2, C)
        table = position_table(config, x, x.shape[1])
        for block in self.factorized_blocks:
            x = block(x, table)
        return self.norm(x).unflatten(0, indices.shape)

    def predictions(self, hidden: Float[Tensor, "B T 2 C"], indices: Int[Tensor, "B T"]) -> list[Prediction]:
        parts = factorize_indices(indices, self.config.bits)
        return [(hidden[:, :, part], head, parts[part]) for part, head in enumerate(self.head)]

    def embed(self, indices: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T C"]]:
        """Vectors of tokens, the sum of their parts', and those of the first parts alone."""
        pre, post = factorize_indices(indices, self.config.bits)
        first = self.pre_emb(pre)
        return first + self.post_emb(post), first
