"""VQ in a low-dimensional unit sphere: tokens are projected to a few numbers, compared by angle, and projected back."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.base.checks import CODE_DIM, require, require_between
from ibqlab.quantizers.base import Assignment, Quantizer, register_quantizer
from ibqlab.quantizers.codebooks import at_least_float32, initial_codes
from ibqlab.quantizers.estimators import nearest_code, straight_through
from ibqlab.quantizers.terms import PairLossConfig, pair_terms


@dataclass(frozen=True, kw_only=True)
class ProjectedVectorQuantizerConfig(PairLossConfig):
    """Low-dimensional cosine VQ as published by LlamaGen."""

    projected_dim: int = 8
    """d, numbers per stored code, at least 1. Published: 8 (LlamaGen), 32 (ViT-VQGAN)."""
    beta_on: str = "encoder"
    """As in every quantizer; LlamaGen and ViT-VQGAN weigh the commitment by β = 0.25."""

    def __post_init__(self):
        super().__post_init__()
        require_between("projected_dim", self.projected_dim, 1, CODE_DIM)
        require(
            self.codebook_init != "kmeans",
            'codebook_init "kmeans" does not apply to vq_projected, whose codes are no features; use "uniform", '
            '"normal" or "unit"',
        )


class ProjectedCodebook(nn.Module):
    """K unit vectors of dimension d under a learned linear map to dimension D.

    codebook = normalise(codes) · Wᵀ + b.
    """

    def __init__(self, initialisation: str, codebook_size: int, code_dim: int, projected_dim: int):
        super().__init__()
        # Published: drawn as any codebook, then normalised once. Their length has no effect but on the step's size.
        self.weight = nn.Parameter(F.normalize(initial_codes(initialisation, codebook_size, projected_dim), dim=1))
        self.map = nn.Linear(projected_dim, code_dim)

    def forward(self) -> Float[Tensor, "K D"]:
        """Unit codes under the map, in float32 at least."""
        return self.project_back(self.unit_codes())

    def unit_codes(self) -> Float[Tensor, "K d"]:
        """The codes that tokens are compared with."""
        return F.normalize(at_least_float32(self.weight), dim=1)

    def project_back(self, vectors: Float[Tensor, "N d"]) -> Float[Tensor, "N D"]:
        """Vectors of the sphere to the dimension of the features."""
        return F.linear(vectors, self.map.weight.to(vectors.dtype), self.map.bias.to(vectors.dtype))


@register_quantizer("vq_projected", ProjectedVectorQuantizerConfig, label="VQ, projected")
class ProjectedVectorQuantizer(Quantizer):
    """Nearest code by angle after a learned projection.

        u = normalise(W_in z + b_in),   e_k = normalise(c_k),   k = argmin_k ‖u − e_k‖ = argmax_k ⟨u, e_k⟩
        z_q = W_out (u + sg(e_k − u)) + b_out,   loss = β‖sg(e_k) − u‖² + ‖e_k − sg(u)‖²

    The value is the unit code projected back: LlamaGen's quantizer hands on the unit code, and its next layer, a 1 × 1
    convolution from d, is the projection. `codebook` is (K, D), every code projected back, so that whoever compares
    codes with features finds both in one space. `codebook_gradient` is that of the stored codes, (K, d).
    In training the projection learns from the values, and codes from their loss alone.
    Source: ViT-VQGAN (Yu et al., 2022), §3.2, factorised and l2-normalised codes; published LlamaGen code,
    VectorQuantizer with codebook_l2_norm, whose projections are quant_conv and post_quant_conv.
    """

    looks_up = False
    """Tokens are compared with the stored codes; the (K, D) codebook is made where codes are decoded."""

    def __init__(self, config: ProjectedVectorQuantizerConfig):
        dims = config.code_dim, config.projected_dim
        super().__init__(config, ProjectedCodebook(config.codebook_init, config.codebook_size, *dims))
        self.project = nn.Linear(*dims)

    @property
    def codebook_gradient(self) -> Float[Tensor, "K d"] | None:
        """∂loss/∂codes of the last backward pass, of the codes as they are stored."""
        return self.codes.weight.grad

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The code at the smallest angle to the projected token."""
        return nearest_code(*self._on_sphere(features), "dot", matmul=self.config.matmul)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Choice and losses on the sphere; in evaluation the projected code to the last bit."""
        unit, unit_codes = self._on_sphere(features)
        indices = nearest_code(unit, unit_codes, "dot", matmul=self.config.matmul)
        codes = F.embedding(indices, unit_codes)  # (N, d)
        terms = pair_terms(unit, codes)
        if not self.training:
            # From the table as `decode` does it: products of other numbers of tokens round otherwise.
            return Assignment(F.embedding(indices, self.codebook).to(unit.dtype), indices, terms)
        return Assignment(self.codes.project_back(straight_through(unit, codes)), indices, terms)

    def _on_sphere(self, features: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N d"], Float[Tensor, "K d"]]:
        """Projected tokens and codes, both of length 1 and in the wider of their types."""
        codes = self.codes.unit_codes()
        dtype = torch.promote_types(features.dtype, codes.dtype)
        weight, bias = self.project.weight.to(dtype), self.project.bias.to(dtype)
        return F.normalize(F.linear(features.to(dtype), weight, bias), dim=1), codes.to(dtype)
