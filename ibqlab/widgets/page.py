"""HTML in a notebook that answers clicks: the one piece of our own in the browser, some lines beside this file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from ibqlab.base.escaping import for_html
from ibqlab.views.subject import lacking


class Page(anywidget.AnyWidget):
    """HTML whose elements with `data-code` or `data-token` tell the kernel when they are clicked.

    The `title` of an element with `data-token` is shown at once when the pointer or the keyboard reaches it.

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
            try:
                self._clicked(content)
            finally:
                self.send({"answered": True})


def status_html(text: str) -> str:
    """A sentence beside the controls, which a screen reader reads out."""
    return f'<span role="status">{for_html(text, None)}</span>'


def safely(say: Callable[[str], object], act: Callable[..., object]) -> Callable[..., None]:
    """A callback whose error is said in a sentence: a widget's own would be seen by nobody.

    Args:
        say: shows a sentence.
        act: what to do; called with the callback's arguments.
    """

    def callback(*arguments: Any) -> None:
        try:
            act(*arguments)
        # Whatever it is: the button would be dead without a word.
        except Exception as error:
            say(lacking(error))

    return callback
