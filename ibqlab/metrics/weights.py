"""Weight files of published networks: where they lie, and whether they are what their name says.

Nothing is ever downloaded and nothing random stands in: a missing file is an error that says what to fetch, and a file
of another content is an error too, because a metric from other weights is another metric under the same name.
"""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from ibqlab.base.cache import hash_file
from ibqlab.base.checks import require
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import open_ordinary

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED = "published"
"""As `expected_sha256`: the hash of the published file."""


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """A weight file that its authors published."""

    purpose: str
    """What needs it, for messages."""
    file: str
    """Its name in torch's folder of downloads."""
    size: str
    """How much there is to fetch."""
    url: str
    """Where it is published."""
    sha256: str
    """How the hash of its content begins, as the file's name says."""


VGG16 = PublishedWeights(
    purpose="LPIPS with net='vgg'",
    file="vgg16-397923af.pth",
    size="553 MB",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af",
)
ALEXNET = PublishedWeights(
    purpose="LPIPS with net='alex'",
    file="alexnet-owt-7be5be79.pth",
    size="244 MB",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256="7be5be79",
)
INCEPTION = PublishedWeights(
    purpose="FID, IS, KID, precision and recall with Inception",
    file="weights-inception-2015-12-05-6726825d.pth",
    size="96 MB",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
)


class WeightFile(NamedTuple):
    """A weight file whose content was hashed."""

    path: Path
    sha256: str
    """Of its content, 64 hexadecimal digits."""
    published: bool
    """Whether it is the published file."""

    def __str__(self) -> str:
        """For a result's card."""
        return f"sha256 {self.sha256[:16]}" + ("" if self.published else " (not the published file)")


def find_weights(
    weights: PublishedWeights, file: str | Path = "", expected_sha256: str | None = PUBLISHED
) -> WeightFile:
    """The weight file that was named, or the one in torch's folder of downloads, after a look at its content.

    Args:
        weights: which file.
        file: a copy of it; empty: `weights.file` in $TORCH_HOME/hub/checkpoints.
        expected_sha256: how the content's hash must begin: "published" or hexadecimal digits. None takes any content,
            and the card says that it is not the published file.
    Returns:
        Path and hash.
    Raises:
        FileNotFoundError: there is no such file; the message says what to fetch and where to put it.
        ValueError: the content has another hash.
    Cost: reads the file once, about 1 s per 500 MB.
    """
    import torch  # noqa: PLC0415 - only the default folder needs it

    usual = Path(torch.hub.get_dir(), "checkpoints", weights.file)
    path = Path(os.path.expanduser(file)) if str(file) else usual
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{weights.purpose} needs the weights {weights.file} ({weights.size}); there is no file {path.absolute()}. "
            f"Fetch {weights.url} and put it at {usual}, or pass the path of your copy."
        )
    content = hash_file(path)
    prefix = weights.sha256 if expected_sha256 == PUBLISHED else expected_sha256
    require(
        prefix is None or content.startswith(prefix.lower()),
        f"the weights {path} must have a sha256 that begins with {prefix}; it begins with {content[:16]}: damaged or "
        f"another file. Fetch {weights.url} again, or pass expected_sha256=None (check_weights=False in an evaluation) "
        "to use this one; the result will say so",
    )
    return WeightFile(path, content, content.startswith(weights.sha256))


def read_state(path: Path, remedy: str) -> "dict[str, Tensor]":
    """The tensors of a weight file, read without running anything that it holds.

    Args:
        path: the file.
        remedy: what to give instead, for the message.
    Raises:
        ValueError: it is no state dict.
    """
    import torch  # noqa: PLC0415 - as above

    try:
        with open_ordinary(path) as stream:
            state = torch.load(stream, map_location="cpu", weights_only=True)
    # What damaged files make torch raise is not written down: pickle's, zip's, Python's and its own errors.
    except Exception as error:
        reason = for_terminal(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise ValueError(
            f"{path} must be a state dict that torch wrote; it cannot be read ({reason}). {remedy}"
        ) from error
    good = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    require(good, f"{path} must be a state dict of tensors; got {type(state).__name__} of other things. {remedy}")
    return state


def import_metric_package(name: str) -> ModuleType:
    """A package of the `metrics` extra.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".", maxsplit=1)[0].replace("_", "-")
        raise ImportError(f"this metric needs {package}; type pip install 'ibqlab[metrics]' ({error})") from error
