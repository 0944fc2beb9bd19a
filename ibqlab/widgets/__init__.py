"""Interactive views for notebooks. Each is an extra view of data that a plot function draws as a static figure, so that
a notebook says the same without a kernel. A widget holds no results: it reads run folders or models and shows
pictures of `ibqlab.plots`. Needs ipywidgets. Start reading at `live`, which needs no controls.

live.py       one run's curves while it trains, and pictures as HTML
explorer.py   a study's runs: method, start, sizes and training step by hand
run_explorer.py   one run: its training step by hand
lab.py        the lab's methods side by side, through time
sampler.py    one generated image at a time
"""

from ibqlab.widgets.explorer import StudyExplorer, explore_study
from ibqlab.widgets.lab import LabExplorer, explore_lab
from ibqlab.widgets.live import LiveCurves
from ibqlab.widgets.run_explorer import RunExplorer, explore_run
from ibqlab.widgets.sampler import SampleExplorer

__all__ = [
    "LabExplorer",
    "LiveCurves",
    "RunExplorer",
    "SampleExplorer",
    "StudyExplorer",
    "explore_lab",
    "explore_run",
    "explore_study",
]
