"""Which steps have a row, and which a snapshot, whatever the distance between updates."""

import math
from dataclasses import dataclass

EARLY_STEPS = (1, 2, 3, 5, 10, 15, 20, 30, 50)
"""Steps with a row of their own however rarely rows are due: collapse is decided in the first ones."""
CONFIRMING_ROWS = 5
"""Rows within `log_every` steps, where the last one showed signs of collapse."""


@dataclass
class Schedule:
    """Says what is due, and remembers what was done."""

    steps: int | None
    """The training's last step, where it is known; it has both."""
    log_every: int
    """Steps between rows."""
    snapshot_every: int
    """Steps between snapshots."""
    logged: int = -1
    """Step of the last row; −1 before the first, which is due at once."""
    stored: int = -1
    """Likewise, of the last snapshot."""
    is_suspicious: bool = False
    """Whether the last row showed trouble that others must confirm; these come sooner then."""

    def needs_row(self, step: int) -> bool:
        """Whether a step has a row."""
        is_extra = self.logged < 0 or step in EARLY_STEPS or step == self.steps
        # Rules want up to five rows in sequence: confirmed within one `log_every`, where it took five.
        every = max(1, self.log_every // CONFIRMING_ROWS) if self.is_suspicious else self.log_every
        return is_extra or step // every > self.logged // every

    def needs_snapshot(self, step: int) -> bool:
        """Whether a step with a row has a snapshot: also at 1, 2, 5, 10, 20, 50 … before the first multiple."""
        every = self.snapshot_every
        if self.stored < 0 or step == self.steps or step // every > self.stored // every:
            return True
        return step < every and _marks_reached(step) > _marks_reached(self.stored)


def _marks_reached(step: int) -> int:
    """How many of 1, 2, 5, 10, 20, 50 … are at most a step."""
    if step < 1:
        return 0
    decade = int(math.log10(step) + 1e-9)
    return 3 * decade + sum(step >= mark * 10**decade for mark in (1, 2, 5))
