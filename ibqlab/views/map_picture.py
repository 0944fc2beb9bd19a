"""The static twin of a map: one step as a picture, thinned where a picture could not show more."""

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from ibqlab.plots import plot_code_map
from ibqlab.plots.style import add_caption
from ibqlab.views.map_data import MapData

MOST_DRAWN = 8000
"""Codes that were in use, other codes, and features of a picture, each at most."""


def draw_map(data: MapData, frame: int, title: str) -> Figure:
    """One snapshot's map, coloured by hits on the scale of all snapshots.

    Args:
        data: the map.
        frame: number of the snapshot.
        title: heading.
    """
    thin, counts = _thinned(data), data.counts(frame)
    figure = plot_code_map(thin.projection, frame, counts, title, most_hits=max(2, int(data.hits.max())))
    caption = " ".join(figure.get_supxlabel().split())
    add_caption(figure, caption.replace("(thinned: give project_codes the counts)", "(a picture shows no more)"))
    return figure


def _thinned(data: MapData) -> MapData:
    """Samples of the codes in use at any snapshot, of all others, and of the features."""
    used = (data.hits > 0).any(0)
    codes = np.union1d(*(_sample(np.flatnonzero(group)) for group in (used, ~used)))
    features = _sample(np.arange(data.features.shape[1]))
    if len(codes) == len(data.code_ids) and len(features) == data.features.shape[1]:
        return data
    return replace(
        data,
        code_ids=data.code_ids[codes],
        codes=data.codes[:, codes],
        features=data.features[:, features],
        hits=data.hits[:, codes],
    )


def _sample(rows: np.ndarray) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(rows)[:MOST_DRAWN])
