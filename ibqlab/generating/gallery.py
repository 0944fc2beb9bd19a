"""Galleries: the same seeds over classes, guidance, temperatures and top-p, from any generator and its tokenizer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure

from ibqlab.base import checks
from ibqlab.base.devices import require_device
from ibqlab.base.progress import tell, track_items
from ibqlab.data import first_images, open_data
from ibqlab.generating.class_labels import SHOWN_CLASSES, row_names
from ibqlab.generating.drawing import ImageGrid, decode_pictures, draw_gallery
from ibqlab.generating.pairs import class_names, data_of, open_pair
from ibqlab.generating.pipeline import GeneratorRunParameters, prepare_pipeline
from ibqlab.generator import AnyGenerator, SamplingConfig
from ibqlab.generator.sampling_config import SAMPLING_CARDS
from ibqlab.generator.sampling_dtype import AUTO, DTYPE_NAMES
from ibqlab.metrics.digits_classifier import Recognition, recognise_digits
from ibqlab.plots import plot_gallery, save_figure
from ibqlab.plots.style import mark_too_short
from ibqlab.recipes.plugins import import_plugins
from ibqlab.recipes.presets import find_preset
from ibqlab.runs import Run, runs_root
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import locate
from ibqlab.tokenizer import Tokenizer

COMPARED = ("cfg_scales", "temperatures", "top_ps")
"""Parameters whose values are compared with each other."""


@dataclass(frozen=True, kw_only=True)
class GalleryParameters:
    """What the `parameters` cell of the gallery notebook may set."""

    preset: str = "digits"
    """Where no generator is given: one of `preset_names("generator")`, whose tokenizer and generator are trained first
    unless they were before."""
    generator: str = ""
    """A trained generator: a run folder, an export or a published file; empty: the preset's."""
    tokenizer: str = ""
    """The tokenizer that decodes; empty: the one that the generator's run or file holds."""
    card: str = ""
    """A published sampling card, such as "ibq_b", for the gallery of seeds; empty: guidance 2 and nothing else."""
    classes: tuple[int, ...] = ()
    """Rows of the galleries; empty: the first ten classes, or all where there are fewer."""
    cfg_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0)
    """Guidance to compare, each ≥ 0; 1 is none."""
    temperatures: tuple[float, ...] = (0.8, 1.0)
    """Temperatures to compare, each ≥ 0; 0 takes the most probable token."""
    top_ps: tuple[float, ...] = (1.0, 0.9)
    """Shares of the probability to draw from, each above 0 to 1."""
    seed: int = 0
    """Seed of the first column; the next ones follow."""

    images_per_class: int = 8
    """Columns of the gallery of seeds, at least 1."""
    device: str = "cpu"
    """Where images are drawn and decoded: "cpu", "cuda", "cuda:1", "mps"."""
    dtype: str = AUTO
    """Number type to draw in: "float32", "bfloat16", "float16" or "float64"; "auto": bfloat16 on a GPU that multiplies
    it, and the weights' type elsewhere."""
    compiled: bool = False
    """Compile the step of one position on a CPU, too, once for each set of filters; on a GPU it is always recorded."""
    plugins: tuple[str, ...] = ()
    """Files (my_quantizer.py) and modules of your own that register the tokenizer's quantizer."""

    def __post_init__(self):
        import_plugins(self.plugins)
        find_preset(self.preset, "generator")
        require_device(self.device)
        checks.require_choice("dtype", self.dtype, DTYPE_NAMES)
        if self.card:
            checks.require_choice("card", self.card, SAMPLING_CARDS)
        checks.require_between("images_per_class", self.images_per_class, 1, checks.GALLERY_IMAGES)
        rows = max(len(self.classes), 1)
        checks.require_at_most("images_per_class × classes", rows * self.images_per_class, checks.GALLERY_IMAGES)
        settings = math.prod(len(getattr(self, name)) for name in COMPARED)
        checks.require_at_most("classes × cfg_scales × temperatures × top_ps", rows * settings, checks.GALLERY_IMAGES)
        checks.require_between("seed", self.seed, 0, checks.SAMPLE_SEED)
        for label in self.classes:
            checks.require_between("classes", label, 0, checks.CLASSES)
        for name in COMPARED:
            checks.require(len(getattr(self, name)) > 0, f"{name} must hold at least one value; got none. Use [1.0].")
            for value in getattr(self, name):
                SamplingConfig(**{name.removesuffix("s"): value})  # says what is wrong with it


def gallery_settings(parameters: GalleryParameters) -> SamplingConfig:
    """How the gallery of seeds is drawn: by the card, or with guidance 2."""
    return SAMPLING_CARDS[parameters.card] if parameters.card else SamplingConfig(cfg_scale=2.0)


def choose_classes(parameters: GalleryParameters, generator: AnyGenerator) -> list[int]:
    """The classes that a notebook's parameters ask for.

    Raises:
        ValueError: a class that the generator has not.
    """
    last = generator.config.num_classes - 1
    chosen = list(parameters.classes) or list(range(min(last + 1, SHOWN_CLASSES)))
    checks.require(max(chosen) <= last, f"classes must lie in 0 to {last}; got {chosen}. Use [] for the first ten.")
    return chosen


