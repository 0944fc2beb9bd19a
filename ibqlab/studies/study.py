"""A study: many runs in one folder, each trained once, and a report on them.

    study = open_study("explore_collapse", StudyParameters(preset="demo"))
    study.run().check()      # trains what is missing, each run in a process of its own
    study.rows()             # one row per finished run; tables are made of them

There is one `Study`. What one study has and another has not is its `StudyDefinition`: the parameters of its notebook,
its runs, and how its report is made. `registry` lists the definitions and opens studies.
"""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from ibqlab.base.checks import PROCESSES, STEPS, require, require_between, require_choice
from ibqlab.base.files import write_whole
from ibqlab.config import content_hash
from ibqlab.data import DataConfig
from ibqlab.diagnostics.lab import LabRunConfig
from ibqlab.grids.cells import PARAMETERS_FILE, STUDY_FILE, Cell, CellStore, StudyError, as_json
from ibqlab.grids.engine import Outcome, run_cells
from ibqlab.grids.local import LocalLauncher
from ibqlab.grids.slurm import SlurmLauncher
from ibqlab.recipes.plugins import import_plugins, plugin_copies
from ibqlab.runs import Run
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import output_folder, run_name
from ibqlab.runs.provenance_record import COMMAND, portable
from ibqlab.training import TrainConfig
from ibqlab.training.alarms import stop_reason
from ibqlab.training.data_check import open_images, reachable
from ibqlab.training.plugin_check import require_reachable, warn_of_broken_rules

CLUSTERS = ("local", "slurm")


@dataclass(frozen=True, kw_only=True)
class SharedParameters:
    """What the `parameters` cell of every study may set. Empty or 0 means: as the preset says."""

    preset: str = "laptop"
    """A size of the study: "smoke", "laptop" and others."""
    steps: int = 0
    """Training steps of every run."""
    workers: int = 0
    """Runs at a time on this machine, one per GPU or group of cores."""
    threads: int = 0
    """CPU threads of each; 0: the cores shared out evenly."""
    cluster: str = "local"
    """"local": processes of this machine; "slurm": jobs of the cluster that this machine submits to."""
    cluster_settings: tuple[str, ...] = ()
    """Of the cluster's jobs: ["partition=gpu", "timeout_min=600", "gpus_per_node=8"]."""
    retry: bool = False
    """Try runs again that failed before."""
    output: str = ""
    """Folder: a name below the folder of all runs, or a path that starts with / ./ or ~; empty: <study>-<preset>."""

    def __post_init__(self):
        require_between("steps", self.steps, 0, STEPS)
        for name in ("workers", "threads"):
            require_between(name, getattr(self, name), 0, PROCESSES)
        require_choice("cluster", self.cluster, CLUSTERS)
        require(
            not self.cluster_settings or self.cluster != "local",
            f"cluster_settings are for jobs of a cluster; got {list(self.cluster_settings)} with cluster=local. Give "
            "cluster=slurm",
        )


def require_distinct(axis: str, values: Sequence[Any]) -> None:
    """Refuse a list of settings that holds one of them twice."""
    require(len(set(values)) == len(values), f"{axis} holds a value twice: {list(values)}")


@dataclass(frozen=True, kw_only=True)
class StudyDefinition:
    """What makes one study differ from another: data, and small functions of them."""

    name: str
    """As typed: `ibqlab run NAME`; its notebook has the same name."""
    parameters: type[SharedParameters]
    """Of its notebook's `parameters` cell."""
    grid: Callable[[Any], Any]
    """Parameters → the same with the preset's values in them. Cells, facts and report are made of it; it has
    `workers`, the number of runs at a time."""
    cells: Callable[[Any, Path], Sequence[Cell]]
    """Grid and folder → all runs, those that others need first."""
    facts: Callable[[Any], dict[str, Any]]
    """Grid → what all runs of a folder have in common. Whatever else differs may be added to a folder."""
    report: Callable[["Study", bool], str]
    """The study, and whether figures that are there already are drawn again → its report as Markdown."""
    follow_up: Callable[[Any, CellStore], Sequence[Cell]] = lambda grid, store: ()
    """Grid and folder → runs that can be named only when others of it are finished, such as those at a rate that is
    searched for first; as many as can be named by now."""
    folder_name: Callable[[str, Any], str] = lambda name, parameters: f"{name}-{parameters.preset}"
    """Name and parameters → the folder to take where `output` is empty."""


