"""The training loop of tokenizers."""

import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ibqlab.base.measures import measure
from ibqlab.base.progress import in_notebook, notice
from ibqlab.data import Batch, first_images, training_batches, validation_batches
from ibqlab.diagnostics.recorder import EARLY_STEPS, FIRST_STEPS, Recorder
from ibqlab.quantizers.soft_vq import SoftVectorQuantizerConfig
from ibqlab.recipes.snapshots import snapshot_schedule
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs import Run
from ibqlab.runs.folder import last_checkpoint
from ibqlab.training.alarms import OnAlarm
from ibqlab.training.data_check import facts_of, open_images
from ibqlab.training.session import RunInputs, Session
from ibqlab.training.speed import uncompiled
from ibqlab.training.tokenizer.growth import move_to_tokens
from ibqlab.training.tokenizer.models import build_models
from ibqlab.training.tokenizer.starting import load_averages
from ibqlab.training.tokenizer.step import TokenizerStep
from ibqlab.training.tokenizer.validation import take_snapshot, validate
from ibqlab.training.trainer import Trainer, Watch, train_run


def train(
    config: TrainConfig,
    path: str | Path,
    *,
    progress: bool = True,
    watch: Watch | None = None,
    on_alarm: OnAlarm | None = None,
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
        on_alarm: called on the first process with each event of the alarm (`record.alarm`).
        accept_changed_data: continue a run whose images are no longer those that it began with; provenance keeps both.
    Returns:
        The run.
    Raises:
        RunError: the folder holds another config, or something that is no run; another process trains there; the images
            have changed since; the disk is full.
        TrainingInterrupted: Ctrl-C or SIGTERM came, or the alarm is set to stop the run.
        TrainingError: a loss or weight is not finite, or other than the config's number of processes run.
        ValueError: no images, images that the tokenizer cannot take, or more memory needed than there is; nothing has
            been written then.
    """
    return train_run(
        _TokenizerTrainer,
        config,
        path,
        progress=progress,
        watch=watch,
        on_alarm=on_alarm,
        accept_changed_data=accept_changed_data,
    )


class _TokenizerTrainer(Trainer):
    """State of one tokenizer's run on one process."""

    @staticmethod
    def prepare(config: TrainConfig, path: Path) -> RunInputs:
        images = open_images(config.data)
        models, start = build_models(config, resumes=last_checkpoint(path) is not None)
        models.tokenizer.latent_grid(config.data.image_size, config.data.image_size)  # refuses what it cannot take
        return RunInputs(images, (models, start), {split: facts_of(source) for split, source in images.items()})

    @staticmethod
    def depends_on_steps(config: TrainConfig) -> str:
        quantizer = config.tokenizer.quantizer
        soft = isinstance(quantizer, SoftVectorQuantizerConfig)
        if soft and quantizer.temperature_start != quantizer.temperature_end:
            return "Soft VQ's temperature, which falls over all steps,"
        return ""

    def __init__(self, config: TrainConfig, inputs: RunInputs, session: Session, watch: Watch | None):
        self.images = inputs.source
        models, self.beginning = inputs.networks
        self.data_facts = inputs.data_facts
        super().__init__(config, session, TokenizerStep(config, models, session.fabric), watch)
        self.tokenizer = tokenizer = self.networks.tokenizer
        least_tokens = config.record.tokens_per_code * tokenizer.quantizer.config.codebook_size
        rows, columns = tokenizer.latent_grid(config.data.image_size, config.data.image_size)
        self.tokens_per_image = rows * columns
        self.validation_images = -(-least_tokens // self.tokens_per_image)
        # A window of whole steps holds the same tokens however many processes share it.
        step_tokens = config.batch_size * self.tokens_per_image
        window = -(-least_tokens // step_tokens) * step_tokens
        growth = self.beginning.growth if self.beginning else None
        self.recorder = Recorder(
            tokenizer.quantizer,
            window,
            config.record.probe_tokens,
            self.fabric.world_size,
            old_codes=growth.old if growth else 0,
        )
        self.recorder_seconds = 0.0
        self.snapshots = snapshot_schedule(config)
        self.gradient_norms: Tensor | None = None
        """Of each code in the step done last, where it will have a snapshot."""

    def start(self) -> None:
        if not self.beginning:
            return
        load_averages(self.networks, self.beginning)
        growth, average = self.beginning.growth, self.networks.average
        if growth and growth.rule == "tokens":
            averages = average.state_dict() if average else {}
            move_to_tokens(self.tokenizer, averages, self.images["train"], growth, self.config.seed)

    def train(self, progress: bool) -> Run:
        """As every run; one that starts from a file says first what is the file's and what starts fresh."""
        if progress and self.beginning and self.fabric.is_global_zero and not in_notebook():
            notice(self.beginning.describe())
        return super().train(progress)

    def batches(self, done: int) -> Iterable[Batch]:
        return training_batches(
            self.images["train"],
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=done,
            steps=self.config.steps - done,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            workers=self.config.data.workers,
        )

    def is_validation_step(self, step: int) -> bool:
        return self._is_whole_validation(step) or step in EARLY_STEPS

    def _is_whole_validation(self, step: int) -> bool:
        """Whether a step is followed by a validation with reconstructions, not by usage alone."""
        return super().is_validation_step(step) or step in self.config.record.early_snapshots

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
        has_snapshot = self._is_whole_validation(step) and self.snapshots.includes(step)
        self.gradient_norms = self._timed(self.recorder.gradient_norms) if has_snapshot else None
        self.networks.optimizer.zero_grad()
        return row

    def line_numbers(self, row: dict[str, Any]) -> dict[str, str]:
        return {measure("loss").title: f"{row['loss']:.3f}", f"window {measure('usage').title}": f"{row['usage']:.1%}"}

    def measure(self, step: int) -> dict[str, Any]:
        record, whole = self.config.record, self._is_whole_validation(step)
        with uncompiled(self.config.speed):
            result = validate(self.tokenizer, self._validation_batches, self.fabric.device, reconstruct=whole)
            self.broken.add(result.broken)
            row = result.row(self.recorder.old_codes)
            if not whole or not self.snapshots.includes(step):
                return row
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
                if self.gradient_norms is not None:
                    arrays["gradient_norm"] = self.gradient_norms.cpu().numpy()
                self.run.save_snapshot(step, **arrays)
        return row

    @cached_property
    def _validation_batches(self) -> Iterable[Batch]:
        """This process's share of the validation images, walked once per validation."""
        return validation_batches(
            self.images["validation"],
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
        count = max(record.snapshot_images, -(-record.snapshot_features // self.tokens_per_image))
        return first_images(self.images["validation"], count).images

    def describe(self) -> dict[str, Any]:
        facts = {
            "data": self.data_facts,
            "parameters": sum(p.numel() for p in self.tokenizer.parameters()),
            "losses": self.config.loss.describe(),
        }
        if self.beginning:
            facts["start"] = self.beginning.facts
        return facts

    def extra_state(self) -> dict[str, Any]:
        recorder = self.recorder.state_dict()
        # (processes, …): every process has its own window of tokens and its own last hits.
        windows = self.fabric.all_gather(recorder["window"]).reshape(self.fabric.world_size, -1)
        hits = self.fabric.all_gather(recorder["last_hit"]).reshape(self.fabric.world_size, -1)
        if self.fabric.is_global_zero:
            share = self.recorder_seconds / self.seconds if self.seconds else 0.0
            self.run.write_provenance(recorder_share_of_step=round(share, 5))
        return {
            "recorder": recorder | {"window": windows, "last_hit": hits},
            "recorder_seconds": self.recorder_seconds,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        rank, recorder = self.fabric.global_rank, state["recorder"]
        self.recorder.load_state_dict(
            {
                "window": recorder["window"][rank],
                "last_hit": recorder["last_hit"][rank],
                "cursor": recorder["cursor"],
                "alive": recorder.get("alive"),
                "old_codes": recorder.get("old_codes", 0),
            }
        )
        self.recorder_seconds = state["recorder_seconds"]

    def _timed(self, function: Any, *args: Any) -> Any:
        """Call the recorder and keep account of what it costs."""
        began = time.perf_counter()
        result = function(*args)
        self.recorder_seconds += time.perf_counter() - began
        return result
