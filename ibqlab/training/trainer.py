"""What every training loop does, whatever it trains: steps in order, rows, checkpoints, an end written down.

All randomness of a step (crops, flips, dropout, revived codes) comes from the seed, the step's number and the process's
rank, never from a generator's history: a run that was killed and started again repeats itself bit for bit.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ibqlab.base.devices import require_processes
from ibqlab.base.files import is_ordinary
from ibqlab.base.measures import measure
from ibqlab.base.processes import names_of_all_processes, sum_over_processes
from ibqlab.base.progress import ProgressLine, in_notebook, notice, tell, time_left
from ibqlab.costs.fitting import require_fits
from ibqlab.data import BrokenImages
from ibqlab.data.broken import STAND_INS
from ibqlab.losses.errors import NonFinite, StoppedByAlarm, TrainingInterrupted
from ibqlab.recipes.plugins import import_plugins, plugin_facts
from ibqlab.recipes.run_config import RunConfig
from ibqlab.runs import Run, RunError, provenance
from ibqlab.runs.checkpoints import Checkpoint, read_checkpoint, require_rows
from ibqlab.training.alarms import OnAlarm, RunAlarm
from ibqlab.training.data_check import note_unreadable, reachable, unreadable_of
from ibqlab.training.failures import memory_error, not_fitting
from ibqlab.training.plugin_check import require_same_plugins
from ibqlab.training.session import RunInputs, Session, training_session

Watch = Callable[[dict[str, Any]], None]
"""Called on the first process with each row of metrics as it is logged. It may raise KeyboardInterrupt to end the
training after this step, as Ctrl-C does. Methods that it may have: `finish`, called when training ends, however
it ends, and `alarm`, called with each event of the alarm."""
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


class Trainer(ABC):
    """State of one run on one process; a subclass says what is trained.

    Args:
        config: of the run.
        session: the run and its processes.
        networks: what learns.
        watch: for live views.
    """

    def __init__(self, config: RunConfig, session: Session, networks: Networks, watch: Watch | None):
        self.config, self.session, self.networks, self.watch = config, session, networks, watch
        self.run, self.fabric = session.run, session.fabric
        self.alarm = RunAlarm(config, session, watch)
        self.broken = BrokenImages(() if "data" in session.facts else unreadable_of(self.run.provenance)[0])
        self.began = time.perf_counter() - self.run.duration
        self.mark = 0.0
        """When the step in progress began, on the clock of time.perf_counter."""
        self.seconds = 0.0
        """Spent on steps, loading of images included, validation and checkpoints left out."""
        self.logged = (0, 0.0)
        """Step of the last logged row, and `seconds` at its end."""
        self.saved = -1
        """Step of the newest checkpoint."""

    @staticmethod
    @abstractmethod
    def prepare(config: RunConfig, path: Path) -> RunInputs:
        """Open the data and build the networks of a run in a folder."""

    @staticmethod
    @abstractmethod
    def depends_on_steps(config: RunConfig) -> str:
        """The setting that stretches over all steps, which makes a longer run another from its start; "" for none."""

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
    def line_numbers(self, row: dict[str, Any]) -> dict[str, str]:
        """What the progress line shows of a row."""

    @abstractmethod
    def start(self) -> None:
        """What a new run does before its first validation."""

    @abstractmethod
    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the networks; every process calls it."""

    @abstractmethod
    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `extra_state` gave."""

    def is_validation_step(self, step: int) -> bool:
        """Whether a step is followed by a validation."""
        return step % self.config.record.validate_every == 0 or step == self.config.steps

    # --- the loop ---

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
                self.alarm.show(line)
                if row is not None:
                    texts = self.line_numbers(row)
                    texts |= {measure("images_per_second").unit: f"{row['images_per_second']:.0f}"}
                    numbers = "".join(f" · {name} {value}" for name, value in texts.items())
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
        asked = torch.tensor([self.session.signals.received > 0, bool(self.alarm.reason)])  # by hand, by the alarm
        if self.fabric.world_size > 1:
            asked = sum_over_processes(asked.long().to(self.fabric.device)) if agreeing else asked[:0]
        if not asked.any() or step == self.config.steps:
            return
        # Step 0 and the step that a run was resumed at are saved already, and so are those where one is due.
        if self.saved != step:
            self._check_weights(step)
            self._save(step)
        kind, by = (StoppedByAlarm, self.alarm.reason or " by the alarm") if asked[1] else (TrainingInterrupted, "")
        how = self.alarm.how_to_go_on if asked[1] else "go on with the same command"
        raise kind(f"stopped at step {step} of {self.config.steps}{by}, everything is saved; {how}")

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
        validating = self.is_validation_step(step)
        saving = step % record.checkpoint_every == 0 or step == config.steps
        # From seed, step and rank alone, so that a resumed run draws what the run would have drawn; 4096 ranks at most.
        torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + self.fabric.global_rank)
        try:
            row = self.learn(step, batch, step % record.log_every == 0 or validating)
        except NonFinite as error:
            raise self.alarm.nonfinite_error(step, error.culprit) from None
        except torch.OutOfMemoryError:
            raise memory_error(step, self.config) from None
        self.seconds += time.perf_counter() - self.mark
        if row is not None:
            images = (step - self.logged[0]) * config.batch_size
            pace = {
                "seconds": round(self.seconds, 3),
                "images_per_second": round(images / (self.seconds - self.logged[1]), 2),
            }
            row = {"step": step, "learning_rate": self.networks.learning_rate, **row, **pace}
            self.logged = (step, self.seconds)
        if validating or saving:
            self._check_weights(step)
        if row is not None:
            self._record_validation(step, row) if validating else self._log(row)
        if saving:
            self._save(step)
        self.run.give_sign_of_life()
        self.mark = time.perf_counter()
        return row

    def _check_weights(self, step: int) -> None:
        """Stop at a weight that is not finite before it is validated or stored, so that the last good state stays."""
        for name, value in self.networks.tensors().items():
            if not torch.isfinite(value).all():
                raise self.alarm.nonfinite_error(step, name)

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
            for take in (self.alarm.check, self.watch):
                try:
                    if take:
                        take(row)
                except KeyboardInterrupt:
                    # A watch may ask for the end; the step is finished and saved first.
                    self.session.signals.ask()

    def _describe(self) -> None:
        """Provenance of a new run."""
        facts_of_kind = self.describe()  # on every process: it may exchange numbers
        if self.fabric.is_global_zero:
            facts = provenance(private=True) | {"seed": self.config.seed, "threads": torch.get_num_threads()}
            if self.config.plugins:
                facts["plugins"] = plugin_facts(import_plugins(self.config.plugins))
            if self.run.started_in:  # begun before, and killed before its first checkpoint: its paths count from there
                facts["started_in"] = str(self.run.started_in)
            self.run.write_provenance(**facts, **facts_of_kind)

    def _save(self, step: int) -> None:
        """Write a checkpoint."""
        state = self.networks.state_dict() | self.extra_state() | {"seconds": self.seconds}
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
        checkpoint = read_checkpoint(self.run.path)
        if self.fabric.is_global_zero:
            require_rows(self.run.path, checkpoint)
        if checkpoint:
            self._load(checkpoint)
            self.saved = checkpoint.step
        if self.fabric.is_global_zero and not self.run.is_new:
            # One that was made to be trained by a process of its own, or ended before its first row, is begun only now.
            if checkpoint or self.run.rows or self.run.has_fewer_steps(self.config):
                self.run.note_resumed(self.config, **self.session.facts)
            else:
                self.run.write_provenance(status="running", **self.session.facts)
            # Rows and snapshots after the checkpoint come again, bit for bit.
            self.run.truncate_metrics(self.saved)
            self.run.drop_snapshots_after(self.saved)
            self.alarm.replay()
        self.fabric.barrier()
        return checkpoint.step if checkpoint else None

    def _load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state."""
        try:
            self.seconds = float(checkpoint.state["seconds"])
            self.networks.load_state_dict(checkpoint.state)
        except (*CONFUSED, ValueError) as error:
            raise not_fitting(checkpoint, error) from None
        try:
            self.load_extra_state(checkpoint.state)
        except CONFUSED as error:
            raise not_fitting(checkpoint, error) from None


