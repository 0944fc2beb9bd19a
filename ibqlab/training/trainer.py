"""What every training loop does, whatever it trains: steps in order, rows, checkpoints, an end written down.

All randomness of a step (crops, flips, dropout, revived codes) comes from the seed, the step's number and the process's
rank, never from a generator's history: a run that was killed and started again repeats itself bit for bit.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from ibqlab.base.devices import require_processes
from ibqlab.base.files import is_ordinary
from ibqlab.base.measures import measure
from ibqlab.base.processes import names_of_all_processes, sum_over_processes
from ibqlab.base.progress import ProgressLine, in_notebook, notice, time_left
from ibqlab.costs.fitting import require_fits
from ibqlab.data import BrokenImages, ImageSource
from ibqlab.data.broken import STAND_INS
from ibqlab.losses.errors import NonFinite, TrainingError, TrainingInterrupted
from ibqlab.losses.tokenizer_loss import IMAGES
from ibqlab.runs import Run, RunError, provenance
from ibqlab.runs.run import Checkpoint
from ibqlab.training.data_check import compare_data, count_images, note_unreadable, unreadable_of
from ibqlab.training.launch import StopSignals, launch

Watch = Callable[[dict[str, Any]], None]
"""Called on the first process with each row of metrics as it is logged. It may raise KeyboardInterrupt to end the
training after this step, as Ctrl-C does. A method `finish` that it may have is called when training ends, however it
ends."""
CONFUSED = (LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError)
"""What torch and dictionaries raise where a state is not the one that is asked for."""


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
    if not is_ordinary(Path(path) / "config.yaml"):
        return None
    run = Run(path)
    if run.status != "finished" or run.has_fewer_steps(config):
        return None
    return Run.start(path, config)


def require_room(config: Any) -> None:
    """Refuse what cannot be trained here, before anything is opened, built or written.

    Args:
        config: the run's settings.
    Raises:
        ValueError: it needs more memory than the device has, or the environment announces half of a launcher's
            processes.
    Cost: nothing for small runs; seconds where memory may be short.
    """
    require_processes(talking=True)
    require_fits(config)


class Session(NamedTuple):
    """A run that is about to be trained by this process."""

    run: Run
    fabric: Any
    signals: StopSignals
    facts: dict[str, Any]
    """What provenance is to say of its being resumed, beside the time."""
    images: int
    """Of both splits."""


@contextmanager
def training_session(
    path: str | Path,
    config: Any,
    data: Mapping[str, Any],
    *,
    accept_changed_data: bool = False,
    depends_on_steps: str = "",
) -> Iterator[Session]:
    """The run folder, made or claimed to be resumed, and the processes of the run; both are let go of at the end.

    Args:
        path: the run folder.
        config: the run's settings.
        data: identity of the images by split, as `facts_of` gives it.
        accept_changed_data: resume a run whose images have changed.
        depends_on_steps: which of its settings stretch over all steps, so that a run cannot be made longer; "" for
            none.
    Raises:
        RunError: the folder holds another config, or something that is no run; another process trains there; the images
            are not those that the run began with. Nothing was changed.
        TrainingError: other than the config's number of processes run.
    """
    facts: dict[str, Any] = {}
    if is_ordinary(Path(path) / "config.yaml"):
        held = Run(path)
        held.require_settings(config, more_steps=True)
        if depends_on_steps and held.has_fewer_steps(config):
            raise RunError(
                f"{path} was begun with steps={held.config['steps']}, and {depends_on_steps} depends on it: with more "
                f"steps it would be no run of {config.steps} steps; nothing was changed. Train a new one (--output "
                f"FOLDER){held.how_to_start_from(config)}"
            )
        facts = compare_data(held, data, accept_changed_data)
    fabric = launch(config)
    with StopSignals() as signals:
        run = Run.start(path, config, claim=True, more_steps=True) if fabric.is_global_zero else None
        try:
            fabric.barrier()
            yield Session(run or Run(path), fabric, signals, facts, count_images(data))
        finally:
            if run:
                run.release()


def facts_of(source: ImageSource) -> dict[str, Any]:
    """A source's identity, for provenance and to find it unchanged at resume."""
    return {
        "description": source.description,
        "fingerprint": source.fingerprint,
        "images": len(source),
        "classes": list(source.classes),
    }


