"""The training loop of tokenizers."""

import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ibqlab.base.measures import measure
from ibqlab.base.progress import tell
from ibqlab.data import Batch, ImageSource, first_images, open_data, training_batches, validation_batches
from ibqlab.diagnostics.recorder import EARLY_STEPS, FIRST_STEPS, Recorder
from ibqlab.losses.errors import TrainingError
from ibqlab.quantizers.soft_vq import SoftVectorQuantizerConfig
from ibqlab.recipes.snapshots import snapshot_schedule
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs import Run
from ibqlab.training.data_check import reachable, require_readable
from ibqlab.training.evaluation import probe_usage, take_snapshot, validate
from ibqlab.training.launch import preparation
from ibqlab.training.models import Start, build_models
from ibqlab.training.speed import uncompiled
from ibqlab.training.step import Models, TokenizerStep
from ibqlab.training.trainer import (
    Session,
    Trainer,
    Watch,
    facts_of,
    finished_run,
    require_room,
    training_session,
)

__all__ = ["TrainingError", "train"]


def train(
    config: TrainConfig,
    path: str | Path,
    *,
    progress: bool = True,
    watch: Watch | None = None,
    accept_changed_data: bool = False,
) -> Run:
    """Train a tokenizer into a run folder, or continue the one that is there.

    A finished run is returned as it is. A run that was interrupted goes on from its last checkpoint, and so does one
    that is to have more steps than before. Ctrl-C and SIGTERM end training after the step in progress, which is saved.

    Args:
        config: the run's settings.
        path: the run folder; created, or continued if it holds the same settings.
        progress: show where the run stands, on the first process.
        watch: called on the first process with each row of metrics as it is logged, for live views.
        accept_changed_data: continue a run whose images are no longer those that it began with; provenance keeps both.
    Returns:
        The run.
    Raises:
        RunError: the folder holds another config, or something that is no run; another process trains there; the images
            have changed since; the disk is full.
        TrainingInterrupted: Ctrl-C or SIGTERM came.
        TrainingError: a loss or weight is not finite, or other than the config's number of processes run.
        ValueError: no images, images that the tokenizer cannot take, or more memory needed than there is; nothing has
            been written then.
    """
    tell(folder=str(Path(path).resolve()))
    config = reachable(config, path)
    finished = finished_run(path, config)
    if finished:
        return finished
    require_room(config)
    with preparation():
        material = _prepare(config)
    with training_session(
        path,
        config,
        material.describe_data(),
        accept_changed_data=accept_changed_data,
        depends_on_steps=_depends_on_steps(config),
    ) as session:
        return _TokenizerTrainer(config, material, session, watch).train(progress)


def _depends_on_steps(config: TrainConfig) -> str:
    """The setting that stretches over all steps, so that a longer run is another from its first step; "" for none."""
    quantizer = config.tokenizer.quantizer
    if isinstance(quantizer, SoftVectorQuantizerConfig) and quantizer.temperature_start != quantizer.temperature_end:
        return "Soft VQ's temperature, which falls over all steps,"
    return ""


class _Material(NamedTuple):
    """What a run is made of."""

    training_data: ImageSource
    validation_data: ImageSource
    models: Models
    origin: Start | None
    """The checkpoint to start from; None: fresh weights."""
    grid: tuple[int, int]
    """Rows and columns of tokens per image."""

    def describe_data(self) -> dict[str, Any]:
        """Identity of the images, for provenance."""
        return {"train": facts_of(self.training_data), "validation": facts_of(self.validation_data)}


def _prepare(config: TrainConfig) -> _Material:
    """Open the data and build the networks: all that can be wrong with either shows before anything is written."""
    training_data, validation_data = open_data(config.data, "train"), open_data(config.data, "validation")
    require_readable(training_data, validation_data)
    models, origin = build_models(config)
    grid = models.tokenizer.latent_grid(config.data.image_size, config.data.image_size)
    return _Material(training_data, validation_data, models, origin, grid)


