"""What ends a training before its last step."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.base.processes import sum_over_processes


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by hand; the message is one line that says what is saved and how to go on.

    Notebooks show that line in place of a traceback; a command should print it and exit with 130.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows; there, the command is a cell."""
        return [str(self).replace("go on with the same command", "run this notebook cell again to go on")]


class StoppedByAlarm(TrainingInterrupted):
    """The alarm stopped a training whose recipe says so (`record.alarm: stop`); its step is saved like that of any."""


class NonFinite(Exception):
    """A loss is not finite; `culprit` names the first tensor on the way to it that holds NaN or infinity."""

    def __init__(self, culprit: str):
        super().__init__(culprit)
        self.culprit = culprit


def count_nonfinite(value: Float[Tensor, ""]) -> Int[Tensor, ""]:
    """On how many processes a number is NaN or infinite. Stays on the device, so that nobody waits for it."""
    return sum_over_processes((~torch.isfinite(value)).long())


def anywhere_nonfinite(value: Float[Tensor, ""]) -> bool:
    """Whether a number is NaN or infinite on any process. Waits for the device."""
    return bool(count_nonfinite(value))
