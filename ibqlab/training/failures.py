"""How a training ends before its last step: by Ctrl-C or SIGTERM, or at a state that cannot be gone on from."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch

from ibqlab.base.checks import gib
from ibqlab.losses.errors import TrainingError, TrainingInterrupted
from ibqlab.losses.tokenizer_loss import IMAGES
from ibqlab.recipes.run_config import RunConfig
from ibqlab.runs import Run, RunError
from ibqlab.runs.checkpoints import Checkpoint

AT_ONCE_SECONDS = 2.0
"""A second Ctrl-C so long after the first one ends training in the middle of its step."""


class StopSignals:
    """Ctrl-C and SIGTERM inside the block are noted, for the training to end after its step.

    A second Ctrl-C, two seconds later or more, raises KeyboardInterrupt at once. torchrun passes each on twice, hence
    the two seconds. Where a signal would have ended the process, it does so after the block has ended by it: whoever
    waits for the process sees how it ended. In other threads than the main one, which get no signals, nothing happens.
    """

    received = 0
    """Number of the signal; 0: none yet."""

    def __enter__(self) -> "StopSignals":
        self.process, self.since = os.getpid(), 0.0
        self.handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # None: set by a program in C around us. Ignored: by nohup.
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self.handlers[number] = signal.signal(number, self._note)
        return self

    def ask(self) -> None:
        """Note a Ctrl-C that came another way."""
        self._note(signal.SIGINT, None)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self.process:
            # A process that loads images: Ctrl-C is its parent's business, SIGTERM is what ends it.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        now = time.monotonic()
        if not self.received:
            self.received, self.since = number, now
        elif number == signal.SIGINT and now - self.since > AT_ONCE_SECONDS:
            raise KeyboardInterrupt

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        handler = self.handlers.get(self.received)
        if not isinstance(error, TrainingInterrupted) or handler in (None, signal.default_int_handler):
            return
        if handler is signal.SIG_DFL:
            print(error, file=sys.stderr, flush=True)
        os.kill(self.process, self.received)


def nonfinite_error(step: int, culprit: str, config: RunConfig, run: Run) -> TrainingError:
    """The error at a number that is not finite, with what to lower and where the last good state is.

    Args:
        culprit: the first tensor that holds it.
    """
    remedy = lower_rate(config)
    if culprit == IMAGES:
        remedy = f"mend the data (data.source {config.data.source!r})"
    good = run.last_checkpoint
    return TrainingError(
        f"step {step}: {culprit} is the first tensor with NaN or infinity; training stops. To go on, {remedy}, in "
        f"a new output folder. The last good checkpoint is {good.name if good else 'none'} in {run.name}"
    )


def memory_error(step: int, config: RunConfig) -> TrainingError:
    """The error at a step that the GPU's memory cannot hold, with the settings that make it smaller."""
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    size = f" ({gib(total - free)} of {gib(total)} in use, by other programs as well)" if total else ""
    again = "" if config.speed.activation_checkpointing else ", or type speed.activation_checkpointing=true"
    return TrainingError(
        f"step {step}: a batch does not fit into the GPU's memory{size}; training stops. Raise accumulate (now "
        f"{config.accumulate}), which computes a batch in parts{again}, or lower batch_size (now {config.batch_size}), "
        "in a new output folder"
    )


def lower_rate(config: RunConfig) -> str:
    """What helps against NaN, as it is typed."""
    remedy = f"lower optimizer.learning_rate (now {config.optimizer.learning_rate:g})"
    if config.precision != "32-true":
        remedy += f" or type precision=32-true (now {config.precision})"
    return remedy


def not_fitting(checkpoint: Checkpoint, error: Exception) -> RunError:
    """The error at a checkpoint whose state is not one of this run's settings."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return RunError(
        f"{checkpoint.file} does not fit this run's settings, it is damaged or another run's ({reason[:200]}); nothing "
        "was changed. Restore it from a copy, or delete it to continue from the one before"
    )
