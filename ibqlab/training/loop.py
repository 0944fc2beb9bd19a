"""The training loop of tokenizers.

All randomness of a step (crops, flips, dropout, revived codes) comes from the seed, the step's number and the process's
rank, never from a generator's history: a run that was killed and started again repeats itself bit for bit.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ibqlab.data import (
    Batch,
    BrokenImages,
    ImageSource,
    open_data,
    training_batches,
    validation_batches,
)
from ibqlab.diagnostics.recorder import Recorder
from ibqlab.quantizers.collectives import names_of_all_processes
from ibqlab.runs import Run, RunError, provenance
from ibqlab.training.config import TrainConfig
from ibqlab.training.evaluation import take_snapshot, validate
from ibqlab.training.losses import IMAGES, NonFinite, TrainingError
from ibqlab.training.models import Start, build_models
from ibqlab.training.processes import launch
from ibqlab.training.speed import uncompiled
from ibqlab.training.step import Models, TokenizerStep

__all__ = ["TrainingError", "train"]


def train(
    config: TrainConfig,
    path: str | Path,
    *,
    progress: bool = True,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Train a tokenizer into a run folder, or continue the one that is there.

    A finished run is returned as it is. A run that was interrupted goes on from its last checkpoint.

    Args:
        config: the run's settings.
        path: the run folder; created, or continued if it holds the same settings.
        progress: show a progress bar (on the first process).
        watch: called on the first process with each row of metrics as it is logged, for live views.
    Returns:
        The run.
    Raises:
        RunError: the folder holds another config, or something that is no run; the disk is full.
        TrainingError: a loss or weight is not finite, or other than the config's number of processes run.
        ValueError: no images, or images that the tokenizer cannot take; nothing has been written then.
    """
    finished = _finished_run(path, config)
    if finished:
        return finished
    material = _prepare(config)
    fabric = launch(config)
    run = Run.start(path, config) if fabric.is_global_zero else None
    fabric.barrier()
    trainer = _Trainer(config, material, run or Run(path), fabric, watch)
    with _ending(trainer):
        trainer.fit(progress and fabric.is_global_zero)
    fabric.barrier()
    return trainer.run


def _finished_run(path: str | Path, config: TrainConfig) -> Run | None:
    """The run, if it has nothing left to do; refuses another config."""
    if not (Path(path) / "config.yaml").is_file() or Run(path).status != "finished":
        return None
    return Run.start(path, config)


class _Material(NamedTuple):
    """What a run is made of."""

    training_data: ImageSource
    validation_data: ImageSource
    models: Models
    start: Start | None
    """The checkpoint to start from; None: fresh weights."""
    grid: tuple[int, int]
    """Rows and columns of tokens per image."""


def _prepare(config: TrainConfig) -> _Material:
    """Open the data and build the networks: all that can be wrong with either shows before anything is written."""
    training_data, validation_data = open_data(config.data, "train"), open_data(config.data, "validation")
    models, start = build_models(config)
    grid = models.tokenizer.latent_grid(config.data.image_size, config.data.image_size)
    return _Material(training_data, validation_data, models, start, grid)


