"""The row of a finished cell: what its run recorded, and what is measured of it once at the end."""

import time
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ibqlab.costs.meter import SavedTensors, storages_of
from ibqlab.data import ImageSource, open_data, readable_batches, to_model_range
from ibqlab.diagnostics.lab import LabRunConfig
from ibqlab.diagnostics.variance import variance_lost
from ibqlab.generating.sampling_runs import SampleRequest, sample_images
from ibqlab.generator.sampling_config import SAMPLING_CARDS
from ibqlab.grids.cells import Cell, EvaluationRequest, column_of
from ibqlab.metrics import evaluate_generation, evaluate_reconstruction
from ibqlab.metrics.cautions import without_cautions
from ibqlab.metrics.digits_classifier import recognise_digits
from ibqlab.pretrained import load_first_stage, load_generator, load_tokenizer
from ibqlab.quantizers.base import Quantizer
from ibqlab.quantizers.soft_vq import SoftVectorQuantizer
from ibqlab.runs import Run
from ibqlab.tokenizer import Tokenizer
from ibqlab.training import GeneratorTrainConfig, TrainConfig
from ibqlab.training.data_check import reachable

RECORDED = {
    "usage": "validation_usage",
    "perplexity": "validation_perplexity",
    "psnr": "validation_psnr",
    "l1": "validation_l1",
    "training_usage": "usage",
    "training_usage_tokens": "usage_tokens",
    "gradient_reach": "gradient_reach",
    "bits_per_token": "validation_bits_per_token",
    "tokens": "validation_tokens",
    "images": "validation_images",
    "feature_norm": "feature_norm_mean",
    "code_norm": "code_norm_mean",
    "softmax_perplexity": "softmax_perplexity",
    "reconstruction_error": "validation_reconstruction_error",
}
"""Column of a row → column of the run's last validation."""
REPEATS = 7
"""Passes of which the quantizer's time is the median."""


def measure_cell(cell: Cell, run: Run) -> dict[str, Any]:
    """All measures of a cell's finished run, by their columns' names.

    Args:
        cell: whose settings say what is measured.
        run: finished, or stopped by the alarm, whose last validation counts then.
    Returns:
        Recorded at the last validation: usage (share of codes hit in `tokens` tokens), perplexity (codes), psnr (dB),
        l1, gradient_reach, bits_per_token, mean norms of features and codes, softmax_perplexity, reconstruction_error
        of the lab. Measured here: variance_lost, of the last snapshot's features; quantizer_ms and quantizer_mib, of
        one pass forward and backward over the tokens of a step; soft_psnr for Soft VQ; what `cell.measure` asks for.
        And steps, seconds of training, parameters, provenance.
    """
    metrics, is_finished = run.metrics, run.status == "finished"
    row = metrics.iloc[-1] if is_finished else last_whole_validation(metrics)
    values: dict[str, Any] = {name: row[column].item() for name, column in RECORDED.items() if column in row}
    values |= {} if is_finished else {"validation_step": int(row["step"])}
    last = metrics.ffill().iloc[-1]
    values |= {"steps": int(last["step"]), "seconds": float(last.get("seconds", run.duration))}
    facts = run.provenance
    values["parameters"] = facts.get("parameters")
    values |= MEASURES[type(cell.config)](cell, run)
    values["provenance"] = {
        key: facts.get(key) for key in ("started", "commit", "dirty", "versions", "hardware", "threads", "data")
    } | ({"unreadable": facts["unreadable"]} if facts.get("unreadable") else {})
    return values


def last_whole_validation(metrics: pd.DataFrame) -> pd.Series:
    """The last row that has all numbers of a validation, so that those of a stopped run are of one step.

    Args:
        metrics: of a run that the alarm has stopped: its last step may have no validation, or usage alone, or features
            that overflow, whose codes cannot be counted. Without a whole validation its last row.
    """
    columns = [column for column in RECORDED.values() if column.startswith("validation_") and column in metrics]
    whole = metrics.dropna(subset=columns)
    return (whole if len(whole) else metrics).iloc[-1]


def _of_lab(cell: Cell, run: Run) -> dict[str, Any]:
    return {"variance_lost": variance_lost_in(run.snapshot())}


def variance_lost_in(snapshot: Mapping[str, np.ndarray]) -> float:
    """`variance_lost` of a snapshot's features and their codes."""
    codes = snapshot["codebook"][snapshot["assignments"]]
    return variance_lost(torch.from_numpy(snapshot["features"]), torch.from_numpy(codes))


