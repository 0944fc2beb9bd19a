"""The fair comparison's tables: means with intervals, each method against one of them, and what a start does.

    tables = FairTables(open_study("fair_comparison", FairParameters(preset="laptop")))
    tables.shown("digits", "own")        # from each method's own start; "common" and "equal": from one start for all
    tables.verdicts("digits", "own")     # who stands clearly above or below the reference, in every measure
    tables.start_effects("digits")       # what the start of the equal-budget comparisons does to each method

All are partial while runs are missing. A method that has no start to choose stands in the table of own starts alone.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ibqlab.base.intervals import Interval, student_interval
from ibqlab.base.measures import SHARE, Quantity, measure
from ibqlab.grids.cells import STOPPED
from ibqlab.plots.style import method_label
from ibqlab.quantizers import INITIALISATIONS
from ibqlab.studies.comparisons import Difference, holm_differences, name_correction
from ibqlab.studies.fair_grid import Arm
from ibqlab.studies.study import Study

DECIMALS = {"usage": 1, "perplexity": 1, "variance_lost": 1, "reconstruction_error": 3, "psnr": 2}
"""Digits after the point."""


class Compared(NamedTuple):
    """A method's arm, the arm that it is compared with, and the measure."""

    arm: Arm
    other: Arm
    key: str


