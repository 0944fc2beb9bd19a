"""What every training loop does, whatever it trains: steps in order, rows, checkpoints, an end written down.

All randomness of a step (crops, flips, dropout, revived codes) comes from the seed, the step's number and the process's
rank, never from a generator's history: a run that was killed and started again repeats itself bit for bit.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from ibqlab.data import BrokenImages, ImageSource
from ibqlab.progress import ProgressLine, time_left
from ibqlab.quantizers.collectives import names_of_all_processes
from ibqlab.runs import Run, RunError, provenance
from ibqlab.training.losses import IMAGES, NonFinite, TrainingError
from ibqlab.training.processes import launch

Watch = Callable[[dict[str, Any]], None]
"""Called on the first process with each row of metrics as it is logged. A method `finish` that it may have is called
when training ends, however it ends."""


@runtime_checkable
class Networks(Protocol):
    """What learns: networks with their optimisers."""

    learning_rate: float
    """Of the last step."""

    def tensors(self) -> dict[str, Tensor]:
        """All learned tensors and Adam's averages with names for error messages."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; every process calls it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


def finished_run(path: str | Path, config: Any) -> Run | None:
    """The run, if it has nothing left to do.

    Raises:
        RunError: it was trained with another config.
    """
    if not (Path(path) / "config.yaml").is_file() or Run(path).status != "finished":
        return None
    return Run.start(path, config)


def begin_run(path: str | Path, config: Any) -> tuple[Run, Any]:
    """The run folder, made or gone on with, and the processes of the run.

    Raises:
        RunError: the folder holds another config, or something that is no run.
        TrainingError: other than the config's number of processes run.
    """
    fabric = launch(config)
    run = Run.start(path, config) if fabric.is_global_zero else None
    fabric.barrier()
    return run or Run(path), fabric


def facts_of(source: ImageSource) -> dict[str, str]:
    """A source's identity, for provenance."""
    return {"description": source.description, "fingerprint": source.fingerprint}