def _of_tokenizer(cell: Cell, run: Run) -> dict[str, Any]:
    config, measure = cell.config, cell.measure
    device = torch.device("cuda" if config.accelerator == "cuda" else "cpu")
    raw = load_tokenizer(run.path, "raw").float().to(device)
    grid = raw.latent_grid(config.data.image_size, config.data.image_size)
    tokens = config.batch_size // (config.processes * config.accumulate) * prod(grid)
    snapshot = run.snapshot()
    values = quantizer_cost(raw.quantizer, torch.from_numpy(snapshot["features"]).to(device), tokens)
    values["variance_lost"] = variance_lost_in(snapshot)
    if not measure.metrics and not isinstance(raw.quantizer, SoftVectorQuantizer):
        return values
    # As many as its last validation saw, which left unreadable ones out.
    images = int(run.metrics["validation_images"].dropna().iloc[-1])
    source = _validation_images(cell, run)
    batches = partial(readable_batches, source, images, workers=config.data.workers)
    if isinstance(raw.quantizer, SoftVectorQuantizer):
        raw.quantizer.progress = 1.0
        values |= soft_inference(raw, (batch.images.to(device) for batch in batches()))
    if measure.metrics:
        with without_cautions():  # a study measures its runs on their own small images, and compares them alone
            result = evaluate_reconstruction(
                raw if measure.weights == "raw" else load_tokenizer(run.path, measure.weights).float().to(device),
                [batch.images for batch in batches()],
                measure.protocol,
                metrics=measure.metrics,
                extractor=measure.extractor or None,
                progress=False,
            )
        # rFID alone is of the extractor's features.
        columns = {"rfid": column_of("rfid", measure.extractor)}
        values |= {columns.get(name, name): result[name].value for name in measure.metrics}
    return values


def quantizer_cost(quantizer: Quantizer, features: Tensor, tokens: int) -> dict[str, float]:
    """Time and memory of a quantizer alone, forward and backward in float32, in training mode, as at training's end.

    Args:
        quantizer: its codebook's state does not change; gradients are dropped.
        features: (n, D) encoder features, repeated to `tokens`.
        tokens: of one pass.
    Returns:
        quantizer_ms (median of 7 passes), quantizer_mib (kept for the backward pass: what autograd holds beside
        features and weights), quantizer_tokens.
    """
    dim = features.shape[1]
    repeated = features.repeat(-(-tokens // len(features)), 1)[:tokens].T.reshape(1, dim, tokens, 1).contiguous()
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    progress, quantizer.progress = quantizer.progress, 1.0  # some quantize only after a part of training
    quantizer.train()
    seconds, memory = [], SavedTensors(())
    for repeat in range(REPEATS + 1):
        inputs = repeated.clone().requires_grad_()
        memory = SavedTensors({*storages_of([quantizer]), inputs.untyped_storage()._cdata})
        began = _now(inputs)
        with memory.watching():
            out = quantizer(inputs)
        (out.loss + out.quantized.square().mean()).backward()
        if repeat:
            seconds.append(_now(inputs) - began)
    quantizer.zero_grad(set_to_none=True)
    quantizer.load_state_dict(state)
    quantizer.progress = progress
    quantizer.eval()
    return {
        "quantizer_ms": 1000 * sorted(seconds)[REPEATS // 2],
        "quantizer_mib": memory.bytes / 2**20,
        "quantizer_tokens": tokens,
    }


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def soft_inference(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> dict[str, float]:
    """Reconstruction from averages of all codes, as in training (table 9).

    Args:
        tokenizer: with Soft VQ, its `progress` set.
        batches: (B, 3, H, W) uint8 each.
    Returns:
        soft_psnr, the mean over the images in dB; soft_temperature.
    """
    tokenizer.eval()
    tokenizer.quantizer.train()
    decibels = []
    for pictures in batches:
        images = to_model_range(pictures)
        squares = (tokenizer(images).reconstruction.clamp(-1, 1) - images).double().square().flatten(1).mean(1)
        decibels.append(10 * torch.log10(4 / squares.clamp_min(1e-12)))
    tokenizer.eval()
    return {"soft_psnr": float(torch.cat(decibels).mean()), "soft_temperature": tokenizer.quantizer.temperature}


def _of_generator(cell: Cell, run: Run) -> dict[str, Any]:
    measure = cell.measure
    if not measure.samples_per_class:
        return {}
    source = _validation_images(cell, run)
    tokenizer = load_first_stage(run.path)
    generator = load_generator(run.path)
    device = "cuda" if cell.config.accelerator == "cuda" else "cpu"
    request = SampleRequest(
        images_per_class=measure.samples_per_class,
        classes=tuple(range(len(source.classes))),
        batch_size=50,
        device=device,
    )
    sampling = SAMPLING_CARDS[measure.card] if measure.card else None
    archive = sample_images(generator, tokenizer, run.path / "samples", sampling, request, progress=False)
    return sample_measures(archive, measure, source)


MEASURES = {TrainConfig: _of_tokenizer, GeneratorTrainConfig: _of_generator, LabRunConfig: _of_lab}
"""What is measured of a finished run, by the kind of its settings."""


def _validation_images(cell: Cell, run: Run) -> ImageSource:
    """The images that a cell's run is validated on."""
    return open_data(reachable(cell.config, run.path).data, "validation")


def sample_measures(archive: Path, measure: EvaluationRequest, source: Any) -> dict[str, Any]:
    """What is measured of samples: recognised digits, and distances to real images."""
    values: dict[str, Any] = {}
    with np.load(archive) as stored:
        pictures, labels = torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(stored["arr_1"])
    values["samples"] = len(pictures)
    if measure.recognised:
        digits = recognise_digits(pictures, labels)
        values |= {"recognised": digits.share, "recognised_real": digits.real_share}
    if measure.generation_metrics:
        result = evaluate_generation(
            str(archive),
            measure.reference or source,
            metrics=measure.generation_metrics,
            extractor=measure.extractor or None,
            progress=False,
        )
        values |= {column_of(name, measure.extractor): result[name].value for name in measure.generation_metrics}
    return values
