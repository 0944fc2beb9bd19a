"""The alarm of a run that trains: rows go in, and whoever should know is told.

What went off stands in the run folder (alarms.jsonl), is shown by the progress line, marked by a live view, and handed
to `train(…, on_alarm=…)`. A resumed run reads its own rows again first, so that nothing is told twice.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ibqlab.base.progress import ProgressLine, notice
from ibqlab.config import to_dict
from ibqlab.diagnostics.alarm import Alarm, AlarmEvent, nonfinite_event
from ibqlab.diagnostics.alarm_rules import RULES, facts_of
from ibqlab.recipes.run_config import RunConfig
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs import Run, RunError
from ibqlab.training.session import Session

OnAlarm = Callable[[AlarmEvent], None]
"""Called on the first process with each alarm, after the row that set it off was logged. Like a watch it may raise
KeyboardInterrupt to end the training after this step."""


class RunAlarm:
    """Follows the rows of one tokenizer's run.

    Args:
        config: of the run, its alarm not "off".
        run: whose folder keeps what went off.
        listeners: called with each event.
    """

    def __init__(self, config: TrainConfig, run: Run, listeners: list[OnAlarm]):
        self.run, self.listeners = run, listeners
        self.facts = facts_of(to_dict(config))
        self.alarm = Alarm(self.facts)
        self.stops = config.record.alarm == "stop"
        self.reason = ""
        """Why training is to stop; "" as long as it is not."""
        self._untold: list[AlarmEvent] = []

    def replay(self) -> None:
        """Take in the rows that a resumed run has logged. Of their alarms those that were not told yet are told now."""
        told = {(row["step"], row.get("rule")) for row in self.run.alarms}
        for row in self.run.rows:
            for event in self.alarm.check(row):
                if (event.step, event.rule) not in told:
                    self.tell(event)

    def check(self, row: dict[str, Any]) -> None:
        """Look at a row that was just logged.

        Raises:
            KeyboardInterrupt: a listener asks for the end of the training; everybody has been told.
        """
        if any([self.tell(event) for event in self.alarm.check(row)]):
            raise KeyboardInterrupt

    def nonfinite(self, step: int, culprit: str) -> None:
        """A step was not done because of NaN or infinity; the error that follows stops the training."""
        with suppress(RunError):
            self.tell(nonfinite_event(step, culprit, self.facts))

    def tell(self, event: AlarmEvent) -> bool:
        """Write an event down and hand it on; whether a listener asks for the end of the training."""
        self.run.log_alarm(event.row())
        self._untold.append(event)
        if self.stops and next(rule.stops for rule in RULES if rule.name == event.rule):
            self.reason = f"{event.title}: {event.seen}"
        asked = False
        for listen in self.listeners:
            try:
                listen(event)
            except KeyboardInterrupt:
                asked = True
        return asked

    def show(self, line: ProgressLine) -> None:
        """Leave what was not shown yet on the screen, above the progress line."""
        for event in self._untold if line.shown else ():
            line.close()
            notice(event)
        self._untold = []


def run_alarm(config: RunConfig, session: Session, watch: Any) -> RunAlarm | None:
    """The alarm of a run on its first process; None where it is off, and for runs without a codebook.

    Args:
        config: of the run.
        session: the run and its processes.
        watch: its method `alarm`, where it has one, is called with each event.
    """
    is_watched = isinstance(config, TrainConfig) and config.record.alarm != "off"
    if not is_watched or not session.fabric.is_global_zero:
        return None
    return RunAlarm(config, session.run, [watch.alarm] if hasattr(watch, "alarm") else [])
