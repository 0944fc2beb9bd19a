"""A run about to be trained: its folder, made or claimed to be resumed, its processes, and what it is made of."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ibqlab.base.files import is_ordinary
from ibqlab.recipes.plugins import import_plugins, plugin_copies
from ibqlab.recipes.run_config import RunConfig
from ibqlab.runs import Run, RunError
from ibqlab.training.data_check import compare_data
from ibqlab.training.failures import StopSignals
from ibqlab.training.launch import launch
from ibqlab.training.plugin_check import require_same_plugins


class RunInputs(NamedTuple):
    """What a run is made of. Whatever can be wrong with it shows while it is made, before anything is written."""

    source: Any
    """What is learned from."""
    networks: Any
    """What learns, on the CPU."""
    data_facts: Mapping[str, Any]
    """Identity of the images by split, for provenance and to find them unchanged at resume."""


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
    path: str | Path, config: RunConfig, data: Mapping[str, Any], accept_changed_data: bool, depends_on_steps: str
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
            or the plugins are not those that the run began with. Nothing was changed.
        TrainingError: other than the config's number of processes run.
    """
    facts: dict[str, Any] = {}
    plugins = import_plugins(config.plugins)
    if is_ordinary(Path(path) / "config.yaml"):
        run = Run(path)
        require_same_plugins(run, plugins)
        run.require_settings(config, more_steps=True)
        if depends_on_steps and run.has_fewer_steps(config):
            raise RunError(
                f"{path} was begun with steps={run.config['steps']}, and {depends_on_steps} depends on it: with more "
                f"steps it would be no run of {config.steps} steps; nothing was changed. Train a new one (--output "
                f"FOLDER){run.how_to_start_from(config)}"
            )
        facts = compare_data(run, data, accept_changed_data)
    fabric = launch(config)
    with StopSignals() as signals:
        claimed = None
        if fabric.is_global_zero:
            claimed = Run.start(path, config, claim=True, more_steps=True, copies=plugin_copies(plugins))
        try:
            fabric.barrier()
            images = sum(split.get("images", 0) for split in data.values() if isinstance(split, dict))
            yield Session(claimed or Run(path), fabric, signals, facts, images)
        finally:
            if claimed:
                claimed.release()
