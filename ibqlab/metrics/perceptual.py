"""LPIPS from weight files at hand: the published metric or an error, never a random network under its name."""

import warnings
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.base.checks import require, require_choice
from ibqlab.losses.lpips_layer import layer_distance
from ibqlab.metrics.weights import (
    ALEXNET,
    PUBLISHED,
    VGG16,
    WeightFile,
    find_weights,
    import_metric_package,
    read_state,
)

TRUNKS = {"vgg": VGG16, "alex": ALEXNET}
SMALLEST_SIDE = {"vgg": 16, "alex": 32}
"""Pixels; below, the pooling layers leave nothing."""
_REMEDY = "Pass the file of the same net (vgg16 for 'vgg', alexnet for 'alex')"


class PerceptualDistance(nn.Module):
    """LPIPS, one value per image; frozen, and in eval mode for good (the published one drops no features either).

    Σ_l mean_hw w_l · (â_l(x) − â_l(y))², with â_l the features of layer l divided by their length over channels plus
    1e-10, and w_l the weights that the authors fitted to human judgements. 0: same picture; 0.1 to 0.3: usual
    reconstructions; the values of the two networks must not be compared.

    Args:
        net: "vgg" or "alex".
        distance: `lpips.LPIPS` with its trunk loaded.
        weights: the trunk's file.
    Source: Zhang et al. 2018, eq. 1, version 0.1.
    """

    def __init__(self, net: str, distance: nn.Module, weights: WeightFile) -> None:
        super().__init__()
        self.net, self.weights, self.distance = net, weights, distance
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode whatever its surroundings do, because dropout would make the loss random."""
        return super().train(False)

    def forward(self, x: Float[Tensor, "B 3 H W"], y: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """The distance of each pair; the gradient flows to both pictures.

        Args:
            x, y: in [−1, 1], at least 16 (vgg) or 32 (alex) pixels high and wide.
        Returns:
            One distance per image, ≥ 0.
        Raises:
            ValueError: different or wrong shapes, or pictures too small.
        """
        smallest = SMALLEST_SIDE[self.net]
        require(
            x.shape == y.shape and x.ndim == 4 and x.shape[1] == 3,
            f"LPIPS compares two batches (B, 3, H, W) of one shape; got {tuple(x.shape)} and {tuple(y.shape)}",
        )
        require(
            min(x.shape[2:]) >= smallest,
            f"LPIPS with net={self.net!r} needs images of at least {smallest} × {smallest} pixels; got {x.shape[2]} × "
            f"{x.shape[3]}. Enlarge them{', or use vgg (16 pixels)' if self.net == 'alex' else ''}, or leave LPIPS out",
        )
        published = self.distance
        features = [published.net(published.scaling_layer(pictures)) for pictures in (x, y)]
        weights = [layer.model[-1].weight for layer in published.lins]
        return sum(layer_distance(*layer) for layer in zip(*features, weights, strict=True)).flatten()

    def extra_repr(self) -> str:
        """Network and weights, for print."""
        return f"net={self.net!r}, weights={self.weights}"


def load_lpips(
    net: str = "vgg", weights: str | Path = "", *, expected_sha256: str | None = PUBLISHED
) -> PerceptualDistance:
    """LPIPS with the published weights.

    The package `lpips` brings the fitted weights of the layers; the ImageNet trunk is a file of torchvision's.

    Args:
        net: "vgg" (training, and reported as LPIPS-VGG) or "alex".
        weights: torchvision's state dict, whole or only its `features.*`; empty: vgg16-397923af.pth or
            alexnet-owt-7be5be79.pth in $TORCH_HOME/hub/checkpoints.
        expected_sha256: how the file's hash must begin; None takes any file, and result cards say so.
    Returns:
        A frozen module: distance(x, y) → (B,).
    Raises:
        FileNotFoundError: no such file; the message says what to fetch and where to put it.
        ValueError: unknown net, another content than published, or a state dict of another network.
        ImportError: without the package lpips.
    Source: published training code, which uses "vgg"; its evaluation prints both.
    """
    require_choice("net", net, TRUNKS)
    file = find_weights(TRUNKS[net], weights, expected_sha256)
    lpips = import_metric_package("lpips")
    # Building the trunk draws random numbers, which would otherwise change the course of a training run.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips uses torchvision's former names of arguments
        distance = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    _load_trunk(distance.net, read_state(file.path, _REMEDY), file.path)
    return PerceptualDistance(net, distance, file)


def _load_trunk(trunk: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy torchvision's `features.*` into lpips' slices, which number the same layers."""
    needed = trunk.state_dict()
    keys = {name: "features." + name.split(".", 1)[1] for name in needed}
    wrong = [key for name, key in keys.items() if key not in state or state[key].shape != needed[name].shape]
    require(
        not wrong,
        f"{path} is not the state dict of this network: {', '.join(wrong[:3])} missing or of another shape. {_REMEDY}",
    )
    trunk.load_state_dict({name: state[key] for name, key in keys.items()}, strict=True)
