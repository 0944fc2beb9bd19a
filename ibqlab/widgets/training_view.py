"""Runs that train in processes of their own, watched and steered from a notebook.

A view reads the run folders, again and again, in the kernel's own loop; it holds nothing. Closing the browser or the
kernel ends no training, and a view that is made again shows the run as it stands.
"""

import asyncio
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets

from ibqlab.base.escaping import for_html
from ibqlab.base.files import RunError
from ibqlab.base.measures import measure
from ibqlab.runs import Run
from ibqlab.studies import Study
from ibqlab.studies.run_explanation import run_alarms
from ibqlab.views.study_process import StudyProcess
from ibqlab.views.subject import lacking
from ibqlab.views.training_process import BackgroundProcess, TrainingProcess
from ibqlab.widgets.live import faded, with_static_page
from ibqlab.widgets.training_pictures import RunPictures, alarms_html, plot_runs_together, together_html

__all__ = ["COMPARED", "EVERY", "TrainingView", "plot_runs_together"]

EVERY = 2.0
"""Seconds between two looks at the run's folder."""
SHARE_OF_TIME = 0.125
"""Spent on drawing at most: where a picture takes long, looks get rarer."""
COMPARED = ("validation_usage", "step_usage", "usage", "perplexity", "gradient_reach", "loss", "validation_psnr")
"""Measures that several runs can be drawn together in."""
NEWEST = "the one in training"
"""Choice of the run that a study works on now."""
_POLL = 0.25
_LEFT = {"width": "58%", "min_width": "420px"}
_RIGHT = {"width": "40%", "min_width": "320px"}
_CONTROL = {"style": {"description_width": "initial"}, "layout": {"width": "max-content"}}


