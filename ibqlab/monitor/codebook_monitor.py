"""The monitor: what somebody else's training loop calls, cheap at every step, a row of numbers at some.

Every step costs a copy of its indices. At logged steps they go through the same recorder that our own trainer uses, so
the numbers mean the same. Trouble never ends a training that runs: the first update raises, since a mistake in the call
shows there; from the second on the monitor warns once, leaves out what it cannot measure, and goes on.
"""

import re
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ibqlab.base.checks import BATCH, CODES, STEPS, whole_number
from ibqlab.base.processes import share_of_work
from ibqlab.monitor import inputs
from ibqlab.monitor.alarm import MonitorAlarm
from ibqlab.monitor.attaching import ModuleReading, follow_module
from ibqlab.monitor.run_writer import RunWriter
from ibqlab.monitor.schedule import Schedule
from ibqlab.monitor.snapshots import snapshot_arrays, snapshot_pictures
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
        steps: how many steps the training will have, where that is known: the last one has a row and a snapshot then.
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
        self._writer = RunWriter(path, config | {"settings": dict(settings or {})})
        self.path = self._writer.path
        """The run folder."""
        self.step = -1
        """The last update's step."""
        self.stopped = False
        """Whether `alarm="stop"` asks for the end of the training, on all processes alike: `if monitor.stopped: break`.
        Lightning's callback and that of Transformers end theirs by themselves."""
        self._now: Any = -1
        self._is_writer = False
        self._is_closed = False
        self._window: Window | None = None
        self._state: dict[str, Any] | None = None
        self._reading: ModuleReading | None = None
        self._read_gradient: Callable[[], Tensor | None] | None = None
        self._movement: Movement | None = None
        self._warned: set[str] = set()

    def watch(self, codebook: Tensor | Callable[[], Tensor | None]) -> None:
        """Measure gradient reach: which share of codes a step moves noticeably.

        Args:
            codebook: the parameter (K, D). Of the last backward pass before `update` its gradient is taken, whether or
                not `zero_grad` has been called since. A buffer that moving averages change in place: how far they move
                each code. Or a function that gives the gradient, where the codebook is computed from other weights.
        Raises:
            ValueError: none of these.
        """
        self._movement = None
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
        **numbers: Any,
    ) -> dict[str, Any] | None:
        """Take in a training step, after its backward pass.

        Args:
            step: counted from 1 over the whole training, growing. Further calls with one step are its micro-batches.
            indices: the chosen codes, any shape; −1 where a token has none. None: as `attach` has read them.
            features: what was compared with the codes, (N, D), (B, T, D) or (B, D, h, w); or a function that gives it,
                called at logged steps only. None: rows without what is measured on features.
            codebook: (K, D), or a function that gives it; of a grid that is not stored, a function from indices to
                codes, or the quantizer itself. None: rows without what is measured on codes.
            images: (B, 3, H, W) or (B, 1, H, W), for snapshots; uint8, or floats in [0, 1] or [−1, 1]. Or a function.
            reconstructions: of these images, likewise.
            **numbers: whatever else a row is to hold: loss=…, psnr=…; tensors of one element are read at logged steps
                only.
        Returns:
            The row, on the first process at logged steps; else None.
        Raises:
            ValueError, RunError: at the first update alone; whatever goes wrong in later ones is a warning.
        """
        if self._is_closed:
            self._warn("the monitor is closed, its run has ended; make a new one to go on")
            return None
        began, is_first = time.perf_counter(), self._is_first
        try:
            return self._update(
                step, inputs.UpdateInputs(indices, features, codebook, images, reconstructions, numbers)
            )
        except Exception as error:  # whatever it is, it must not end somebody's training
            if is_first:
                raise
            self._warn(str(error) or type(error).__name__)
            return None
        finally:
            # The first one imports the library and makes the folder.
            self._writer.monitor_seconds += 0.0 if is_first else time.perf_counter() - began

    def log(self, step: int, **numbers: Any) -> None:
        """Write a row of the loop's own numbers, such as those of a validation: log(step, validation_psnr=21.3).

        Args:
            step: as in `update`; not before its last row.
            **numbers: as in `update`.
        """
        if self._is_writer and self._writer.run:
            kept = self._plain_numbers(numbers, {})
            self._checked(lambda: self._writer.log({"step": step, **kept}))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs for its window not to start empty: this process's, for your checkpoint."""
        if self._window is None:
            return {}
        self._take_in()
        return self._window.recorder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a stored window, before the first update."""
        self._state = dict(state)

    def close(self, status: str = "finished") -> None:
        """End the run. Later updates write nothing.

        Args:
            status: "finished", "failed" or "stopped".
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._reading:
            self._reading.remove()
        self._writer.end(status)

    def __enter__(self) -> "CodebookMonitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.close("stopped" if issubclass(kind, KeyboardInterrupt) else "failed")

    @property
    def _is_first(self) -> bool:
        """Whether nothing was measured yet, so that a mistake is one of the call."""
        return self.schedule.logged < 0

    def _update(self, step: int, given: inputs.UpdateInputs) -> dict[str, Any] | None:
        self._now = step = whole_number("step", step, 0, STEPS)
        if step < self.step:
            self._warn(
                f"step must grow: got {step} after {self.step}; updates are left aside until it does. Count steps over "
                "the whole training, not within an epoch"
            )
            return None
        if self._reading and given.indices is None:
            indices, features, codebook = self._reading.take(given.features, given.codebook)
            given = given._replace(indices=indices, features=features, codebook=codebook)
        if given.indices is None:
            raise ValueError(
                "update needs the codes that the step chose: pass indices=…, or attach(module) once, whose forward "
                "pass in training mode comes before each update"
            )
        flat = inputs.flat_indices(given.indices, self.codebook_size)
        if self._window is None:
            self._begin(flat)
        is_due = step > self.step and self.schedule.needs_row(step)
        self.step, self._writer.was_asked_to_end = step, False
        self._window.add(step, flat)
        self._writer.give_sign_of_life()
        row = self._measure(step, flat, given) if is_due else None
        if self._window.is_full:
            self._take_in()
        if self._movement and self.schedule.needs_row(step + 1):
            self._movement.keep()
        return row

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
        if self._state:
            self._window.recorder.load_state_dict(self._state)

    def _measure(self, step: int, flat: Tensor, given: inputs.UpdateInputs) -> dict[str, Any] | None:
        """A row, and a snapshot where one is due. What processes sum, all of them come to, whatever they were given."""
        codes = self._checked(lambda: self._codes(inputs.codebook_of(given.codebook, self.codebook_size, flat.device)))
        dim = None if codes is None else codes.shape[1]
        tokens = self._checked(lambda: inputs.tokens_of(given.features, dim))
        if self._is_first and self._chooses_log_every and codes is not None and codes.device.type == "cpu":
            self.schedule.log_every = max(LOG_EVERY, codes.numel() * self.probe_tokens // ROW_WORK)
        needs_snapshot, sample, chosen = self.schedule.needs_snapshot(step), None, None
        if tokens is not None:
            most = max(self.probe_tokens, self.snapshot_features if needs_snapshot else 0)
            rows = inputs.sample_rows(len(tokens), most)
            sample = tokens[rows.to(tokens.device)].float()
            chosen = flat[rows.to(flat.device)] if len(tokens) == len(flat) else None
            sample, chosen = self._finite(sample, chosen)
        self._take_in()
        measured = self._window.report(step, codes, sample, chosen, self._read_gradient)
        recorder = self._window.recorder
        hits = {"counts": recorder.counts(), "last_hit": recorder.last_hits()} if needs_snapshot else {}
        try:
            if self._is_writer:
                if not self._writer.run:
                    self._writer.begin(step, dim if tokens is None or dim is not None else tokens.shape[1])
                    self._alarm.follow(self._writer.run)
                own = self._plain_numbers(given.numbers, measured)
                measured = {"step": step, **own, **measured, "seconds": round(self._writer.seconds, 3)}
                self._writer.log(measured)
                self._checked(lambda: self._alarm.check(self._writer.run, measured))
            if self._is_writer and needs_snapshot:
                arrays = snapshot_arrays(codes, sample, chosen, self.snapshot_features)
                pictures = (given.images, given.reconstructions)
                arrays |= snapshot_pictures(pictures, self.snapshot_images, self._checked)
                self._writer.save_snapshot(step, arrays | hits)
        finally:
            asked = self._alarm.asks_to_end(flat.device)
            self._writer.was_asked_to_end, self.stopped = asked and not self.stopped, asked
        self.schedule.logged = step
        if needs_snapshot:
            self.schedule.stored = step
        return measured if self._is_writer else None

    def _codes(self, codebook: Any) -> Tensor | None:
        if codebook is None:
            return None
        codes = inputs.checked_codebook(codebook, self.codebook_size)
        if bool(torch.isfinite(codes.sum())) or bool(torch.isfinite(codes).all()):  # a sum takes a twentieth of it
            return codes
        self._warn("codebook must be finite; it holds NaN or infinity, so what is measured on codes is left out")
        return None

    def _finite(self, sample: Tensor, chosen: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A sample and its codes without rows of NaN or infinity; None where none is left."""
        good = torch.isfinite(sample).all(1)
        broken = len(sample) - int(good.sum())
        if not broken:
            return sample, chosen
        self._warn(f"features must be finite; {broken} of {len(sample)} rows looked at hold NaN or infinity, left out")
        if broken == len(sample):
            return None, None
        return sample[good], None if chosen is None else chosen[good.to(chosen.device)]

    def _plain_numbers(self, numbers: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        """The loop's own numbers, without those that no row can hold."""
        from ibqlab.runs.metrics import plain_row

        def plain(name: str) -> dict[str, Any]:
            if name in measured or name in ("step", "seconds"):
                raise ValueError(f"{name} is written by the monitor itself; give your number another name")
            return {name: plain_row(numbers[name], name)}  # null where it is not finite

        kept = [self._checked(lambda name=name: plain(name)) for name in numbers if numbers[name] is not None]
        return {name: value for row in kept if row for name, value in row.items()}

    def _take_in(self) -> None:
        """Count the indices that wait; wrong ones are told of."""
        for side, count in self._window.take_in().items():
            message = (
                f"indices must lie in 0 to {self.codebook_size - 1} since codebook_size={self.codebook_size}, or be −1 "
                f"for a token without code; {count} lie {side} and are left out. Give the codebook's full size"
            )
            if self._is_first:
                raise ValueError(message)
            self._warn(message)

    def _checked(self, read: Callable[[], Any]) -> Any:
        """What is read; None with a warning where it is not what it must be, an error at the first update."""
        try:
            return read()
        except Exception as error:
            if self._is_first:
                raise
            self._warn(str(error) or type(error).__name__)
            return None

    def _warn(self, message: str) -> None:
        """Each kind of trouble once: a loop has thousands of steps."""
        kind = re.sub(r"[0-9]+", "", message)[:24]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"monitor, step {self._now}: {message}", stacklevel=4)
