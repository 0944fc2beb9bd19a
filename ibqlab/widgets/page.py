"""HTML in a notebook that answers clicks: the one piece of our own in the browser, a dozen lines beside this file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets


class Page(anywidget.AnyWidget):
    """HTML whose elements with `data-code` or `data-token` tell the kernel when they are clicked.

    Args:
        value: the HTML; what comes from outside in it must be escaped.
        clicked: called with what was clicked: {"code": "51", "token": "", "shift": False}.
    """

    _esm = Path(__file__).with_name("page.js")
    value = traitlets.Unicode().tag(sync=True)

    def __init__(self, value: str = "", clicked: Callable[[dict[str, Any]], None] | None = None):
        super().__init__(value=value)
        self._clicked = clicked
        self.on_msg(self._hear)

    def _hear(self, _: Any, content: Any, __: Any) -> None:
        if self._clicked is not None and isinstance(content, dict):
            self._clicked(content)
