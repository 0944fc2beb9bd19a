"""The alarm of a monitored training: the rules that our own trainer goes by, on the monitor's rows.

What goes off stands in the run folder, is printed once, and handed to `on_alarm`. Somebody else's loop cannot be ended
from here, so "stop" raises nothing: it sets the monitor's `stopped`, which a loop looks at after each update.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ibqlab.base.checks import require_choice
from ibqlab.base.processes import sum_over_processes

if TYPE_CHECKING:
    from ibqlab.diagnostics.alarm import Alarm, AlarmEvent
    from ibqlab.runs import Run

MODES = ("warn", "stop", "off")


class MonitorAlarm:
    """Follows the rows of a monitored run.

    Args:
        mode: "warn", "stop" or "off".
        on_alarm: called with each event on the first process; what it raises is a warning of the monitor.
    """

    def __init__(self, mode: str, on_alarm: Callable[["AlarmEvent"], Any] | None):
        require_choice("alarm", mode, MODES)
        if on_alarm is not None and not callable(on_alarm):
            raise ValueError(f"on_alarm must be a function of an event, such as print; got {on_alarm!r:.40}")
        self.mode, self.on_alarm = mode, on_alarm
        self._alarm: Alarm | None = None
        self._asks = False

    def follow(self, run: "Run") -> None:
        """Begin with a run, on the first process; the rows that it has count, and what they set off was told before."""
        from ibqlab.diagnostics.alarm import Alarm
        from ibqlab.diagnostics.alarm_rules import facts_of

        if self.mode != "off":
            self._alarm = Alarm(facts_of(run.config))
            for row in run.rows:
                self._alarm.check(row)

    def check(self, run: "Run", row: Mapping[str, Any]) -> None:
        """Look at a row that was just logged, and tell what it sets off."""
        from ibqlab.base.progress import notice

        for event in self._alarm.check(row) if self._alarm else ():
            run.log_alarm(event.row())
            notice(event)
            self._asks = self._asks or event.stops
            if self.on_alarm:
                self.on_alarm(event)

    def answers(self, device: torch.device) -> tuple[bool, bool]:
        """Whether the first process's rows ask for the end of the training, and whether the next row should come soon.

        All processes come here at each row.
        """
        if self.mode == "off":
            return False, False
        suspects = self._alarm is not None and self._alarm.suspects
        flags: Tensor = sum_over_processes(torch.tensor([self._asks, suspects], dtype=torch.int64, device=device))
        asks, suspects = flags.tolist()
        return bool(asks) and self.mode == "stop", bool(suspects)
