"""Axis 1, where code vectors come from: free parameters, their directions, a moving average of features, a frozen set
under a map, or the grid of sign vectors, which is never stored."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import require_memory
from ibqlab.base.processes import sum_over_processes

INITIALISATIONS = {
    "uniform": "U(±1/K)",
    "normal": "N(0, 1)",
    "unit": "N(0, 1/D)",
    "kmeans": "k-means",
    "grid": "fixed grid",
    "library": "its library's",
}
"""Starts of a codebook and how figures write them. The published VQ uses "uniform", the published IBQ "normal"; "grid"
is no start but a codebook whose codes follow from the settings, as LFQ's, FSQ's and BSQ's do; "library" a start that
another library makes."""
CHOSEN_STARTS = ("uniform", "normal", "unit", "kmeans")
"""Those that settings may choose; a method with another one takes no other."""


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or as they are where their type is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def initial_codes(initialisation: str, codebook_size: int, code_dim: int) -> Float[Tensor, "K D"]:
    """Codes at the start of training.

    Args:
        initialisation: one of `CHOSEN_STARTS`; "kmeans" starts as "normal" until the first batch replaces it.
        codebook_size: K.
        code_dim: D.
    Returns:
        (K, D) float32.
    Raises:
        ValueError: "grid", which is not learned, or "library", which is made elsewhere; or a codebook larger than this
            machine's memory.
    Source: published VQ U(−1/K, 1/K); published IBQ N(0, 1), the default of `nn.Embedding`.
    """
    if initialisation not in CHOSEN_STARTS:
        whose = "the fixed codebook of the quantizer 'lfq'" if initialisation == "grid" else "for 'vqp' alone"
        raise ValueError(
            f"codebook_init {initialisation!r} is {whose}; a codebook that learns starts from 'uniform', 'normal', "
            "'unit' or 'kmeans'"
        )
    # Without memory on the meta device and in a plan.
    if type(torch.empty(0)) is Tensor and not torch.empty(0).is_meta:
        require_memory(
            4 * codebook_size * code_dim,
            f"a codebook of {codebook_size:,} codes of dimension {code_dim:,}",
            "choose a smaller codebook_size or code_dim",
        )
    codes = torch.empty(codebook_size, code_dim)
    if initialisation == "uniform":
        return codes.uniform_(-1 / codebook_size, 1 / codebook_size)
    return codes.normal_(std=code_dim**-0.5 if initialisation == "unit" else 1.0)


class FreeCodebook(nn.Module):
    """K × D free parameters, learned by gradient."""

    def __init__(self, initialisation: str, codebook_size: int, code_dim: int):
        super().__init__()
        self.weight = nn.Parameter(initial_codes(initialisation, codebook_size, code_dim))

    def forward(self) -> Float[Tensor, "K D"]:
        """The parameters themselves."""
        return self.weight

    @torch.no_grad()
    def replace(self, indices: Int[Tensor, " R"], vectors: Float[Tensor, "R D"]) -> None:
        """Overwrite some codes, as k-means start and revival do."""
        self.weight[indices] = vectors.to(self.weight.dtype)


class UnitCodebook(FreeCodebook):
    """K × D free parameters, each code divided by its length wherever it is used.

    Codes start with length 1. Their lengths change in training, since a step along a sphere leaves it, but no result
    depends on them. Source: published LlamaGen code, VectorQuantizer with l2_norm.
    """

    def __init__(self, initialisation: str, codebook_size: int, code_dim: int):
        super().__init__(initialisation, codebook_size, code_dim)
        if not self.weight.is_meta:  # without memory, torch would import its compiler for it
            with torch.no_grad():
                self.weight.copy_(nn.functional.normalize(self.weight, dim=1))

    def forward(self) -> Float[Tensor, "K D"]:
        """Codes of length 1, in float32 at least."""
        return nn.functional.normalize(at_least_float32(self.weight), dim=1)

    def replace(self, indices: Int[Tensor, " R"], vectors: Float[Tensor, "R D"]) -> None:
        """Overwrite some codes by the directions of vectors."""
        super().replace(indices, nn.functional.normalize(vectors, dim=1))


def as_compared(quantizer: nn.Module, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
    """Features as a method compares them with its codes: of unit length where the codes are.

    Args:
        quantizer: any.
        features: encoder output. Whoever draws or measures features beside codes needs both in one space.
    """
    is_unit = isinstance(getattr(quantizer, "codes", None), UnitCodebook)
    return nn.functional.normalize(features, dim=1) if is_unit else features


class EmaCodebook(nn.Module):
    """Each code is the exponential moving average of the features assigned to it; it takes no gradient.

        n_k ← γ n_k + (1−γ) #{tokens of code k},   m_k ← γ m_k + (1−γ) Σ their features,   code_k = m_k / n_k

    with n_k smoothed by ε so that no code divides by zero. Counts and sums are taken over all processes.
    Source: VQ-VAE, appendix A.1 (van den Oord et al., 2017).
    """

    def __init__(self, initialisation: str, codebook_size: int, code_dim: int, decay: float):
        super().__init__()
        self.decay = decay
        codes = initial_codes(initialisation, codebook_size, code_dim)
        self.register_buffer("weight", codes)
        self.register_buffer("hits", torch.ones(codebook_size))
        self.register_buffer("sums", codes.clone())

    def forward(self) -> Float[Tensor, "K D"]:
        """The averages."""
        return self.weight

    @torch.no_grad()
    def update(self, features: Float[Tensor, "N D"], indices: Int[Tensor, " N"], epsilon: float = 1e-5) -> None:
        """Move hits, sums and codes by one batch of assigned features."""
        size = len(self.hits)
        # In float32 also where they are stored in half precision, in which sums of many hits overflow.
        old_hits, old_sums = at_least_float32(self.hits), at_least_float32(self.sums)
        hits = torch.bincount(indices, minlength=size).to(old_hits.dtype)
        sums = torch.zeros_like(old_sums).index_add_(0, indices, features.to(old_sums.dtype))
        hits = old_hits.lerp(sum_over_processes(hits), 1 - self.decay)
        sums = old_sums.lerp(sum_over_processes(sums), 1 - self.decay)
        # Laplace smoothing: a code without hits keeps a count near ε instead of 0, and the total stays what it was.
        total = hits.sum()
        smoothed = (hits + epsilon) * total / (total + size * epsilon)
        self.hits.copy_(hits)
        self.sums.copy_(sums)
        self.weight.copy_(sums / smoothed[:, None])

    @torch.no_grad()
    def replace(self, indices: Int[Tensor, " R"], vectors: Float[Tensor, "R D"]) -> None:
        """Overwrite some codes and restart their averages as if hit once."""
        vectors = vectors.to(self.weight.dtype)
        self.weight[indices] = vectors
        self.sums[indices] = vectors
        self.hits[indices] = 1.0


class LinearCodebook(nn.Module):
    """A frozen random codebook under one learned linear map, so that a gradient to any code moves all of them.

    codebook = anchors · Wᵀ + b. Source: SimVQ (Zhu et al., 2024).
    """

    def __init__(self, initialisation: str, codebook_size: int, code_dim: int):
        super().__init__()
        self.register_buffer("anchors", initial_codes(initialisation, codebook_size, code_dim))
        self.map = nn.Linear(code_dim, code_dim)

    def forward(self) -> Float[Tensor, "K D"]:
        """Anchors under the map, in float32 at least."""
        return nn.functional.linear(*map(at_least_float32, (self.anchors, self.map.weight, self.map.bias)))


class SignGrid(nn.Module):
    """All 2^D vectors of ±1, made on demand: no parameters, nothing in the state dict.

    Code k has +1 in channel i where bit i of k is set, so channel 0 is the least significant bit.
    Source: published LFQ.
    """

    def __init__(self, code_dim: int):
        super().__init__()
        self.code_dim = code_dim
        # One number that follows the module's device and type, which the grid is made for. Being in no checkpoint, it
        # has to be real in a model made on "meta".
        like = torch.zeros(())
        self.register_buffer("like", torch.zeros((), device="cpu") if like.is_meta else like, persistent=False)

    def forward(self) -> Float[Tensor, "K D"]:
        """The whole grid. Cost: O(K·D) operations and memory, 19 MB for K = 262,144."""
        return self.signs(torch.arange(2**self.code_dim, device=self.like.device))

    def signs(self, indices: Int[Tensor, "*grid"]) -> Float[Tensor, "*grid D"]:
        """The sign vectors of some indices, 0 to K−1."""
        bits = indices.long()[..., None] & bit_values(self.code_dim, indices.device)
        return torch.where(bits != 0, 1.0, -1.0).to(self.like.dtype)


def bit_values(bits: int, device: torch.device) -> Int[Tensor, " bits"]:
    """1, 2, 4, …: what each bit of an index is worth, the least significant first."""
    return 2 ** torch.arange(bits, device=device)
