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
from ibqlab.diagnostics.alarm_rules import NonFiniteValues, facts_of
from ibqlab.losses.errors import TrainingError
from ibqlab.recipes.run_config import RunConfig
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs import Run, RunError
from ibqlab.training.failures import lower_rate, nonfinite_error
from ibqlab.training.session import Session

OnAlarm = Callable[[AlarmEvent], None]
"""Called on the first process with each alarm, after the row that set it off was logged. Like a watch it may raise
KeyboardInterrupt to end the training after this step."""


class RunAlarm:
    """Follows the rows of a run. It is silent where there is no codebook, where a recipe switches it off, and on other
    processes than the first.

    Args:
        config: of the run.
        session: the run and its processes.
        watch: its method `alarm`, where it has one, is called with each event.
    """

    def __init__(self, config: RunConfig, session: Session, watch: Any):
        self.config, self.run = config, session.run
        self.listeners: list[OnAlarm] = [watch.alarm] if hasattr(watch, "alarm") else []
        """Called with each event."""
        self.mode = config.record.alarm if isinstance(config, TrainConfig) else "off"
        self.facts = facts_of(to_dict(config))
        self.alarm: Alarm | None = None
        if self.facts and self.mode != "off" and session.fabric.is_global_zero:
            self.alarm = Alarm(self.facts)
        self.reason = ""
        """The end of "stopped at step 3 of 12" once training is to stop; "" as long as it is not."""
        self.how_to_go_on = "go on with the same command"
        """What helps once training is to stop."""
        self._untold: list[AlarmEvent] = []

    def replay(self) -> None:
        """Take in the rows that a resumed run has logged. Of their alarms those that were not told yet are told now."""
        if self.alarm is None:
            return
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
        if self.alarm and any([self.tell(event) for event in self.alarm.check(row)]):
            raise KeyboardInterrupt

    def nonfinite_error(self, step: int, culprit: str) -> TrainingError:
        """The error that ends a training at NaN or infinity, which is an alarm, too.

        Args:
            step: that was not done.
            culprit: the first tensor that holds it.
        """
        if self.alarm:
            with suppress(RunError):  # the disk may be full
                self.tell(nonfinite_event(step, culprit, self.facts))
        return nonfinite_error(step, culprit, self.config, self.run)

    def tell(self, event: AlarmEvent) -> bool:
        """Write an event down and hand it on; whether a listener asks for the end of the training."""
        self.run.log_alarm(event.row())
        self._untold.append(event)
        if self.mode == "stop" and event.stops:
            self.reason = f" by the alarm ({event.title}: {event.seen})"
            if event.rule == NonFiniteValues.name:
                self.how_to_go_on = f"the next step would fail: {lower_rate(self.config)}, in a new output folder"
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


def stop_reason(run: Run) -> str:
    """Why the alarm stopped a run that still stands where it was stopped: "few codes at step 40 of 300"; else "".

    Args:
        run: of a tokenizer. One whose recipe does not say `record.alarm: stop`, that was stopped by hand elsewhere, or
            that has gone on since, was not.
    """
    record = run.config.get("record")
    if not isinstance(record, dict) or record.get("alarm") != "stop" or run.status not in ("stopped", "interrupted"):
        return ""
    events = []
    with suppress(RunError):  # a damaged note
        events = [AlarmEvent.of_row(row) for row in run.alarms]
    titles = [event.title for event in events if event.step == run.step and event.stops]
    return f"{', '.join(titles)} at step {run.step:,} of {run.config['steps']:,}" if titles else ""
