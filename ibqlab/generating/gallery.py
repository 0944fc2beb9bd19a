"""Galleries: the same seeds over classes, guidance, temperatures and top-p, from any generator and its tokenizer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from ibqlab.base.checks import (
    CLASSES,
    GALLERY_IMAGES,
    SAMPLE_SEED,
    require,
    require_at_most,
    require_between,
    require_choice,
)
from ibqlab.base.progress import counted, tell, why_too_short
from ibqlab.data import Batch, first_images, open_data
from ibqlab.generating.pipeline import (
    GeneratorRunParameters,
    Pair,
    class_names,
    data_of,
    open_pair,
    plan_pipeline,
)
from ibqlab.generator import AnyGenerator
from ibqlab.generator.cards import SAMPLING_CARDS
from ibqlab.generator.sampling import SamplingConfig, Seed
from ibqlab.metrics import truncate_to_uint8
from ibqlab.metrics.digits_classifier import Recognition, recognise_digits
from ibqlab.plots import plot_gallery, save_figure
from ibqlab.plots.style import mark_too_short
from ibqlab.recipes.presets import find_preset
from ibqlab.runs import Run, runs_root
from ibqlab.tokenizer import Tokenizer
from ibqlab.training.generator.token_source import check_fit, find_folder

BATCH = 64
"""Images drawn and decoded at once."""
SHOWN_CLASSES = 10
"""Rows of a gallery where no classes are named."""


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

    def __post_init__(self):
        find_preset(self.preset, "generator")
        if self.card:
            require_choice("card", self.card, SAMPLING_CARDS)
        require_between("images_per_class", self.images_per_class, 1, GALLERY_IMAGES)
        rows = max(len(self.classes), 1)
        require_at_most("images_per_class × classes", rows * self.images_per_class, GALLERY_IMAGES)
        settings = math.prod(len(getattr(self, name)) for name in ("cfg_scales", "temperatures", "top_ps"))
        require_at_most("classes × cfg_scales × temperatures × top_ps", rows * settings, GALLERY_IMAGES)
        require_between("seed", self.seed, 0, SAMPLE_SEED)
        for label in self.classes:
            require_between("classes", label, 0, CLASSES)
        for name in ("cfg_scales", "temperatures", "top_ps"):
            for value in getattr(self, name):
                SamplingConfig(**{name.removesuffix("s"): value})  # says what is wrong with it
        for name in ("cfg_scales", "temperatures", "top_ps"):
            require(len(getattr(self, name)) > 0, f"{name} must hold at least one value; got none. Use [1.0].")


def gallery_settings(parameters: GalleryParameters) -> SamplingConfig:
    """How the gallery of seeds is drawn: by the card, or with guidance 2."""
    return SAMPLING_CARDS[parameters.card] if parameters.card else SamplingConfig(cfg_scale=2.0)


Setting = tuple[float, float]
"""Temperature and top-p."""


class Drawn(NamedTuple):
    """Generated images and what they were asked to be."""

    images: UInt8[np.ndarray, "rows columns H W 3"]
    labels: Int[np.ndarray, "rows columns"]
    seeds: Int[np.ndarray, "rows columns"]


@torch.no_grad()
def draw_images(
    generator: AnyGenerator, tokenizer: Tokenizer, labels: Int[Tensor, " B"], *, seed: Seed = 0, **sampling: Any
) -> UInt8[np.ndarray, "B H W 3"]:
    """New images of classes, as pictures.

    Args:
        generator: a transformer over the tokenizer's codes.
        tokenizer: whose decoder makes the images, on the generator's device.
        labels: classes asked for.
        seed: of the batch, whose image i is drawn by seed + i, or one per image.
        **sampling: settings of `Generator.sample`: cfg_scale, temperature, top_k, top_p, …
    Returns:
        8-bit pictures, cut off below and above as published.
    Raises:
        ValueError: a tokenizer that does not fit the generator, labels or settings that cannot be.
    """
    check_fit(tokenizer, generator.config)
    side = generator.config.grid_size
    seeds = list(range(seed, seed + len(labels)) if isinstance(seed, int) else seed)
    pictures = []
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        tokens = generator.sample(labels[part], seed=seeds[part], **sampling)
        decoded = tokenizer.decode_indices(tokens.view(-1, side, side))
        pictures.append(truncate_to_uint8(decoded).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)


def draw_gallery(
    generator: AnyGenerator,
    tokenizer: Tokenizer,
    classes: Sequence[int],
    *,
    columns: int = 8,
    seed: int = 0,
    **sampling: Any,
) -> Drawn:
    """Each class with the same seeds: seed, seed + 1, … from left to right.

    Args:
        generator: as for `draw_images`.
        tokenizer: likewise.
        classes: one row each.
        columns: images per class, at least 1.
        seed: of the first column.
        **sampling: as for `draw_images`.
    """
    require(columns >= 1 and len(classes) > 0, "a gallery needs at least one class and one column")
    labels = torch.tensor(classes, device=next(generator.parameters()).device).repeat_interleave(columns)
    seeds = [*range(seed, seed + columns)] * len(classes)
    images = draw_images(generator, tokenizer, labels, seed=seeds, **sampling)
    shape = (len(classes), columns)
    return Drawn(
        images.reshape(*shape, *images.shape[1:]), labels.cpu().numpy().reshape(shape), np.array(seeds).reshape(shape)
    )


def choose_classes(parameters: GalleryParameters, generator: AnyGenerator) -> list[int]:
    """The classes that a notebook's parameters ask for.

    Raises:
        ValueError: a class that the generator has not.
    """
    there = generator.config.num_classes
    chosen = list(parameters.classes) or list(range(min(there, SHOWN_CLASSES)))
    require(max(chosen) < there, f"classes must lie in 0 to {there - 1}; got {chosen}. Use [] for the first ten.")
    return chosen


def compare_settings(pair: Pair, classes: Sequence[int], parameters: GalleryParameters) -> dict[Setting, Drawn]:
    """One image of every class under every guidance, for each temperature and top-p, all drawn by one seed.

    Args:
        pair: generator and tokenizer.
        classes: rows.
        parameters: with the settings to compare.
    Returns:
        (temperature, top_p) → images, one column per guidance.
    """
    found, scales = {}, parameters.cfg_scales
    labels = torch.tensor(classes, device=next(pair.generator.parameters()).device)
    pairs = list(product(parameters.temperatures, parameters.top_ps))
    for temperature, top_p in counted(pairs, "galleries", "settings"):
        shared = {"seed": [parameters.seed] * len(classes), "temperature": temperature, "top_p": top_p}
        columns = [draw_images(*pair, labels, cfg_scale=scale, **shared) for scale in scales]
        images = np.stack(columns, axis=1)
        chosen = np.broadcast_to(np.array(classes)[:, None], images.shape[:2])
        found[temperature, top_p] = Drawn(images, chosen, np.full(images.shape[:2], parameters.seed))
    return found


def gallery_table(drawn: Drawn, **settings: Any) -> pd.DataFrame:
    """What stands behind a gallery.

    Args:
        drawn: from `draw_gallery`.
        **settings: that all images share, such as temperature.
    Returns:
        One row per image: row, column, class, seed, mean (grey level, 0 to 255), and the settings.
    """
    rows, columns = drawn.labels.shape
    return pd.DataFrame(
        [
            {
                "row": row,
                "column": column,
                "class": int(drawn.labels[row, column]),
                "seed": int(drawn.seeds[row, column]),
                "mean": float(drawn.images[row, column].mean()),
                **settings,
            }
            for row, column in product(range(rows), range(columns))
        ]
    )


class Gallery:
    """Figures of one generator's images, saved with what stands behind them.

    Args:
        pair: generator and tokenizer.
        parameters: what to draw.
        path: of the generator: a run folder, or a file.
    """

    def __init__(self, pair: Pair, parameters: GalleryParameters, path: str | Path) -> None:
        self.generator, self.tokenizer = pair
        self.pair, self.parameters, self.path = pair, parameters, Path(path)
        root = runs_root().resolve()
        inside = self.path.resolve().is_relative_to(root)
        self.name = self.path.resolve().relative_to(root).as_posix() if inside else self.path.name
        self.names = class_names(path)
        """Of the classes, by label; empty where nobody tells them."""
        self.run = Run(self.path) if self.path.is_dir() else None
        self.folder = self.path / "figures" if self.run else runs_root() / "galleries" / self.path.stem
        """Where figures go: into the generator's run, or into a folder of their own beside the runs."""
        data = data_of(path)
        self.of_digits = data is not None and data.source == "digits"

    def figure_seeds(self, classes: Sequence[int], name: str = "gallery") -> Figure:
        """Each class with the same seeds; saved as `name`."""
        sampling, parameters = gallery_settings(self.parameters), self.parameters
        drawn = draw_gallery(
            *self.pair, classes, columns=parameters.images_per_class, seed=parameters.seed, **vars(sampling)
        )
        columns = [f"seed {seed}" for seed in drawn.seeds[0]]
        caption = f"guidance {_shown(sampling.cfg_scale)}, temperature {_shown(sampling.temperature)}"
        figure = self._plot(drawn.images, self._rows(drawn), columns, caption)
        save_figure(figure, self.folder / name, gallery_table(drawn, **_plain(sampling)))
        if self.run:  # a run's result is its last validation
            tell(folder=str(self.path.resolve()))
        else:
            count, columns = drawn.labels.size, drawn.labels.shape[1]
            tell(folder=str(self.folder.resolve()), result=f"{count:,} images drawn, {columns} of each class")
        return figure

    @cached_property
    def compared(self) -> dict[Setting, Drawn]:
        """`compare_settings` of the parameters, drawn when first asked for."""
        return compare_settings(self.pair, choose_classes(self.parameters, self.generator), self.parameters)

    def figures_settings(self) -> Iterator[Figure]:
        """Class by guidance, one figure per temperature and top-p; saved as `gallery_t…_p…`."""
        scales = self.parameters.cfg_scales
        columns = [f"guidance {scale:g}" for scale in scales]
        for (temperature, top_p), drawn in self.compared.items():
            caption = f"temperature {temperature:g}, top-p {top_p:g}, seed {self.parameters.seed}"
            figure = self._plot(drawn.images, self._rows(drawn), columns, caption)
            table = gallery_table(drawn, temperature=temperature, top_p=top_p)
            table["cfg_scale"] = [scales[column] for column in table["column"]]
            save_figure(figure, self.folder / f"gallery_t{temperature:g}_p{top_p:g}", table)
            yield figure

    def table(self) -> pd.DataFrame:
        """Setting by setting: what was drawn, and for digits the share that a classifier recognises.

        Returns:
            Columns: temperature, top_p, cfg_scale, images, and for digits recognised (share, 0 to 1).
        """
        rows = []
        for (temperature, top_p), drawn in self.compared.items():
            for column, scale in enumerate(self.parameters.cfg_scales):
                part = Drawn(*(values[:, column : column + 1] for values in drawn))
                row = {"temperature": temperature, "top_p": top_p, "cfg_scale": scale, "images": part.labels.size}
                rows.append(row | ({"recognised": _recognise(part).share} if self.of_digits else {}))
        if self.of_digits:
            best = max(rows, key=lambda row: row["recognised"])
            tell(
                result=f"{best['recognised']:.1%} of {best['images']} digits recognised at the best of {len(rows)} "
                f"settings (temperature {best['temperature']:g}, top-p {best['top_p']:g}, guidance "
                f"{best['cfg_scale']:g})"
            )
        return pd.DataFrame(rows)

    def figure_completions(self, images: int = 4) -> Figure | None:
        """Validation images, what the upper half of their tokens alone decodes to, and what the generator makes of it.

        Saved as `completions`; None for a generator whose images are not here.

        Args:
            images: how many, at least 1.
        """
        batch = self._validation_batch(images)
        if batch is None:
            return None
        images, side = len(batch.images), self.generator.config.grid_size  # fewer where there are no more
        tokens = self.tokenizer.encode_indices(batch.images).flatten(1)
        given = side * (side // 2)
        # The rest of the grid holds the first code, so that the eye sees where the given rows end.
        half = torch.where(torch.arange(side**2) < given, tokens, 0)
        sampling, seeds = gallery_settings(self.parameters), range(self.parameters.seed, self.parameters.seed + 3)
        labels = torch.where(batch.labels < 0, self.generator.config.num_classes, batch.labels)
        drawn = [
            self.generator.sample(labels, seed=[seed] * images, prompt=tokens[:, :given], **vars(sampling))
            for seed in seeds
        ]
        columns = [batch.images, *(self._decode(part) for part in (tokens, half, *drawn))]
        pictures = torch.stack(columns, dim=1).permute(0, 1, 3, 4, 2).numpy()
        names = ["image", "its tokens", f"{side // 2} of {side} rows", *(f"seed {seed}" for seed in seeds)]
        figure = self._plot(pictures, [""] * images, names, "the rest of the image is drawn")
        table = pd.DataFrame({"image": range(images), "class": labels.tolist(), "tokens_given": given})
        save_figure(figure, self.folder / "completions", table)
        return figure

    def _plot(self, pictures: np.ndarray, rows: Sequence[str], columns: Sequence[str], caption: str) -> Figure:
        """`plot_gallery` that says whose images these are, and whether the run is too short."""
        step = f" at step {self.run.step:,}" if self.run else ""
        figure = plot_gallery(pictures, rows, columns, caption=f"{self.name}{step}: {caption}")
        reason = why_too_short(self.run.step) if self.run else ""
        if reason:
            mark_too_short(figure, reason)
        return figure

    @torch.no_grad()
    def _decode(self, tokens: Int[Tensor, "B T"]) -> UInt8[Tensor, "B 3 H W"]:
        side = self.generator.config.grid_size
        return truncate_to_uint8(self.tokenizer.decode_indices(tokens.view(-1, side, side)))

    def _validation_batch(self, images: int) -> Batch | None:
        """The first readable validation images of the generator's run; None where they are not here."""
        data = data_of(self.path)
        if data is None:
            return None
        return first_images(open_data(data, "validation"), images)

    def judge(self, images_per_class: int = 20) -> str:
        """How many generated digits a classifier of real scans takes for the class asked for, in a sentence."""
        if not self.of_digits:
            return "only digits have a classifier here that can tell whether an image is what was asked for"
        sentence = self.recognise(images_per_class).describe()
        tell(result=sentence)
        return sentence

    def recognise(self, images_per_class: int) -> Recognition:
        """The same as numbers.

        Args:
            images_per_class: drawn and looked at, at least 1.
        Raises:
            ValueError: a generator that was not trained on digits.
        """
        require(self.of_digits, f"{self.name} was not trained on digits, and the classifier knows nothing else")
        sampling = gallery_settings(self.parameters)
        classes = range(self.generator.config.num_classes)
        seed = self.parameters.seed
        return _recognise(draw_gallery(*self.pair, classes, columns=images_per_class, seed=seed, **vars(sampling)))

    def _rows(self, drawn: Drawn) -> list[str]:
        labels = drawn.labels[:, 0]
        return [self.names[label] if label < len(self.names) else f"class {label}" for label in labels]


def open_gallery(parameters: GalleryParameters) -> Gallery:
    """The generator that a notebook's parameters name, or the preset's, trained first if it is not there.

    Raises:
        CheckpointError: no such generator, or no tokenizer with it.
    """
    if parameters.generator:
        path = find_folder(parameters.generator)
    else:
        pipeline = plan_pipeline(GeneratorRunParameters(preset=parameters.preset))
        pipeline.write_tokens(pipeline.train_tokenizer())
        path = pipeline.train_generator().path
    return Gallery(open_pair(path, parameters.tokenizer), parameters, path)


def _recognise(drawn: Drawn) -> Recognition:
    images = torch.from_numpy(drawn.images.reshape(-1, *drawn.images.shape[2:])).permute(0, 3, 1, 2)
    return recognise_digits(images, torch.from_numpy(drawn.labels.reshape(-1).copy()))


def _shown(setting: float | tuple[float, float]) -> str:
    return " and ".join(f"{value:g}" for value in setting) if isinstance(setting, tuple) else f"{setting:g}"


def _plain(sampling: SamplingConfig) -> dict[str, Any]:
    """Settings as a table's cells."""
    return {name: _shown(v) if isinstance(v, tuple) else v for name, v in vars(sampling).items()}