def train_run(
    trainer: type[Trainer],
    config: RunConfig,
    path: str | Path,
    *,
    progress: bool,
    watch: Watch | None,
    accept_changed_data: bool,
    on_alarm: OnAlarm | None = None,
) -> Run:
    """Train into a run folder, or continue the one that is there; arguments and errors are those of `train`.

    Args:
        trainer: what is trained.
    """
    tell(folder=str(Path(path).resolve()))
    config = reachable(config, path)
    if is_ordinary(Path(path) / "config.yaml"):
        run = Run(path)
        require_same_plugins(run, import_plugins(config.plugins))
        if run.status == "finished" and not run.has_fewer_steps(config):
            return Run.start(path, config)
    # Refused before anything is opened, built or written; seconds where memory may be short.
    require_processes(talking=True)
    require_fits(config)
    try:
        inputs = trainer.prepare(config, Path(path))
    except KeyboardInterrupt:
        raise TrainingInterrupted(
            "stopped before the training began, nothing is lost; go on with the same command"
        ) from None
    depends_on_steps = trainer.depends_on_steps(config)
    with training_session(path, config, inputs.data_facts, accept_changed_data, depends_on_steps) as session:
        ready = trainer(config, inputs, session, watch)
        if on_alarm:
            ready.alarm.listeners.append(on_alarm)
        return ready.train(progress)
