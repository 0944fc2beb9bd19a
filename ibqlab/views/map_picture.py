"""The static twin of a map: one step as a picture, thinned where a picture could not show more."""

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from ibqlab.plots import plot_code_map
from ibqlab.views.map_data import MapData

MOST_DRAWN = 6000
"""Dead codes, and features, of a picture at most."""


def draw_map(data: MapData, frame: int, title: str) -> Figure:
    """One snapshot's map, coloured by hits on the scale of all snapshots.

    Args:
        data: the map.
        frame: number of the snapshot.
        title: heading.
    """
    thin = _thinned(data)
    return plot_code_map(thin.projection, frame, thin.counts(frame), title, most_hits=max(2, int(data.hits.max())))


def _thinned(data: MapData) -> MapData:
    """All codes in use at any snapshot, and as many others and features as a picture can show."""
    draw = np.random.default_rng(0)
    used = (data.hits > 0).any(0)
    dead = np.flatnonzero(~used)
    codes = np.union1d(np.flatnonzero(used), dead[np.sort(draw.permutation(len(dead))[:MOST_DRAWN])])
    features = np.sort(draw.permutation(data.features.shape[1])[:MOST_DRAWN])
    if len(codes) == len(data.code_ids) and len(features) == data.features.shape[1]:
        return data
    return replace(
        data,
        code_ids=data.code_ids[codes],
        codes=data.codes[:, codes],
        features=data.features[:, features],
        hits=data.hits[:, codes],
    )
