"""The processes and devices of a run."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from ibqlab.losses.errors import TrainingError, TrainingInterrupted
from ibqlab.recipes.tokenizer_config import TrainConfig


def launch(config: TrainConfig) -> Any:
    """Fabric with as many processes as the config asks for.

    Raises:
        TrainingError: another number of processes runs, or there are not as many devices; the message says what to
            type.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started != config.processes:
        raise TrainingError(
            f"the config asks for {config.processes} process(es), {started} are running; type: "
            + (
                f"torchrun --nproc-per-node {config.processes} -m ibqlab train RECIPE processes={config.processes}"
                if config.processes > 1
                else f"ibqlab train RECIPE processes={started}"
            )
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started > 1 else 1
    accelerator = _accelerator(config.accelerator, local)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from lightning_fabric import Fabric  # noqa: PLC0415 - four seconds, needed only to train
        from lightning_fabric.plugins.environments import LightningEnvironment  # noqa: PLC0415
        from lightning_fabric.strategies import DDPStrategy  # noqa: PLC0415
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=started // local,
        # Fabric's own double precision cuts every output to float32; the networks are double from the start instead.
        precision="32-true" if config.precision == "64-true" else config.precision,
        # A single process must not take a Slurm allocation for a world to join.
        plugins=[LightningEnvironment()] if started == 1 else None,
        # Upkeep keeps buffers equal on all processes; sending frozen codes at every step would cost K·D numbers.
        strategy=DDPStrategy(broadcast_buffers=False) if started > 1 else "auto",
    )
    fabric.launch()
    if fabric.world_size != config.processes:
        raise TrainingError(f"{fabric.world_size} process(es) came up, the config asks for {config.processes}")
    return fabric


def _accelerator(wanted: str, devices: int) -> str:
    """The kind of device for so many processes on this machine: cpu or cuda."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not there):
        return "cpu"
    if there < devices:
        raise TrainingError(
            f"each process needs a CUDA device of its own; {devices} run here and there are {there}. Start at most "
            f"{max(there, 1)}, or type accelerator=cpu"
        )
    return "cuda"


@contextmanager
def preparation() -> Iterator[None]:
    """Ctrl-C inside the block, in which a run is made ready, says how to go on like one that comes later.

    Raises:
        TrainingInterrupted: Ctrl-C came.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise TrainingInterrupted(
            "stopped before the training began, nothing is lost; go on with the same command"
        ) from None


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
