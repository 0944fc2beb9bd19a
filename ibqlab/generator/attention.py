"""Attention of the published transformers: positions on a grid, queries and keys turned by them, and caches.

What is unusual: the class token stands before the grid and has no position on it. The published table holds cos = sin
= 0 for it, so its query and key are zero vectors after rotation: every token gives it the score 0, whatever the
weights. Published weights were trained with this and need it. Shape letters: B images · T sequence · C width · H heads
· d = C/H.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 10_000.0


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


class KeyValueCache:
    """Keys and values of the positions so far, of one attention, so that the next ones need not compute them.

    Args:
        positions: that there is room for.
    """

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
        self, x: Float[Tensor, "B T C"], table: Float[Tensor, "T pairs 2"], cache: KeyValueCache | None = None
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
        if cache is not None:
            k, v = cache.append(k, v)
        # A single query is the newest position, which sees all others; a causal mask would show it the first key alone.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.dropout(self.wo(mixed.transpose(1, 2).flatten(-2)))
