"""VQGAN-LC: a frozen table of anchors, such as clustered CLIP features, under a learned projector."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.base.checks import CODE_DIM, require, require_between, require_choice
from ibqlab.quantizers.base import register_quantizer
from ibqlab.quantizers.codebooks import at_least_float32, initial_codes
from ibqlab.quantizers.terms import PairLossConfig
from ibqlab.quantizers.vectors import to_vectors
from ibqlab.quantizers.vq import NearestCodeQuantizer

PROJECTORS = ("linear", "mlp")
HIDDEN = 256
"""Width of the projector "mlp". Published: 256."""
_WEIGHTS_FOLLOW: ContextVar[bool] = ContextVar("weights_follow", default=False)


@dataclass(frozen=True, kw_only=True)
class LargeCodebookQuantizerConfig(PairLossConfig):
    """VQGAN-LC as published."""

    codebook_init: str = "unit"
    """Where random anchors lie; of no effect where a file gives them. "kmeans" does not apply: anchors are frozen."""
    anchors: str = ""
    """A .npy or .safetensors file with one table (K, anchor_dim); "" draws random anchors. Published: k-means centres
    per class of CLIP ViT-L/14 features. The table is in every checkpoint, too, so that the file is needed for a new
    run only."""
    anchor_dim: int = 768
    """Numbers per anchor, at least 1. Published: 768."""
    projector: str = "linear"
    """From anchors to codes: "linear", or "mlp" with one hidden layer of 256 and ReLU. Published: "linear"."""
    quantization_weight: float = 0.1
    """As in every quantizer. Published: 0.1."""
    beta: float = 0.33
    """As in every quantizer. Published: 0.33 on the codebook's side."""

    def __post_init__(self):
        super().__post_init__()
        require_between("anchor_dim", self.anchor_dim, 1, CODE_DIM)
        require_choice("projector", self.projector, PROJECTORS)
        require(
            self.codebook_init != "kmeans",
            'codebook_init "kmeans" does not apply to vqgan_lc, whose anchors are frozen; use "unit"',
        )
        suffix = Path(self.anchors).suffix
        require(
            not self.anchors or suffix in (".npy", ".safetensors"),
            f"anchors must be a .npy or .safetensors file; got {self.anchors!r}. Save a tensor with "
            "numpy.save(path, anchors.numpy())",
        )

    @classmethod
    def sized(cls, codes: int, dim: int) -> dict[str, Any]:
        """Random anchors of twice the dimension."""
        return super().sized(codes, dim) | {"anchor_dim": 2 * dim}


class AnchorCodebook(nn.Module):
    """A frozen table under a learned projector, so that a gradient to any code moves all of them."""

    def __init__(self, config: LargeCodebookQuantizerConfig):
        super().__init__()
        size, dim = config.codebook_size, config.anchor_dim
        # Without memory on the meta device and in a plan, where no file is read.
        if not config.anchors or torch.empty(0).is_meta:
            anchors = initial_codes(config.codebook_init, size, dim)
        elif _WEIGHTS_FOLLOW.get() and not Path(config.anchors).expanduser().is_file():
            anchors = torch.full((size, dim), torch.nan)  # drawn, they would shift what is drawn after them
        else:
            anchors = read_anchors(config.anchors, size, dim)
        self.register_buffer("anchors", anchors)
        if config.projector == "linear":
            layers = [nn.Linear(dim, config.code_dim)]
            nn.init.normal_(layers[0].weight, std=config.code_dim**-0.5)
        else:
            layers = [nn.Linear(dim, HIDDEN), nn.Linear(HIDDEN, config.code_dim)]
        self.layers = nn.ModuleList(layers)

    def forward(self) -> Float[Tensor, "K D"]:
        """Anchors under the projector, in float32 at least."""
        first, *rest = self.layers
        codes = F.linear(*map(at_least_float32, (self.anchors, first.weight, first.bias)))
        for layer in rest:
            codes = F.linear(codes.relu(), at_least_float32(layer.weight), at_least_float32(layer.bias))
        return codes


@register_quantizer("vqgan_lc", LargeCodebookQuantizerConfig, label="VQGAN-LC")
class LargeCodebookQuantizer(NearestCodeQuantizer):
    """Nearest code among projected anchors; only the projector learns.

        C = projector(A),   k = argmin_k ‖z − c_k‖,   z_q = z + sg(c_k − z),   loss = w(‖sg(c) − z‖² + β‖c − sg(z)‖²)

    Source: Zhu et al., "Scaling the Codebook Size of VQ-GAN to 100,000 with a Utilization Rate of 99%" (2024), §3;
    published VQGAN-LC code, models_vq. Its projector starts at N(0, 1/D), which this keeps.
    """

    reaches = "map"

    def __init__(self, config: LargeCodebookQuantizerConfig):
        super().__init__(config, AnchorCodebook(config))


@contextmanager
def weights_follow(are_coming: bool = True) -> Iterator[None]:
    """Inside the block a file of anchors may be missing, because a checkpoint with the table is loaded afterwards.

    Args:
        are_coming: whether one is; if not, the block changes nothing.
    """
    token = _WEIGHTS_FOLLOW.set(are_coming)
    try:
        yield
    finally:
        _WEIGHTS_FOLLOW.reset(token)


def read_anchors(path: str, codebook_size: int, anchor_dim: int) -> Float[Tensor, "K A"]:
    """The table of a file, float32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no single table of K × anchor_dim finite numbers; the message says what to set.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(
            f'anchors: no file {path}. Give the .npy or .safetensors file of the table, or anchors="" for random ones'
        )
    anchors = to_vectors(_table(place), "anchors").float()
    require(
        tuple(anchors.shape) == (codebook_size, anchor_dim),
        f"anchors in {path} are {tuple(anchors.shape)}, settings say ({codebook_size}, {anchor_dim}); "
        f"set codebook_size={len(anchors)} and anchor_dim={anchors.shape[1]}",
    )
    require(bool(anchors.isfinite().all()), f"anchors in {path} hold NaN or infinity; make the file again")
    return anchors


def _table(path: Path) -> Any:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    from safetensors.torch import load_file  # noqa: PLC0415 - only files of this kind need it

    tensors = load_file(path)
    require(len(tensors) == 1, f"anchors: {path} must hold one tensor, the table; got {sorted(tensors)[:5]}")
    return next(iter(tensors.values()))
