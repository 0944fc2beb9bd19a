"""What a case is: settings side by side, what is measured, and claims that the runs must bear out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ibqlab.base.checks import require_choice
from ibqlab.base.intervals import Interval, name_student_interval, student_interval
from ibqlab.base.measures import SHARE as UNIT_OF_SHARES
from ibqlab.base.measures import measure

REPORTED, COMPARED, REMEDY = "as reported", "compared", "remedy"
ROLES = (REPORTED, COMPARED, REMEDY)
SHARE = (0.0, 1.0)
"""Bounds of a share."""
KINDS = ("symptom", "cause", "remedy")
LEAST_SEEDS = 3
"""Seeds that a claim needs before it is judged: with two, Student's interval is 12.7 standard errors to either side."""


@dataclass(frozen=True, kw_only=True)
class CaseMeasure:
    """A number that a case follows."""

    key: str
    """Column of the curves."""
    title: str
    """In words, as it stands in sentences: "usage"."""
    axis: str = ""
    """What its axis says; empty: the unit."""
    unit: str = ""
    """Behind a number that was multiplied by `scale`, with a space in front: " %", " dB"."""
    scale: float = 1.0
    """From the value to what is shown: 100 for shares."""
    decimals: int = 1
    """Digits after the point."""
    bounds: tuple[float, float] = (-np.inf, np.inf)
    """What its value, before the scale, cannot leave."""
    is_change: bool = False
    """Whether it is a difference already, and is written with its sign."""
    log: bool = False
    """Whether its axis is logarithmic."""
    limit: float | None = None
    """A value that means something by itself, drawn as a line."""
    limit_text: str = ""
    """What that value is."""
    drawn: bool = True
    """Whether it has a panel; one that exists only at a run's end has none."""

    @classmethod
    def listed(cls, key: str, **settings: Any) -> "CaseMeasure":
        """One that `ibqlab.base.measures` lists, called as there.

        Args:
            key: of it.
            settings: other fields.
        """
        quantity = measure(key)
        facts = {"unit": " %", "bounds": quantity.bounds} if quantity.unit == UNIT_OF_SHARES else {}
        return cls(key=key, title=quantity.title, scale=quantity.scale, **facts | settings)

    def text(self, interval: Interval, signed: bool = False) -> str:
        """A mean over seeds with its interval, for reading; of a difference with its sign."""
        unit = " points" if signed and self.unit == " %" else self.unit
        return interval.text(self.decimals, self.scale, unit, signed=signed)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the settings that a case puts side by side."""

    key: str
    """Its name in folders and tables."""
    label: str
    """Its name in figures and sentences."""
    role: str = COMPARED
    """One of `ROLES`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What its runner is told."""
    typed: str = ""
    """Of a remedy: what to type into a recipe or a command."""

    def __post_init__(self):
        require_choice("role", self.role, ROLES)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Something that runs may bear out: a measure is lower, or higher, for one arm than for another."""

    kind: str
    """One of `KINDS`."""
    measure: str
    """Key of the measure, at the end of a run."""
    arm: str
    """Key of the arm that is spoken of."""
    against: str = ""
    """Key of the arm that it is compared with, seed by seed; empty: with 0, for a measure that is a change already."""
    lower: bool = False
    """Whether the arm's value is said to be the lower one."""
    says: str
    """What may be said where it holds."""

    def __post_init__(self):
        require_choice("kind", self.kind, KINDS)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim after the runs."""

    claim: Claim
    difference: Interval
    """Of the arm's value minus the other's, mean over seeds and Student's 95 % interval."""
    sentence: str
    """What was seen, with numbers. It repeats the claim only where that holds."""

    @property
    def is_judged(self) -> bool:
        """Whether enough seeds have a value."""
        return self.difference.count >= LEAST_SEEDS

    @property
    def holds(self) -> bool:
        """Whether the interval excludes 0 on the side that the claim names; never where nothing is judged."""
        low, high = self.difference.low, self.difference.high
        return self.is_judged and bool(high < 0 if self.claim.lower else low > 0)


