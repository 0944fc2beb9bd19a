"""The parts of the published transformers: positions on a grid, norms, attention, and blocks that the class adapts.

What is unusual: the class token stands before the grid and has no position on it. The published table holds cos = sin
= 0 for it, so its query and key are zero vectors after rotation: every token gives it the score 0, whatever the
weights. Published weights were trained with this and need it. Submodule names are the published ones. Shape letters:
B images · T sequence · C width · H heads · d = C/H.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPSILON = 1e-5
ROTARY_BASE = 10_000.0
INIT_STD = 0.02


def rotary_table(
    grid_size: int, head_dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Float[Tensor, "positions pairs 2"]:
    """Cosine and sine by which each position turns each pair of a query's or key's channels.

        θ = [r·f, c·f],  f_j = 10000^(−2j/(d/2)),  j = 0 … d/4 − 1

    Position 0 is the class token: cos = sin = 0, as published, where a rotation by 0 would have cos = 1. Position
    1 + t is the token in row r = ⌊t / grid_size⌋ and column c = t mod grid_size.

    Args:
        grid_size: tokens along one side of the image.
        head_dim: d, channels of a head, a multiple of 4: half of the pairs turn by row, half by column.
        dtype: of the table; it is computed in float64.
        device: of the table.
    Returns:
        (1 + grid_size², d/2, 2): cosine and sine.
    Raises:
        ValueError: `head_dim` is no multiple of 4.
    Source: published IBQ generator code; RoFormer (arXiv 2104.09864), eq. 15, for the rotation in one dimension.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(
            f"head_dim must be a multiple of 4, pairs of channels for rows and for columns; got {head_dim}. "
            f"Use {max(4, round(head_dim / 4) * 4)}."
        )
    half = head_dim // 2
    frequencies = ROTARY_BASE ** (-torch.arange(0, half, 2, dtype=torch.float64, device=device) / half)
    along = torch.arange(grid_size, device=device)[:, None] * frequencies  # (side, d/4), of one axis
    rows = along[:, None].expand(-1, grid_size, -1)
    columns = along[None].expand(grid_size, -1, -1)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (side², d/2): half of the pairs turn by each axis
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table]).to(dtype)  # the class token's row: cos = sin = 0


def rotate(x: Float[Tensor, "B T H d"], table: Float[Tensor, "T pairs 2"]) -> Float[Tensor, "B T H d"]:
    """Turn neighbouring channels (a, b) to (a cos θ − b sin θ, b cos θ + a sin θ).

    Args:
        x: queries or keys.
        table: rows of `rotary_table`, one per position of `x`.
    Returns:
        In the type of `x`, computed in the wider of both types. The published code leaves half types in float32 and
        autocast rounds them in the attention; the numbers are the same.
    Source: published IBQ generator code.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight, without a mean taken off and without a bias; ε = 10⁻⁵.

    Half types are normalised in float32 and rounded before the weight, as published.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*positions C"]) -> Float[Tensor, "*positions C"]:
        """Each position on its own, over its channels."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * (wide.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()
        return normed.to(x.dtype) * self.weight


