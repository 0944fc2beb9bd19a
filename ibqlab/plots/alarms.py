"""Where the alarm went off, in figures whose axis is the training step."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ibqlab.diagnostics.alarm import AlarmEvent
from ibqlab.plots.style import add_caption

ALARM_LOOK = {"color": "#B00000", "linestyle": (0, (2, 1.5)), "linewidth": 1.0, "zorder": 1.5}
"""Of the line at the step of an alarm: red and dashed, behind what was measured."""


def mark_alarms(figure: Figure, events: Sequence[AlarmEvent]) -> None:
    """A line through every panel at the step of each alarm, and their names in the caption.

    Args:
        figure: in the house style, every panel's axis the training step.
        events: in their order; of one rule the first two are named, further ones counted.
    """
    for step in sorted({event.step for event in events}):
        for axes in figure.axes:
            axes.axvline(step, **ALARM_LOOK)
    if events:
        add_caption(figure, f"{figure.get_supxlabel()}\nred: alarms ({alarm_list(events)})")


def alarm_list(events: Sequence[AlarmEvent]) -> str:
    """Alarms in a line: "reach lost at step 40; few codes at steps 12 and 300"."""
    steps: dict[str, list[str]] = {}
    for event in events:
        steps.setdefault(event.title, []).append(f"{event.step:,}")
    texts = []
    for title, numbers in steps.items():
        more = f" and {len(numbers) - 2:,} more" if numbers[2:] else ""
        texts.append(f"{title} at step{'s' * (len(numbers) > 1)} {' and '.join(numbers[:2])}{more}")
    return "; ".join(texts)
