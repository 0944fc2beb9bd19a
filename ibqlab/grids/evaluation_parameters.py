"""What the notebooks that measure tokenizers may set, and the command that repeats their work."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ibqlab.base.checks import IMAGE_SIDE, IMAGES, require, require_at_most, require_choice
from ibqlab.base.devices import require_device
from ibqlab.metrics import PROTOCOLS
from ibqlab.metrics.protocols import RECONSTRUCTION_METRICS
from ibqlab.metrics.weights import ALEXNET, VGG16, PublishedWeights
from ibqlab.pretrained.load_report import WEIGHTS
from ibqlab.recipes.plugins import import_plugins
from ibqlab.recipes.presets import find_preset

NETS: dict[str, PublishedWeights] = {"vgg": VGG16, "alex": ALEXNET}
"""Trunks of LPIPS."""


@dataclass(frozen=True, kw_only=True)
class MeasuringParameters:
    """What the notebooks that measure tokenizers have in common. Empty or 0 means: as the preset says."""

    preset: str = "laptop"
    """One of `preset_names("evaluation")`."""
    weights: str = ""
    """"ema", averaged (published results), or "raw", as trained; empty: the only ones that the checkpoints hold, else
    the preset's."""
    images: str = ""
    """Folder of images, tar shards, or an .npz; empty: the run's own validation images, or the built-in photographs."""
    protocol: str = "seed-voken-ibq"
    """A key of `ibqlab.metrics.PROTOCOLS`. Under smoke and laptop a variant of it, for small images and without
    Inception, whose name says so."""
    image_size: int = 0
    """Height and width at which all are measured, in pixels; 0: the protocol's, under smoke and laptop the largest of
    the tokenizers'. Another size than the protocol's is named in every result."""
    limit: int = 0
    """Images at most; 0: all, and of the built-in photographs, which have no end, as many as the preset says."""
    metrics: tuple[str, ...] = ()
    """Names as in `evaluate_reconstruction`. What is asked for by name is never left out."""
    lpips_weights: tuple[str, ...] = ()
    """Files of LPIPS' trunks as "vgg=FILE" and "alex=FILE"; those not given: torch's folder of downloads."""
    inception_weights: str = ""
    """Inception's file; empty: torch's folder of downloads."""
    device: str = ""
    """Where to compute; empty: "cuda" where there is one, else "cpu"."""
    output: str = ""
    """Folder of results: a name below the folder of all runs, or a path that starts with / ./ or ~; empty:
    <notebook>-<preset>."""
    plugins: tuple[str, ...] = ()
    """Files (my_quantizer.py) and modules of your own that register the checkpoints' quantizers."""

    def __post_init__(self) -> None:
        import_plugins(self.plugins)
        find_preset(self.preset, "evaluation")
        require_choice("protocol", self.protocol, PROTOCOLS)
        if self.weights:
            require_choice("weights", self.weights, WEIGHTS)
        for metric in self.metrics:
            require_choice("metrics", metric, RECONSTRUCTION_METRICS)
        for net in split_labels("lpips_weights", self.lpips_weights):
            require_choice("lpips_weights", net, NETS)
        if self.device:
            require_device(self.device)
        require_at_most("limit", self.limit, IMAGES)
        require_at_most("image_size", self.image_size, IMAGE_SIDE, "pixels")
        require(self.image_size >= 0, f"image_size must be ≥ 0 pixels (0: the protocol's), got {self.image_size}")
        require(self.limit >= 0, f"limit must be ≥ 0 images (0: all), got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class EvaluationParameters(MeasuringParameters):
    """What the `parameters` cell of evaluate_tokenizer may set."""

    checkpoint: str = ""
    """Published file, export or run folder; empty: the preset's own run, trained first."""
    quantizer: str = ""
    """Of a published file that does not tell IBQ from VQ: "ibq" or "vq"; empty: as the file tells."""
    family: str = ""
    """Whose published file it is, one of `available_families`; empty: as the file tells."""


@dataclass(frozen=True, kw_only=True)
class ComparisonParameters(MeasuringParameters):
    """What the `parameters` cell of compare_published may set."""

    checkpoints: tuple[str, ...] = ()
    """"label=path" or a path each; empty: two runs of the preset, VQ and IBQ, trained first."""
    quantizers: tuple[str, ...] = ()
    """"label=vq" or "label=ibq" for published files that do not tell VQ from IBQ."""
    families: tuple[str, ...] = ()
    """"label=family" each, for published files that do not tell whose they are; one of `available_families`."""
    own_protocols: bool = True
    """Measure each published tokenizer under its own system's protocol as well, which takes the time again."""
    published: tuple[str, ...] = ()
    """"label=recipe" each, a key of experiments/published/tokenizers.yaml; empty: where a tokenizer is that of one."""


def split_labels(name: str, entries: Sequence[str]) -> dict[str, str]:
    """["a=x", "b=y"] as {"a": "x", "b": "y"}.

    Raises:
        ValueError: an entry without a label or a value, or a label twice.
    """
    values: dict[str, str] = {}
    for entry in entries:
        label, _, value = (part.strip() for part in entry.partition("="))
        require(bool(label and value), f"{name} takes label=value; got {entry!r}. Type a=FILE")
        require(label not in values, f"{name}: the label {label!r} is given twice; give each a label of its own")
        values[label] = value
    return values


def command_of(notebook: str, parameters: MeasuringParameters) -> str:
    """What makes the results again; of absolute paths only the last part, since they tell whose machine it was."""
    values = {field.name: getattr(parameters, field.name) for field in fields(parameters)}
    changed = {"preset": parameters.preset} | {
        field.name: values[field.name] for field in fields(parameters) if values[field.name] != field.default
    }
    words = [shlex.quote(f"{name}={_as_typed(value)}") for name, value in changed.items()]
    return " ".join(["ibqlab run", notebook, *words])


def _as_typed(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_typed, value))}]"
    label, equals, rest = str(value).rpartition("=")
    return f"{label}{equals}{Path(rest).name if Path(rest).is_absolute() else rest}"
