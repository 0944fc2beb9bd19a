"""Which tokenizers an evaluation notebook measures, on which images, by which rules. Nothing is computed here.

Everything that can be wrong with a request is found before a run is trained or an image is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ibqlab.base.checks import require, require_choice
from ibqlab.base.measures import measure
from ibqlab.base.resources import BUILT_IN
from ibqlab.config import ConfigError, parse
from ibqlab.data import DataConfig, open_data
from ibqlab.grids.evaluation_parameters import NETS, MeasuringParameters, split_labels
from ibqlab.metrics import PROTOCOLS, MetricCard, Protocol, open_images
from ibqlab.metrics.cautions import cautions_of_images, raw_weights
from ibqlab.metrics.images import ImageSet
from ibqlab.metrics.protocols import RECONSTRUCTION_METRICS
from ibqlab.metrics.weights import INCEPTION, find_weights, import_metric_package
from ibqlab.pretrained import read_checkpoint
from ibqlab.pretrained.family import find_family
from ibqlab.pretrained.load_report import AS_GIVEN
from ibqlab.pretrained.tokenizer_architecture import empty_tokenizer
from ibqlab.quantizers import available_quantizers
from ibqlab.recipes.presets import PRESETS, EvaluationPreset, find_preset
from ibqlab.runs import Run
from ibqlab.runs.finding import locate
from ibqlab.tokenizer import TokenizerConfig
from ibqlab.training import RunParameters, TrainConfig, prepare_run

PHOTO_SIDE = 224
"""Pixels along a side of the built-in photographs for larger tokenizers: their crops have at most 225."""


@dataclass(frozen=True, kw_only=True)
class TokenizerUnderTest:
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
    weights: str | None = None
    """The one set of weights that the file holds, "ema", "raw" or AS_GIVEN; None: both."""
    family: str | None = None
    """Whose published file it is, where the file does not tell."""
    system: str = ""
    """Name of the published system that wrote the file, one of `available_families`; empty for our own."""
    has_averages: bool = True
    """Whether weights="ema" may be asked for; of a run still to be trained nobody knows."""

    @property
    def own_protocol(self) -> str:
        """Name of the protocol of its system's published numbers; "" where there is none."""
        return find_family(self.system).protocol if self.system else ""


@dataclass(frozen=True, kw_only=True)
class EvaluationRules:
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
    sizes: dict[str, int] = field(default_factory=dict)
    """Label → the only image size in pixels that the tokenizer takes, where it is another than that of the images."""
    as_given: tuple[str, ...] = ()
    """Labels of the tokenizers whose file holds one set of weights and does not tell which: their authors' only one."""
    cautions: tuple[str, ...] = ()
    """What must be known before the work begins, each with what to do."""


def prepare_tokenizer(label: str, preset: str, settings: tuple[str, ...] = ()) -> TokenizerUnderTest:
    """The run that a preset trains where no checkpoint is named.

    Raises:
        ConfigError: the preset trains none.
    """
    if not PRESETS[preset].tokenizer:
        raise ConfigError(
            "this preset measures checkpoints that are there; name one: checkpoint=FILE of a published tokenizer "
            "(ibqlab.pretrained.download_published fetches them), an export or a run folder"
        )
    config, path = prepare_run(RunParameters(preset=preset, settings=settings))
    return TokenizerUnderTest(label=label, path=path, config=config.tokenizer, data=config.data, run=config)


def find_tokenizer(label: str, checkpoint: str, quantizer: str = "", family: str = "") -> TokenizerUnderTest:
    """A checkpoint that was named: a published file, an export, or a run folder (also by its name among all runs).

    Raises:
        FileNotFoundError, CheckpointError, RunError, ValueError: as `read_checkpoint`.
    """
    if quantizer:
        require_choice("quantizer", quantizer, available_quantizers())
    path = locate(checkpoint)
    opened = read_checkpoint(path, quantizer=quantizer or None, family=family or None)
    run = Run(path) if path.is_dir() and not opened.family else None
    return TokenizerUnderTest(
        label=label,
        path=path,
        config=opened.config,
        quantizer=quantizer or None,
        data=parse(TrainConfig, run.located_config, source=f"run {path.name}").data if run else None,
        weights=opened.weights,
        family=family or None,
        system=opened.family,
        has_averages=opened.weights is not None or bool(opened.part("tokenizer_ema")),
    )