@contextmanager
def _ending(trainer: "_Trainer") -> Iterator[None]:
    """Write into the run how it ended, also when it ends badly."""
    try:
        yield
    except BaseException as error:
        # The disk may be full: what went wrong first is what must be told.
        with suppress(RunError):
            trainer.finish("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    trainer.finish("finished")


class _Trainer:
    """State of one run on one process."""

    def __init__(
        self,
        config: TrainConfig,
        material: _Material,
        run: Run,
        fabric: Any,
        watch: Callable[[dict[str, Any]], None] | None,
    ):
        self.config, self.run, self.fabric, self.watch = config, run, fabric, watch
        self.training_data, self.validation_data, models, self.start, self.grid = material
        self.networks = TokenizerStep(config, models, fabric)
        self.tokenizer = tokenizer = self.networks.tokenizer
        wanted = config.record.tokens_per_code * tokenizer.quantizer.config.codebook_size
        tokens = self.grid[0] * self.grid[1]
        self.validation_images = -(-wanted // tokens)
        # A window of whole steps holds the same tokens however many processes share it.
        window = -(-wanted // (config.batch_size * tokens)) * config.batch_size * tokens
        self.recorder = Recorder(tokenizer.quantizer, window, config.record.probe_tokens, fabric.world_size)
        self.broken = BrokenImages()
        self.began = time.perf_counter() - run.provenance.get("duration_s", 0.0)
        self.mark = 0.0
        """When the step in progress began, on the clock of time.perf_counter."""
        self.seconds = 0.0
        """Spent on steps, loading of images included, validation and checkpoints left out."""
        self.recorder_seconds = 0.0
        self.logged = (0, 0.0)
        """Step of the last logged row, and `seconds` at its end."""

    def fit(self, progress: bool) -> None:
        """Train from where the run stands to the last step."""
        config = self.config
        found = self._resume()
        if found is None:
            if self.start:
                self.start.load_averages(self.networks)
            self._describe()
            self._record_validation(0, {"step": 0, "seconds": 0.0})
            self._save(0)
        done = found or 0
        bar = tqdm(total=config.steps, initial=done, desc=self.run.name, unit="step", disable=not progress)
        batches = training_batches(
            self.training_data,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=done,
            steps=config.steps - done,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            workers=config.data.workers,
        )
        self.mark, self.logged = time.perf_counter(), (done, self.seconds)
        with bar:
            for step, batch in enumerate(batches, start=done + 1):
                row = self._step(step, batch)
                if row is not None:
                    shown = {"loss": f"{row['loss']:.3f}", "usage": f"{row['usage']:.1%}"}
                    bar.set_postfix(shown | {"images/s": f"{row['images_per_second']:.0f}"}, refresh=False)
                bar.update()
        self.broken.names = names_of_all_processes(self.broken.names)
        report = self.broken.report()
        if report and self.fabric.is_global_zero:
            warnings.warn(report, stacklevel=2)

    def finish(self, status: str) -> None:
        """Note in the run how it ended."""
        if self.fabric.is_global_zero:
            self.run.finish(status, duration_s=self._duration())

    def _duration(self) -> float:
        """Seconds spent on the run, those before it was resumed included."""
        return round(time.perf_counter() - self.began, 2)

    def _step(self, step: int, batch: Batch) -> dict[str, Any] | None:
        """One optimiser step; the row of metrics where one is due."""
        config, record = self.config, self.config.record
        last = step == config.steps
        validating = step % record.validate_every == 0 or step in record.early_snapshots or last
        logging = step % record.log_every == 0 or validating
        saving = step % record.checkpoint_every == 0 or last
        self.broken.add(batch.broken)
        if logging:
            self._timed(self.recorder.before_step)
        torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + self.fabric.global_rank)
        self.tokenizer.quantizer.progress = (step - 1) / config.steps
        try:
            losses, features = self.networks.learn(
                step, batch.images, lambda indices: self._timed(self.recorder.observe, indices, step)
            )
        except NonFinite as error:
            self._stop_at_nonfinite(step, error.culprit)
        row = None
        if logging:
            row = {"step": step, "learning_rate": self.networks.learning_rate, **self._mean(losses)}
            row |= self._timed(self.recorder.report, features, step)
        self.networks.optimizer.zero_grad()
        self.seconds += time.perf_counter() - self.mark
        if row is not None:
            row |= self._pace(step)
        if validating or saving:
            self._check_weights(step)
        if row is not None:
            self._record_validation(step, row) if validating else self._log(row)
        if saving:
            self._save(step)
        self.mark = time.perf_counter()
        return row

    def _pace(self, step: int) -> dict[str, float]:
        """Seconds of training so far, and images per second since the last logged row."""
        before, seconds = self.logged
        self.logged = (step, self.seconds)
        images = (step - before) * self.config.batch_size
        return {
            "seconds": round(self.seconds, 3),
            "images_per_second": round(images / (self.seconds - seconds), 2),
        }

    def _check_weights(self, step: int) -> None:
        """Stop at a weight that is not finite before it is validated or stored, so that the last good state stays."""
        for name, value in self.networks.tensors().items():
            if not torch.isfinite(value).all():
                self._stop_at_nonfinite(step, name)

    def _stop_at_nonfinite(self, step: int, culprit: str) -> NoReturn:
        good, config = self.run.last_checkpoint, self.config
        remedy = f"lower optimizer.learning_rate (now {config.optimizer.learning_rate:g})"
        if config.precision != "32-true":
            remedy += f" or type precision=32-true (now {config.precision})"
        if culprit == IMAGES:
            remedy = f"mend the data (data.source {config.data.source!r})"
        raise TrainingError(
            f"step {step}: {culprit} is the first tensor with NaN or infinity; training stops. To go on, {remedy}, in "
            f"a new output folder. The last good checkpoint is {good.name if good else 'none'} in {self.run.name}"
        )

    def _mean(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Loss terms averaged over processes."""
        values = self.fabric.all_reduce(torch.stack([v.float() for v in losses.values()]), reduce_op="mean")
        return dict(zip(losses, values.tolist(), strict=True))

    def _timed(self, function: Any, *args: Any) -> Any:
        """Call the recorder and keep account of what it costs."""
        began = time.perf_counter()
        result = function(*args)
        self.recorder_seconds += time.perf_counter() - began
        return result

    def _record_validation(self, step: int, row: dict[str, Any]) -> None:
        """Validate, snapshot, and log the step's row with the validation's numbers."""
        with uncompiled(self.config.speed):
            measured = self._measure_validation(step)
        if self.fabric.is_global_zero:
            self._log(row | measured)

    def _measure_validation(self, step: int) -> dict[str, Any]:
        """The validation's numbers; a snapshot of the same state is written by the way."""
        record = self.config.record
        result = validate(self.tokenizer, self._validation_batches, self.fabric.device)
        self.broken.add(result.broken)
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
        """The first validation images, as many as the snapshot's features and pictures need."""
        record = self.config.record
        count = max(record.snapshot_images, -(-record.snapshot_features // (self.grid[0] * self.grid[1])))
        batches = validation_batches(self.validation_data, images=count, batch_size=count)
        return next(iter(batches)).images

    def _log(self, row: dict[str, Any]) -> None:
        if self.fabric.is_global_zero:
            self.run.log(row)
            if self.watch:
                self.watch(row)

    def _describe(self) -> None:
        """Provenance of a new run."""
        if self.fabric.is_global_zero:
            self.run.write_provenance(
                **provenance(),
                seed=self.config.seed,
                threads=torch.get_num_threads(),
                data={"train": _facts(self.training_data), "validation": _facts(self.validation_data)},
                parameters=sum(p.numel() for p in self.tokenizer.parameters()),
                losses=self.config.loss.describe(),
                **({"start": self.start.describe()} if self.start else {}),
            )

    def _save(self, step: int) -> None:
        """Write a checkpoint."""
        mine = self.recorder.state_dict()
        windows = self.fabric.all_gather(mine["window"]).reshape(self.fabric.world_size, -1)
        hits = self.fabric.all_gather(mine["last_hit"]).reshape(self.fabric.world_size, -1)
        if not self.fabric.is_global_zero:
            return
        state = {
            **self.networks.state_dict(),
            "recorder": {"window": windows, "last_hit": hits, "cursor": mine["cursor"]},
            "seconds": self.seconds,
            "recorder_seconds": self.recorder_seconds,
        }
        self.run.save_checkpoint(step, state)
        share = self.recorder_seconds / self.seconds if self.seconds else 0.0
        self.run.write_provenance(recorder_share_of_step=round(share, 5), duration_s=self._duration())

    def _resume(self) -> int | None:
        """Load the last checkpoint and cut the run's files back to it. The step it stands at; None without one."""
        found = self.run.load_checkpoint()
        step, state = found or (-1, None)
        if self.fabric.is_global_zero:
            self.run.truncate_metrics(step)
            self.run.drop_snapshots_after(step)
        self.fabric.barrier()
        if state is None:
            return None
        self.networks.load_state_dict(state)
        rank, kept = self.fabric.global_rank, state["recorder"]
        mine = {"window": kept["window"][rank], "last_hit": kept["last_hit"][rank], "cursor": kept["cursor"]}
        self.recorder.load_state_dict(mine)
        self.seconds, self.recorder_seconds = state["seconds"], state["recorder_seconds"]
        return step


def _facts(source: ImageSource) -> dict[str, Any]:
    return {"description": source.description, "fingerprint": source.fingerprint}
