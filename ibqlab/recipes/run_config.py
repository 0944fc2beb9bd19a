"""What the settings of every training run hold, whatever it trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ibqlab.base import checks as bounds
from ibqlab.base.checks import require, require_at_most, require_choice
from ibqlab.data import DataConfig
from ibqlab.recipes.plugins import import_named

PRECISIONS = ("32-true", "bf16-mixed", "64-true")
ACCELERATORS = ("auto", "cpu", "cuda")
OTHER_PRECISIONS = {"32": "32-true", "fp32": "32-true", "float32": "32-true", "64": "64-true", "float64": "64-true"} | {
    name: "bf16-mixed" for name in ("16", "16-mixed", "bf16", "bfloat16", "fp16", "float16")
}
"""What other libraries call them, or what comes nearest."""


def ordered_keys(*names: str) -> Callable[[type], type]:
    """A decorator that puts a dataclass's fields in this order, which is that of their keys in config.yaml.

    A subclass would have its base's fields first. Fields must be keyword-only, so that nothing else depends on it.
    """

    def order(cls: type) -> type:
        fields = cls.__dataclass_fields__
        require(sorted(names) == sorted(fields), f"{cls.__name__} has the fields {', '.join(fields)}; order them all")
        cls.__dataclass_fields__ = {name: fields[name] for name in names}
        return cls

    return order


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run; a tokenizer's and a generator's settings add to it what they train."""

    data: DataConfig = field(default_factory=DataConfig)
    """Images. A generator's run turns them into tokens at every step, as published, or takes those that a store was
    made from."""
    steps: int = 300
    """Optimiser steps, ≥ 1."""
    batch_size: int = 16
    """Images per optimiser step over all processes and accumulated parts, ≥ 1. Published: 256 for tokenizers, 768 for
    generators."""
    accumulate: int = 1
    """Parts into which each process's share of a batch is cut to save memory, ≥ 1. A tokenizer's entropy penalty and
    moving averages see one part at a time."""
    processes: int = 1
    """Processes that train together, started by torchrun; fewer is an error. Published: 64 for tokenizers, 32 to 96 for
    generators."""
    accelerator: str = "auto"
    """"cpu", "cuda", or "auto": CUDA where there is one."""
    precision: str = "32-true"
    """"32-true", "bf16-mixed" or "64-true" (for proofs of equality). With "bf16-mixed" some parts stay in float32: the
    quantizer and the losses; a generator's norms, rotations and sum over the vocabulary."""
    seed: int = 0
    """Seed of weights, dropouts, crops and order, 0 to 2³¹ − 1. All randomness of a step comes from it and the step's
    number."""
    plugins: tuple[str, ...] = ()
    """Files (my_quantizer.py) and modules of your own that register quantizers; run before the settings are read, in
    every process, and copied into the run."""

    @classmethod
    def before_parsing(cls, settings: Mapping[str, Any]) -> None:
        """Run the plugins, which register what the settings name."""
        import_named(settings)

    def __post_init__(self):
        """Numbers lie within their bounds and divide; the device and the precision are known ones."""
        limits = {
            "steps": bounds.STEPS,
            "batch_size": bounds.BATCH,
            "accumulate": bounds.BATCH,
            "processes": bounds.PROCESSES,
        }
        for name, limit in limits.items():
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
            require_at_most(name, getattr(self, name), limit)
        require_at_most("data.workers", self.data.workers, bounds.WORKERS)
        require_at_most("data.image_size", self.data.image_size, bounds.IMAGE_SIDE)
        parts = self.processes * self.accumulate
        require(
            self.batch_size % parts == 0,
            f"batch_size {self.batch_size} must be a multiple of processes × accumulate = {parts}",
        )
        _require_meant("accelerator", self.accelerator, ACCELERATORS, {"gpu": "cuda"})
        _require_meant("precision", self.precision, PRECISIONS, OTHER_PRECISIONS)
        require(0 <= self.seed < 2**31, f"seed must lie in 0 … 2147483647, got {self.seed}")


def _require_meant(setting: str, value: str, choices: Sequence[str], synonyms: Mapping[str, str]) -> None:
    """Like `require_choice`, with what other libraries call the same."""
    if value in synonyms:
        choice_list = ", ".join(map(repr, choices))
        raise ValueError(f"{setting} must be one of {choice_list}, got {value!r}; write {setting}={synonyms[value]}")
    require_choice(setting, value, choices)
