"""The monitor: what somebody else's training loop calls, cheap at every step, a row of numbers at some.

Every step costs a copy of its indices. At logged steps they go through the same recorder that our own trainer uses, so
the numbers mean the same. Trouble never ends a training that runs: the first update raises, since a mistake in the call
shows there; from the second on the monitor warns once, leaves out what it cannot measure, and goes on.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibqlab.base.checks import BATCH, CODES, STEPS, whole_number
from ibqlab.base.measures import is_measure
from ibqlab.base.processes import share_of_work
from ibqlab.monitor import inputs
from ibqlab.monitor.alarm import MonitorAlarm
from ibqlab.monitor.attaching import ModuleReading, follow_module
from ibqlab.monitor.reading import Reading, read_tensors
from ibqlab.monitor.run_writer import RunWriter
from ibqlab.monitor.schedule import Schedule
from ibqlab.monitor.snapshots import snapshot_arrays, snapshot_pictures
from ibqlab.monitor.trouble import Trouble, uncompiled
from ibqlab.monitor.window import Movement, Window, follow_gradient

LOG_EVERY = 50
"""Steps between rows, unless rows are expensive."""
ROW_WORK = 2**22
"""Codes × dimension × probe tokens of a row for which a step goes by, on a CPU: about 1 ms of one core."""


class CodebookMonitor:
    """Writes a run folder about the codebook of any model while it trains.

        monitor = CodebookMonitor("runs/mine", codebook_size=1024)
        for step, images in enumerate(batches, start=1):
            …
            monitor.update(step, indices=indices, features=z, codebook=vq.embedding.weight, loss=loss)

    Where torch.distributed is initialised, make one in each process and call `update` in all of them at the same steps:
    hits are summed over processes, features are those of the first one, and it alone writes. A script that ends without
    an error has finished its run; `close`, or `with`, ends it sooner.

    Args:
        path: the run folder, a name among all runs such as "runs/mine", or a path that starts with /, ./, ../ or ~. A
            run of the same settings that is there goes on.
        codebook_size: K, at least 2.
        steps: how many steps the training will have, where that is known. The last step has a row and a snapshot; of
            several processes only where its number is given.
        log_every: steps between rows. None: 50, and more where the codebook is large and lies on a CPU, so that rows
            take some 2 % of a step of 50 ms. The first update and steps 1, 2, 3, 5, 10, 15, 20, 30, 50 have one, too.
        snapshot_every: steps between snapshots; before the first of them there are some at 1, 2, 5, 10, 20, 50 ….
        settings: whatever tells this run from others, as plain values; "quantizer" and "seed" have a column in
            `ibqlab runs`.
        window_tokens: least length of the usage window over all processes, tokens; 10·K by default, whole steps always.
        probe_tokens: tokens on which distances and softmax perplexity are measured.
        snapshot_features: features kept in a snapshot.
        snapshot_images: images kept in a snapshot, where `update` is given some.
        alarm: when a rule of `ibqlab.diagnostics.alarm_rules` finds signs of collapse in a row: "warn" (print it, and
            write it into the folder), "stop" (besides, set `stopped`, which your loop looks at), or "off". "reaches" in
            `settings` says which codes a step moves, as `Quantizer.reaches`; "codebook_init": "grid" that none does.
        on_alarm: called on the first process with each event of the alarm.
    Raises:
        ValueError: a number out of bounds, or a path that no run can have.
        RunError: the folder holds something else, or a run with other settings.
    Cost: per step a copy of the indices; per row O(probe_tokens·K·D) operations. The share of the time that it took
        stands in provenance.json.
    """

    def __init__(
        self,
        path: str | Path,
        codebook_size: int,
        *,
        steps: int | None = None,
        log_every: int | None = None,
        snapshot_every: int = 1000,
        settings: Mapping[str, Any] | None = None,
        window_tokens: int | None = None,
        probe_tokens: int = 256,
        snapshot_features: int = 1024,
        snapshot_images: int = 8,
        alarm: str = "warn",
        on_alarm: Callable[[Any], Any] | None = None,
    ):
        self.codebook_size = whole_number("codebook_size", codebook_size, 2, CODES)
        self.schedule = Schedule(
            steps=steps if steps is None else whole_number("steps", steps, 1, STEPS),
            log_every=LOG_EVERY if log_every is None else whole_number("log_every", log_every, 1, STEPS),
            snapshot_every=whole_number("snapshot_every", snapshot_every, 1, STEPS),
        )
        self._chooses_log_every = log_every is None
        self.window_tokens = whole_number("window_tokens", window_tokens or 10 * self.codebook_size, 1, 100 * CODES)
        self.probe_tokens = whole_number("probe_tokens", probe_tokens, 1, BATCH)
        self.snapshot_features = whole_number("snapshot_features", snapshot_features, 1, BATCH)
        self.snapshot_images = whole_number("snapshot_images", snapshot_images, 0, BATCH)
        self._alarm = MonitorAlarm(alarm, on_alarm)
        config = {"kind": "monitored", "codebook_size": self.codebook_size} | ({"steps": steps} if steps else {})
        self._writer = RunWriter(path, config | {"settings": inputs.checked_settings(settings)})
        self.path = self._writer.path
        """The run folder."""
        self.step = -1
        """The last update's step."""
        self.stopped = False
        """Whether `alarm="stop"` asks for the end of the training, on all processes alike: `if monitor.stopped: break`.
        Lightning's callback and that of Transformers end theirs by themselves."""
        self._trouble = Trouble()
        self._is_writer = False
        self._is_closed = False
        self._window: Window | None = None
        self._state: Any = None
        self._reading: ModuleReading | None = None
        self._read_gradient: Callable[[], Tensor | None] | None = None
        self._movement: Movement | None = None
        self._latest: tuple[Tensor, inputs.UpdateInputs] | None = None

    def watch(self, codebook: Tensor | nn.Module | Callable[[], Tensor | None]) -> None:
        """Measure gradient reach: which share of codes a step moves noticeably.

        Args:
            codebook: the parameter (K, D), or a module with it. Of the last backward pass before `update` its gradient
                is taken, whether or not `zero_grad` has been called since. A buffer that moving averages change in
                place: how far they move each code. A function that gives the gradient of a computed codebook.
        Raises:
            ValueError: none of these.
        """
        self._movement = None
        if isinstance(codebook, nn.Module):
            codebook = inputs.codebook_of_module(codebook)
        if isinstance(codebook, Tensor) and codebook.is_leaf and not codebook.requires_grad:
            self._watch_movement(lambda: codebook)
        elif isinstance(codebook, Tensor):
            self._read_gradient = follow_gradient(codebook, lambda: self.schedule.needs_row(self.step + 1))
        elif callable(codebook):
            self._read_gradient = codebook
        else:
            raise ValueError(f"watch needs a parameter, a buffer or a function; got {type(codebook).__name__}")

    def _watch_movement(self, read: Callable[[], Tensor]) -> None:
        self._movement = Movement(read)
        self._read_gradient = self._movement.take

    def attach(
        self, module: nn.Module, read: Callable[[Any], Any] | None = None, codebook: inputs.Given = None
    ) -> None:
        """Take indices and features off a module's forward pass; `update` then needs the step alone.

        Where vector-quantize-pytorch averages the codebook, gradient reach is that of its movement.

        Args:
            module: the quantizer. Passes in evaluation mode are left aside.
            read: from the module's output to its indices, or to (indices, features); without features, the module's
                first input is taken. None: a module of vector-quantize-pytorch, whose outputs are known.
            codebook: as in `update`. None: as `read` is.
        Raises:
            ValueError: an unknown module without `read`; the message says what to write.
        """
        self._reading = follow_module(module, read, codebook)
        if self._reading.averaged_codebook and self._read_gradient is None:
            self._watch_movement(self._reading.averaged_codebook)

    @torch.no_grad()
    def update(
        self,
        step: int,
        *,
        indices: Any = None,
        features: inputs.Given = None,
        codebook: inputs.Given = None,
        images: inputs.Given = None,
        reconstructions: inputs.Given = None,
        probe: inputs.Given = None,
        **numbers: Any,
    ) -> dict[str, Any] | None:
        """Take in a training step, after its backward pass.

        Args:
            step: counted from 1 over the whole training, growing. Further calls with one step are its micro-batches.
            indices: the chosen codes, any shape; −1 where a token has none. None: as `attach` has read them.
            features: what was compared with the codes, (N, D), (B, T, D) or (B, D, h, w); or a function that gives it,
                called at logged steps only. None: rows without what is measured on features.
            codebook: (K, D), a module such as nn.Embedding, or a function that gives it; of a grid that is not stored,
                a function from indices to codes, or the quantizer itself. None: rows without what is measured on codes.
            images: (B, 3, H, W) or (B, 1, H, W), for snapshots; uint8, or floats in [0, 1] or [−1, 1]. Or a function.
            reconstructions: of these images, likewise.
            probe: features of one fixed batch, the same images each time: without it nobody knows how far the features
                drift. Or a function, called where a snapshot is due, in every process: `lambda: encoder(fixed)`.
            **numbers: whatever else a row is to hold: loss=…, psnr=…; tensors of one element are read at logged steps
                only.
        Returns:
            The row, on the first process at logged steps; else None.
        Raises:
            ValueError, RunError: at the first update alone; whatever goes wrong in later ones is a warning.
        """
        if self._is_closed:
            self._trouble.warn("the monitor is closed, its run has ended; make a new one to go on")
            return None
        began, is_first = time.perf_counter(), self._trouble.raises
        given = inputs.UpdateInputs(indices, features, codebook, images, reconstructions, probe, numbers)
        try:
            with torch.inference_mode(False):  # what it keeps is used in later steps
                return self._trouble.checked(lambda: uncompiled(self._update)(step, given))
        finally:
            # The first one imports the library and makes the folder.
            self._writer.monitor_seconds += 0.0 if is_first else time.perf_counter() - began

    def log(self, step: int, **numbers: Any) -> None:
        """Write a row of the loop's own numbers, such as those of a validation: log(step, validation_psnr=21.3).

        Args:
            step: as in `update`; not before the last row, nor before the first update.
            **numbers: as in `update`.
        """
        if self._window is None:
            self._trouble.warn(f"log({step}, …) comes before the first update and is left out: nothing is written yet")
        elif self._is_writer and self._writer.run:
            row = self._plain_numbers(numbers, {})
            self._trouble.checked(lambda: self._writer.log({"step": whole_number("step", step, 0, STEPS), **row}))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs for its window not to start empty: this process's, for your checkpoint."""
        if self._window is None:
            return {}
        self._take_in()
        return self._window.recorder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a stored window, before the first update; one of other sizes is left aside with a warning then."""
        self._state = state

    def close(self, status: str = "finished") -> None:
        """End the run: its last step has a row and a snapshot then, and later updates write nothing.

        Args:
            status: "finished", "failed" or "stopped".
        """
        self._writer.check_status(status)
        if self._is_closed:
            return
        self._is_closed = True
        self._trouble.checked(lambda: self._writer.end(status))
        if self._reading:
            self._reading.remove()

    def __enter__(self) -> "CodebookMonitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.close("stopped" if issubclass(kind, KeyboardInterrupt) else "failed")

    def _update(self, step: int, given: inputs.UpdateInputs) -> dict[str, Any] | None:
        self._trouble.step = step
        step = whole_number("step", step, 0, STEPS)
        if step < self.step:
            self._trouble.warn(
                f"step must grow: got {step} after {self.step}; updates are left aside until it does. Count steps over "
                "the whole training, not within an epoch"
            )
            return None
        if self._reading and given.indices is None:
            indices, features, codebook = self._reading.take(given.features, given.codebook)
            given = given._replace(indices=indices, features=features, codebook=codebook)
        flat = self._trouble.checked(lambda: self._flat(given.indices))
        if flat is None:
            if self._window is None or self._window.processes == 1:
                return None
            # The other processes wait for this one's share of the sums.
            flat = torch.empty(0, dtype=torch.int32, device=self._window.device)
        if self._window is None:
            self._begin(flat)
        is_due = step > self.step and self.schedule.needs_row(step)
        self.step, self._writer.was_asked_to_end = step, False
        self._window.add(step, flat)
        self._trouble.checked(self._writer.give_sign_of_life)
        row = self._measure(step, flat, given) if is_due else None
        is_stored = self.schedule.stored == step or self._window.processes > 1
        self._latest = None if is_stored else (flat, given.kept(self.snapshot_images))
        if self._window.is_full:
            self._take_in()
        if self._movement and self.schedule.needs_row(step + 1):
            self._movement.keep()
        return row

    def _flat(self, indices: Any) -> Tensor:
        if indices is None:
            raise ValueError(
                "update needs the codes that the step chose: pass indices=…, or attach(module) once, whose forward "
                "pass in training mode comes before each update"
            )
        flat = inputs.flat_indices(indices, self.codebook_size)
        if not len(flat) and not (dist.is_available() and dist.is_initialized()):
            self._trouble.warn("indices must hold at least one token; got none, so this step counts for nothing")
        return flat

    def _begin(self, flat: Tensor) -> None:
        """Now processes know each other, if ever; without sums each would have a window of its own."""
        if dist.is_available() and dist.is_initialized():
            rank, processes = dist.get_rank(), dist.get_world_size()
        else:
            rank, processes = share_of_work()[0], 1
        self._is_writer = rank == 0
        # Of whole steps it holds the same tokens however many processes share it.
        step_tokens = max(1, len(flat) * processes)
        tokens = -(-self.window_tokens // step_tokens) * step_tokens
        self._window = Window(self.codebook_size, tokens, self.probe_tokens, processes, flat.device)
        if self._state and not self._window.load(self._state):
            self._trouble.warn("the stored window is of another codebook, batch or window size; a new one begins")

    def _measure(
        self, step: int, flat: Tensor, given: inputs.UpdateInputs, has_row: bool = False
    ) -> dict[str, Any] | None:
        """A row, and a snapshot where one is due. What processes sum, all of them come to, whatever they were given."""
        needs_snapshot = self.schedule.needs_snapshot(step)
        most_probe = self.snapshot_features if needs_snapshot else 0
        most = (max(self.probe_tokens, most_probe), most_probe)
        seen = read_tensors(given, flat, self.codebook_size, most, self._trouble)
        if self._trouble.raises and self._chooses_log_every and seen.codes is not None and seen.codes.is_cpu:
            self.schedule.log_every = max(LOG_EVERY, seen.codes.numel() * self.probe_tokens // ROW_WORK)
        self._take_in()
        measured = None if has_row else self._report(step, seen)
        hits = self._window.hits(step, self._movement is None) if needs_snapshot else {}
        pictures = snapshot_pictures(given, self.snapshot_images, self._trouble) if needs_snapshot else {}
        try:
            if self._is_writer:
                if not self._writer.run:
                    self._writer.begin(step, seen.dim)
                    self._writer.before_end = self._write_last
                    self._alarm.follow(self._writer.run)
                if measured is not None:
                    own = self._plain_numbers(given.numbers, measured)
                    measured = {"step": step, **own, **measured, "seconds": round(self._writer.seconds, 3)}
                    self._writer.log(measured)
                    self._trouble.checked(lambda: self._alarm.check(self._writer.run, measured))
                if needs_snapshot:
                    arrays = snapshot_arrays(seen, self.snapshot_features)
                    self._writer.save_snapshot(step, arrays | pictures | hits)
        finally:
            asked, self.schedule.is_suspicious = self._alarm.answers(flat.device)
            self._writer.was_asked_to_end, self.stopped = asked and not self.stopped, asked
        self.schedule.logged, self._trouble.raises = step, False
        if needs_snapshot:
            self.schedule.stored = step
        return measured if self._is_writer else None

    def _report(self, step: int, seen: Reading) -> dict[str, Any] | None:
        """The row of what was read; None where it could not be measured."""
        read = self._read_gradient and (lambda: self._trouble.checked(self._gradient))
        return self._trouble.checked(lambda: self._window.report(step, seen.codes, seen.sample, seen.chosen, read))

    def _gradient(self) -> Tensor | None:
        gradient = inputs.value_of(self._read_gradient, "the gradient for watch")
        if isinstance(gradient, Tensor) and gradient.shape[:-1].numel() != self.codebook_size:
            rule = f"the gradient for watch must hold one row per code, K = {self.codebook_size}"
            raise ValueError(f"{rule}; got {tuple(gradient.shape)}")
        return gradient

    @torch.no_grad()
    def _write_last(self) -> None:
        """The last update's row and snapshot, where it had none, when the run ends."""
        if self._latest is None:
            return
        (flat, given), self._latest = self._latest, None
        self.schedule.steps, asked = self.step, self._writer.was_asked_to_end
        self._trouble.checked(lambda: self._measure(self.step, flat, given, self.schedule.logged == self.step))
        self._writer.was_asked_to_end = asked

    def _plain_numbers(self, numbers: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        """The loop's own numbers, without those that no row can hold."""
        from ibqlab.runs.metrics import plain_row

        def plain(name: str) -> dict[str, Any]:
            if name in measured or name in ("step", "seconds"):
                raise ValueError(f"{name} is written by the monitor itself; give your number another name")
            value = plain_row(numbers[name], name)  # null where it is not finite
            if is_measure(name) and not isinstance(value, int | float | None):
                raise ValueError(f"{name} must be a number, or a tensor of one element; got {value!r:.40}")
            return {name: value}

        names = [name for name in numbers if numbers[name] is not None]
        checked = [self._trouble.checked(lambda name=name: plain(name)) for name in names]
        return {name: value for row in checked if row for name, value in row.items()}

    def _take_in(self) -> None:
        """Count the indices that wait; wrong ones are told of."""
        for side, count in self._window.take_in().items():
            message = (
                f"indices must lie in 0 to {self.codebook_size - 1} since codebook_size={self.codebook_size}, or be −1 "
                f"for a token without code; {count} lie {side} and are left out. Give the codebook's full size"
            )
            if self._trouble.raises:
                raise ValueError(message)
            self._trouble.warn(message)