class Study:
    """The runs of a definition at some parameters, and their folder. Nothing is written before `prepare` or `run`.

    Args:
        definition: of the study.
        parameters: of its notebook.
    Raises:
        ConfigError: an unknown preset, recipe or quantizer, or runs that cannot be.
    """

    def __init__(self, definition: StudyDefinition, parameters: SharedParameters):
        self.definition, self.parameters, self.name = definition, parameters, definition.name
        self.grid = definition.grid(parameters)
        self.folder = output_folder(parameters.output, default=definition.folder_name(self.name, parameters))
        self.store = CellStore(self.folder)
        self._first_cells = list(definition.cells(self.grid, self.folder))
        self.cells = self._named_by_now()
        self.facts = {"study": self.name, **definition.facts(self.grid)}
        self.plugins = import_plugins(list(dict.fromkeys(name for cell in self.cells for name in cell.config.plugins)))
        if self.plugins:
            self.facts["plugins"] = {plugin.file_name: plugin.sha256[:12] for plugin in self.plugins}

    def __repr__(self) -> str:
        return f"Study({self.name!r}, {len(self.cells)} runs, {str(self.folder)!r})"

    def _named_by_now(self) -> list[Cell]:
        """All runs that can be named, as `StudyDefinition.follow_up` says."""
        return [*self._first_cells, *self.definition.follow_up(self.grid, self.store)]

    @property
    def command(self) -> str:
        """What makes it again, for whoever may read it: of paths outside this folder and ~ only the end."""
        return self.command_to(portable(run_name(self.folder)))

    def command_to(self, output: str) -> str:
        """What is typed to go on with this study.

        Args:
            output: its folder's name or path, left out where it is the one that the study takes by itself.
        """
        plain = type(self.parameters)()
        changed = {field.name: getattr(self.parameters, field.name) for field in fields(plain)}
        words = [f"preset={self.parameters.preset}"]
        words += [
            f"{key}={as_typed(value)}"
            for key, value in changed.items()
            if key not in ("preset", "retry", "output", "wait") and value != getattr(plain, key)
        ]
        if run_name(self.folder) != self.definition.folder_name(self.name, self.parameters):
            words.append(shlex.quote(f"output={output}"))
        return " ".join(["ibqlab run", self.name, *words])

    def prepare(self) -> None:
        """Make the folder and write down what is to be trained in it, so that another process can do so.

        Raises:
            StudyError, ConfigError, RunError, ValueError: as `run`.
        """
        self.finished()  # refuses runs with other settings
        trained = [cell.config for cell in self.cells if isinstance(cell.config, (TrainConfig, LabRunConfig))]
        require_reachable(trained)
        if self.parameters.cluster == "local":
            self._open_images()
        warn_of_broken_rules(trained)
        self.store.claim(self.facts)
        for name, content in plugin_copies(self.plugins).items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            write_whole(self.folder / name, content)
        write_whole(self.folder / PARAMETERS_FILE, as_json({"study": self.name, **asdict(self.parameters)}))

    def run(self, progress: bool = True) -> Outcome:
        """Train every run that is not finished. Failures are returned, not raised, so that a notebook goes on to its
        tables; `Outcome.check` raises them.

        Raises:
            StudyError: the folder is another study's, or there is no cluster.
            ConfigError: a quantizer that the runs' processes could not find, such as one of a notebook's cell.
            RunError: a run of the folder has other settings, or the folder cannot be written. Nothing is trained.
            ValueError: there are no images where the settings say.
        """
        self.prepare()
        os.environ[COMMAND] = self.command_to(run_name(self.folder))
        typed = self.parameters
        if typed.cluster == "slurm":
            launcher = SlurmLauncher(self.folder, typed.cluster_settings)
        else:
            launcher = LocalLauncher(typed.workers or self.grid.workers, typed.threads)
        try:
            retry, tried = typed.retry, set()
            # By their names: a search that ends otherwise than before names other runs, not more of them.
            while new := {cell.name for cell in self.cells} - tried:
                tried |= new
                outcome = run_cells(self.cells, self.store, launcher, retry=retry, progress=progress)
                self.cells, retry = self._named_by_now(), False
            return outcome
        finally:
            os.environ.pop(COMMAND, None)

    def _open_images(self) -> None:
        """Open once what the runs to come train on: a path that leads nowhere is told once, before anything starts."""
        sources: list[DataConfig] = []
        for cell in self.cells:
            if isinstance(cell.config, TrainConfig) and self.store.row(cell) is None:
                data = reachable(cell.config, self.folder / cell.name).data
                if data not in sources:
                    open_images(data)
                    sources.append(data)

    def rows(self) -> pd.DataFrame:
        """One row per run that is finished by now, in the order of the cells.

        Raises:
            StudyError: none is; the message gives the first failure.
        """
        rows = self.store.table(self.cells)
        if rows.empty:
            raise self.nothing_finished()
        return rows

    def nothing_finished(self) -> StudyError:
        """The error of whoever needs a finished run and has none; it gives the first failure."""
        why = "".join(f"; {name} failed: {error}" for name, error in self.failures()[:1])
        return StudyError(f"no run of {self.name} is finished in {self.folder.name}; call run() first{why}")

    def failures(self) -> list[tuple[str, str]]:
        """Names of the runs that failed, each with its error, in the order of the cells."""
        return [(cell.name, failure["error"]) for cell in self.cells if (failure := self.store.failure(cell))]

    def finished(self) -> list[tuple[Cell, Run]]:
        """Cells whose training is finished, with their run folders; those that the alarm has stopped are, too.

        Raises:
            RunError: a cell's folder holds another config.
        """
        runs = []
        for cell in self.cells:
            if (self.folder / cell.name / "config.yaml").is_file():
                run = Run(self.folder / cell.name)
                if run.config_hash != content_hash(cell.config):
                    Run.start(run.path, cell.config)  # refuses, and names the keys that differ
                runs.append((cell, run))
        return [(cell, run) for cell, run in runs if run.status == "finished" or stop_reason(run)]

    def metrics(self) -> pd.DataFrame:
        """All logged rows of all finished runs, with the cells' labels as columns.

        Raises:
            StudyError: as `rows`.
        """
        frames = [run.metrics.assign(run=cell.name, **cell.labels) for cell, run in self.finished()]
        if not frames:
            raise self.nothing_finished()
        return pd.concat(frames, ignore_index=True)

    @property
    def too_short(self) -> str:
        """Why its runs are too short to mean anything: its preset, or their steps; empty where they are not."""
        return why_too_short(max(cell.config.steps for cell in self.cells), self.parameters.preset)

    def require_same(self) -> None:
        """Refuse a folder of other runs, before anything is read from it or started in it.

        Raises:
            StudyError: the folder is of another study; the message gives the differences.
            RunError: it is of no study yet and holds a run with other settings.
        """
        changes = self.store.differences(self.facts)
        if changes:
            raise StudyError(f"{self.folder} holds another grid; nothing was changed. There → yours: {changes}")
        if not (self.folder / STUDY_FILE).exists():
            for cell in self.cells:
                Run.check(self.folder / cell.name, cell.config)


def as_typed(value: Any) -> str:
    """A parameter's value as a shell takes it."""
    if not isinstance(value, tuple):
        return shlex.quote(str(value))
    items = [f'"{item}"' if "," in str(item) else str(item) for item in value]
    return shlex.quote(f"[{', '.join(items)}]")