class TrainingView(ipywidgets.VBox):
    """One or several runs while they train: curves, hits per code and the map of the chosen one, and buttons.

    "start" begins the training, or goes on from its last checkpoint. "pause" ends its process after the step in
    progress, with a checkpoint of it. There is no other button to stop: a paused run takes no memory and no time, and
    going on from it tomorrow is the same as going on now.

    Watching ends where nobody sees the view any more, and with the run. Looks at the folders get rarer where drawing
    takes long, so that they take at most an eighth of a processor's time.

    Args:
        runs: run folders or names, or processes from `TrainingProcess.begin`, one or several; or a study. What cannot
            be opened is told in the view.
        every: seconds between two looks at the folders, at least 0.2.
    Raises:
        ValueError: no run, or looks that are too frequent.
    """

    def __init__(self, runs: Any, every: float = EVERY):
        if every < 0.2:
            raise ValueError(f"every is a time in seconds, at least 0.2; got {every}")
        self.every = every
        self.problem = ""
        """Why runs that were asked for are not here."""
        self.paths: dict[str, Path] = {}
        """Name in the legend → run folder, which may not be there yet."""
        self.processes: dict[str, BackgroundProcess] = {}
        """Name → what trains it; a study's runs share one."""
        self._open(runs)
        self._pictures = {name: RunPictures(name) for name in self.paths}
        self._build_controls()
        left = ipywidgets.VBox([self.together, self.curves, self.histogram], layout=_LEFT)
        both = ipywidgets.HBox([left, self.code_map], layout={"flex_flow": "row wrap", "align_items": "flex-start"})
        super().__init__([self._controls, self.said, self.alarms, both])
        self.add_class("ibqlab-training")
        self._lock = threading.RLock()  # some kernels answer buttons in another thread while a cell runs
        self._seen: Any = None
        self._trouble = ""  # why the pictures could not be drawn; the buttons know nothing of it
        self._due = 0.0
        self._asked_to_stop = False
        self._paused_here = False
        self._freed = threading.Event()
        self._watching: asyncio.Task | None = None
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._was_shown = False
        self._view_count = 0  # from now on the browser counts in how many places the view is shown
        self.observe(self._note_shown, names="_view_count")
        self.refresh(force=True)
        self.watch()

    def _open(self, runs: Any) -> None:
        """Find what is to be watched."""
        if isinstance(runs, Study | StudyProcess):
            study = runs if isinstance(runs, StudyProcess) else StudyProcess(runs)
            self.paths = {label: study.path / name for name, label in study.labels.items()}
            self.processes = dict.fromkeys(self.paths, study)
            return
        several = runs if isinstance(runs, Sequence) and not isinstance(runs, str | Path) else [runs]
        if not several or runs is None:
            raise ValueError("a view needs at least one run; pass a run's name or folder")
        problems = []
        for one in several:
            try:
                process = one if isinstance(one, TrainingProcess) else TrainingProcess(getattr(one, "path", one))
                # Runs of different folders may have one name.
                name = process.path.name if process.path.name not in self.paths else str(process.path)
                self.paths[name], self.processes[name] = process.path, process
            except (RunError, OSError, ValueError) as error:
                problems.append(lacking(error))
        self.problem = " ".join(problems)

    def _build_controls(self) -> None:
        names = list(self.paths)
        of_study = any(isinstance(process, StudyProcess) for process in self.processes.values())
        self.choice = ipywidgets.Dropdown(
            options=[*([NEWEST] if of_study else []), *names], description="run", **_CONTROL
        )
        self.measure = ipywidgets.Dropdown(
            options=[(measure(key).title, key) for key in COMPARED], description="compare by", **_CONTROL
        )
        self.start = ipywidgets.Button(
            description="start",
            icon="play",
            tooltip="train, in a process that outlives this notebook",
            layout={"width": "auto"},
        )
        self.stop = ipywidgets.Button(
            description="pause",
            icon="pause",
            tooltip="end after the step in progress, with a checkpoint; going on from it is possible at any time",
            layout={"width": "auto"},
        )
        self.free = ipywidgets.Button(
            description="free the kernel",
            tooltip="stop waiting, so that other cells of the notebook can run; the training stays as it is",
            layout={"width": "auto", "display": "none"},
        )
        self.start.on_click(lambda _: self._steer("start"))
        self.stop.on_click(lambda _: self._steer("stop"))
        self.free.on_click(lambda _: self._freed.set())
        for control in (self.choice, self.measure):
            control.observe(lambda _: self.refresh(force=True), names="value")
        self.said, self.alarms, self.together, self.curves, self.histogram = (ipywidgets.HTML() for _ in range(5))
        self.code_map = ipywidgets.HTML(layout=_RIGHT)
        several = len(names) > 1
        self._controls = ipywidgets.HBox(
            [
                self.start,
                self.stop,
                self.free,
                *([self.choice, self.measure] if several else []),
            ],
            layout={"flex_flow": "row wrap"},
        )

    # --- what is shown, and what trains it ---

    @property
    def chosen(self) -> str:
        """Name of the run whose pictures are shown; "" where there is none."""
        if self.choice.value != NEWEST:
            return self.choice.value or ""
        process = next(iter(self.processes.values()))
        training = set(process.training())
        there = [name for name, path in self.paths.items() if (path / "config.yaml").is_file()]
        now = [name for name in there if self.paths[name].relative_to(process.path).as_posix() in training]
        return (now or there[-1:] or [""])[0]

    @property
    def process(self) -> BackgroundProcess | None:
        """What the buttons steer: of the chosen run, or the study's; None where no run could be opened."""
        return self.processes.get(self.choice.value) or next(iter(self.processes.values()), None)

    # --- watching ---

    def watch(self) -> None:
        """Look at the folders again and again, in the kernel's own loop; without one, `refresh` does by hand."""
        if self._loop is not None:
            # May be called from another thread than the loop's.
            self._loop.call_soon_threadsafe(self._begin_watching)

    def _begin_watching(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = self._loop.create_task(_look(weakref.ref(self)))

    @property
    def is_watched(self) -> bool:
        """Whether looking goes on: the view is not closed, somebody may see it, and something may still change."""
        if self.comm is None or (self._was_shown and not self._view_count):
            return False
        with self._lock:
            return any(not _is_over(process) for process in self.processes.values())

    def _note_shown(self, change: Any) -> None:
        if change["new"]:
            self._was_shown = True
            self.watch()

    async def wait(self) -> bool:
        """Wait until the training has ended, or the button "free the kernel" is pressed.

        A training that this view has paused has not ended: it goes on by the button beside.

        It has to be awaited in the cell itself: a cell that blocks the kernel's loop lets no button be heard, and a
        kernel that waits in the loop draws meanwhile, too.

        Returns:
            Whether the training has ended.
        """
        self._freed.clear()
        self.free.layout.display = ""
        try:
            while self.process is not None and (self.process.is_running or self._is_paused()):
                await asyncio.sleep(_POLL)
                if self._freed.is_set():
                    return False
            return True
        finally:
            self.free.layout.display = "none"
            self.refresh(force=True)

    def _is_paused(self) -> bool:
        """Whether this view's button ended the process before its work was done."""
        return self._paused_here and not self.process.is_finished

    def refresh(self, force: bool = False) -> None:
        """Draw what is new in the folders; an error is shown in place of the picture.

        Args:
            force: draw now, and although nothing is new.
        """
        with self._lock:
            try:
                self._tell()
            except (RunError, OSError, ValueError, LookupError) as error:
                self.said.value = f"<b>{for_html(lacking(error), None)}</b>"
                self.start.disabled = self.stop.disabled = True
                self._fade()
                return
            if not force and time.monotonic() < self._due:
                return
            began, trouble = time.thread_time(), self._trouble
            try:
                self._trouble = ""
                self._draw_new(force)
            except (RunError, OSError, ValueError, LookupError) as error:
                self._trouble = lacking(error)
            except Exception as error:  # in a callback nobody would see it
                self._trouble = f"The view cannot be drawn ({type(error).__name__}: {error})."
            if self._trouble:
                self._fade()
            if self._trouble != trouble:
                self._tell()
            # In seconds of a processor: on a busy machine the clock on the wall says little about the cost.
            self._due = time.monotonic() + max(self.every, (time.thread_time() - began) / SHARE_OF_TIME)

    def _fade(self) -> None:
        """What was shown last is no longer how it stands."""
        if self._seen is not None:
            self._seen = None
            for part in (self.together, self.curves, self.histogram, self.code_map):
                part.value = faded(part.value)

    def static_html(self) -> str:
        """The pictures as they are shown now."""
        left = f"<div>{self.together.value}{self.curves.value}{self.histogram.value}</div>"
        both = f'<div style="display: flex; flex-wrap: wrap">{left}<div>{self.code_map.value}</div></div>'
        return f"<p>{self.said.value}</p>{self.alarms.value}{both}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    def _steer(self, what: str) -> None:
        """What the buttons do."""
        try:
            if self.process is not None:
                getattr(self.process, what)()
            self._asked_to_stop = self._paused_here = what == "stop"
        except (RunError, OSError, ValueError) as error:
            self.said.value = f"<b>{for_html(lacking(error), None)}</b>"
            return
        self.refresh(force=True)
        self.watch()

    def _tell(self) -> None:
        """Where the training stands, in words, and what the buttons can do now."""
        process, problems = self.process, " ".join(filter(None, (self.problem, self._trouble)))
        problem = f"<b>{for_html(problems, None)}</b>" if problems else ""
        if process is None:
            self.said.value = problem
            self.start.disabled = self.stop.disabled = True
            return
        running = process.is_running
        self._asked_to_stop &= running
        self.start.disabled = running or process.is_finished
        self.stop.disabled = not running or self._asked_to_stop
        self.start.description = "go on" if process.has_begun else "start"
        words = process.describe()
        if self._asked_to_stop:
            words = f"{process.path.name}: the step in progress is being finished and saved …"
        self.said.value = f"{for_html(words, None)} {problem}"

    def _draw_new(self, force: bool) -> None:
        """The pictures, where something is new."""
        if not self.paths:
            return
        name = self.chosen
        state = self._state(name)
        if state == self._seen and not force:
            return
        self._draw(name)
        self._seen = state

    def _draw(self, name: str) -> None:
        there = {one: Run(path) for one, path in self.paths.items() if (path / "config.yaml").is_file()}
        if len(self.paths) > 1:
            self.together.value = together_html(there, self.measure.value)
        if name in there:
            run = there[name]
            self.alarms.value = alarms_html(run_alarms(run)[0])
            self.curves.value = self._pictures[name].curves(run)
            self.code_map.value, self.histogram.value = self._pictures[name].snapshot(run)
        else:
            self.curves.value = "curves appear with the first step"

    def _state(self, name: str) -> Any:
        """What the pictures depend on: how long the metrics are, and which snapshots there are."""
        sizes = []
        for path in self.paths.values():
            file = path / "metrics.jsonl"
            sizes.append((file.stat().st_size if file.is_file() else 0, len(list((path / "snapshots").glob("*.npz")))))
        return name, self.measure.value, tuple(sizes)


async def _look(reference: "weakref.ref[TrainingView]") -> None:
    """Refresh a view again and again; it is not kept alive for that."""
    while (view := reference()) is not None:
        view.refresh()
        if not view.is_watched:
            view.refresh(force=view._seen is not None)  # the last rows may have come since
            return
        pause = view.every
        del view
        await asyncio.sleep(pause)


def _is_over(process: BackgroundProcess) -> bool:
    """Whether nothing will change any more by itself: finished, or gone."""
    try:
        return not process.is_running and process.is_finished
    except (RunError, OSError, ValueError):
        return True
