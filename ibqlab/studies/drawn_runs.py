"""Runs that figures of codes and features are drawn of: which ones, and what tells them apart."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from ibqlab.base.checks import require
from ibqlab.config import ConfigError, parse
from ibqlab.quantizers import INITIALISATIONS
from ibqlab.runs import Run
from ibqlab.runs.kinds import kind_of
from ibqlab.studies.method_grid import StudyParameters, name_start
from ibqlab.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class FeatureMapParameters(StudyParameters):
    """What the `parameters` cell of the notebook `feature_code_map` may set. Empty or 0 means: as the preset says."""

    study: str = ""
    """Folder of a study of methods that is there already; its finished runs are drawn, nothing is trained."""
    runs: tuple[str, ...] = ()
    """Names or folders of runs of tokenizers that are there already, likewise."""
    output: str = ""
    """Folder of figures and report; empty: feature_code_map-<preset>, or <study's folder>-figures."""

    def __post_init__(self):
        super().__post_init__()
        require(not (self.study and self.runs), "give either study or runs: both say which runs are drawn")
        if self.study or self.runs:
            plain = type(self)()
            free = ("preset", "projection", "output", "study", "runs")
            idle = [
                f.name for f in fields(self) if f.name not in free and getattr(self, f.name) != getattr(plain, f.name)
            ]
            source = "study" if self.study else "runs"
            require(not idle, f"{source} names runs that are drawn as they are; leave out {', '.join(idle)}")


class DrawnRun(NamedTuple):
    """A run, and what tells it from the others."""

    labels: dict[str, Any]
    """method, init, published_init, codebook_size, code_dim, seed."""
    run: Run

    @property
    def title(self) -> str:
        """As the plots take it, which give methods their proper names."""
        return f"{self.labels['method']} from {name_start(self.labels['init'], self.labels['published_init'])}"


def label_run(run: Run) -> DrawnRun:
    """A run with what tells it apart, read from its settings.

    Raises:
        ConfigError: it is no tokenizer's.
    """
    kind = kind_of(run.config)
    if kind != "tokenizer":
        raise ConfigError(
            f"runs: {run.name} is a {kind} run; the maps are of tokenizers with an encoder: name such runs"
        )
    config = parse(TrainConfig, run.located_config, source=run.name)
    quantizer = config.tokenizer.quantizer
    labels = {
        "method": quantizer.config_name,
        "init": INITIALISATIONS[quantizer.codebook_init],
        "published_init": quantizer.codebook_init == type(quantizer).codebook_init,
        "codebook_size": quantizer.codebook_size,
        "code_dim": quantizer.code_dim,
        "seed": config.seed,
    }
    return DrawnRun(labels, run)


def told_apart(runs: list[DrawnRun]) -> list[DrawnRun]:
    """The same, refused where two runs would share a line of a figure.

    Raises:
        ConfigError: the message names both.
    """
    seen: dict[tuple[Any, ...], str] = {}
    for one in runs:
        key = tuple(one.labels.values())
        if key in seen:
            raise ConfigError(
                f"runs: {seen[key]} and {one.run.name} have the same method, start, size and seed, so no figure could "
                "tell them apart; name one of them"
            )
        seen[key] = one.run.name
    return runs
