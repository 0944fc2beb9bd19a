"""Two maps side by side, of two methods: the interactive twin of the figures of `FeatureCodeMap`."""

from typing import Any

import ipywidgets

from ibqlab.base.escaping import for_html
from ibqlab.runs import RunError
from ibqlab.studies import FeatureCodeMap
from ibqlab.widgets.codebook_map import CodebookMap
from ibqlab.widgets.live import with_static_page

_HALF = {"width": "49%", "min_width": "460px"}


class MapPair(ipywidgets.VBox):
    """The maps of two runs, one beside the other where the page is wide enough, and what their code numbers share.

    Codes chosen in one map are marked in the other where both runs began with the same codebook. Elsewhere equal
    numbers mean nothing, and the maps stay apart.

    Args:
        figures: whose runs are read already.
        height: of each map, CSS pixels.
    """

    def __init__(self, figures: FeatureCodeMap, height: int = 420):
        pair = figures.pair()
        self.maps: list[CodebookMap] = []
        shown = []
        for one in pair:
            heading = ipywidgets.HTML(f"<h4>{for_html(one.name)}</h4>")
            try:
                self.maps.append(CodebookMap(one.run, figures.projection, height=height))
            except (RunError, ValueError, OSError, ImportError) as error:
                shown.append([heading, ipywidgets.HTML(f"<p>{for_html(error, None)}</p>")])
            else:
                shown.append([heading, self.maps[-1]])
        self.is_linked = len(self.maps) == 2 and figures.begins_alike(pair)
        if self.is_linked:
            self.maps[0].link(self.maps[1])
        self.sentence = ipywidgets.HTML(
            f"<p>{for_html(_relation(len(pair), len(self.maps), self.is_linked), None)}</p>"
        )
        columns = [ipywidgets.VBox(children, layout=_HALF) for children in shown]
        super().__init__([self.sentence, ipywidgets.HBox(columns, layout={"flex_flow": "row wrap"})])
        self.add_class("ibqlab-map-pair")
        self._headings = [children[0].value for children in shown]
        self._pages = [children[1] for children in shown]

    def static_html(self) -> str:
        """Both maps as pictures, and what relates them."""
        pages = [
            f"<div>{heading}{page.value if isinstance(page, ipywidgets.HTML) else page.static_html()}</div>"
            for heading, page in zip(self._headings, self._pages, strict=True)
        ]
        return f'{self.sentence.value}<div style="display: flex; flex-wrap: wrap">{"".join(pages)}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())


def explore_feature_map(figures: FeatureCodeMap) -> MapPair:
    """Two maps side by side that answer to the mouse: VQ and IBQ from one start where there are such runs.

    Args:
        figures: after `run`.
    Returns:
        The view, to be shown as a notebook's output; it needs a running kernel.
    Raises:
        ValueError: no run is read yet.
    """
    return MapPair(figures)


def _relation(runs: int, maps: int, is_linked: bool) -> str:
    """What the two maps have in common, in a sentence."""
    if runs < 2:
        return "One run: there is nothing to compare it with."
    if maps < 2:
        return "Without both maps there is nothing to compare."
    if is_linked:
        return (
            "Code k began at the same place in both runs: codes chosen in one map are marked in the other. The planes "
            "are fitted apart, so places cannot be compared."
        )
    return "The runs began with different codebooks: equal code numbers mean nothing, so the maps are not linked."
