"""The link between the stages: a tokenizer's tokens, counted, and the generators that were trained over them.

    report = describe_tokenizer(load_tokenizer("runs/ibq"), DataConfig(source="digits"), generators=[Run("runs/gen")])
    save_token_figure(report, "runs/ibq/figures/token_link")

A generator's loss stands beside baselines only where both were measured on the same tokens: its run must say that it is
over this tokenizer, over these images, and over as many of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ibqlab.config import ConfigError, parse
from ibqlab.data import DataConfig, Split, open_data, training_batches, validation_batches
from ibqlab.data.broken import UnreadableImages
from ibqlab.plots import plot_token_link, save_figure, token_link_table
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.runs import Run
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokens.entropy import bits_per_token
from ibqlab.tokens.report import ModelCost, TokenReport, report_tokens
from ibqlab.training.generator.token_source import Tokens

_LOSSES = {
    "without class": ("validation_loss_unconditional", "position_loss_unconditional", False),
    "with class": ("validation_loss", "position_loss", True),
}
"""Ending of the name → column of the metrics, array of the snapshot, whether the class was given."""


def encode_images(tokenizer: Tokenizer, data: DataConfig, split: Split, *, images: int, batch_size: int = 64) -> Tokens:
    """The tokens of a split's images, as a generator's training meets them.

    Args:
        tokenizer: any; used in eval mode and left in its own.
        data: the images.
        split: "train" (random crops and mirroring as `data` says, from seed 0, at most one epoch of a source that ends)
            or "validation" (the first ones, in their order).
        images: how many, at least 1; fewer where there are fewer, or where some of these cannot be read.
        batch_size: images at once, at least 1.
    Returns:
        Tokens and classes.
    Raises:
        ValueError: a number below 1, or an image size that the tokenizer's downsampling does not divide.
    """
    source = open_data(data, split)
    tokenizer.latent_grid(data.image_size, data.image_size)
    if images < 1 or batch_size < 1:
        raise ValueError(f"images and batch_size must be at least 1; got {images} and {batch_size}")
    count = images if source.endless else min(images, len(source))
    size = min(batch_size, count)
    if split == "train":
        steps = -(-count // size)
        batches = training_batches(source, batch_size=size, seed=0, start_step=0, steps=steps, workers=data.workers)
    else:
        batches = validation_batches(source, images=count, batch_size=size, workers=data.workers)
    training, encoded = tokenizer.training, []
    tokenizer.eval()
    try:
        for batch in batches:
            if len(batch.images):
                tokens = tokenizer.encode_indices(batch.images).flatten(1)  # (B, T)
                encoded.append((tokens.cpu(), batch.labels))
    finally:
        tokenizer.train(training)
    if not encoded:
        raise UnreadableImages("at least one of the images to be encoded must be readable; none is. Replace the files")
    return Tokens(*(torch.cat(tensors)[:count] for tensors in zip(*encoded, strict=True)))


def generators_over(tokenizer: Tokenizer, runs: Sequence[Run]) -> list[Run]:
    """The finished runs of generators over this tokenizer, among any runs."""
    fingerprint = tokenizer.fingerprint()
    return [run for run in runs if run.status == "finished" and _fingerprint(run) == fingerprint]


def describe_tokenizer(
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    images: int = 4096,
    validation_images: int = 256,
    generators: Sequence[Run] | Mapping[str, Run] = (),
    batch_size: int = 64,
) -> TokenReport:
    """What this tokenizer's tokens cost: baselines counted on `data`, and the generators trained over them.

    Args:
        tokenizer: with the weights that the generators saw.
        data: images that they were trained on.
        images: training images to count, at least 2; more give better baselines, and entropies that are more than
            bounds.
        validation_images: to measure bits on, at least 1; what the generators' `record.validation_images` says.
        generators: finished runs over this tokenizer (`generators_over` finds them), or name → run. Each adds a row
            with and one without its class. A factorised generator's loss, the sum over both parts, is comparable.
        batch_size: images to encode at once.
    Returns:
        The report; baselines with a class where there are several.
    Raises:
        ValueError: a run that is not finished, no generator's, over another tokenizer, other images or another number
            of them, without a validation, or with the name of another. All is checked before an image is encoded.
    Cost: encoding images + validation_images; counting takes seconds for a few thousand images.
    """
    validation_source = open_data(data, "validation")
    most = math.inf if validation_source.endless else len(validation_source)
    held_out = min(validation_images, most)
    named = dict(generators) if isinstance(generators, Mapping) else {run.name: run for run in generators}
    if len(named) < len(generators):  # one would hide another
        raise ValueError("generators share a name; pass them as {name: run} with names of your own")
    fingerprint = tokenizer.fingerprint() if named else ""
    models: dict[str, ModelCost] = {}
    for name, run in named.items():
        config = _require_comparable(run, fingerprint, data)
        validated = config.record.validation_images
        if min(validated, most) != held_out:
            raise ValueError(
                f"{run.path} was validated on {validated:,} images, baselines would be on {held_out:,}: pass "
                f"validation_images={validated}"
            )
        models |= _generator_costs(name, run, permuted=config.index_permutation >= 0)
    training = encode_images(tokenizer, data, "train", images=images, batch_size=batch_size)
    validation = encode_images(tokenizer, data, "validation", images=held_out, batch_size=batch_size)
    size = (data.image_size, data.image_size)
    return report_tokens(
        training.indices.numpy(),
        validation.indices.numpy(),
        tokenizer.quantizer.config.codebook_size,
        tokenizer.latent_grid(*size),
        size,
        labels=(training.labels.numpy(), validation.labels.numpy()) if len(validation_source.classes) > 1 else None,
        models=models,
    )


def _generator_costs(name: str, run: Run, *, permuted: bool = False) -> dict[str, ModelCost]:
    """The last validation in bits, by position where the snapshot has that: with class, and without where validated."""
    metrics = run.metrics
    if "validation_loss" not in metrics or metrics["validation_loss"].dropna().empty:
        raise ValueError(f"{run.path} holds no validation_loss: it is no generator's run, or an old one")
    snapshot = run.snapshot() if run.snapshot_steps else {}
    costs = {}
    for ending, (column, array, given_class) in _LOSSES.items():
        if column in metrics and metrics[column].notna().any():
            nats = snapshot.get(array, float(metrics[column].dropna().iloc[-1]))
            costs[f"{name} {ending}"] = ModelCost(bits=bits_per_token(nats), given_class=given_class, permuted=permuted)
    return costs


def save_token_figure(report: TokenReport, path: str | Path, title: str = "") -> Figure:
    """Draw `plot_token_link`, and write it as PNG with its numbers as CSV and the report's table beside it.

    Args:
        report: of `describe_tokenizer`.
        path: file name with or without ".png"; the table is NAME_table.csv.
        title: the tokenizer's name.
    """
    figure = plot_token_link(report, title)
    picture, _ = save_figure(figure, path, token_link_table(report))
    report.table.to_csv(picture.with_name(f"{picture.stem}_table.csv"), index=False)
    return figure


def _require_comparable(run: Run, fingerprint: str, data: DataConfig) -> GeneratorTrainConfig:
    """The settings of a generator's run, refused where its loss cannot stand beside these tokens."""
    if run.status != "finished":
        raise ValueError(f"{run.path} is {run.status}; a generator's loss counts when its run is finished")
    try:
        config = parse(GeneratorTrainConfig, run.located_config)
    except ConfigError as error:
        raise ValueError(f"{run.path} is no run of a generator: {error}") from None
    if _fingerprint(run) != fingerprint:
        raise ValueError(
            f"{run.path} is over tokenizer {_fingerprint(run)}, this one is {fingerprint}: pass the tokenizer that it "
            "was trained with, loaded with the same weights, or choose runs with generators_over(tokenizer, runs)"
        )
    if _same_images(config.data) != _same_images(data):
        raise ValueError(f"{run.path} was trained on other images: pass data={config.data!r}")
    return config


def _fingerprint(run: Run) -> str:
    """The tokenizer that a generator's run says it is over; empty for other runs."""
    facts = run.provenance.get("tokenizer")
    return str(facts.get("fingerprint", "")) if isinstance(facts, dict) else ""


def _same_images(data: DataConfig) -> DataConfig:
    """The settings without those that leave the validation images as they are."""
    return replace(data, workers=0, flip=False)