class Trainer(ABC):
    """State of one run on one process.

    Args:
        config: with the fields that all kinds of training have: steps, batch_size, seed, precision, optimizer, record.
        session: the run and its processes.
        networks: what learns.
        watch: for live views.
    """

    def __init__(self, config: Any, session: Session, networks: Networks, watch: Watch | None):
        self.config, self.session, self.networks, self.watch = config, session, networks, watch
        self.run, self.fabric = session.run, session.fabric
        self.broken = BrokenImages(() if "data" in session.facts else unreadable_of(self.run.provenance).names)
        self.began = time.perf_counter() - self.run.duration
        self.mark = 0.0
        """When the step in progress began, on the clock of time.perf_counter."""
        self.seconds = 0.0
        """Spent on steps, loading of images included, validation and checkpoints left out."""
        self.logged = (0, 0.0)
        """Step of the last logged row, and `seconds` at its end."""
        self.saved = -1
        """Step of the newest checkpoint."""

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

    def saving(self, step: int) -> bool:
        """Whether a step is followed by a checkpoint."""
        return step % self.config.record.checkpoint_every == 0 or step == self.config.steps

    def train(self, progress: bool) -> Run:
        """Train to the last step and note how it ended; the run.

        Args:
            progress: show where the run stands, on the first process.
        Raises:
            TrainingInterrupted: Ctrl-C or SIGTERM came; the step in progress was finished and saved.
        """
        done = self._resume()
        progress = progress and self.fabric.is_global_zero
        if progress and not in_notebook():
            notice(f"{self.config.steps:,} steps → {self.run.path}")
        try:
            with self.ending():
                self.fit(done, progress)
        finally:
            if hasattr(self.watch, "finish"):
                self.watch.finish()
            unreadable = self.broken.report(self.session.images, STAND_INS)
            if unreadable and self.fabric.is_global_zero:
                notice(unreadable)
        self.fabric.barrier()
        if self.session.signals.received:
            raise TrainingInterrupted(
                f"stopped after all {self.config.steps} steps: the run is finished, everything is saved"
            )
        return self.run

    def fit(self, done: int | None, progress: bool) -> None:
        """Train from where the run stands to the last step.

        Args:
            done: the step that it stands at; None: at its very beginning.
            progress: show where the run stands.
        """
        config = self.config
        if done is None:
            self.start()
            self._describe()
            self._record_validation(0, {"step": 0, "seconds": 0.0})
            self._save(0)
            done = 0
        batches = self.batches(done)
        self.mark, self.logged = time.perf_counter(), (done, self.seconds)
        began, numbers = time.monotonic(), ""
        with ProgressLine(progress) as line:
            self._stop_if_asked(done, True)
            for step, batch in enumerate(batches, start=done + 1):
                row = self._step(step, batch)
                if row is not None:
                    shown = self.shown(row) | {measure("images_per_second").unit: f"{row['images_per_second']:.0f}"}
                    numbers = "".join(f" · {name} {value}" for name, value in shown.items())
                    if self.broken.names:
                        numbers += f" · {len(self.broken.names):,} unreadable"
                left = (time.monotonic() - began) / (step - done) * (config.steps - step)
                stands = f"{self.run.name}: step {step:,} of {config.steps:,}{numbers}"
                line.show(f"{stands} · {time_left(left)} left" if step < config.steps else stands)
                self._stop_if_asked(step, row is not None)

    def _stop_if_asked(self, step: int, agreeing: bool) -> None:
        """End after a step where Ctrl-C, SIGTERM or the watch asked for it, with a checkpoint of this very step.

        Several processes must end at the same step; they agree on it at logged steps (`agreeing`), where they wait for
        each other anyway.
        """
        asked = self.session.signals.received > 0
        if self.fabric.world_size > 1:
            asked = agreeing and bool(sum_over_processes(torch.tensor(int(asked), device=self.fabric.device)))
        if not asked or step == self.config.steps:
            return
        # Step 0 and the step that a run was resumed at are saved already, and so are those where one is due.
        if self.saved != step:
            self._check_weights(step)
            self._save(step)
        raise TrainingInterrupted(
            f"stopped at step {step} of {self.config.steps}, everything is saved; go on with the same command"
        )

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Write into the run how it ended, also when it ends badly."""
        try:
            yield
        except BaseException as error:
            # A signal to all processes ends those that load images, too, and their end may come before the step's.
            loaders_ended = bool(self.session.signals.received) and "DataLoader worker" in str(error)
            is_stop = isinstance(error, KeyboardInterrupt) or loaders_ended
            # The disk may be full: what went wrong first is what must be told.
            with suppress(RunError):
                self._finish("stopped" if is_stop else "failed")
            if is_stop and not isinstance(error, TrainingInterrupted):
                # In the middle of a step, whose half must not be saved.
                raise TrainingInterrupted(
                    f"stopped at once; everything up to step {max(self.saved, 0)} of {self.config.steps} is saved; go "
                    "on with the same command"
                ) from None
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
        validating, saving = self.validating(step), self.saving(step)
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
        self.run.give_sign_of_life()
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
                try:
                    self.watch(row)
                except KeyboardInterrupt:
                    # A watch may ask for the end; the step is finished and saved first.
                    self.session.signals.ask()

    def _describe(self) -> None:
        """Provenance of a new run."""
        own = self.describe()
        if self.fabric.is_global_zero:
            facts = provenance(private=True) | {"seed": self.config.seed, "threads": torch.get_num_threads()}
            if self.run.started_in:  # begun before, and killed before its first checkpoint: its paths count from there
                facts["started_in"] = str(self.run.started_in)
            self.run.write_provenance(**facts, **own)

    def _save(self, step: int) -> None:
        """Write a checkpoint."""
        state = self.networks.state_dict() | self.kept() | {"seconds": self.seconds}
        self.broken.add(names_of_all_processes(self.broken.names))
        if self.fabric.is_global_zero:
            self.run.save_checkpoint(step, state, every=self.config.record.checkpoint_every)
            self.run.write_provenance(
                duration_s=self._duration(), **note_unreadable(self.broken.names, self.session.images)
            )
        self.saved = step

    def _resume(self) -> int | None:
        """Load the last checkpoint and cut the run's files back to it. The step it stands at; None without one.

        Raises:
            RunError: the checkpoint does not fit, or rows of metrics are lost; nothing was changed.
        """
        checkpoint = self.run.read_checkpoint()
        if self.fabric.is_global_zero:
            self.run.check_rows(checkpoint)
        if checkpoint:
            self._load(checkpoint)
            self.saved = checkpoint.step
        if self.fabric.is_global_zero and not self.run.is_new:
            self.run.note_resumed(self.config, **self.session.facts)
            self.run.truncate_metrics(self.saved)
            self.run.drop_snapshots_after(self.saved)
        self.fabric.barrier()
        return checkpoint.step if checkpoint else None

    def _load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state."""
        try:
            self.seconds = float(checkpoint.state["seconds"])
            self.networks.load_state_dict(checkpoint.state)
        except (*CONFUSED, ValueError) as error:
            raise _not_fitting(checkpoint, error) from None
        try:
            self.restore(checkpoint.state)
        except CONFUSED as error:
            raise _not_fitting(checkpoint, error) from None


def _not_fitting(checkpoint: Checkpoint, error: Exception) -> RunError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return RunError(
        f"{checkpoint.file} does not fit this run's settings, it is damaged or another run's ({reason[:200]}); nothing "
        "was changed. Restore it from a copy, or delete it to continue from the one before"
    )
