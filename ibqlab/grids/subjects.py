"""What an evaluation notebook is asked to do: which tokenizers, which images, which rules. Nothing is computed here.

Everything that can be wrong with a request is found before a run is trained or an image is read.
"""

import shlex
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ibqlab.base.checks import IMAGES, require, require_at_most, require_choice
from ibqlab.base.devices import require_device
from ibqlab.config import ConfigError, parse
from ibqlab.data import DataConfig, open_data
from ibqlab.metrics import PROTOCOLS, MetricCard, Protocol, open_images
from ibqlab.metrics.images import ImageSet
from ibqlab.metrics.protocols import RECONSTRUCTION_METRICS
from ibqlab.metrics.weights import ALEXNET, INCEPTION, VGG16, PublishedWeights, find_weights, import_metric_package
from ibqlab.pretrained import read_checkpoint
from ibqlab.pretrained.report import WEIGHTS
from ibqlab.pretrained.tokenizer_architecture import empty_tokenizer
from ibqlab.quantizers import available_quantizers
from ibqlab.runs import Run
from ibqlab.runs.root import locate
from ibqlab.tokenizer import TokenizerConfig
from ibqlab.training import RunParameters, TrainConfig, plan_run


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What holds where a parameter of an evaluation notebook is empty."""

    trained: str = ""
    """Preset of the run that is trained where no checkpoint is named; empty: one must be named, and images too."""
    weights: str
    """"ema" or "raw". Averages over 0.999 of the past mean nothing after a few hundred steps."""
    extractor: str = ""
    """Feature extractor in place of the protocol's Inception; empty: the protocol's."""
    metrics: tuple[str, ...] = RECONSTRUCTION_METRICS
    """What is measured."""
    optional: tuple[str, ...] = ()
    """Metrics that are left out, with a line in the table, while their weight files are missing."""
    endless_images: int = 0
    """How many images are taken of a source without end (the built-in photographs)."""


_SMALL = ("rfid", "lpips_vgg", "psnr", "ssim", "usage", "perplexity")
PRESETS = {
    "smoke": Preset(
        trained="smoke",
        weights="raw",
        extractor="digits",
        metrics=_SMALL,
        optional=("lpips_vgg",),
        endless_images=128,
    ),
    "laptop": Preset(
        trained="laptop",
        weights="raw",
        extractor="digits",
        metrics=_SMALL,
        optional=("lpips_vgg",),
        endless_images=1024,
    ),
    "published": Preset(weights="ema"),
}
"""Presets of the notebooks evaluate_tokenizer and compare_published."""
_NETS: dict[str, PublishedWeights] = {"vgg": VGG16, "alex": ALEXNET}


@dataclass(frozen=True, kw_only=True)
class MeasuringParameters:
    """What the notebooks that measure tokenizers have in common. Empty or 0 means: as the preset says."""

    preset: str = "laptop"
    """A key of `PRESETS`."""
    weights: str = ""
    """"ema", averaged (published results), or "raw", as trained."""
    images: str = ""
    """Folder of images, tar shards, or an .npz; empty: the run's own validation images, or the built-in photographs."""
    protocol: str = "seed-voken-ibq"
    """A key of `ibqlab.metrics.PROTOCOLS`. Under smoke and laptop a variant of it, for small images and without
    Inception, whose name says so."""
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

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, PRESETS)
        require_choice("protocol", self.protocol, PROTOCOLS)
        if self.weights:
            require_choice("weights", self.weights, WEIGHTS)
        for metric in self.metrics:
            require_choice("metrics", metric, RECONSTRUCTION_METRICS)
        for net in split_labels("lpips_weights", self.lpips_weights):
            require_choice("lpips_weights", net, _NETS)
        if self.device:
            require_device(self.device)
        require_at_most("limit", self.limit, IMAGES)
        require(self.limit >= 0, f"limit must be ≥ 0 images (0: all), got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A tokenizer to measure."""

    label: str
    """Its name in tables and figures."""
    path: Path
    """Checkpoint, export or run folder; of a run still to be trained, where it will be."""
    config: TokenizerConfig
    """Architecture."""
    quantizer: str | None = None
    """What the shapes of a published file do not tell."""
    data: DataConfig | None = None
    """What it was trained on; None where the file does not tell."""
    run: TrainConfig | None = None
    """Settings of a run to train or finish first; None for a checkpoint that was named."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How every tokenizer of a notebook is measured."""

    protocol: Protocol
    weights: str
    """"ema" or "raw"."""
    metrics: tuple[str, ...]
    """What is computed."""
    left_out: tuple[MetricCard, ...]
    """Cards without a value for what the preset would measure if its weight files were there."""
    images: ImageSet
    """The same for all."""
    source: Any
    """The same images, as `evaluate_reconstruction` takes them."""
    limit: int | None
    lpips_weights: dict[str, str]
    inception_weights: str
    device: str
    weight_files: dict[str, str]
    """Metric → sha256 of the network it needs."""


def plan_subject(label: str, preset: Preset, settings: tuple[str, ...] = ()) -> Subject:
    """The run that a preset trains where no checkpoint is named.

    Raises:
        ConfigError: the preset trains none.
    """
    if not preset.trained:
        raise ConfigError(
            "this preset measures checkpoints that are there; name one: checkpoint=FILE of a published tokenizer "
            "(ibqlab.pretrained.download_published fetches them), an export or a run folder"
        )
    config, path = plan_run(RunParameters(preset=preset.trained, settings=settings))
    return Subject(label=label, path=path, config=config.tokenizer, data=config.data, run=config)


def find_subject(label: str, checkpoint: str, quantizer: str = "") -> Subject:
    """A checkpoint that was named: a published file, an export, or a run folder (also by its name among all runs).

    Raises:
        FileNotFoundError, CheckpointError, RunError, ValueError: as `read_checkpoint`.
    """
    if quantizer:
        require_choice("quantizer", quantizer, available_quantizers())
    path = locate(checkpoint)
    config = read_checkpoint(path, quantizer=quantizer or None).config
    run = Run(path) if path.is_dir() else None
    data = parse(TrainConfig, run.located_config, source=f"run {path.name}").data if run else None
    return Subject(label=label, path=path, config=config, quantizer=quantizer or None, data=data)


def find_rules(parameters: MeasuringParameters, subjects: Sequence[Subject]) -> Rules:
    """Protocol, images, metrics and weight files for these tokenizers, all of them looked at.

    Raises:
        ConfigError: images are needed and not named, or the runs' own images differ.
        FileNotFoundError: no such folder, or weight files that are missing: all of them in one message.
        ValueError: an empty folder, unreadable or too few images, a size that a tokenizer cannot take, or weights of
            another content.
        ImportError: a package of `ibqlab[metrics]` is missing.
    """
    preset = PRESETS[parameters.preset]
    sizes = [subject.config.autoencoder.resolution for subject in subjects]
    protocol = fit_protocol(PROTOCOLS[parameters.protocol], preset, max(sizes))
    source = parameters.images or _own_images(subjects, protocol, preset)
    endless = getattr(source, "endless", False)
    limit = parameters.limit or (preset.endless_images if endless else None)
    images = open_images(
        source, resize=protocol.resize, image_size=protocol.image_size, crop=protocol.crop, limit=limit
    )
    for subject in subjects:
        _check_size(subject, images.side)
    given = split_labels("lpips_weights", parameters.lpips_weights)
    wanted = parameters.metrics or preset.metrics
    optional = () if parameters.metrics else preset.optional
    files, left_out = _find_weight_files(wanted, optional, protocol, given, parameters.inception_weights)
    metrics = tuple(metric for metric in wanted if metric not in left_out)
    require("rfid" not in metrics or images.count >= 2, f"rfid needs at least 2 images, got {images.count}")
    import_metric_package("torchmetrics")
    return Rules(
        protocol=protocol,
        weights=parameters.weights or preset.weights,
        metrics=metrics,
        left_out=tuple(_empty_card(metric, protocol, why) for metric, why in left_out.items()),
        images=images,
        source=source,
        limit=limit,
        lpips_weights=given,
        inception_weights=parameters.inception_weights,
        device=parameters.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        weight_files=files,
    )


def fit_protocol(protocol: Protocol, preset: Preset, resolution: int) -> Protocol:
    """A published protocol as it is, or under smoke and laptop a variant for tokenizers of that resolution.

    The variant's name says what was changed, so that its numbers cannot pass for published ones.
    """
    if not preset.extractor:
        return protocol
    size = "" if protocol.resize == "none" else f" at {resolution} px"
    return replace(
        protocol,
        name=f"{protocol.name}{size}, {preset.extractor} features",
        purpose=f"A trial of {protocol.name} on small images and without Inception; compares with nothing published.",
        image_size=resolution,
        extractor=preset.extractor,
        published_extractor="",
        deviation=f"Other image size and other features than {protocol.name}.",
        source="",
    )


def split_labels(name: str, entries: Sequence[str]) -> dict[str, str]:
    """["a=x", "b=y"] as {"a": "x", "b": "y"}.

    Raises:
        ValueError: an entry without a label or a value, or a label twice.
    """
    found: dict[str, str] = {}
    for entry in entries:
        label, _, value = (part.strip() for part in entry.partition("="))
        require(bool(label and value), f"{name} takes label=value; got {entry!r}. Type a=FILE")
        require(label not in found, f"{name}: the label {label!r} is given twice; give each a label of its own")
        found[label] = value
    return found


def command_of(notebook: str, parameters: MeasuringParameters) -> str:
    """What makes the results again; of absolute paths only the last part, since they tell whose machine it was."""
    words = [f"preset={parameters.preset}"]
    for field in fields(parameters):
        value = getattr(parameters, field.name)
        default = field.default if field.default is not MISSING else None
        if field.name != "preset" and value != default:
            words.append(f"{field.name}={_as_typed(value)}")
    return " ".join(["ibqlab run", notebook, *map(shlex.quote, words)])


def _as_typed(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_typed, value))}]"
    label, equals, rest = str(value).rpartition("=")
    return f"{label}{equals}{Path(rest).name if Path(rest).is_absolute() else rest}"


