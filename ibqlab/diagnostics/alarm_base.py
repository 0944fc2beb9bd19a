"""What a rule of the alarm is: the facts it knows, what it must answer, and how it reads a row."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ibqlab.base.checks import is_finite_number, whole_number


@dataclass(frozen=True, kw_only=True)
class CodebookFacts:
    """What rules must know of a codebook beside the rows."""

    codebook_size: int
    """K."""
    softmax: bool = False
    """Whether the gradient goes through a softmax over z·C, as IBQ's does."""
    fixed: bool = False
    """Whether no code ever moves, as in LFQ's grid of signs."""
    mapped: bool = False
    """Whether codes come out of a map that moves all of them at once, as in SimVQ."""
    double_quantization: bool = True
    """Whether IBQ's term that holds features back is on; True for methods that have no such term."""
    entropy_epsilon: float | None = None
    """ε inside the logarithm of the average entropy that is trained for; None where none is."""
    placeholder_share: float = 0.0
    """Share of the placeholder in the averaged codebook at the last step, 0 to 1."""
    monitored: bool = False
    """Whether the model is somebody else's: remedies are words then, and no settings of ours."""

    def __post_init__(self):
        whole_number("codebook_size", self.codebook_size, 1)

    @property
    def entropy_ceiling(self) -> float:
        """The largest average entropy that the loss can see, −ln(1/K + ε) nats; ln K for ε = 0."""
        return -math.log(1 / self.codebook_size + (self.entropy_epsilon or 0.0))


class Words(NamedTuple):
    """What a rule says when it goes off."""

    seen: str
    cause: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """One sign of trouble."""

    name: ClassVar[str]
    title: ClassVar[str]
    """In two words, for figures."""
    rows: int = 3
    """Rows in sequence that must show it. One alone may be a step of few images or a chance."""
    clear_rows: int = 10
    """Rows in sequence without it, after which it may go off again: a measure at its threshold is told of once."""
    stops: bool = True
    """Whether a run that stops at alarms stops at this one."""

    def concerns(self, facts: CodebookFacts) -> bool:
        """Whether the rule means anything for a codebook."""
        return True

    @abstractmethod
    def judge(self, row: Mapping[str, Any], facts: CodebookFacts, memory: dict[str, Any]) -> dict[str, float] | None:
        """The numbers of a row that show trouble; {} where all is well, None where the row does not tell.

        Args:
            row: as a run logs it.
            facts: of the codebook.
            memory: what the rule keeps between rows, empty before the first.
        """

    @abstractmethod
    def explain(self, values: Mapping[str, float], facts: CodebookFacts) -> Words:
        """What to say of the numbers that `judge` gave."""


def read_numbers(row: Mapping[str, Any], *keys: str) -> dict[str, float] | None:
    """Some numbers of a row; None where one is missing or not finite."""
    values = {key: row.get(key) for key in keys}
    return {key: float(value) for key, value in values.items()} if all(map(is_finite_number, values.values())) else None


def even_share(row: Mapping[str, Any]) -> float | None:
    """Codes that a step's tokens hit, as a share of those that even use would hit; None where the row does not tell."""
    values = read_numbers(row, "step_usage", "step_usage_even")
    return values["step_usage"] / values["step_usage_even"] if values and values["step_usage_even"] > 0 else None


def quantization_loss(row: Mapping[str, Any]) -> float | None:
    """Mean squared distance of features to their codes, under the name that the row has for it; None without one."""
    keys = ("term_commitment", "quantization_error", "quantizer_loss")
    return next((float(row[key]) for key in keys if is_finite_number(row.get(key))), None)
