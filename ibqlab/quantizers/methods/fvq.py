"""FVQ: a small transformer, VQBridge, rewrites the whole codebook in each step, so every code learns in each step."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.base.checks import BLOCKS, CHANNELS, CODES, require, require_between
from ibqlab.quantizers.base import register_quantizer
from ibqlab.quantizers.codebooks import FreeCodebook, at_least_float32
from ibqlab.quantizers.terms import PairLossConfig
from ibqlab.quantizers.vq import NearestCodeQuantizer


@dataclass(frozen=True, kw_only=True)
class BridgedQuantizerConfig(PairLossConfig):
    """FVQ with VQBridge."""

    beta_on: str = "encoder"
    """As in every quantizer; LlamaGen, on which FVQ is built, weighs the commitment by β = 0.25."""
    bridge_patch: int = 16
    """Codes in a patch, one token of the bridge, at least 1. With K = 262,144 and 16 the bridge has 16,384 tokens."""
    bridge_width: int = 64
    """Width of the bridge, a multiple of bridge_heads."""
    bridge_heads: int = 4
    """Heads of its attention, at least 1."""
    bridge_depth: int = 2
    """Its transformer blocks, at least 1."""

    def __post_init__(self):
        super().__post_init__()
        require_between("bridge_patch", self.bridge_patch, 1, CODES)
        require_between("bridge_width", self.bridge_width, 1, CHANNELS)
        require_between("bridge_heads", self.bridge_heads, 1, CHANNELS)
        require_between("bridge_depth", self.bridge_depth, 1, BLOCKS)
        require(
            self.bridge_width % self.bridge_heads == 0,
            f"bridge_width must be a multiple of bridge_heads; got {self.bridge_width} and {self.bridge_heads}. "
            f"Use bridge_width={self.bridge_heads * max(1, self.bridge_width // self.bridge_heads)}",
        )
        require(
            self.codebook_init != "kmeans",
            'codebook_init "kmeans" does not apply to fvq, whose codes pass the bridge; use "uniform"',
        )

    @classmethod
    def sized(cls, codes: int, dim: int) -> dict[str, Any]:
        """A bridge of at most 512 tokens: attention over 16,384, as at the published size, takes seconds."""
        return super().sized(codes, dim) | {"bridge_patch": max(16, codes // 512)}


class BridgedCodebook(FreeCodebook):
    """K × D free parameters under VQBridge: compress, process, recover.

    compress: patches of codes → one vector each;   process: transformer blocks over all patches
    recover: one vector → a patch of codes, added to the codes
    """

    def __init__(self, config: BridgedQuantizerConfig):
        super().__init__(config.codebook_init, config.codebook_size, config.code_dim)
        self.patch, width = config.bridge_patch, config.bridge_width
        self.compress = nn.Linear(self.patch * config.code_dim, width)
        self.process = nn.ModuleList(BridgeBlock(width, config.bridge_heads) for _ in range(config.bridge_depth))
        self.recover = nn.Linear(width, self.patch * config.code_dim)
        # The bridge starts as the identity.
        nn.init.zeros_(self.recover.weight)
        nn.init.zeros_(self.recover.bias)

    def forward(self) -> Float[Tensor, "K D"]:
        """The codes under the bridge, in float32 at least."""
        codes = at_least_float32(self.weight)
        size, dim = codes.shape
        # The last patch is filled up with zeros.
        patches = F.pad(codes, (0, 0, 0, -size % self.patch)).reshape(-1, self.patch * dim)  # (K/patch, patch·D)
        tokens = _linear(self.compress, patches)
        for block in self.process:
            tokens = block(tokens)
        change = _linear(self.recover, F.layer_norm(tokens, tokens.shape[1:], eps=1e-6))
        return codes + change.reshape(-1, dim)[:size]


class BridgeBlock(nn.Module):
    """A transformer block without affine norms, as DiT has it: attention over all patches, then two layers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.reduce = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Float[Tensor, "P W"]) -> Float[Tensor, "P W"]:
        """One block; fused attention never makes the P × P matrix."""
        normed = F.layer_norm(tokens, tokens.shape[1:], eps=1e-6)
        heads = (
            _linear(self.qkv, normed).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        )  # (3, heads, P, W/heads)
        mixed = F.scaled_dot_product_attention(*(part[None] for part in heads))[0]
        tokens = tokens + _linear(self.merge, mixed.transpose(0, 1).flatten(1))
        normed = F.layer_norm(tokens, tokens.shape[1:], eps=1e-6)
        return tokens + _linear(self.reduce, F.gelu(_linear(self.expand, normed), approximate="tanh"))


def _linear(layer: nn.Linear, values: Tensor) -> Tensor:
    """A linear layer in the type of the values, whatever that of its weights is."""
    return F.linear(values, layer.weight.to(values.dtype), layer.bias.to(values.dtype))


@register_quantizer("fvq", BridgedQuantizerConfig, label="FVQ")
class BridgedQuantizer(NearestCodeQuantizer):
    """VQ over a codebook that VQBridge rewrites.

        C = bridge(E),   k = argmin_k ‖z − c_k‖,   z_q = z + sg(c_k − z),   loss = β‖sg(c) − z‖² + ‖c − sg(z)‖²

    Chosen codes alone have a gradient (`codebook_gradient`); through the bridge it moves all of E.
    The paper's "learning annealing" is read as the learning rate's fall, which recipes set; nothing here follows
    `progress`. The published bridge's file could not be read. That patches are runs of consecutive codes without
    positions, that the result is added to E, and the sizes above are choices of this library.
    Source: Chang et al., "Scalable Training for Vector-Quantized Networks with 100% Codebook Utilization" (2025, arXiv
    2509.10140), compress–process–recover.
    Cost: beside the choice, O(K·D·width + (K/patch)²·width) operations per call.
    """

    reaches = "map"

    def __init__(self, config: BridgedQuantizerConfig):
        super().__init__(config, BridgedCodebook(config))