def find_rules(parameters: MeasuringParameters, tokenizers: Sequence[TokenizerUnderTest]) -> EvaluationRules:
    """Protocol, images, metrics and weight files for these tokenizers, all of them looked at.

    Raises:
        ConfigError: images are needed and not named, or the runs' own images differ.
        FileNotFoundError: no such folder, or weight files that are missing: all of them in one message.
        ValueError: an empty folder, unreadable or too few images, a size that a tokenizer cannot take, or weights of
            another content.
        ImportError: a package of `ibqlab[metrics]` is missing.
    """
    preset = find_preset(parameters.preset, "evaluation")
    side = max(tokenizer.config.autoencoder.resolution for tokenizer in tokenizers)
    if parameters.images == "photos" or not (parameters.images or any(tokenizer.data for tokenizer in tokenizers)):
        side = min(side, PHOTO_SIDE)
    protocol = fit_protocol(PROTOCOLS[parameters.protocol], preset, parameters.image_size or side)
    if parameters.image_size:
        protocol = at_size(protocol, parameters.image_size)
    source, limit, images = open_for(protocol, parameters, tokenizers)
    weights = _choose_weights(tokenizers, parameters.weights, preset.weights)
    lpips_weights = split_labels("lpips_weights", parameters.lpips_weights)
    requested = parameters.metrics or preset.metrics or RECONSTRUCTION_METRICS
    optional = () if parameters.metrics else preset.optional
    files, left_out = _find_weight_files(requested, optional, protocol, lpips_weights, parameters.inception_weights)
    metrics = tuple(metric for metric in requested if metric not in left_out)
    require("rfid" not in metrics or images.count >= 2, f"rfid needs at least 2 images, got {images.count}")
    import_metric_package("torchmetrics")
    single = _single_sizes(tokenizers, images.side)
    cautions = [*cautions_of(images, protocol), *_caution_of_weights(tokenizers, weights)]
    cautions += [
        f"resized twice: {label} takes {size} × {size} pixels only, so that its images are resized once more and its "
        f"reconstructions back to {images.side[0]}. Type image_size={size}, or read it under its own protocol"
        for label, size in single.items()
    ]
    return EvaluationRules(
        protocol=protocol,
        weights=weights,
        metrics=metrics,
        left_out=tuple(_empty_card(metric, protocol, why) for metric, why in left_out.items()),
        images=images,
        source=source,
        limit=limit,
        lpips_weights=lpips_weights,
        inception_weights=parameters.inception_weights,
        device=parameters.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        weight_files=files,
        sizes=single,
        as_given=tuple(tokenizer.label for tokenizer in tokenizers if tokenizer.weights == AS_GIVEN),
        cautions=tuple(cautions),
    )


def open_for(
    protocol: Protocol, parameters: MeasuringParameters, tokenizers: Sequence[TokenizerUnderTest]
) -> tuple[Any, int | None, ImageSet]:
    """The images of a request as a protocol prepares them: what to open, how many at most, and the set itself.

    Raises:
        ConfigError, FileNotFoundError, ValueError: as `find_rules`.
    """
    if parameters.images in BUILT_IN:
        source = open_data(DataConfig(source=parameters.images, image_size=protocol.image_size), "validation")
    else:
        source = parameters.images or _validation_images(tokenizers, protocol, parameters.preset)
    endless = getattr(source, "endless", False)
    preset = find_preset(parameters.preset, "evaluation")
    limit = parameters.limit or (preset.endless_images if endless else None)
    images = open_images(
        source, resize=protocol.resize, image_size=protocol.image_size, crop=protocol.crop, limit=limit
    )
    return source, limit, images


def cautions_of(images: ImageSet, protocol: Protocol) -> list[str]:
    """Those of the images; none of a trial, which compares with nothing published."""
    return cautions_of_images(images, protocol) if protocol.source else []


def takes_one_size(config: TokenizerConfig) -> bool:
    """Whether a tokenizer takes images of its resolution alone, as TiTok does; others take any multiple."""
    side = config.autoencoder.resolution
    try:
        config.autoencoder.latent_grid(2 * side, 2 * side)
    except ValueError:
        return True
    return False