Runner = Callable[[Arm, int, int, Path], pd.DataFrame]
"""(arm, seed, steps, folder) → curve: column x, and a column per measure. It leaves run folders, and reads
those that are finished."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case that people report."""

    name: str
    """As parameters name it."""
    title: str
    """In a few words."""
    symptom: str
    """What people see, and where it was reported."""
    setting: str
    """What is run here in its place."""
    arms: tuple[Arm, ...]
    """Settings side by side."""
    measures: tuple[CaseMeasure, ...]
    """What is followed."""
    claims: tuple[Claim, ...]
    """What the runs must bear out."""
    runner: Runner
    """Makes one run of one arm."""
    steps: int
    """Of a run, where nobody asks for other ones."""
    x_title: str = "step"
    """Of the horizontal axis."""
    x_log: bool = False
    """Whether it is logarithmic."""
    ends: Callable[[pd.DataFrame], Mapping[str, float]] | None = None
    """Measures of a whole curve beyond the last value of each column."""
    epochs: int = 0
    """How many epochs a run stands for; 0 where that means nothing."""
    caveat: str = ""
    """What the small case leaves out of the reported one."""

    def arm(self, key: str) -> Arm:
        """The arm of a key."""
        return next(arm for arm in self.arms if arm.key == key)

    def measure(self, key: str) -> CaseMeasure:
        """The measure of a key."""
        return next(measure for measure in self.measures if measure.key == key)

    def run(self, seeds: Sequence[int], steps: int, folder: Path, show: Callable[[str], None] = print) -> "CaseResult":
        """Every arm with every seed; runs that are finished in the folder are read.

        Args:
            seeds: of the runs.
            steps: of each; 0: the case's own.
            folder: of the case.
            show: told what is being run.
        Raises:
            RunError: the folder holds a run with other settings.
        """
        curves, steps = [], steps or self.steps
        for arm in self.arms:
            for seed in seeds:
                show(f"{self.title}: {arm.label}, seed {seed}")
                curve = self.runner(arm, seed, steps, folder / f"seed{seed}")
                curves.append(curve.assign(arm=arm.key, label=arm.label, role=arm.role, seed=seed))
        return CaseResult(case=self, steps=steps, curves=pd.concat(curves, ignore_index=True))


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """The runs of a case, and what they say."""

    case: Case
    steps: int
    """Of every run."""
    curves: pd.DataFrame
    """One row per arm, seed and x: arm, label, role, seed, x, and the measures."""

    @property
    def seeds(self) -> int:
        """How many there are."""
        return self.curves["seed"].nunique()

    @property
    def not_judged(self) -> str:
        """Why no claim is judged; empty where there are seeds enough."""
        return too_few_seeds(self.seeds)

    def ends(self) -> pd.DataFrame:
        """One row per arm and seed: the last value of every measure, and what the case computes of whole curves."""
        rows = []
        for (arm, seed), curve in self.curves.sort_values("x", kind="stable").groupby(["arm", "seed"], sort=False):
            last = {m.key: _last(curve[m.key]) for m in self.case.measures if m.key in curve}
            more = self.case.ends(curve) if self.case.ends else {}
            rows.append({"arm": arm, "seed": seed, **last, **more})
        return pd.DataFrame(rows)

    def table(self) -> pd.DataFrame:
        """One row per arm: what it is, and each measure at the end, mean over seeds with Student's 95 % interval."""
        ends, rows = self.ends(), []
        for arm in self.case.arms:
            own = ends[ends["arm"] == arm.key]
            cells = {
                m.title: m.text(student_interval(list(own[m.key]), m.bounds), m.is_change) for m in self.case.measures
            }
            rows.append({"setting": arm.label, "role": arm.role, **cells})
        return pd.DataFrame(rows)

    def findings(self) -> list[Finding]:
        """Every claim of the case, judged."""
        ends = self.ends().set_index(["arm", "seed"])
        return [self._judge(claim, ends) for claim in self.case.claims]

    @property
    def reproduced(self) -> bool:
        """Whether every claim about the symptom holds."""
        return all(self._symptoms())

    def _symptoms(self) -> list[bool]:
        """Of each claim about the symptom, whether it holds."""
        return [finding.holds for finding in self.findings() if finding.claim.kind == "symptom"]

    def report(self) -> str:
        """The case as Markdown: whether it was reproduced, cause and remedy as far as the runs bear them out."""
        findings = self.findings()
        symptoms = self._symptoms()
        seen = "Reproduced, with a reservation" if self.case.caveat else "Reproduced"
        verdict = seen if all(symptoms) else "Not reproduced"
        if any(symptoms) and not all(symptoms):
            verdict = f"Reproduced in part: {sum(symptoms)} of {len(symptoms)} claims about the symptom"
        if self.not_judged:
            verdict = f"Nothing is judged: {self.not_judged}"
        lines = [f"**{verdict}.**" + (f" {self.case.caveat}" if self.case.caveat else ""), ""]
        for kind in KINDS:
            lines += [f"* *{kind}*: {finding.sentence}" for finding in findings if finding.claim.kind == kind]
        helpful = {finding.claim.arm for finding in findings if finding.claim.kind == "remedy" and finding.holds}
        typed = [f"`{arm.typed}`" for arm in self.case.arms if arm.key in helpful and arm.typed]
        if not self.not_judged:
            lines += ["", "To type, of what helped here: " + (" or ".join(typed) if typed else "nothing") + "."]
        lines += [""]
        lines += [f"Differences: {name_student_interval(self.seeds)}, runs of one seed compared with each other."]
        return "\n".join(lines)

    def _judge(self, claim: Claim, ends: pd.DataFrame) -> Finding:
        """The difference that a claim speaks of, seed by seed, and the sentence that it allows."""
        measure, values = self.case.measure(claim.measure), ends.loc[claim.arm][claim.measure]
        names = self.case.arm(claim.arm).label
        if claim.against:
            values = values - ends.loc[claim.against][claim.measure]
            names += f" against {self.case.arm(claim.against).label}"
        difference = student_interval(list(values))
        finding = Finding(claim=claim, difference=difference, sentence="")
        numbers = f"{measure.title[:1].upper()}{measure.title[1:]}, {names}: {measure.text(difference, signed=True)}"
        if not finding.is_judged:
            with_value = (
                "" if self.not_judged else f", since it has a value in {difference.count} of {self.seeds} seeds"
            )
            words = f"“{claim.says}” is not judged{with_value}. {numbers}."
        elif finding.holds:
            words = f"{claim.says}. {numbers}."
        else:
            words = f"not seen here: “{claim.says}”. {numbers}."
        return Finding(claim=claim, difference=difference, sentence=words)


def _last(values: pd.Series) -> float:
    """The last value that is a number; NaN where there is none."""
    numbers = values.dropna()
    return float(numbers.iloc[-1]) if len(numbers) else np.nan


def too_few_seeds(seeds: int) -> str:
    """Why so many seeds bear out no claim and refute none; empty where they are enough."""
    return f"claims need at least {LEAST_SEEDS} seeds, got {seeds}" if seeds < LEAST_SEEDS else ""


def count_text(number: int, noun: str) -> str:
    """A number of things in words: "1 seed", "5 seeds"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
