"""What the notebook of the atlas needs: its parameters, a run to look at where none is named, and cards to print."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ibqlab.base.checks import require_between, require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.recipes.presets import find_preset
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import run_name
from ibqlab.runs.newest import newest_tokenizer_run
from ibqlab.training import RunParameters, prepare_run, train
from ibqlab.views.atlas.write import IMAGES, AtlasSettings
from ibqlab.views.card_page import card_html, static_card
from ibqlab.views.cards import CardReader
from ibqlab.views.map_data import METHODS
from ibqlab.views.patches import MOST_IMAGES
from ibqlab.views.subject import open_subject


@dataclass(frozen=True, kw_only=True)
class AtlasParameters:
    """What the `parameters` cell of `codebook_atlas` may set."""

    preset: str = "laptop"
    """One of `preset_names("tokenizer")`: what is trained where `source` is empty and no tokenizer has been yet."""
    source: str = ""
    """A run, its name or folder, or a checkpoint's file; empty: the newest tokenizer run that has finished."""
    images: str = ""
    """As of `AtlasSettings`."""
    image_size: int = 0
    """As of `AtlasSettings`."""
    count: int = IMAGES
    """Images, at most."""
    method: str = "pca"
    """Of the map: "pca" or "umap"."""
    parquet: bool = False
    """As of `AtlasSettings`."""
    family: str = ""
    """As of `AtlasSettings`; empty: as the file tells."""
    num_heads: int = 0
    """As of `AtlasSettings`; 0: the published ones."""
    output: str = ""
    """Folder of the atlas; empty: NAME_atlas below the folder of all runs, STUDY-NAME_atlas of a study's run."""

    def __post_init__(self):
        find_preset(self.preset, "tokenizer")
        require_between("count", self.count, 1, MOST_IMAGES)
        require_choice("method", self.method, METHODS)

    @property
    def settings(self) -> AtlasSettings:
        """Of the atlas."""
        same = {name: getattr(self, name) for name in ("images", "image_size", "count", "method", "parquet")}
        return AtlasSettings(**same, family=self.family or None, num_heads=self.num_heads or None)


class ChosenSource(NamedTuple):
    """What the atlas is of."""

    source: Path | str
    """A run or a checkpoint, as of `write_atlas`."""
    words: str
    """Which it is, why, and how to name another, for people."""


def find_or_train(parameters: AtlasParameters) -> ChosenSource:
    """What the atlas is of: the source that is named, else the newest tokenizer run, else one that is trained."""
    if parameters.source:
        return ChosenSource(parameters.source, f"codes of {for_terminal(parameters.source)}")
    run, why = newest_tokenizer_run(), "the newest tokenizer run that has finished"
    if run is None:
        config, folder = prepare_run(RunParameters(preset=parameters.preset))
        run = train(config, folder)
        why = f"trained with preset {parameters.preset} because no tokenizer run had finished"
    name = shlex.quote(run_name(run.path))
    short = why_too_short(run.step)
    words = f"codes of {for_terminal(name)}, {why}" + (f" ({short}: too short to mean anything)" if short else "")
    return ChosenSource(run.path, f"{words}\nto see another: source=RUN; ibqlab runs lists them")


def example_cards(what: str | Path, settings: AtlasSettings) -> str:
    """Cards of the most used code, one of middle use, one of the least used, and one without a hit, as one page.

    Args:
        what: a run or checkpoint, as of `write_atlas`.
        settings: of its atlas; what that has encoded is not encoded again.
    """
    subject = open_subject(what, settings.images, **settings.of_subject)
    reader = CardReader(subject, settings.count)
    cards = [(title, static_card(card_html(reader.read([code])))) for title, code in example_codes(reader)]
    return "".join(f"<h2>{title}</h2>{card}" for title, card in cards)


def example_codes(reader: CardReader) -> list[tuple[str, int]]:
    """Title and code; kinds that there are none of are left out."""
    if reader.index is not None:
        counts = reader.index.counts
    else:
        counts = reader.history[1][-1] if reader.history else np.zeros(reader.codebook_size, int)
    order = np.argsort(-counts, kind="stable")
    used = int((counts > 0).sum())
    examples = []
    if used:
        examples.append(("The most used code", order[0]))
    if used > 2:
        examples.append(("A code of middle use", order[used // 2]))
    if used > 1:
        examples.append(("One of the least used", order[used - 1]))
    if used < len(order):
        examples.append(("A code without a hit", order[used]))
    return [(title, int(code)) for title, code in examples]
