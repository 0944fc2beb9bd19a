"""An alarm for codebooks that collapse: what its rules look for in a run's rows, and what they tell.

    alarm = Alarm(CodebookFacts(codebook_size=1024))
    for row in rows:                      # of metrics.jsonl, in order
        for event in alarm.check(row):
            print(event)                  # alarm at step 40, reach lost: …

A run checks each row as it logs it. `find_alarms` checks the rows of a run that is there already, with the same result:
nothing but the rows counts. The rules stand in `alarm_rules`, each with its threshold and where that was seen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ibqlab.diagnostics.alarm_remedies import remedy_in_words
from ibqlab.diagnostics.alarm_rules import RULES, CodebookFacts, NonFiniteValues, Rule


@dataclass(frozen=True, kw_only=True)
class AlarmEvent:
    """A rule that went off. `print` it: one line with step, what was seen, likely cause, and what to change."""

    step: int
    """Training step of the row."""
    rule: str
    """Name of the rule, a key of `RULES`."""
    title: str
    """The same in two words, for figures and tables."""
    seen: str
    """What the rows showed, in words."""
    cause: str
    """The likely cause."""
    remedy: str
    """Which setting to change; in somebody else's model, which quantity."""
    values: Mapping[str, float]
    """The numbers behind it."""

    def __str__(self) -> str:
        return f"alarm at step {self.step:,}, {self.title}: {self.seen}. Likely cause: {self.cause}. Try: {self.remedy}"

    @property
    def stops(self) -> bool:
        """Whether a run that stops at alarms stops at this one."""
        return any(rule.stops for rule in RULES if rule.name == self.rule)

    def row(self) -> dict[str, Any]:
        """As a line of alarms.jsonl."""
        return asdict(self)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "AlarmEvent":
        """The event that a line of alarms.jsonl holds; what the line lacks is empty."""
        texts = {name: str(row.get(name, "")) for name in ("rule", "title", "seen", "cause", "remedy")}
        values = row.get("values")
        return cls(step=row["step"], values=values if isinstance(values, dict) else {}, **texts)


@dataclass
class _Watch:
    """What is kept of one rule between rows."""

    showing: int = 0
    """Rows in sequence that show it."""
    well: int = 0
    """Rows in sequence that do not."""
    told: bool = False
    memory: dict[str, Any] = field(default_factory=dict)


class Alarm:
    """Looks at rows in their order and tells of each trouble once, and once more when it was gone and comes back.

    Args:
        facts: what the rules must know of the codebook.
        rules: to go by. A rule goes off at the `rows`-th row in sequence that shows what it looks for, and may do so
            again after `clear_rows` that do not.
    """

    def __init__(self, facts: CodebookFacts, rules: Sequence[Rule] = RULES):
        self.facts = facts
        self._watches = [(rule, _Watch()) for rule in rules if rule.concerns(facts)]

    @property
    def suspects(self) -> bool:
        """Whether the last row showed something that further rows must confirm before it is told."""
        return any(watch.showing and not watch.told for _, watch in self._watches)

    def check(self, row: Mapping[str, Any]) -> list[AlarmEvent]:
        """The rules that go off at a row.

        Args:
            row: "step" and named numbers as a run logs them; rows without what a rule looks at change nothing for it.
        """
        events = []
        for rule, watch in self._watches:
            values = rule.judge(row, self.facts, watch.memory)
            if values is None:
                continue
            watch.showing, watch.well = (watch.showing + 1, 0) if values else (0, watch.well + 1)
            if watch.well >= rule.clear_rows:
                watch.told = False
            if watch.showing >= rule.rows and not watch.told:
                watch.told = True
                events.append(make_event(rule, int(row["step"]), values, self.facts))
        return events


def make_event(rule: Rule, step: int, values: Mapping[str, float], facts: CodebookFacts) -> AlarmEvent:
    """The event of a rule that goes off at a step.

    Args:
        rule: that goes off.
        step: of training.
        values: that show it, from `Rule.judge`.
        facts: of the codebook.
    """
    words = rule.explain(values, facts)
    if facts.monitored:
        words = words._replace(remedy=remedy_in_words(rule.name, words.remedy, facts.softmax, facts.fixed))
    return AlarmEvent(step=step, rule=rule.name, title=rule.title, values=dict(values), **words._asdict())


def nonfinite_event(step: int, culprit: str, facts: CodebookFacts) -> AlarmEvent:
    """The event of a step that was not done because of NaN or infinity.

    Args:
        step: of training.
        culprit: the first tensor that holds it, in words.
        facts: of the codebook.
    """
    return make_event(NonFiniteValues(), step, {culprit: float("nan")}, facts)


def find_alarms(
    rows: Iterable[Mapping[str, Any]], facts: CodebookFacts, rules: Sequence[Rule] = RULES
) -> list[AlarmEvent]:
    """All alarms of a run that has been logged already.

    Args:
        rows: of metrics.jsonl, in order; a null counts as not finite, a missing number as not measured.
        facts, rules: as of `Alarm`.
    """
    alarm = Alarm(facts, rules)
    return [event for row in rows for event in alarm.check(row)]
