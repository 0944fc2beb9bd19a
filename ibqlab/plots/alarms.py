"""Where the alarm went off, in figures whose axis is the training step."""

import textwrap
from collections.abc import Sequence

from matplotlib.figure import Figure

from ibqlab.base.escaping import for_matplotlib
from ibqlab.diagnostics.alarm import AlarmEvent
from ibqlab.plots.style import CAPTION_SIZE, REFERENCE_GREY

LETTERS_PER_INCH = 16
"""Of a caption."""
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
        lines = textwrap.wrap(f"red: alarms ({alarm_list(events)})", int(LETTERS_PER_INCH * figure.get_figwidth()))
        caption = "\n".join([figure.get_supxlabel(), *(for_matplotlib(line, None) for line in lines)])
        figure.supxlabel(caption, fontsize=CAPTION_SIZE, color=REFERENCE_GREY)


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