class FairTables:
    """The tables of a study, read from the rows that are there by now.

    Args:
        study: a fair comparison.
    """

    def __init__(self, study: Study):
        self.study, self.grid = study, study.grid
        preset = self.grid.preset
        self.views = {"own": "", "common": preset.common_start, "equal": preset.equal_start}
        """View → the start of all methods in it; "": each one's own."""

    @property
    def equal_start(self) -> str:
        """The start of the equal-budget comparisons, as tables write it."""
        return INITIALISATIONS[self.views["equal"]]

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Cell → its row, for all that trained to their end; the alarm may have stopped others."""
        rows = {cell.name: row for cell in self.study.cells if (row := self.study.store.row(cell))}
        return {name: row for name, row in rows.items() if not row.get(STOPPED)}

    @cached_property
    def rates(self) -> dict[Arm, float | None]:
        """Arm → the rate that its search chose; None while it is not known, and where every rate failed."""
        return {arm: self.grid.best_rate(arm, self.study.store) for arm in self.grid.arms}

    def values(self, arm: Arm, key: str) -> list[float]:
        """A measure of an arm's result, one value per finished seed."""
        rate = self.rates[arm]
        cells = [] if rate is None else self.grid.final(arm, rate)
        numbers = [self.rows[cell.name].get(key) for cell in cells if cell.name in self.rows]
        return [float(number) for number in numbers if number is not None and np.isfinite(number)]

    def view_arms(self, data: str, view: str) -> list[Arm]:
        """The arms of a view: each method's own start, or the one start of all that have a choice."""
        arms = [self.grid.arm(data, label, self.views[view]) for label in self.grid.methods]
        return [arm for arm in arms if arm]

    # --- the search ---

    def search(self) -> pd.DataFrame:
        """What the searches came to.

        Returns:
            One row per arm and rate: data, method, start, own_start, rate, criterion (the measure it was chosen by),
            score (NaN where a run failed or was stopped), chosen, at_edge (a chosen rate with no rate tried beyond it).
        """
        lines = []
        for arm in self.grid.arms:
            bench, chosen = self.grid.data[arm.data], self.rates[arm]
            for rate, score in (self.grid.scores(arm, self.study.store) or {}).items():
                edge = rate == chosen and rate in (min(bench.rates), max(bench.rates))
                facts = {"data": arm.data, "method": arm.label, "start": arm.start, "own_start": arm.own}
                facts |= {"rate": rate, "criterion": bench.criterion, "score": score}
                lines.append(facts | {"chosen": rate == chosen, "at_edge": edge and len(bench.rates) > 1})
        return pd.DataFrame(lines)

    def describe_search(self) -> str:
        """The budget of the searches and how they ended, as a list of Markdown."""
        table, lines = self.search(), []
        for name, bench in self.grid.data.items():
            rates = ", ".join(f"{rate:g}" for rate in bench.rates)
            seeds = ", ".join(map(str, self.grid.preset.search_seeds))
            line = f"- {name}: rates {rates}, each with seed {seeds}; the best by {measure(bench.criterion).title}"
            here = table[table["data"] == name] if len(table) else table
            if len(here):
                chosen, failed = here[here["chosen"]], int(here["score"].isna().sum())
                low, high = ((chosen["rate"] == edge).sum() for edge in (min(bench.rates), max(bench.rates)))
                if len(bench.rates) > 1:
                    line += f". Of {len(chosen)} searches {low} ended at the lowest rate and {high} at the highest"
                line += f"; {failed} rates failed and count as the worst" if failed else ""
            lines.append(line)
        return "\n".join(lines)

    # --- results ---

    def data(self) -> pd.DataFrame:
        """All results, nothing rounded.

        Returns:
            One row per arm and measure: data, method (label), is_reference, quantizer, start, own_start, codebook_size,
            code_dim, rates (tried), steps, rate (chosen), measure, mean, low, high (Student's 95 % interval), seeds.
        """
        lines = []
        for arm in self.grid.arms:
            config = self.grid.config(arm).tokenizer.quantizer
            facts = {"data": arm.data, "method": arm.label, "is_reference": arm.label == self.grid.against}
            facts |= {"quantizer": config.config_name, "start": arm.start, "own_start": arm.own}
            facts |= {"rates": ", ".join(f"{rate:g}" for rate in self.grid.data[arm.data].rates)}
            facts |= {"steps": self.grid.config(arm).steps}
            facts |= {"codebook_size": config.codebook_size, "code_dim": config.code_dim}
            for key in self.grid.data[arm.data].measures:
                found = self._interval(arm, key)
                numbers = {"mean": found.mean, "low": found.low, "high": found.high, "seeds": found.count}
                lines.append(facts | {"rate": self.rates[arm], "measure": key} | numbers)
        return pd.DataFrame(lines)

    def shown(self, data: str, view: str) -> pd.DataFrame:
        """A view for reading: a row per method with its rate, measures and the difference to the reference."""
        differences, lines = self.differences(data, view), []
        keys = self.grid.data[data].measures
        for arm in self.view_arms(data, view):
            config, rate = self.grid.config(arm).tokenizer.quantizer, self.rates[arm]
            line = {"method": label_of(arm), "K": f"{config.codebook_size:,}", "D": str(config.code_dim)}
            if view == "own":
                line["start"] = INITIALISATIONS[arm.start]
            line["rate"] = "–" if rate is None else f"{rate:g}"
            line |= {measure(key).heading: self._text(key, self._interval(arm, key)) for key in keys}
            for key in (keys[0], keys[-1]):
                difference = differences.get((arm, key))
                line[f"{measure(key).title} − {self._reference}'s"] = (
                    self._difference_text(key, difference) if difference else "–"
                )
            lines.append(line | {"seeds": f"{len(self.values(arm, keys[0]))} of {len(self.grid.seeds)}"})
        return pd.DataFrame(lines)

    def differences(self, data: str, view: str) -> dict[tuple[Arm, str], Difference]:
        """Every method against the reference from the same view, in all measures, corrected together."""
        reference = self.grid.arm(data, self.grid.against, self.views[view])
        if reference is None:  # one with fixed codes has no other start than its own
            reference = self.grid.arm(data, self.grid.against)
        arms = [arm for arm in self.view_arms(data, view) if arm.label != self.grid.against]
        return self._compare([Compared(arm, reference, key) for arm in arms for key in self.grid.data[data].measures])

    def verdicts(self, data: str, view: str) -> str:
        """Who stands clearly above or below the reference, measure by measure, as a list of Markdown."""
        differences = self.differences(data, view)
        if not differences:
            return self._nothing(self.view_arms(data, view))
        if untested := self._untested(differences):
            return untested
        lines = []
        for key in self.grid.data[data].measures:
            here = {arm: difference for (arm, of), difference in differences.items() if of == key}
            lines.append(f"- **{measure(key).title}**: {self._sides(key, here)}.")
        tested = sum(np.isfinite(difference.p_value) for difference in differences.values())
        lines.append(f"- Welch's test at 5 %, {self._seeds(differences)} seeds, {name_correction(tested)}.")
        return "\n".join(lines)

    # --- the second table ---

    def start_effects(self, data: str) -> pd.DataFrame:
        """What the start of the equal-budget comparisons does to each method that has another one of its own.

        Returns:
            For reading: one row per method with usage and the task's measure from its own start and from that one, and
            the differences with Holm's intervals.
        """
        differences, lines = self._effects(data), []
        usage, task = self.grid.data[data].measures[0], self.grid.data[data].criterion
        start = self.equal_start
        for arm in dict.fromkeys(arm for arm, _ in differences):
            own = self.grid.arm(data, arm.label)
            line = {"method": label_of(arm), "own start": INITIALISATIONS[own.start]}
            for key in (usage, task):
                title = measure(key).heading
                line[f"{title}, own start"] = self._text(key, self._interval(own, key))
                line[f"{title}, {start}"] = self._text(key, self._interval(arm, key))
                line[f"change of {measure(key).title}"] = self._difference_text(key, differences[arm, key])
            lines.append(line)
        return pd.DataFrame(lines)

    def describe_effects(self, data: str) -> str:
        """The same in sentences, and which verdicts against the reference turn with the start. Computed."""
        differences = self._effects(data)
        if not differences:
            return self._nothing([arm for arm in self.view_arms(data, "equal") if not arm.own])
        if untested := self._untested(differences):
            return untested
        start, lines = self.equal_start, []
        for key in (self.grid.data[data].measures[0], self.grid.data[data].criterion):
            here = {arm: difference for (arm, of), difference in differences.items() if of == key}
            lines.append(f"- **{measure(key).title}** from {start} instead of the own start: {self._sides(key, here)}.")
            lines += self._turned(data, key)
        tested = sum(np.isfinite(difference.p_value) for difference in differences.values())
        lines.append(f"- Welch's test at 5 %, {self._seeds(differences)} seeds, {name_correction(tested)}.")
        return "\n".join(lines)

    def _effects(self, data: str) -> dict[tuple[Arm, str], Difference]:
        keys = (self.grid.data[data].measures[0], self.grid.data[data].criterion)
        arms = [arm for arm in self.view_arms(data, "equal") if not arm.own]
        return self._compare([Compared(arm, self.grid.arm(data, arm.label), key) for arm in arms for key in keys])

    def _nothing(self, arms: Sequence[Arm]) -> str:
        """Why there is nothing to compare."""
        if len({arm.label for arm in arms} - {self.grid.against}) == 0:
            return f"- Nothing to compare {self._reference} with: no other method has this start."
        missing = [arm for arm in self.grid.arms if self.grid.scores(arm, self.study.store) is None]
        missing += [arm for arm, rate in self.rates.items() if rate is not None and not self.values(arm, "usage")]
        if missing:
            return "- Nothing to compare is finished yet."
        return f"- Nothing to compare: {self._reference}, or every other method, failed at all of its rates."

    def _untested(self, differences: dict[tuple[Arm, str], Difference]) -> str:
        """What to say where no difference has a test; "" where some have."""
        if any(np.isfinite(difference.p_value) for difference in differences.values()):
            return ""
        return f"- Not tested: a test needs two seeds of each method, and there is {self._seeds(differences)}."

    def _turned(self, data: str, key: str) -> list[str]:
        """Methods whose verdict against the reference changes sides between own starts and the equal one; a line of
        Markdown, none where nothing can be compared."""
        own, equal = (self.differences(data, view) for view in ("own", "equal"))
        before = {arm.label: difference for (arm, of), difference in own.items() if of == key}
        after = {arm.label: difference for (arm, of), difference in equal.items() if of == key}
        both = [label for label in after if label in before]
        if not both:
            return []
        changed = [label for label in both if _side(before[label]) != _side(after[label])]
        turned = [label for label in changed if _side(before[label]) * _side(after[label]) < 0]
        text = (
            f"- Compared with {self._reference} in {measure(key).title}, {len(changed)} of {len(both)} verdicts from "
        )
        text += f"{self.equal_start} are others than from own starts"
        return [
            text + (f", and turn round for {' · '.join(self._names(turned))}." if turned else "; none turns round.")
        ]

    # --- words ---

    @property
    def _reference(self) -> str:
        return self._names([self.grid.against])[0]

    def _names(self, labels: Sequence[str]) -> list[str]:
        return [name_of(label, self.grid.methods[label]["name"]) for label in labels]

    def _sides(self, key: str, differences: dict[Arm, Difference]) -> str:
        """ "clearly higher: A · B; clearly lower: C; not told apart: D". Names hold commas."""
        groups = {"clearly higher": 1, "clearly lower": -1, "not told apart": 0}
        parts = []
        for words, side in groups.items():
            names = [label_of(arm) for arm, difference in differences.items() if _side(difference) == side]
            if names:
                parts.append(f"{words}: {' · '.join(names)}")
        better = measure(key).better
        note = f" ({better} is better)" if better == "lower" else ""
        return "; ".join(parts) + note

    def _seeds(self, differences: dict[tuple[Arm, str], Difference]) -> int:
        """The fewest behind any of the arms."""
        return min(len(self.values(arm, key)) for arm, key in differences)

    def _interval(self, arm: Arm, key: str) -> Interval:
        return student_interval(self.values(arm, key), measure(key).bounds)

    def _text(self, key: str, interval: Interval) -> str:
        quantity = measure(key)
        return interval.text(DECIMALS[key], quantity.scale, _unit(quantity))

    def _difference_text(self, key: str, difference: Difference) -> str:
        quantity = measure(key)
        found = Interval(difference.value, difference.low, difference.high, 0 if math.isnan(difference.value) else 1)
        text = found.text(DECIMALS[key], quantity.scale, signed=True)
        return f"**{text}**" if difference.is_clear else text

    def _compare(self, compared: Sequence[Compared]) -> dict[tuple[Arm, str], Difference]:
        """Differences of arms that both have a result, corrected together."""
        known = [one for one in compared if self.values(one.arm, one.key) and self.values(one.other, one.key)]
        pairs = [(self.values(one.arm, one.key), self.values(one.other, one.key)) for one in known]
        found = holm_differences(pairs, [self._step(one) for one in known])
        return {(one.arm, one.key): difference for one, difference in zip(known, found, strict=True)}

    def _step(self, compared: Compared) -> float:
        """The step in which a measure can change: a usage moves code by code."""
        sizes = [self.grid.config(arm).tokenizer.quantizer.codebook_size for arm in (compared.arm, compared.other)]
        return 1 / max(sizes) if compared.key == "usage" else 0.0


def label_of(arm: Arm) -> str:
    """A method as tables write it: "VQ, k-means"."""
    return name_of(arm.label, arm.label.partition(",")[0])


def name_of(label: str, method: str) -> str:
    """A label with the method's proper name."""
    return method_label(method) + label[len(method) :]


def _unit(quantity: Quantity) -> str:
    return " %" if quantity.unit == SHARE else ""


def _side(difference: Difference) -> int:
    """1: clearly above 0, −1: clearly below, 0: not told from it."""
    return int(np.sign(difference.value)) if difference.is_clear else 0