class Trainer(ABC):
    """State of one run on one process.

    Args:
        config: with the fields that all kinds of training have: steps, batch_size, seed, precision, optimizer, record.
        run: the run folder.
        fabric: the run's Fabric.
        networks: what learns.
        watch: for live views.
    """

    def __init__(self, config: Any, run: Run, fabric: Any, networks: Networks, watch: Watch | None):
        self.config, self.run, self.fabric, self.networks, self.watch = config, run, fabric, networks, watch
        self.broken = BrokenImages()
        self.began = time.perf_counter() - run.provenance.get("duration_s", 0.0)
        self.mark = 0.0
        """When the step in progress began, on the clock of time.perf_counter."""
        self.seconds = 0.0
        """Spent on steps, loading of images included, validation and checkpoints left out."""
        self.logged = (0, 0.0)
        """Step of the last logged row, and `seconds` at its end."""

    # --- what is trained ---

    @abstractmethod
    def batches(self, done: int) -> Iterable[Any]:
        """This process's batches of the steps after `done`."""

    @abstractmethod
    def learn(self, step: int, batch: Any, logging: bool) -> dict[str, Any] | None:
        """One optimiser step; its row of metrics where one is due."""

    @abstractmethod
    def measure(self, step: int) -> dict[str, Any]:
        """The validation's numbers on the first process; a snapshot of the same state is written by the way."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Provenance of a new run, beside what every run has."""

    @abstractmethod
    def shown(self, row: dict[str, Any]) -> dict[str, str]:
        """What the progress line shows of a row."""

    @abstractmethod
    def start(self) -> None:
        """What a new run does before its first validation."""

    @abstractmethod
    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the networks; every process calls it."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `kept` gave."""

    def validating(self, step: int) -> bool:
        """Whether a step is followed by a validation."""
        return step % self.config.record.validate_every == 0 or step == self.config.steps

    # --- the loop ---

    def train(self, progress: bool) -> Run:
        """Train to the last step and note how it ended; the run.

        Args:
            progress: show where the run stands, on the first process.
        """
        try:
            with self.ending():
                self.fit(progress and self.fabric.is_global_zero)
        finally:
            if hasattr(self.watch, "finish"):
                self.watch.finish()
        self.fabric.barrier()
        return self.run

    def fit(self, progress: bool) -> None:
        """Train from where the run stands to the last step."""
        config = self.config
        found = self._resume()
        if found is None:
            self.start()
            self._describe()
            self._record_validation(0, {"step": 0, "seconds": 0.0})
            self._save(0)
        done = found or 0
        batches = self.batches(done)
        self.mark, self.logged = time.perf_counter(), (done, self.seconds)
        began, numbers = time.monotonic(), ""
        with ProgressLine(progress) as line:
            for step, batch in enumerate(batches, start=done + 1):
                row = self._step(step, batch)
                if row is not None:
                    shown = self.shown(row) | {"images/s": f"{row['images_per_second']:.0f}"}
                    numbers = "".join(f" · {name} {value}" for name, value in shown.items())
                left = (time.monotonic() - began) / (step - done) * (config.steps - step)
                stands = f"{self.run.name}: step {step:,} of {config.steps:,}{numbers}"
                line.show(f"{stands} · {time_left(left)} left" if step < config.steps else stands)
        self.broken.names = names_of_all_processes(self.broken.names)
        report = self.broken.report()
        if report and self.fabric.is_global_zero:
            warnings.warn(report, stacklevel=2)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Write into the run how it ended, also when it ends badly."""
        try:
            yield
        except BaseException as error:
            # The disk may be full: what went wrong first is what must be told.
            with suppress(RunError):
                self._finish("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        self._finish("finished")

    def _finish(self, status: str) -> None:
        if self.fabric.is_global_zero:
            self.run.finish(status, duration_s=self._duration())

    def _duration(self) -> float:
        """Seconds spent on the run, those before it was resumed included."""
        return round(time.perf_counter() - self.began, 2)

    def _step(self, step: int, batch: Any) -> dict[str, Any] | None:
        """One step with all that is due after it; the row of metrics where one is."""
        config, record = self.config, self.config.record
        validating = self.validating(step)
        saving = step % record.checkpoint_every == 0 or step == config.steps
        torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + self.fabric.global_rank)
        try:
            row = self.learn(step, batch, step % record.log_every == 0 or validating)
        except NonFinite as error:
            self._stop_at_nonfinite(step, error.culprit)
        self.seconds += time.perf_counter() - self.mark
        if row is not None:
            row = {"step": step, "learning_rate": self.networks.learning_rate, **row, **self._pace(step)}
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

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Numbers averaged over processes."""
        means = self.fabric.all_reduce(torch.stack([v.double() for v in values.values()]), reduce_op="mean")
        return dict(zip(values, means.tolist(), strict=True))

    def _record_validation(self, step: int, row: dict[str, Any]) -> None:
        """Validate, snapshot, and log the step's row with the validation's numbers."""
        measured = self.measure(step)
        if self.fabric.is_global_zero:
            self._log(row | measured)

    def _log(self, row: dict[str, Any]) -> None:
        if self.fabric.is_global_zero:
            self.run.log(row)
            if self.watch:
                self.watch(row)

    def _describe(self) -> None:
        """Provenance of a new run."""
        own = self.describe()
        if self.fabric.is_global_zero:
            facts = {"seed": self.config.seed, "threads": torch.get_num_threads()}
            self.run.write_provenance(**provenance(), **facts, **own)

    def _save(self, step: int) -> None:
        """Write a checkpoint."""
        state = self.networks.state_dict() | self.kept() | {"seconds": self.seconds}
        if self.fabric.is_global_zero:
            self.run.save_checkpoint(step, state)
            self.run.write_provenance(duration_s=self._duration())

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
        self.restore(state)
        self.seconds = state["seconds"]
        return step
