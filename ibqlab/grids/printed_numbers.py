"""What was printed for the tokenizers that are compared: by their own authors, and by table 1 of IBQ."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ibqlab.base.checks import require
from ibqlab.grids.evaluation_parameters import split_labels
from ibqlab.grids.evaluation_rules import TokenizerUnderTest
from ibqlab.pretrained.tokenizer_architecture import empty_tokenizer
from ibqlab.recipes.published import PublishedRow, published_rows
from ibqlab.recipes.published_files import PublishedNumbers, PublishedTokenizer, published_files
from ibqlab.recipes.recipe_files import recipe_config

PRINTED = ("rfid", "lpips", "psnr", "ssim", "usage")
"""What papers print of a tokenizer."""
STANDS_FOR = {"vq": "imagenet/vqgan_16384", "ibq": "imagenet/ibq_16384"}
"""Label of a run that compare_published trains by itself → the recipe whose row is shown."""
RELEASED = tuple(f"imagenet/{name}" for name in ("ibq_1024", "ibq_8192", "ibq_16384", "ibq_262144", "lfq_262144"))
"""Rows whose checkpoints were published; a file without settings is taken for no other, though shapes may agree."""


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What was printed for a tokenizer. A number is the authors' own where they print it, else table 1's."""

    own: PublishedNumbers | None = None
    """Of the paper or the page that published it."""
    table_1: PublishedNumbers | None = None
    """Of table 1 of IBQ."""

    def number(self, name: str) -> float:
        """A printed number, NaN where nobody prints it.

        Args:
            name: one of `PRINTED`.
        """
        numbers = self.numbers_of(name)
        return math.nan if numbers is None else getattr(numbers, name)

    def numbers_of(self, name: str) -> PublishedNumbers | None:
        """The set that a number is taken from."""
        sets = (numbers for numbers in (self.own, self.table_1) if numbers is not None)
        return next((numbers for numbers in sets if getattr(numbers, name) is not None), None)

    @property
    def sets(self) -> list[PublishedNumbers]:
        """The sets that any number is taken from."""
        taken = [self.numbers_of(name) for name in PRINTED]
        return [numbers for numbers in (self.own, self.table_1) if numbers is not None and numbers in taken]


def find_published(tokenizers: Sequence[TokenizerUnderTest], named: Sequence[str] = ()) -> dict[str, Printed]:
    """Printed numbers to show beside tokenizers: those named as "label=name", else of what each is recognised as.

    Args:
        tokenizers: to be measured.
        named: name is a recipe of experiments/published/tokenizers.yaml or a file of files.yaml.
    Raises:
        ValueError: a label that no tokenizer has, or a name of which nothing was published.
    """
    rows, files, chosen = published_rows(), published_files(), split_labels("published", named)
    labels = [tokenizer.label for tokenizer in tokenizers]
    for label, name in chosen.items():
        require(label in labels, f"published names the label {label!r}; the checkpoints' are {', '.join(labels)}")
        known = ", ".join([*rows, *files])
        require(name in rows or name in files, f"nothing is published for {name!r}; there are {known}")
    if not chosen:
        chosen = {tokenizer.label: _recognised(tokenizer, rows, files) for tokenizer in tokenizers}
    found = {
        label: _of_file(files[name]) if name in files else of_row(rows[name]) for label, name in chosen.items() if name
    }
    return {label: printed for label, printed in found.items() if printed}


def of_row(row: PublishedRow) -> Printed:
    """The numbers of a recipe's row, which are table 1's, too, where it names that table."""
    numbers = PublishedNumbers(
        rfid=row.rfid, lpips=row.lpips, usage=row.usage, protocol=row.protocol, source=f"{row.source}, {row.table}"
    )
    return Printed(own=numbers, table_1=numbers if re.search(r"tables? (\d+, )*1\b", row.table) else None)


def _of_file(file: PublishedTokenizer) -> Printed | None:
    return Printed(own=file.own, table_1=file.table_1) if file.own or file.table_1 else None


def _recognised(
    tokenizer: TokenizerUnderTest, rows: Mapping[str, PublishedRow], files: Mapping[str, PublishedTokenizer]
) -> str | None:
    """The published file or the recipe that a tokenizer is; of a run that a preset trains, what it stands for."""
    if tokenizer.run and tokenizer.label in STANDS_FOR:
        return STANDS_FOR[tokenizer.label]
    file = _published_file(tokenizer, files) if tokenizer.system else None
    if file:
        return file
    candidates = rows if tokenizer.data else RELEASED
    return next((name for name in candidates if recipe_config(name).tokenizer == tokenizer.config), None)


def _published_file(tokenizer: TokenizerUnderTest, files: Mapping[str, PublishedTokenizer]) -> str | None:
    """The one published file of the same system, codes and number of parameters; of several the one of that name."""
    quantizer = tokenizer.config.quantizer
    parameters = sum(parameter.numel() for parameter in empty_tokenizer(tokenizer.config).parameters())
    alike = [
        name
        for name, file in files.items()
        if (file.family, file.codebook_size, file.code_dim)
        == (tokenizer.system, quantizer.codebook_size, quantizer.code_dim)
        and file.parameters in (None, parameters)
    ]
    counted = [name for name in alike if files[name].parameters]
    same_name = [name for name in alike if files[name].file == tokenizer.path.name]
    fitting = alike if len(alike) == 1 and counted else same_name
    return fitting[0] if len(fitting) == 1 else None
