"""One generated image at a time: class, seed, guidance, temperature and filters by hand."""

from collections.abc import Sequence
from typing import Any

import ipywidgets
import torch

from ibqlab.base.escaping import for_html, for_terminal
from ibqlab.generating.drawing import draw_images
from ibqlab.generator import AnyGenerator
from ibqlab.plots import plot_gallery
from ibqlab.tokenizer import Tokenizer
from ibqlab.widgets.live import faded, picture_html, with_static_page

_STYLE = {"description_width": "110px"}


class SampleExplorer(ipywidgets.VBox):
    """Controls for one image, and the image; it is drawn when the button is pressed, and fades when a control moves.

    Args:
        generator: a transformer over the tokenizer's codes.
        tokenizer: whose decoder makes the images.
        names: class names by label; classes beyond them are shown by number.
        **computing: dtype and compiled, as of `Generator.sample`.
    """

    def __init__(self, generator: AnyGenerator, tokenizer: Tokenizer, names: Sequence[str] = (), **computing: Any):
        self._generator, self._tokenizer, self._computing = generator, tokenizer, computing
        count = generator.config.num_classes
        labels = [
            (for_terminal(names[label]) if label < len(names) else f"class {label}", label) for label in range(count)
        ]
        slider = {"style": _STYLE, "continuous_update": False, "readout_format": ".2f"}
        self.label = ipywidgets.Dropdown(options=[*labels, ("no class", count)], description="class", style=_STYLE)
        self.seed = ipywidgets.BoundedIntText(0, min=0, max=2**31 - 1, description="seed", style=_STYLE)
        self.cfg_scale = ipywidgets.FloatSlider(2.0, min=0, max=8, step=0.25, description="guidance", **slider)
        self.temperature = ipywidgets.FloatSlider(1.0, min=0, max=2, step=0.05, description="temperature", **slider)
        self.top_p = ipywidgets.FloatSlider(1.0, min=0.05, max=1, step=0.05, description="top-p", **slider)
        self.button = ipywidgets.Button(description="draw", button_style="primary")
        self.picture = ipywidgets.HTML()
        self.picture.add_class("ibqlab-sample")
        self._controls = [self.label, self.seed, self.cfg_scale, self.temperature, self.top_p]
        self._drawn = ""
        self._drawn_from: list[Any] = []
        """Values of the controls behind what was drawn last."""
        super().__init__([ipywidgets.HBox([ipywidgets.VBox([*self._controls, self.button]), self.picture])])
        self.button.on_click(lambda _: self.draw())
        for control in self._controls:
            control.observe(lambda _: self._fade_if_other(), names="value")
        self.draw()

    def static_html(self) -> str:
        """The image that was drawn last; its caption names its settings."""
        return self._drawn

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return with_static_page(super()._repr_mimebundle_(**kwargs), self.static_html())

    def draw(self) -> None:
        """Show the image that the controls describe, or why it cannot be: an error in a callback is seen by nobody."""
        self.picture.value = f"{faded(self._drawn)}<p>drawing …</p>"
        self._drawn_from = self._chosen()
        self._drawn = self._draw()
        self.picture.value = self._drawn

    def _chosen(self) -> list[Any]:
        return [control.value for control in self._controls]

    def _fade_if_other(self) -> None:
        """Fade the image where the controls describe another."""
        is_described = self._chosen() == self._drawn_from
        self.picture.value = self._drawn if is_described else f"{faded(self._drawn)}<p>press draw</p>"

    def _draw(self) -> str:
        settings = {"cfg_scale": self.cfg_scale.value, "temperature": self.temperature.value, "top_p": self.top_p.value}
        try:
            device = next(self._generator.parameters()).device
            label = torch.tensor([self.label.value], device=device)
            pair = self._generator, self._tokenizer
            image = draw_images(*pair, label, seed=self.seed.value, **settings, **self._computing)
        except (ValueError, RuntimeError) as error:
            return f"<b>{for_html(error, None)}</b>"
        name = self.label.label
        sliders = (self.cfg_scale, self.temperature, self.top_p)
        described = ", ".join(f"{slider.description} {slider.value:g}" for slider in sliders)
        caption = f"seed {self.seed.value}, {described}"
        figure = plot_gallery(image[None], [""], [name], caption=caption)
        return picture_html(figure, f"generated image of {name}: {caption}")