class KeyValueCache:
    """Keys and values of the positions so far, of one attention, so that the next ones need not compute them.

    Args:
        positions: that there is room for.
    """

    mask = None
    """Every stored position may be looked at."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.length = 0
        self.keys_values: Tensor | None = None

    def append(
        self, keys: Float[Tensor, "B H new d"], values: Float[Tensor, "B H new d"]
    ) -> tuple[Float[Tensor, "B H T d"], Float[Tensor, "B H T d"]]:
        """Store those of the next positions; returns keys and values of all so far."""
        batch, heads, new, channels = keys.shape
        if self.keys_values is None:
            # Room for all positions at once: growing by one position would copy the cache T times.
            self.keys_values = keys.new_zeros(2, batch, heads, self.positions, channels)
        positions = slice(self.length, self.length + new)
        self.keys_values[0, :, :, positions] = keys
        self.keys_values[1, :, :, positions] = values
        self.length = positions.stop
        keys, values = self.keys_values[:, :, :, : self.length]
        return keys, values

    def truncate(self, rows: int) -> None:
        """Go on with the first `rows` images of the batch alone."""
        if self.keys_values is not None:
            self.keys_values = self.keys_values[:, :rows].contiguous()


class FixedCache:
    """A filled `KeyValueCache` whose every tensor keeps its shape, as a compiled step wants it.

    Attention reads all positions, and a mask rules those out that are still to come.

    Args:
        keys_values: of a cache, with room for all positions.
        position: where the next keys and values go; the caller moves it on, in place.
        mask: (1, 1, 1, positions), true up to that position; likewise.
    """

    def __init__(
        self, keys_values: Float[Tensor, "2 B H T d"], position: Int[Tensor, "1"], mask: Bool[Tensor, "1 1 1 T"]
    ) -> None:
        self.keys, self.values = keys_values.unbind()
        self.position, self.mask = position, mask

    def append(
        self, keys: Float[Tensor, "B H 1 d"], values: Float[Tensor, "B H 1 d"]
    ) -> tuple[Float[Tensor, "B H T d"], Float[Tensor, "B H T d"]]:
        """Write those of the next position; returns keys and values of all positions, those to come among them."""
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


AnyCache = KeyValueCache | FixedCache
Modulation = tuple[Tensor, ...]
"""What the class does to a block: gates, scales and shifts, each (B, 1, C)."""


class Attention(nn.Module):
    """Each position looks at itself and at those before it: softmax(q kᵀ / √d) v, with q and k turned by position.

    Args:
        width: C, a multiple of num_heads.
        num_heads: H.
        dropout: share of the output's values dropped in training.
    Cost: O(T·C² + T²·C) operations per image; the memory of the fused kernel grows with T.
    Source: published IBQ generator code.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B T C"], table: Float[Tensor, "T pairs 2"], cache: AnyCache | None = None
    ) -> Float[Tensor, "B T C"]:
        """What every position takes from itself and those before it.

        Args:
            x: a sequence from its beginning; with a cache that holds its beginning, the one position that comes next.
            table: rows of these positions.
            cache: of this attention and this sequence.
        """
        q, k, v = (
            vectors.unflatten(-1, (self.num_heads, -1)) for vectors in self.wqkv(x).chunk(3, dim=-1)
        )  # (B, T, H, d)
        # Turned before they are cached, so that a key is turned once and not at every later position.
        q, k, v = (vectors.transpose(1, 2) for vectors in (rotate(q, table), rotate(k, table), v))  # (B, H, T, d)
        mask = None
        if cache is not None:
            (k, v), mask = cache.append(k, v), cache.mask
        # A single query is the newest position, which sees all others; a causal mask would show it the first key alone.
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=q.shape[2] > 1)
        return self.dropout(self.wo(mixed.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU: w2(SiLU(w1 x) ⊙ w3 x), without biases.

    Args:
        width: C.
        multiple: the hidden width is ⌊8C/3⌋ rounded up to a multiple of this.
        dropout: share of the output's values dropped in training.
    Source: published IBQ generator code; Shazeer (arXiv 2002.05202), eq. 6.
    """

    def __init__(self, width: int, multiple: int, dropout: float) -> None:
        super().__init__()
        hidden = math.ceil((8 * width // 3) / multiple) * multiple
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Each position on its own."""
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """h = x + Attention(RMS(x)), out = h + FeedForward(RMS(h)): a block that the class does not adapt.

    Args:
        attention: of the width that `feed_forward` has.
        feed_forward: what every position does on its own.
    Source: published Open-MAGVIT2 generator.
    """

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        width = attention.wo.out_features
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)

    def forward(
        self, x: Float[Tensor, "B T C"], table: Float[Tensor, "T pairs 2"], cache: AnyCache | None = None
    ) -> Float[Tensor, "B T C"]:
        """Attention, then feed-forward; `table` has the rows of these positions, `cache` is as in `Attention`."""
        x = x + self.attention(self.attention_norm(x), table, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class AdaptiveBlock(Block):
    """A block whose residuals the class scales, shifts and gates.

        γ₁, γ₂, s₁, s₂, b₁, b₂ = Linear(SiLU(c)),  h = x + γ₁ ⊙ Attention(RMS(x) ⊙ (1 + s₁) + b₁),
        out = h + γ₂ ⊙ FeedForward(RMS(h) ⊙ (1 + s₂) + b₂)

    Source: published IBQ generator code; DiT (arXiv 2212.09748), §3.2, for the idea.
    """

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__(attention, feed_forward)
        width = attention.wo.out_features
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Float[Tensor, "B T C"], table: Float[Tensor, "T pairs 2"], condition: Float[Tensor, "B 1 C"]
    ) -> Float[Tensor, "B T C"]:
        """Attention, then feed-forward, as the class's embedding `condition` has them."""
        return self.apply_modulation(x, table, self.modulation(condition))

    def modulation(self, condition: Float[Tensor, "B 1 C"]) -> Modulation:
        """γ₁, γ₂, s₁, s₂, b₁, b₂ of a class's embedding: the same at all positions, so decoding computes them once."""
        return self.ada_lin(condition).chunk(6, dim=-1)

    def apply_modulation(
        self,
        x: Float[Tensor, "B T C"],
        table: Float[Tensor, "T pairs 2"],
        modulation: Modulation,
        cache: AnyCache | None = None,
    ) -> Float[Tensor, "B T C"]:
        """What `forward` computes, from the class's `modulation`; `cache` as in `Attention`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        x = x + gate1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1, table, cache)
        return x + gate2 * self.feed_forward(self.ffn_norm(x) * (1 + scale2) + shift2)

    @torch.no_grad()
    def scale_condition(self, gate_scale: float) -> None:
        """Start with little to none of the class: gates times `gate_scale`, scales and shifts halved, as published."""
        weight = self.ada_lin[1].weight
        gates = weight.shape[0] // 3
        weight[:gates].mul_(gate_scale)
        weight[gates:].mul_(0.5)


class AdaptiveNorm(nn.Module):
    """RMS(x) ⊙ (1 + scale) + shift with scale, shift = Linear(SiLU(c)): the norm before the head.

    Source: published IBQ generator code.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rmsnorm = RMSNorm(width)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Float[Tensor, "B T C"], condition: Float[Tensor, "B 1 C"]) -> Float[Tensor, "B T C"]:
        """Each position on its own, as the class's embedding `condition` has it."""
        return self.apply_modulation(x, self.modulation(condition))

    def modulation(self, condition: Float[Tensor, "B 1 C"]) -> Modulation:
        """Scale and shift of a class's embedding."""
        return self.ada_lin(condition).chunk(2, dim=-1)

    def apply_modulation(self, x: Float[Tensor, "B T C"], modulation: Modulation) -> Float[Tensor, "B T C"]:
        """What `forward` computes, from the class's `modulation`."""
        scale, shift = modulation
        return self.rmsnorm(x) * (1 + scale) + shift


class ClassEmbedding(nn.Module):
    """One vector per class, and one for "any class", which guidance contrasts the others with.

    Args:
        num_classes: classes 0 to num_classes − 1; the label num_classes is the null class.
        width: C.
        dropout: chance that a label becomes the null class, in training, each image on its own.
    Source: published IBQ generator code; classifier-free guidance (arXiv 2207.12598).
    """

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.null_class = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Int[Tensor, " B"]) -> Float[Tensor, "B 1 C"]:
        """Vectors of the labels, of which training mode replaces some by the null class."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = labels.masked_fill(dropped, self.null_class)
        return self.embedding_table(labels)[:, None]


def initialise(model: nn.Module) -> None:
    """Weights of linear layers and embeddings from N(0, 0.02²), biases 0; norms stay at 1. Published for IBQ."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
