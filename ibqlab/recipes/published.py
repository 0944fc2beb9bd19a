"""What papers printed for the recipes that train their models, from the files under experiments/published."""

from dataclasses import dataclass
from pathlib import Path

from ibqlab.base.checks import require
from ibqlab.config import load_yaml, parse
from ibqlab.recipes.recipe_files import EXPERIMENTS, find_recipe, recipe_name


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """What a paper printed for the tokenizer or the generator of a recipe, or of a file; None: not printed.

    A tokenizer's row has an rFID, a generator's a gFID.
    """

    table: str
    """Where it stands: "table 6 (codebook size)"."""
    rfid: float | None = None
    """Fréchet Inception distance of reconstructions of the ImageNet validation set, 256 pixels."""
    lpips: float | None = None
    """LPIPS of the same; the papers do not say with which network."""
    usage: float | None = None
    """Share of codes hit by the validation set, 0 to 1."""
    gfid: float | None = None
    """Fréchet Inception distance of 50,000 samples of ImageNet's classes, 256 pixels, from ADM's reference."""
    inception_score: float | None = None
    """Of the same samples."""
    precision: float | None = None
    """Share of samples near a reference image, 0 to 1."""
    recall: float | None = None
    """Share of reference images near a sample, 0 to 1."""
    source: str
    """The paper."""
    protocol: str = "seed-voken-ibq"
    """The protocol of `ibqlab.metrics` that a tokenizer's numbers were made under."""
    remarks: str = ""
    """What is odd about the row."""

    def __post_init__(self):
        require(
            self.gfid is not None if self.rfid is None else (self.gfid, self.inception_score) == (None, None),
            "a published row has rfid (a tokenizer's), or gfid and perhaps inception_score (a generator's); got "
            f"{self.rfid}, {self.gfid} and {self.inception_score}",
        )

    def describe(self) -> str:
        """The numbers in one line."""
        numbers = {
            "rFID {:.2f}": self.rfid,
            "LPIPS {:.4f}": self.lpips,
            "usage {:.3g} %": None if self.usage is None else 100 * self.usage,
            "gFID {:.2f}": self.gfid,
            "IS {:.2f}": self.inception_score,
            "precision {:.2f}": self.precision,
            "recall {:.2f}": self.recall,
        }
        words = [form.format(number) for form, number in numbers.items() if number is not None]
        return f"{', '.join(words)} ({self.source}, {self.table})"


def published_rows(network: str = "tokenizer", folder: Path = EXPERIMENTS) -> dict[str, PublishedRow]:
    """The published numbers by recipe name, of tokenizers or of generators; of files that no recipe trains, by theirs.

    Raises:
        ConfigError: an entry that is no `PublishedRow`; the message names it.
    """
    file = folder / "published" / f"{network}s.yaml"
    return {name: parse(PublishedRow, row, source=f"{file.name}, {name}") for name, row in load_yaml(file).items()}


def published_row(recipe: str) -> PublishedRow | None:
    """What was published for a recipe, given as a path or a name under experiments/; None for recipes of our own.

    Raises:
        ConfigError: no such recipe.
    """
    name = recipe_name(find_recipe(recipe))
    return (published_rows() | published_rows("generator")).get(name)
