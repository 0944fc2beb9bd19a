"""The block that TiTok's encoder and decoder are made of: attention over all tokens, then a two-layer network."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPSILON = 1e-5
WIDENING = 4
"""Width of the two-layer network as a multiple of the tokens' width."""


class Attention(nn.Module):
    """proj(softmax(qᵀk / √(W / heads)) v) with q, k, v from one linear layer, every token with all others.

    Args:
        width: W, channels of a token.
        heads: that share the width.
    Cost: O(T²·W) operations; the memory of the fused kernel grows with T, not with its square.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        """What every token takes from all of them."""
        batch, length, width = x.shape
        stacked = self.in_proj(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = stacked.permute(2, 0, 3, 1, 4)  # each (B, heads, T, W / heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), and of that y + mlp(norm(y)); exact GELU, ε = 10⁻⁵.

    Args:
        width: W, channels of a token.
        heads: of the attention.
    Source: fact sheet of the published systems §5.2.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = nn.Sequential(nn.Linear(width, WIDENING * width), nn.GELU(), nn.Linear(WIDENING * width, width))

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        """The tokens, each with what it took from all and what the two layers add."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