class _TokenizerTrainer(Trainer):
    """State of one tokenizer's run on one process."""

    def __init__(self, config: TrainConfig, material: _Material, session: Session, watch: Watch | None):
        self.material = material
        self.training_data, self.validation_data, models, self.origin, self.grid = material
        super().__init__(config, session, TokenizerStep(config, models, session.fabric), watch)
        self.tokenizer = tokenizer = self.networks.tokenizer
        wanted = config.record.tokens_per_code * tokenizer.quantizer.config.codebook_size
        tokens = self.grid[0] * self.grid[1]
        self.validation_images = -(-wanted // tokens)
        # A window of whole steps holds the same tokens however many processes share it.
        window = -(-wanted // (config.batch_size * tokens)) * config.batch_size * tokens
        self.recorder = Recorder(tokenizer.quantizer, window, config.record.probe_tokens, self.fabric.world_size)
        self.recorder_seconds = 0.0
        self.snapshots = snapshot_schedule(config)

    def start(self) -> None:
        if self.origin:
            self.origin.load_averages(self.networks)

    def batches(self, done: int) -> Iterable[Batch]:
        return training_batches(
            self.training_data,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=done,
            steps=self.config.steps - done,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            workers=self.config.data.workers,
        )

    def validating(self, step: int) -> bool:
        return self._validating_whole(step) or step in EARLY_STEPS

    def _validating_whole(self, step: int) -> bool:
        """Whether a step is followed by a validation with reconstructions, not by usage alone."""
        return super().validating(step) or step in self.config.record.early_snapshots

    def learn(self, step: int, batch: Batch, logging: bool) -> dict[str, Any] | None:
        self.broken.add(batch.broken)
        logging = logging or step <= FIRST_STEPS
        if logging:
            self._timed(self.recorder.before_step)
        self.tokenizer.quantizer.progress = (step - 1) / self.config.steps
        losses, features = self.networks.learn(
            step, batch.images, lambda indices: self._timed(self.recorder.observe, indices, step)
        )
        row = self.mean(losses) | self._timed(self.recorder.report, features, step) if logging else None
        self.networks.optimizer.zero_grad()
        return row

    def shown(self, row: dict[str, Any]) -> dict[str, str]:
        return {measure("loss").title: f"{row['loss']:.3f}", f"window {measure('usage').title}": f"{row['usage']:.1%}"}

    def measure(self, step: int) -> dict[str, Any]:
        with uncompiled(self.config.speed):
            return self._measure(step)

    def _measure(self, step: int) -> dict[str, Any]:
        record = self.config.record
        if not self._validating_whole(step):
            usage, broken = probe_usage(self.tokenizer, self._validation_batches, self.fabric.device)
            self.broken.add(broken)
            return usage
        result = validate(self.tokenizer, self._validation_batches, self.fabric.device)
        self.broken.add(result.broken)
        if not self.snapshots.includes(step):
            return result.row()
        last_hit = self.recorder.last_hits()
        if self.fabric.is_global_zero:
            arrays = take_snapshot(
                self.tokenizer,
                self._snapshot_pictures,
                counts=result.counts,
                last_hit=last_hit,
                features=record.snapshot_features,
                images=record.snapshot_images,
            )
            self.run.save_snapshot(step, **arrays)
        return result.row()

    @cached_property
    def _validation_batches(self) -> Iterable[Batch]:
        """This process's share of the validation images, walked once per validation."""
        return validation_batches(
            self.validation_data,
            images=self.validation_images,
            batch_size=self.config.batch_size // self.config.accumulate,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            workers=self.config.data.workers,
        )

    @cached_property
    def _snapshot_pictures(self) -> Tensor:
        """The first readable validation images, as many as the snapshot's features and pictures need."""
        record = self.config.record
        count = max(record.snapshot_images, -(-record.snapshot_features // (self.grid[0] * self.grid[1])))
        return first_images(self.validation_data, count).images

    def describe(self) -> dict[str, Any]:
        return {
            "data": self.material.describe_data(),
            "parameters": sum(p.numel() for p in self.tokenizer.parameters()),
            "losses": self.config.loss.describe(),
            **({"start": self.origin.describe()} if self.origin else {}),
        }

    def kept(self) -> dict[str, Any]:
        mine = self.recorder.state_dict()
        windows = self.fabric.all_gather(mine["window"]).reshape(self.fabric.world_size, -1)
        hits = self.fabric.all_gather(mine["last_hit"]).reshape(self.fabric.world_size, -1)
        if self.fabric.is_global_zero:
            share = self.recorder_seconds / self.seconds if self.seconds else 0.0
            self.run.write_provenance(recorder_share_of_step=round(share, 5))
        return {
            "recorder": {"window": windows, "last_hit": hits, "cursor": mine["cursor"]},
            "recorder_seconds": self.recorder_seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        rank, kept = self.fabric.global_rank, state["recorder"]
        mine = {"window": kept["window"][rank], "last_hit": kept["last_hit"][rank], "cursor": kept["cursor"]}
        self.recorder.load_state_dict(mine)
        self.recorder_seconds = state["recorder_seconds"]

    def _timed(self, function: Any, *args: Any) -> Any:
        """Call the recorder and keep account of what it costs."""
        began = time.perf_counter()
        result = function(*args)
        self.recorder_seconds += time.perf_counter() - began
        return result
