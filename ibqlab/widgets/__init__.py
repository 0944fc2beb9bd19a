"""Interactive views for notebooks. Each is an extra view of data that a plot function draws as a static figure, so that
a notebook says the same without a kernel. A widget holds no results: it reads run folders or models and shows
pictures of `ibqlab.plots`. Needs ipywidgets. Start reading at `live`, which needs no controls.

codebook_map.py   a run's codes among its features, through time; a click opens the code's card
linked_maps.py    two maps side by side
map_canvas.py     the plot of a map, and what draws its points
code_card.py  what a code is
token_view.py an image's tokens: read, replace, compare
training_cell.py  what a notebook's training cell calls: train apart, show it, wait or not
training_view.py  runs that train in processes of their own: watch, pause, go on
run_browser.py    all runs of a folder: found, compared, noted, opened in the other views
training_pictures.py  what it shows
page.py       HTML that answers clicks
live.py       one run's curves while it trains, and pictures as HTML
explorer.py   a study's runs: method, start, sizes and training step by hand
run_explorer.py   one run: its training step by hand
lab.py        the lab's methods side by side, through time
sampler.py    one generated image at a time
"""

from ibqlab.widgets.code_card import CodeCard
from ibqlab.widgets.codebook_map import CodebookMap
from ibqlab.widgets.explorer import StudyExplorer, explore_study
from ibqlab.widgets.lab import LabExplorer, explore_lab
from ibqlab.widgets.linked_maps import LinkedMaps, link_maps
from ibqlab.widgets.live import LiveCurves
from ibqlab.widgets.run_browser import RunBrowser
from ibqlab.widgets.run_explorer import RunExplorer, explore_run
from ibqlab.widgets.sampler import SampleExplorer
from ibqlab.widgets.token_view import TokenView, compare_tokens
from ibqlab.widgets.training_cell import finished_run, require_finished, train_and_watch, train_study
from ibqlab.widgets.training_view import TrainingView

__all__ = [
    "CodeCard",
    "CodebookMap",
    "LabExplorer",
    "LinkedMaps",
    "LiveCurves",
    "RunBrowser",
    "RunExplorer",
    "SampleExplorer",
    "StudyExplorer",
    "TokenView",
    "TrainingView",
    "compare_tokens",
    "explore_lab",
    "explore_run",
    "explore_study",
    "finished_run",
    "link_maps",
    "require_finished",
    "train_and_watch",
    "train_study",
]
