"""Two maps side by side: two steps of one run, two runs, two methods; what is selected in one is selected in both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np

from ibqlab.base.escaping import for_html
from ibqlab.base.files import RunError
from ibqlab.runs import Run
from ibqlab.views.map_data import MapData
from ibqlab.views.subject import Subject, lacking
from ibqlab.widgets.codebook_map import CodebookMap, step_controls
from ibqlab.widgets.live import with_static_page


class LinkedMaps(ipywidgets.VBox):
    """Two maps with one slider where their steps agree, and linked selection where their codes correspond.

    A code's number means the same in two maps of one run, and in two runs that share K and began with the same
    codebook; otherwise selecting stays within each map, and a sentence says why.

    Args:
        first, second: made by `CodebookMap`.
        titles: above each; empty: none, since each map names its run.
    """

    def __init__(self, first: CodebookMap, second: CodebookMap, titles: Sequence[str] = ()):
        self.maps = first, second
        # Without titles the maps' own headings say which run it is.
        self.headings = [ipywidgets.HTML(f"<h4>{for_html(name)}</h4>" if name else "") for name in titles or ("", "")]
        self.said = ipywidgets.HTML()
        self.play, self.step = step_controls("step of both")
        self.controls = ipywidgets.HBox([self.play, self.step], layout={"flex_flow": "row wrap"})
        columns = [
            ipywidgets.VBox([heading, one], layout={"width": "49%", "min_width": "min(100%, 380px)"})
            for heading, one in zip(self.headings, self.maps, strict=True)
        ]
        pair = ipywidgets.HBox(columns, layout={"flex_flow": "row wrap", "justify_content": "space-between"})
        super().__init__([self.controls, self.said, pair])
        self.add_class("ibqlab-linked-maps")
        self.codes_correspond, self._steps, self._is_judging = False, (), False
        self.step.observe(self._moved, names="value")
        for one, other in (self.maps, self.maps[::-1]):
            one.on_select(self._teller(other))
            one.on_show(self._judge)
        self._judge()

    def static_html(self) -> str:
        """Both maps as pictures, one beside the other."""
        pages = "".join(
            f'<div style="flex:1 1 420px">{heading.value}{one.static_html()}</div>'
            for heading, one in zip(self.headings, self.maps, strict=True)
        )
        return f'{self.said.value}<div style="display:flex;flex-wrap:wrap">{pages}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    def _teller(self, other: CodebookMap) -> Any:
        def tell(codes: tuple[int, ...]) -> None:
            if self.codes_correspond:
                other.show_selected(codes)

        return tell

    def _judge(self) -> None:
        """Whether codes and steps of the two agree, as they stand now."""
        first, second = self.maps
        if first.data is None or second.data is None:
            self.codes_correspond, self._steps, text = False, (), "One of the two has no map, so nothing is linked."
        else:
            try:
                self.codes_correspond, text = compare_codes((first.subject, first.data), (second.subject, second.data))
            except (RunError, ValueError, OSError, KeyError) as error:
                self.codes_correspond, text = False, f"Selecting is not linked: {lacking(error)}"
            is_one_run = first.subject.path.resolve() == second.subject.path.resolve()
            same_method = first.data.method == second.data.method
            self._steps = tuple(sorted(set(first.data.steps) & set(second.data.steps)))
            # Of one run in one plane two different steps are compared, and one slider would end that.
            self._steps = () if is_one_run and same_method else self._steps
            if not (is_one_run and same_method):
                text += " Each map has a plane of its own, so places cannot be compared between them."
            has_steps = len(first.data.steps) > 1 or len(second.data.steps) > 1  # a published file has one moment
            if has_steps and len(self._steps) < 2 and not (is_one_run and same_method):
                text += " They share fewer than two steps, so each has its own slider."
        self.said.value = f'<p class="ibqlab-linked-said">{for_html(text, None)}</p>'
        has_slider = len(self._steps) > 1
        self.controls.layout.display = None if has_slider else "none"
        if has_slider:
            options = [(f"{step:,}", number) for number, step in enumerate(self._steps)]
            if tuple(self.step.options) != tuple(options):
                # The maps stay at the steps that were asked for; the slider moves both once it is moved.
                now = first.data.steps[first.step.value]
                self._is_judging = True
                self.play.max = len(options) - 1
                self.step.options = options
                self.step.value = self.play.value = int(np.abs(np.array(self._steps) - now).argmin())
                self._is_judging = False

    def _moved(self, _: Any) -> None:
        if not self._is_judging and len(self._steps) > 1 and self.step.value < len(self._steps):
            for one in self.maps:
                if one.data is not None and self._steps[self.step.value] in one.data.steps:
                    one.step.value = one.data.steps.index(self._steps[self.step.value])


def compare_codes(first: tuple[Subject, MapData], second: tuple[Subject, MapData]) -> tuple[bool, str]:
    """Whether a code's number means the same in two maps, and one sentence that says so.

    Args:
        first, second: a run and its map.
    """
    (one, one_map), (other, other_map) = first, second
    if one.path.resolve() == other.path.resolve():
        return True, "Both maps are of one run: a code has the same number in both, and selecting is linked."
    sizes = one_map.codebook_size, other_map.codebook_size
    if sizes[0] != sizes[1]:
        return False, f"Selecting is not linked: the runs have {sizes[0]:,} and {sizes[1]:,} codes."
    books = [subject.snapshot(data.steps[0])["codebook"] for subject, data in (first, second)]
    same = books[0].shape == books[1].shape and np.array_equal(books[0], books[1])
    if one.run is None or other.run is None:
        linked = "Both hold the same codebook, so a code's number means the same in both: selecting is linked."
        apart = "Selecting is not linked: these are two codebooks, so a code's number means something else in each."
        return same, linked if same else apart
    steps = one_map.steps[0], other_map.steps[0]
    if steps == (0, 0) and same:
        return True, (
            f"Both runs have K = {sizes[0]:,} and began with the same codebook, so a code's number means the same in "
            "both: selecting is linked."
        )
    why = "they began with different codebooks" if steps == (0, 0) else "their codebooks at step 0 were not stored"
    return False, (
        f"Selecting is not linked: both runs have K = {sizes[0]:,}, but {why}, so a code's number means something else "
        "in each."
    )


def link_maps(
    first: str | Path | Run | Subject | CodebookMap,
    second: str | Path | Run | Subject | CodebookMap,
    titles: Sequence[str] = (),
    **settings: Any,
) -> LinkedMaps:
    """Two maps side by side.

    Args:
        first, second: runs, checkpoints as of `open_subject(FILE, images)`, or maps that were made already, for
            instance by another method or at another step.
        titles: above each; empty: none, since each map names its run.
        **settings: of both maps where runs are given, as of `CodebookMap`; without cards unless `with_card=True`.
    """
    made = [
        one if isinstance(one, CodebookMap) else CodebookMap(one, **{"with_card": False, **settings})
        for one in (first, second)
    ]
    if len(titles) not in (0, 2):
        raise ValueError(f"titles must be two, one above each map; got {len(titles)}")
    return LinkedMaps(*made, titles=titles)
