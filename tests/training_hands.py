"""What a hand does to a training that a notebook watches in a browser, and what it sees there."""

import re
from contextlib import contextmanager

from browsers import ERRORS

from ibqlab.views.training_process import TrainingProcess

LAST_CURVES = "[...document.querySelectorAll('.jp-OutputArea-output img[alt*=\"up to step\"]')].at(-1)?.alt"


def button(page, text):
    """Of the last training that is shown."""
    return page.locator(".ibqlab-training").last.locator("button", has_text=text)


def last_step(page, seen):
    """The last step of the curves that are shown, once they show another one than was seen."""
    page.wait_for_function(f"seen => {LAST_CURVES} && {LAST_CURVES} !== seen", arg=seen)
    alt = page.evaluate(f"() => {LAST_CURVES}")
    return alt, int(alt.rpartition(" ")[2])


def curves_up_to(page, step):
    """What the curves are called that end with this step, once they do."""
    page.wait_for_function(f"step => {LAST_CURVES}.endsWith(` up to step ${{step}}`)", arg=step)
    return page.evaluate(f"() => {LAST_CURVES}")


def stopped_at(page, run):
    """The step in the one line that a stopped training cell says; the run stands there with a checkpoint of it."""
    page.wait_for_function(f"() => ({ERRORS})().length")
    (error,) = page.evaluate(ERRORS)
    step = int(re.fullmatch(r"TrainingInterrupted: stopped at step (\d+) of 100000, everything is saved; .*", error)[1])
    assert run.status == "stopped"
    assert run.last_checkpoint.name == f"step_{step:08d}.pt"
    return step


def paused_at(page, run):
    """The step at which the view says that the training is paused; the run stands there with a checkpoint of it."""
    page.locator(".ibqlab-training").last.get_by_text("paused at step").wait_for()
    step = run.step
    assert f"paused at step {step:,} of 100,000" in page.locator(".ibqlab-training").last.inner_text()
    assert run.status == "stopped"
    assert run.last_checkpoint.name == f"step_{step:08d}.pt"
    return step


@contextmanager
def stopped_in_the_end(run):
    """A training that outlives its notebook does not outlive a test that fails."""
    try:
        yield
    finally:
        if run.is_dir():
            TrainingProcess(run).stop()
