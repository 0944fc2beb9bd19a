"""Interactive views for notebooks: extra views of what plots draw as static figures. Needs ipywidgets.

explorer.py   a study's runs: method, start, sizes and training step by hand
live.py       one run's curves while it trains
sampler.py    one generated image at a time
"""

from ibqlab.widgets.explorer import StudyExplorer, explore_study
from ibqlab.widgets.live import LiveCurves
from ibqlab.widgets.sampler import SampleExplorer

__all__ = ["LiveCurves", "SampleExplorer", "StudyExplorer", "explore_study"]
