"""What recording and a live view cost a training: shares of the training process's processor time.

    python experiments/benchmarks/live_view.py builtin/photos --output live_view.csv

One run in this process, watched by a view in another. The view is stopped and let go on, in turn, every `--block`
steps, so that both kinds of steps come from the same minutes of the same machine: `watched_share` is the middle of the
pairs' extra cost, `noise` half the range between their quartiles. `recorder_share` is what usage, rows, alarm and
snapshots take of the same run. All in processor time, which a busy machine changes little; `view_share` is the time
that the view itself takes of another core, which trains nothing.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rows import origin_columns

from ibqlab.runs import Run
from ibqlab.training import recipe_config, train
from ibqlab.training.alarms import RunAlarm
from ibqlab.training.tokenizer import loop


class Account:
    """Processor seconds of this process that calls of some functions take."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; calls from within another counted one are not counted twice."""

        def call(*arguments: Any, **settings: Any) -> Any:
            self.depth += 1
            began = time.process_time()
            try:
                return function(*arguments, **settings)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.process_time() - began

        return call


def watch(folder: str) -> None:
    """Be the kernel of a notebook that shows a run."""
    from ibqlab.widgets import TrainingView  # noqa: PLC0415 - the training process needs none

    async def look() -> None:
        view = TrainingView(folder)
        print("loaded", flush=True)
        await asyncio.sleep(0)  # watching begins with the loop's next turn
        await view._watching

    asyncio.run(look())


class Viewer:
    """The view's process: stopped, and let go on."""

    def __init__(self, folder: Path):
        command = [sys.executable, __file__, "--watch", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()  # has loaded
        self.pause()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @property
    def seconds(self) -> float:
        """Processor time by now."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.go_on()
        self.process.terminate()
        self.process.wait()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Train once and keep account."""
    steps = arguments.block * (2 * arguments.pairs + 1)
    settings = {"steps": steps, "record.log_every": arguments.log_every, "record.validate_every": arguments.block}
    config = recipe_config(arguments.recipe, settings)
    recording = Account()
    for place, name in (
        (Run, "log"),
        (Run, "save_snapshot"),
        (RunAlarm, "check"),
        (loop, "take_snapshot"),
        (loop._TokenizerTrainer, "_timed"),
    ):
        setattr(place, name, recording.counted(getattr(place, name)))
    marks: list[tuple[float, float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        viewers: list[Viewer] = []

        def see(row: dict[str, Any]) -> None:
            if row["step"] == 0:
                viewers.append(Viewer(path))
            if row["step"] and row["step"] % arguments.block == 0:
                viewer = viewers[0]
                marks.append((time.process_time(), recording.seconds, viewer.seconds, time.perf_counter()))
                viewer.go_on() if len(marks) % 2 else viewer.pause()

        try:
            train(config, path, watch=see, progress=False)
        finally:
            for viewer in viewers:
                viewer.end()
    training, recorded, viewed, wall = np.diff(np.array(marks), axis=0).T
    watched, alone = training[0::2], training[1::2]
    extra = watched / alone - 1
    low, middle, high = np.quantile(extra, (0.25, 0.5, 0.75))
    return {
        "recipe": arguments.recipe,
        "log_every": arguments.log_every,
        "codebook_size": config.tokenizer.quantizer.codebook_size,
        "steps": steps,
        "step_ms": 1000 * training.mean() / arguments.block,
        "recorder_share": recorded.sum() / training.sum(),
        "watched_share": middle,
        "noise": (high - low) / 2,
        "pairs": len(extra),
        "view_share": viewed[0::2].sum() / wall[0::2].sum(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="builtin/photos")
    parser.add_argument("--block", type=int, default=20, help="steps between two turns of the view")
    parser.add_argument("--pairs", type=int, default=10, help="blocks with the view, and as many without")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--output", type=Path, help="CSV file")
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        watch(arguments.watch)
        return
    table = pd.DataFrame([measure(arguments) | origin_columns(0)])
    print(table[["recipe", "step_ms", "recorder_share", "watched_share", "noise", "view_share"]].to_string(index=False))
    if arguments.output:
        table.to_csv(arguments.output, index=False)


if __name__ == "__main__":
    main()