def _single_sizes(tokenizers: Sequence[TokenizerUnderTest], side: tuple[int, int]) -> dict[str, int]:
    """Sizes of the tokenizers that take one only, where it is not that of the images.

    Raises:
        ValueError: another one that cannot take these images.
    """
    sizes = {}
    for tokenizer in tokenizers:
        try:
            empty_tokenizer(tokenizer.config).latent_grid(*side)
        except ValueError as error:
            if not takes_one_size(tokenizer.config) or side[0] != side[1]:
                raise ValueError(f"the tokenizer {tokenizer.label} cannot take these images: {error}") from None
            sizes[tokenizer.label] = tokenizer.config.autoencoder.resolution
    return sizes


def _caution_of_weights(tokenizers: Sequence[TokenizerUnderTest], weights: str) -> list[str]:
    """Published files of systems that evaluate averaged weights, measured as trained."""
    raw = [
        tokenizer.label
        for tokenizer in tokenizers
        if weights == "raw" and tokenizer.system and tokenizer.weights is None and tokenizer.has_averages
    ]
    return [caution for label in raw for caution in raw_weights(label)]


def _choose_weights(tokenizers: Sequence[TokenizerUnderTest], typed: str, usual: str) -> str:
    """Which weights are measured: those asked for, else the only ones that the files hold, else of published files the
    averages, as their authors measure, else the preset's.

    Raises:
        ConfigError: a file has not those.
    """
    held = {tokenizer.weights for tokenizer in tokenizers} - {None, AS_GIVEN}
    both = [tokenizer for tokenizer in tokenizers if tokenizer.weights is None]
    if both and all(tokenizer.system and tokenizer.has_averages for tokenizer in both):
        usual = "ema"
    weights = typed or (held.pop() if len(held) == 1 else usual)
    for tokenizer in tokenizers:
        if tokenizer.weights not in (None, AS_GIVEN, weights):
            raise ConfigError(
                f"{tokenizer.label} holds only one set of weights; give weights={tokenizer.weights}, or a file that "
                f"holds {weights!r}, too"
            )
        if weights == "ema" and not tokenizer.has_averages:
            raise ConfigError(f"{tokenizer.label} holds no averaged weights; give weights=raw for those it has")
    return weights


def at_size(protocol: Protocol, image_size: int) -> Protocol:
    """A protocol at another image size, which its name says."""
    if protocol.image_size == image_size:
        return protocol
    return replace(
        protocol,
        name=f"{protocol.name} at {image_size} px",
        purpose=f"{protocol.name} on images of another size; compares with nothing published.",
        image_size=image_size,
        deviation=f"Another image size than {protocol.name}.",
    )


def fit_protocol(protocol: Protocol, preset: EvaluationPreset, resolution: int) -> Protocol:
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


def _validation_images(tokenizers: Sequence[TokenizerUnderTest], protocol: Protocol, preset: str) -> Any:
    """The validation images of the runs, at the protocol's size; the built-in photographs where no run tells any."""
    if not PRESETS[preset].tokenizer:
        raise ConfigError("published protocols need images of that size; name their folder: images=FOLDER")
    trained_on = {tokenizer.label: tokenizer.data for tokenizer in tokenizers if tokenizer.data}
    sources = [replace(data, image_size=protocol.image_size, workers=0, flip=False) for data in trained_on.values()]
    if any(source != sources[0] for source in sources):
        raise ConfigError(
            f"these runs were validated on different images ({', '.join(trained_on)}); name one folder for all: "
            "images=FOLDER"
        )
    data = sources[0] if sources else DataConfig(source="photos", image_size=protocol.image_size)
    return open_data(data, "validation")


def _find_weight_files(
    requested: Sequence[str], optional: Sequence[str], protocol: Protocol, lpips: dict[str, str], inception: str
) -> tuple[dict[str, str], dict[str, str]]:
    """sha256 of the networks that metrics need, and why optional metrics are left out."""
    needs = {f"lpips_{net}": (file, lpips.get(net, "")) for net, file in NETS.items()}
    if protocol.extractor.startswith("inception-"):
        needs["rfid"] = (INCEPTION, inception)
    files: dict[str, str] = {}
    left_out: dict[str, str] = {}
    missing = []
    for metric in (metric for metric in requested if metric in needs):
        file, path = needs[metric]
        try:
            files[metric] = find_weights(file, path).sha256
        except FileNotFoundError as error:
            if metric in optional and not path:
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
        metric=measure(metric).title,
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
