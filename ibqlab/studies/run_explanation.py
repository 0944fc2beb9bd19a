"""The part of a run's report that explains its codebook: alarms, the band, norms and drift, lives, rarefaction."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ibqlab.base.escaping import for_markdown
from ibqlab.diagnostics.alarm import AlarmEvent, find_alarms
from ibqlab.diagnostics.alarm_rules import facts_of
from ibqlab.diagnostics.explain import logit_scale_band, measure_drift
from ibqlab.diagnostics.lifetimes import code_lives, survival_curve
from ibqlab.plots import explain
from ibqlab.runs import Run, RunError
from ibqlab.runs.kinds import is_monitored
from ibqlab.studies.figures import first_middle_last

MOST_SNAPSHOTS = 24
"""Of a run that are read for drift and lives, evenly chosen; those of large codebooks have a quarter of a gigabyte."""
HOW_TO_READ = {
    "band": "High on the left no code is singled out; at 1 only the chosen code learns. Between lies the band in which "
    "most codes are reached. The ring is the run.",
    "explanation": "Trouble begins where features reach the codes' norm, where the winner's lead leaps, or where dead "
    "codes stand still while features drift.",
    "survival": "A fall that ends early: collapse was decided in the first steps, and what was left lives on.",
    "rarefaction": "Where a curve still rises at its end, more tokens would find more codes; where it is flat, the "
    "rest is dead.",
}
"""Name of a figure → how to read it, in a sentence or two."""
WITHOUT_SOFTMAX = {
    "band": "What index backpropagation would reach with these features and codes. The run itself learns otherwise, "
    "and its own reach is the one that it measured. The ring is where its features and codes stand.",
    "explanation": "Trouble begins where features grow and codes do not follow, or where dead codes stand still while "
    "features drift.",
}
"""The same of runs whose gradient does not go through a softmax over z·C."""
Saved = Callable[[str, Figure, pd.DataFrame], Figure]
"""Saves a figure with its numbers under a name."""


def explaining_figures(run: Run, save: Saved) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Name of the file → title and what draws it, of figures that explain a tokenizer's run.

    Args:
        run: what it lacks is told by a RunError when the figure is drawn.
        save: for figures and their numbers.
    """
    return {
        "band": ("Reach against the logits' scale", lambda: _figure_band(run, save)),
        "explanation": ("Norms, margins, drift, births and deaths", lambda: _figure_explanation(run, save)),
        "survival": ("How long codes live", lambda: _figure_survival(run, save)),
        "rarefaction": ("Usage against tokens", lambda: _figure_rarefaction(run, save)),
    }


def how_to_read(run: Run) -> dict[str, str]:
    """Name of a figure → how to read it for this run: what is true of a softmax over z·C alone is said of it alone."""
    return HOW_TO_READ | ({} if _has_softmax(run) else WITHOUT_SOFTMAX)


def _has_softmax(run: Run) -> bool:
    """Whether the run's gradient goes through a softmax over z·C, as far as its settings tell."""
    facts = facts_of(run.config)
    return facts is not None and facts.softmax


def run_alarms(run: Run) -> tuple[list[AlarmEvent], bool]:
    """A run's alarms, and whether they were told while it trained.

    Of a run without a note of any, such as one from before there was an alarm, they are worked out from its rows.
    """
    noted = []
    with suppress(RunError):  # a damaged note; the rows tell the same
        noted = [AlarmEvent.of_row(row) for row in run.alarms]
    facts = facts_of(run.config)
    if noted or facts is None:
        return noted, True
    return find_alarms(run.rows, facts), False


def describe_alarms(run: Run) -> str:
    """A run's alarms as Markdown; "" for a run without a codebook."""
    if facts_of(run.config) is None:
        return ""
    events, told = run_alarms(run)
    if not events:
        return "No rule of the alarm went off."
    lines = [
        f"- **Step {event.step:,}, {for_markdown(event.title)}**: "
        f"{for_markdown(f'{event.seen}. Likely cause: {event.cause}. Try: {event.remedy}', None)}"
        for event in events
    ]
    afterwards = "" if told else "\n\nWorked out from the rows; the run itself told of none."
    return "\n".join(lines) + afterwards


def _figure_band(run: Run, save: Saved) -> Figure:
    """Reach and softmax perplexity against the logits' scale, at the first, a middle and the last snapshot."""
    bands, size = {}, 0
    for step in first_middle_last(_steps(run, 1)):
        arrays = run.snapshot(step)
        size = len(arrays["codebook"])
        bands[step] = logit_scale_band(*(torch.as_tensor(arrays[name]) for name in ("features", "codebook")))
    table = explain.band_table(bands, size, not _has_softmax(run))
    return save("band", explain.plot_band(table), table)


def _figure_explanation(run: Run, save: Saved) -> Figure:
    """Norms, margins, drift, births and deaths."""
    table = explain.explanation_table(run.metrics, measure_drift(_snapshots(run)))
    return save("explanation", explain.plot_explanation(table), table)


def _figure_survival(run: Run, save: Saved) -> Figure:
    """Kaplan–Meier curve of the codes' lives."""
    steps = _steps(run, 2)
    # Without the codebooks, which would fill the memory.
    pairs = [[arrays[name] for name in ("counts", "last_hit")] for arrays in map(run.snapshot, steps)]
    lives = code_lives(steps, *np.stack(pairs, axis=1))
    if not len(lives.steps):
        raise RunError("no code was hit")
    table = explain.survival_table(survival_curve(lives.steps, lives.died), lives.never)
    return save("survival", explain.plot_survival(table), table)


def _figure_rarefaction(run: Run, save: Saved) -> Figure:
    """Expected usage against tokens, at the first, a middle and the last snapshot."""
    steps = first_middle_last(_steps(run, 1))
    counts = {f"step {step:,}": run.snapshot(step)["counts"] for step in steps}
    source = "tokens of the training window" if is_monitored(run.config) else "validation tokens"
    table = explain.rarefaction_table(counts, source)
    return save("rarefaction", explain.plot_rarefaction(table), table)


def _steps(run: Run, least: int) -> list[int]:
    """Steps of at most `MOST_SNAPSHOTS` snapshots, the first and the last among them."""
    steps = run.snapshot_steps
    if len(steps) < least:
        raise RunError(f"it has {len(steps)} snapshots, and {least} are needed")
    chosen = np.unique(np.linspace(0, len(steps) - 1, MOST_SNAPSHOTS).round().astype(int))
    return [steps[number] for number in chosen]


def _snapshots(run: Run) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Step and arrays of these snapshots, one at a time; the features are those of the same images in all of them."""
    for step in _steps(run, 0) if run.snapshot_steps else ():
        arrays = run.snapshot(step)
        if is_monitored(run.config):  # each of its snapshots holds another batch's features
            arrays.pop("features", None)
            if "probe_features" in arrays:
                arrays["features"] = arrays["probe_features"]
        yield step, arrays
