"""The training loop of tokenizers.

All randomness of a step (crops, flips, dropout, revived codes) comes from the seed, the step's number and the process's
rank, never from a generator's history: a run that was killed and started again repeats itself bit for bit.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ibqlab.data import (
    Batch,
    BrokenImages,
    ImageSource,
    open_data,
    to_model_range,
    training_batches,
    validation_batches,
)
from ibqlab.diagnostics.recorder import Recorder
from ibqlab.runs import Run, provenance
from ibqlab.tokenizer import Tokenizer
from ibqlab.training.config import TrainConfig
from ibqlab.training.ema import WeightAverage
from ibqlab.training.evaluation import take_snapshot, validate
from ibqlab.training.losses import TrainingError, name_first_nonfinite, tokenizer_loss

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
        TrainingError: a loss or weight is not finite, or fewer processes run than the config asks for.
    """
    fabric = _launch(config)
    run = Run.start(path, config) if fabric.is_global_zero else None
    fabric.barrier()
    run = run or Run(path)
    if run.status == "finished":
        return run
    trainer = _Trainer(config, run, fabric, watch)
    with _ending(run, fabric):
        trainer.fit(progress and fabric.is_global_zero)
    return run


def _launch(config: TrainConfig) -> Any:
    """Fabric with as many processes as the config asks for, or an error that says how to start them."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started != config.processes:
        raise TrainingError(
            f"the config asks for {config.processes} process(es), {started} are running; type: "
            + (
                f"torchrun --nproc-per-node {config.processes} -m ibqlab train RECIPE"
                if config.processes > 1
                else f"ibqlab train RECIPE processes={started}"
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from lightning_fabric import Fabric  # noqa: PLC0415 - four seconds, needed only to train
        from lightning_fabric.plugins.environments import LightningEnvironment  # noqa: PLC0415
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started > 1 else 1
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=local,
        num_nodes=started // local,
        precision=config.precision,
        # A single process must not take a Slurm allocation for a world to join.
        plugins=[LightningEnvironment()] if started == 1 else None,
        strategy="ddp" if started > 1 else "auto",
    )
    fabric.launch()
    if fabric.world_size != config.processes:
        raise TrainingError(f"{fabric.world_size} process(es) came up, the config asks for {config.processes}")
    return fabric


@contextmanager
def _ending(run: Run, fabric: Any) -> Iterator[None]:
    """Write into the run how it ended, also when it ends badly."""
    started = time.perf_counter()
    status = "failed"
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        if fabric.is_global_zero:
            before = run.provenance.get("duration_s", 0.0)
            run.finish(status, duration_s=round(before + time.perf_counter() - started, 2))


class _Trainer:
    """State of one run on one process."""

    def __init__(self, config: TrainConfig, run: Run, fabric: Any, watch: Callable[[dict[str, Any]], None] | None):
        self.config, self.run, self.fabric, self.watch = config, run, fabric, watch
        self.training_data = open_data(config.data, "train")
        self.validation_data = open_data(config.data, "validation")
        torch.manual_seed(config.seed)
        tokenizer = Tokenizer.from_config(config.tokenizer)
        self.grid = tokenizer.latent_grid(config.data.image_size, config.data.image_size)
        adam = torch.optim.Adam(
            tokenizer.parameters(), lr=config.optimizer.learning_rate, betas=tuple(config.optimizer.betas)
        )
        self.model, self.optimizer = fabric.setup(tokenizer, adam)
        self.tokenizer: Tokenizer = self.model.module
        self.average = WeightAverage(tokenizer, config.ema_decay) if config.ema_decay else None
        wanted = config.record.tokens_per_code * tokenizer.quantizer.config.codebook_size
        self.recorder = Recorder(tokenizer.quantizer, wanted, config.record.probe_tokens, fabric.world_size)
        self.validation_images = -(-wanted // (self.grid[0] * self.grid[1]))
        self.broken = BrokenImages()
        self.seconds = 0.0
        self.recorder_seconds = 0.0

    def fit(self, progress: bool) -> None:
        """Train from where the run stands to the last step."""
        config = self.config
        done = self._resume()
        if done == 0:
            self._describe()
            self._record_validation(0, {"step": 0, "seconds": 0.0})
            self._save(0)
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
        shown = {}
        with bar:
            for step, batch in enumerate(batches, start=done + 1):
                row = self._step(step, batch)
                if row is not None:
                    shown = {"loss": f"{row['loss']:.3f}", "usage": f"{row['usage']:.1%}"}
                    shown["images/s"] = f"{row['images_per_second']:.0f}"
                    bar.set_postfix(shown, refresh=False)
                bar.update()
        report = self.broken.report()
        if report and self.fabric.is_global_zero:
            warnings.warn(report, stacklevel=2)

    def _step(self, step: int, batch: Batch) -> dict[str, Any] | None:
        """One optimiser step; the row of metrics where one is due."""
        config, record = self.config, self.config.record
        began = time.perf_counter()
        validating = step % record.validate_every == 0 or step in record.early_snapshots or step == config.steps
        logging = step % record.log_every == 0 or validating
        self.broken.add(batch.broken)
        if logging:
            self._timed(self.recorder.before_step)
        torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + self.fabric.global_rank)
        self.tokenizer.quantizer.progress = (step - 1) / config.steps
        losses, features = self._forward_backward(step, batch.images)
        self.optimizer.step()
        if self.average:
            self.average.update()
        row = None
        if logging:
            row = {"step": step, "learning_rate": config.optimizer.learning_rate, **self._mean(losses)}
            row |= self._timed(self.recorder.report, features, step)
        self.optimizer.zero_grad()
        spent = time.perf_counter() - began
        self.seconds += spent
        if row is not None:
            row |= {"seconds": round(self.seconds, 3), "images_per_second": round(config.batch_size / spent, 2)}
            self._record_validation(step, row) if validating else self._log(row)
        if step % record.checkpoint_every == 0 or step == config.steps:
            self._save(step)
        return row

    def _forward_backward(self, step: int, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of one batch in `accumulate` parts; the mean loss terms and the last part's features."""
        config = self.config
        parts = images.chunk(config.accumulate)
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts, start=1):
            pictures = to_model_range(part.to(self.fabric.device))
            with self.fabric.no_backward_sync(self.model, enabled=number < len(parts)):
                out = self.model(pictures)
                loss, terms = tokenizer_loss(config.loss, pictures, out)
                if not torch.isfinite(loss):
                    self._stop_at_nonfinite(step, name_first_nonfinite(pictures, out, self._codebook(), terms))
                self.fabric.backward(loss / len(parts))
            self._timed(self.recorder.observe, out.quantizer.indices, step)
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(parts)
        return sums, out.features

    def _codebook(self) -> Tensor:
        return self.tokenizer.quantizer.codebook

    def _stop_at_nonfinite(self, step: int, culprit: str) -> None:
        good = self.run.last_checkpoint
        raise TrainingError(
            f"step {step}: {culprit} is the first tensor with NaN or infinity; training stops. The last good "
            f"checkpoint is {good.name if good else 'none'} in {self.run.name}. Lower optimizer.learning_rate "
            f"(now {self.config.optimizer.learning_rate:g}) or use precision=32-true (now {self.config.precision}), "
            f"in a new output folder"
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
        config, record = self.config, self.config.record
        share = {"rank": self.fabric.global_rank, "world_size": self.fabric.world_size}
        result = validate(
            self.tokenizer,
            self.validation_data,
            images=self.validation_images,
            batch_size=config.batch_size // config.accumulate,
            device=self.fabric.device,
            workers=config.data.workers,
            **share,
        )
        last_hit = self.recorder.last_hits()
        if not self.fabric.is_global_zero:
            return
        if not hasattr(self, "pictures"):
            self.pictures = self._snapshot_pictures()
        arrays = take_snapshot(
            self.tokenizer,
            self.pictures,
            counts=result.counts,
            last_hit=last_hit,
            features=record.snapshot_features,
            images=record.snapshot_images,
        )
        self.run.save_snapshot(step, **arrays)
        row |= result.row()
        self._log(row)

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
            )

    def _save(self, step: int) -> None:
        """Write a checkpoint; a weight that is not finite stops the run instead, so the last good one stays."""
        for name, parameter in self.tokenizer.named_parameters():
            if not torch.isfinite(parameter).all():
                self._stop_at_nonfinite(step, f"the weight {name!r}")
        mine = self.recorder.state_dict()
        windows = self.fabric.all_gather(mine["window"]).reshape(self.fabric.world_size, -1)
        hits = self.fabric.all_gather(mine["last_hit"]).reshape(self.fabric.world_size, -1)
        if not self.fabric.is_global_zero:
            return
        state = {
            "model": self.tokenizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.average.state_dict() if self.average else {},
            "recorder": {"window": windows, "last_hit": hits, "cursor": mine["cursor"]},
            "seconds": self.seconds,
            "recorder_seconds": self.recorder_seconds,
        }
        self.run.save_checkpoint(step, state)
        share = self.recorder_seconds / self.seconds if self.seconds else 0.0
        self.run.write_provenance(recorder_share_of_step=round(share, 5))

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one, and cut the run's files back to it. The step it stands at."""
        found = self.run.load_checkpoint()
        step, state = found if found else (0, None)
        if self.fabric.is_global_zero:
            self.run.truncate_metrics(step if state else -1)
            self.run.drop_snapshots_after(step if state else -1)
        self.fabric.barrier()
        if state is None:
            return 0
        self.tokenizer.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["ema"])
        rank, kept = self.fabric.global_rank, state["recorder"]
        mine = {"window": kept["window"][rank], "last_hit": kept["last_hit"][rank], "cursor": kept["cursor"]}
        self.recorder.load_state_dict(mine)
        self.seconds, self.recorder_seconds = state["seconds"], state["recorder_seconds"]
        return step


def _facts(source: ImageSource) -> dict[str, Any]:
    return {"description": source.description, "fingerprint": source.fingerprint}
