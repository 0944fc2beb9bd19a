"""SF-DiVeQ: in training features go to points of a curve through the codes, so that two codes learn from each token."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import require
from ibqlab.quantizers.base import Assignment, Quantizer, QuantizerConfig, register_quantizer
from ibqlab.quantizers.estimators import nearest_code
from ibqlab.quantizers.methods.diveq import directed_error


@dataclass(frozen=True, kw_only=True)
class SpaceFillingQuantizerConfig(QuantizerConfig):
    """SF-DiVeQ as published, but for its start and its evaluation (see the class)."""

    codebook_init: str = "uniform"
    """As in every quantizer. Published: the first 1,000 steps are not quantized, then each code is the mean of a piece
    of the last 50 steps' features. Here quantization starts at once; "kmeans" comes nearest to codes among features."""
    noise_std: float = 1e-3
    """σ of the noise added to the directions in training, in the features' unit, ≥ 0. Published: 1e-3, as noise_var,
    but handed to a function that takes a standard deviation."""

    def __post_init__(self):
        super().__post_init__()
        require(self.noise_std >= 0, f"noise_std must be ≥ 0, got {self.noise_std}. Use 1e-3, or 0 for no noise")


@register_quantizer("sf_diveq", SpaceFillingQuantizerConfig, label="SF-DiVeQ")
class SpaceFillingQuantizer(Quantizer):
    """Space-Filling Differentiable Vector Quantization.

        training: d_i = (1 − λ_i) c_i + λ_i c_{i+1},  λ_i ~ U(0, 1) anew in every step,   i = argmin_i ‖z − d_i‖
        z_q = z + (1 − λ_i) ‖c_i − z‖ sg(v/‖v‖) + λ_i ‖c_{i+1} − z‖ sg(w/‖w‖),   v = c_i − z + ε,  w = c_{i+1} − z + ε'
        evaluation: k = argmin_k ‖z − c_k‖,   z_q = c_k

    Codes are corners of a curve in the order of their indices, so permuting codes changes the method. Only K − 1 points
    of the curve are candidates in a step, one on each segment. The index in training is the segment's end nearer to z.
    Source: SF-DiVeQ (Vali et al., ICLR 2026; its text was not at hand); published package diveq. At inference its value
    is the nearest point of the whole curve, which does not follow from the index that it returns, the nearest code; its
    generator draws segments, and a random point on each. A token here must decode to one vector, so evaluation gives
    the nearest code itself, and training and evaluation differ by up to half a segment. The published "detach" variant
    without noise leads both errors towards the first code, seemingly by mistake; noise_std = 0 here leads each towards
    its own.
    """

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The nearest code."""
        return nearest_code(features, codebook, matmul=self.config.matmul)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """The nearest of the points drawn on the segments; in evaluation the nearest code."""
        if not self.training:
            indices = self.choose(features, codebook)
            return Assignment(F.embedding(indices, codebook), indices, {})
        with torch.no_grad():
            shares = torch.rand(len(codebook) - 1, 1, device=codebook.device, dtype=codebook.dtype)  # λ, one a segment
            points = torch.lerp(codebook[:-1], codebook[1:], shares)  # (K − 1, D)
            segments = torch.zeros(len(features), dtype=torch.int64, device=features.device)
            if len(points) > 1:  # one segment is no choice
                segments = nearest_code(features, points, matmul=self.config.matmul)
            share = shares[segments]  # (N, 1)
        start, end = F.embedding(segments, codebook), F.embedding(segments + 1, codebook)
        noise = self.config.noise_std
        quantized = features + (1 - share) * directed_error(features, start, noise)
        quantized = quantized + share * directed_error(features, end, noise)
        with torch.no_grad():
            ends_nearer = (features - end).square().sum(1) < (features - start).square().sum(1)
        return Assignment(quantized, segments + ends_nearer, {})
