"""The parts of the published transformers around attention: norms, feed-forward, and blocks that the class adapts.

Submodule names are the published ones. Shape letters: B images · T sequence · C width.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.generator.attention import Attention, KeyValueCache

NORM_EPSILON = 1e-5
INIT_STD = 0.02
Modulation = tuple[Tensor, ...]
"""What the class does to a block: gates, scales and shifts, each (B, 1, C)."""


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight, without a mean taken off and without a bias; ε = 10⁻⁵.

    Half types are normalised in float32 and rounded before the weight, as published.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*positions C"]) -> Float[Tensor, "*positions C"]:
        """Each position on its own, over its channels."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # the square of 256 is beyond float16
        normed = wide * (wide.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()
        return normed.to(x.dtype) * self.weight


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
    Source: published Open-MAGVIT2 and LlamaGen generators.
    """

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        width = attention.wo.out_features
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)

    def forward(
        self, x: Float[Tensor, "B T C"], table: Float[Tensor, "T pairs 2"], cache: KeyValueCache | None = None
    ) -> Float[Tensor, "B T C"]:
        """Attention, then feed-forward; `table` has the rows of these positions, `cache` is as in `Attention`."""
        x = x + self.attention(self.attention_norm(x), table, cache)
        return x + self.feed_forward(self.ffn_norm(x))

    def modulation(self, condition: Float[Tensor, "B 1 C"]) -> Modulation:
        """What a class does to this block: nothing."""
        return ()

    def apply_modulation(
        self,
        x: Float[Tensor, "B T C"],
        table: Float[Tensor, "T pairs 2"],
        modulation: Modulation,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B T C"]:
        """What `forward` computes; there is no modulation to apply."""
        return self(x, table, cache)


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
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "B T C"]:
        """What `forward` computes, from the class's `modulation`; `cache` as in `Attention`."""
        # Gates start near 0, where the block passes x on; a scale and a shift of 0 leave the norm as it is.
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation  # (B, 1, C) each, the same at all T positions
        x = x + gate1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1, table, cache)
        return x + gate2 * self.feed_forward(self.ffn_norm(x) * (1 + scale2) + shift2)

    @torch.no_grad()
    def scale_condition(self, gate_scale: float) -> None:
        """Start with little to none of the class: gates times `gate_scale`, scales and shifts halved, as published."""
        weight = self.ada_lin[1].weight  # (6C, C): both gates first, as `modulation` has them
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


class HeadNorm(RMSNorm):
    """The norm before a head that the class does not adapt; its methods are those of `AdaptiveNorm`.

    Source: published LlamaGen generator code.
    """

    @property
    def rmsnorm(self) -> RMSNorm:
        """Itself: the norm whose weight stands before the head."""
        return self

    def modulation(self, condition: Float[Tensor, "B 1 C"]) -> Modulation:
        """What a class does to this norm: nothing."""
        return ()

    def apply_modulation(self, x: Float[Tensor, "B T C"], modulation: Modulation) -> Float[Tensor, "B T C"]:
        """What `forward` computes; there is no modulation to apply."""
        return self(x)


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