def gallery_table(grid: ImageGrid, **settings: Any) -> pd.DataFrame:
    """What stands behind a gallery.

    Args:
        grid: from `draw_gallery`.
        **settings: that all images share, such as temperature.
    Returns:
        One row per image: row, column, class, seed, mean (grey level, 0 to 255), and the settings.
    """
    rows, columns = np.indices(grid.labels.shape)
    values = {"row": rows, "column": columns, "class": grid.labels, "seed": grid.seeds}
    values["mean"] = grid.images.mean(axis=(2, 3, 4))
    return pd.DataFrame({name: array.flatten() for name, array in values.items()}).assign(**settings)


class Gallery:
    """Figures of one generator's images, saved with what stands behind them.

    Args:
        pair: generator and tokenizer, as `open_pair` gives them; moved to the parameters' device.
        parameters: what to draw.
        path: of the generator: a run folder, or a file.
    """

    def __init__(self, pair: tuple[AnyGenerator, Tokenizer], parameters: GalleryParameters, path: str | Path) -> None:
        self.pair = self.generator, self.tokenizer = tuple(network.to(parameters.device) for network in pair)
        self.parameters, self.path = parameters, Path(path)
        self.sampling = gallery_settings(parameters)
        """Of all images but those that compare settings."""
        self.computing = {"dtype": parameters.dtype, "compiled": parameters.compiled or None}
        """How all images are computed."""
        root = runs_root().resolve()
        inside = self.path.resolve().is_relative_to(root)
        self.name = self.path.resolve().relative_to(root).as_posix() if inside else self.path.name
        self.names = class_names(path)
        """Of the classes, by label; empty where nobody tells them."""
        self.run = Run(self.path) if self.path.is_dir() else None
        self.folder = self.path / "figures" if self.run else runs_root() / "galleries" / self.path.stem
        """Where figures go: into the generator's run, or into a folder of their own beside the runs."""
        self.data = data_of(path)
        """The images that it learned from; None where they are not here."""
        self.of_digits = self.data is not None and self.data.source == "digits"

    def figure_seeds(self, classes: Sequence[int], name: str = "gallery") -> Figure:
        """Each class with the same seeds; saved as `name`."""
        parameters, sampling = self.parameters, self.sampling
        grid = self._draw(classes, parameters.images_per_class)
        caption = f"guidance {_setting_text(sampling.cfg_scale)}, temperature {_setting_text(sampling.temperature)}"
        columns = [f"seed {seed}" for seed in grid.seeds[0]]
        # A schedule, such as guidance from 1 to 4, is one cell of the table.
        items = vars(sampling).items()
        settings = {key: _setting_text(value) if isinstance(value, tuple) else value for key, value in items}
        figure = self._figure(name, grid, columns, caption, **settings)
        tell(folder=str((self.path if self.run else self.folder).resolve()))
        return figure

    @cached_property
    def compared(self) -> dict[tuple[float, float], ImageGrid]:
        """Temperature and top-p → one image of every class under every guidance, all by one seed; drawn when asked for.

        A row is a class, a column a guidance.
        """
        parameters, grids = self.parameters, {}
        classes = choose_classes(parameters, self.generator)
        pairs = list(product(parameters.temperatures, parameters.top_ps))
        for temperature, top_p in track_items(pairs, "galleries", "settings"):
            shared = {"columns": 1, "seed": parameters.seed, "temperature": temperature, "top_p": top_p}
            shared |= self.computing
            columns = [draw_gallery(*self.pair, classes, cfg_scale=scale, **shared) for scale in parameters.cfg_scales]
            grids[temperature, top_p] = ImageGrid(
                *(np.concatenate(arrays, axis=1) for arrays in zip(*columns, strict=True))
            )
        return grids

    def figures_settings(self) -> Iterator[Figure]:
        """Class by guidance, one figure per temperature and top-p; saved as `gallery_t…_p…`."""
        scales = self.parameters.cfg_scales
        columns = [f"guidance {scale:g}" for scale in scales]
        for (temperature, top_p), grid in self.compared.items():
            caption = f"temperature {temperature:g}, top-p {top_p:g}, seed {self.parameters.seed}"
            settings = {"temperature": temperature, "top_p": top_p, "cfg_scale": np.tile(scales, len(grid.labels))}
            yield self._figure(f"gallery_t{temperature:g}_p{top_p:g}", grid, columns, caption, **settings)

    def table(self) -> pd.DataFrame:
        """Setting by setting: what was drawn, and for digits the share that a classifier recognises.

        Returns:
            Columns: temperature, top_p, cfg_scale, images, and for digits recognised (share, 0 to 1).
        """
        rows = []
        for (temperature, top_p), grid in self.compared.items():
            for column, scale in enumerate(self.parameters.cfg_scales):
                images, labels = grid.images[:, column], grid.labels[:, column]
                row = {"temperature": temperature, "top_p": top_p, "cfg_scale": scale, "images": labels.size}
                rows.append(row | ({"recognised": _recognise(images, labels).share} if self.of_digits else {}))
        result = f"{sum(row['images'] for row in rows):,} images drawn under {len(rows)} settings"
        if self.of_digits:
            best = max(rows, key=lambda row: row["recognised"])
            result = (
                f"{best['recognised']:.1%} of {best['images']} digits recognised at the best of {len(rows)} settings "
                f"(temperature {best['temperature']:g}, top-p {best['top_p']:g}, guidance {best['cfg_scale']:g})"
            )
        tell(result=result)
        return pd.DataFrame(rows)

    def figure_completions(self, images: int = 4) -> Figure | None:
        """Validation images, what the upper half of their tokens alone decodes to, and what the generator makes of it.

        Saved as `completions`; None for a generator whose images are not here.

        Args:
            images: how many, at least 1; fewer where there are no more.
        """
        batch = first_images(open_data(self.data, "validation"), images) if self.data else None
        if batch is None:
            return None
        count, side, device = len(batch.images), self.generator.config.grid_size, self.parameters.device
        tokens = self.tokenizer.encode_indices(batch.images.to(device)).flatten(1)  # (B, T)
        prompt = side * (side // 2)
        # The rest of the grid holds the first code, so that the eye sees where the upper half ends.
        half = torch.where(torch.arange(side**2, device=device) < prompt, tokens, 0)
        seeds = range(self.parameters.seed, self.parameters.seed + 3)
        labels = torch.where(batch.labels < 0, self.generator.config.num_classes, batch.labels)
        shared = {"prompt": tokens[:, :prompt], **vars(self.sampling), **self.computing}
        completions = [self.generator.sample(labels, seed=[seed] * count, **shared) for seed in seeds]
        decoded = [decode_pictures(self.tokenizer, grid, side) for grid in (tokens, half, *completions)]
        pictures = np.stack([batch.images.permute(0, 2, 3, 1).numpy(), *decoded], axis=1)  # (B, columns, H, W, 3)
        names = ["image", "its tokens", f"{side // 2} of {side} rows", *(f"seed {seed}" for seed in seeds)]
        figure = self._plot(pictures, [""] * count, names, "the rest of the image is drawn")
        table = pd.DataFrame({"image": range(count), "class": labels.tolist(), "tokens_given": prompt})
        save_figure(figure, self.folder / "completions", table)
        return figure

    def judge(self, images_per_class: int = 20) -> str:
        """How many generated digits a classifier of real scans takes for the class asked for, in a sentence.

        Args:
            images_per_class: drawn and looked at, at least 1.
        """
        if not self.of_digits:
            return "only digits have a classifier here that can tell whether an image is what was asked for"
        grid = self._draw(range(self.generator.config.num_classes), images_per_class)
        sentence = _recognise(grid.images.reshape(-1, *grid.images.shape[2:]), grid.labels.flatten()).describe()
        tell(result=sentence)
        return sentence

    def _draw(self, classes: Sequence[int], columns: int) -> ImageGrid:
        settings = vars(self.sampling) | self.computing
        return draw_gallery(*self.pair, classes, columns=columns, seed=self.parameters.seed, **settings)

    def _figure(self, name: str, grid: ImageGrid, columns: Sequence[str], caption: str, **settings: Any) -> Figure:
        """A figure with one class per row. It is saved with the table of its images."""
        figure = self._plot(grid.images, row_names(grid.labels[:, 0], self.names), columns, caption)
        save_figure(figure, self.folder / name, gallery_table(grid, **settings))
        return figure

    def _plot(self, pictures: np.ndarray, rows: Sequence[str], columns: Sequence[str], caption: str) -> Figure:
        """`plot_gallery` that says whose images these are, and whether the run is too short."""
        step = f" at step {self.run.step:,}" if self.run else ""
        figure = plot_gallery(pictures, rows, columns, caption=f"{self.name}{step}: {caption}")
        reason = why_too_short(self.run.step) if self.run else ""
        if reason:
            mark_too_short(figure, reason)
        return figure


def open_gallery(parameters: GalleryParameters) -> Gallery:
    """The generator that a notebook's parameters name, or the preset's, trained first if it is not there.

    Raises:
        CheckpointError: no such generator, or no tokenizer with it.
    """
    if parameters.generator:
        path = locate(parameters.generator)
    else:
        pipeline = prepare_pipeline(GeneratorRunParameters(preset=parameters.preset))
        pipeline.write_tokens(pipeline.train_tokenizer())
        path = pipeline.train_generator().path
    return Gallery(open_pair(path, parameters.tokenizer), parameters, path)


def _recognise(images: UInt8[np.ndarray, "B H W 3"], labels: Int[np.ndarray, " B"]) -> Recognition:
    return recognise_digits(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.copy()))


def _setting_text(setting: float | tuple[float, float]) -> str:
    return " and ".join(f"{value:g}" for value in setting) if isinstance(setting, tuple) else f"{setting:g}"
