"""What a widget shows, as a page that needs no kernel."""

from abc import abstractmethod
from typing import Any

from ibqlab.notebooks.results import text_of


class StaticTwin:
    """A widget that gives a notebook what it shows now as HTML and as text, beside the live view.

    A copy made by papermill, and every page that has no kernel to ask, then holds pictures and numbers in place of a
    widget's name. Comes before the widget's class among the bases.
    """

    @abstractmethod
    def static_html(self) -> str:
        """What is shown now, without controls."""

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        shown = self.static_html()
        data |= {"text/html": shown, "text/plain": text_of(shown)}
        return bundle