def _own_images(subjects: Sequence[Subject], protocol: Protocol, preset: Preset) -> Any:
    """The validation images of the runs, at the protocol's size; the built-in photographs where no run tells any."""
    if not preset.trained:
        raise ConfigError("published protocols need images of that size; name their folder: images=FOLDER")
    told = {subject.label: subject.data for subject in subjects if subject.data}
    kinds = [replace(data, image_size=protocol.image_size, workers=0, flip=False) for data in told.values()]
    if any(kind != kinds[0] for kind in kinds):
        raise ConfigError(
            f"these runs were validated on different images ({', '.join(told)}); name one folder for all: images=FOLDER"
        )
    data = kinds[0] if kinds else DataConfig(source="photos", image_size=protocol.image_size)
    return open_data(data, "validation")


def _check_size(subject: Subject, side: tuple[int, int]) -> None:
    try:
        empty_tokenizer(subject.config).latent_grid(*side)
    except ValueError as error:
        raise ValueError(f"the tokenizer {subject.label} cannot take these images: {error}") from None


def _find_weight_files(
    wanted: Sequence[str], optional: Sequence[str], protocol: Protocol, lpips: dict[str, str], inception: str
) -> tuple[dict[str, str], dict[str, str]]:
    """sha256 of the networks that metrics need, and why optional metrics are left out."""
    needs = {f"lpips_{net}": (file, lpips.get(net, "")) for net, file in _NETS.items()}
    if protocol.extractor.startswith("inception-"):
        needs["rfid"] = (INCEPTION, inception)
    files: dict[str, str] = {}
    left_out: dict[str, str] = {}
    missing = []
    for metric in (metric for metric in wanted if metric in needs):
        file, given = needs[metric]
        try:
            files[metric] = find_weights(file, given).sha256
        except FileNotFoundError as error:
            if metric in optional and not given:
                option = f'lpips_weights=["{metric.removeprefix("lpips_")}=FILE"]'
                left_out[metric] = (
                    f"not computed: fetch {file.url} ({file.size}) into torch's hub/checkpoints, or give {option}"
                )
            else:
                missing.append(str(error))
        else:
            import_metric_package("torch_fidelity" if metric == "rfid" else "lpips")
    if missing:
        raise FileNotFoundError("\n".join([f"{len(missing)} weight files are missing:", *missing]))
    return files, left_out


def _empty_card(metric: str, protocol: Protocol, why: str) -> MetricCard:
    return MetricCard(
        key=metric,
        metric=f"LPIPS ({metric.removeprefix('lpips_')})",
        value=float("nan"),
        unit="",
        better="lower",
        images=0,
        protocol=protocol.name,
        resize="",
        crop="",
        rounding="",
        remarks=(why,),
    )
