"""Tokenizers whose files were published, from experiments/published/files.yaml: where, under which licence, how good.

Of each there are up to two sets of numbers: those of its authors, and those that table 1 of IBQ prints for it. Each set
names the protocol it was made under, because numbers compare only within one.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ibqlab.base.checks import require
from ibqlab.config import load_yaml, parse
from ibqlab.recipes.recipe_files import EXPERIMENTS

NOT_STATED = "not stated"
BYTES_PER_NUMBER = 4
"""Published files hold float32."""


@dataclass(frozen=True, kw_only=True)
class PublishedSystem:
    """Whose files they are."""

    page: str
    """The authors' page."""
    code_licence: str = NOT_STATED
    weights_licence: str = NOT_STATED


@dataclass(frozen=True, kw_only=True)
class PublishedNumbers:
    """What was printed of a tokenizer on ImageNet's validation set; None: not printed."""

    rfid: float | None = None
    """Fréchet Inception distance of reconstructions."""
    lpips: float | None = None
    """Perceptual distance; hardly a paper says with which network."""
    psnr: float | None = None
    """Peak signal-to-noise ratio, dB."""
    ssim: float | None = None
    """Structural similarity, at most 1."""
    usage: float | None = None
    """Share of codes that were hit, 0 to 1."""
    protocol: str = ""
    """A name of `ibqlab.metrics.PROTOCOLS`; "" where nobody says how they were measured."""
    source: str = "IBQ, table 1"
    remarks: str = ""
    """What is odd about them."""

    def __post_init__(self) -> None:
        usage = self.usage if self.usage is not None else 0.0
        require(0 <= usage <= 1, f"usage is a share between 0 and 1; got {usage}")

    def describe(self) -> str:
        """The numbers, their source and their protocol in one line."""
        forms = {
            "rFID {:.2f}": self.rfid,
            "LPIPS {:.4g}": self.lpips,
            "PSNR {:.2f} dB": self.psnr,
            "SSIM {:.3g}": self.ssim,
            "usage {:.3g} %": None if self.usage is None else 100 * self.usage,
        }
        words = [form.format(number) for form, number in forms.items() if number is not None]
        remarks = f"; {self.remarks}" if self.remarks else ""
        return f"{', '.join(words)} ({self.source}; protocol {self.protocol or NOT_STATED}{remarks})"


@dataclass(frozen=True, kw_only=True)
class PublishedTokenizer:
    """A tokenizer that its authors published, and what was printed of it."""

    system: str
    """Whose it is."""
    family: str
    """What `load_tokenizer(path, family=…)` calls it."""
    repository: str = ""
    """On the Hugging Face hub; "" where it lies elsewhere, which its system's page says."""
    file: str = ""
    """In that repository, or what the downloaded file is called; "" where nobody says."""
    name_there: str = ""
    """What the authors' page calls it, where it is on no hub."""
    companions: tuple[str, ...] = ()
    """Files of the same repository without which it cannot be opened."""
    codebook_size: int
    """K, codes."""
    code_dim: int
    """D, numbers per code."""
    parameters: int | None = None
    """Of the tokenizer alone; None where it was not counted."""
    sha256: str = ""
    """Checksum as published; "" where none was."""
    own: PublishedNumbers | None = None
    """Numbers that the authors print."""
    table_1: PublishedNumbers | None = None
    """Numbers that table 1 of IBQ prints for the same tokenizer."""
    remarks: str = ""
    """What else must be known."""

    @property
    def rfid(self) -> float | None:
        """The authors' rFID."""
        return self.own.rfid if self.own else None

    @property
    def lpips(self) -> float | None:
        """The authors' LPIPS."""
        return self.own.lpips if self.own else None

    @property
    def usage(self) -> float | None:
        """The authors' usage."""
        return self.own.usage if self.own else None

    @property
    def size(self) -> str:
        """Megabytes of the tokenizer's weights; what was trained beside them may come on top."""
        return weights_size(self.parameters)


def weights_size(parameters: int | None) -> str:
    """About how many megabytes so many float32 numbers take, in words."""
    return f"about {parameters * BYTES_PER_NUMBER / 1e6:,.0f} MB" if parameters else f"size {NOT_STATED}"


@cache
def published_systems(folder: Path = EXPERIMENTS) -> dict[str, PublishedSystem]:
    """The systems by name.

    Raises:
        ConfigError: an entry that is no `PublishedSystem`; the message names it.
    """
    systems = load_yaml(folder / "published" / "files.yaml")["systems"]
    return {name: parse(PublishedSystem, row, source=f"files.yaml, {name}") for name, row in systems.items()}


@cache
def published_files(folder: Path = EXPERIMENTS) -> dict[str, PublishedTokenizer]:
    """The published tokenizers by name, in the order of their systems.

    Raises:
        ConfigError: an entry that is no `PublishedTokenizer`; the message names it.
    """
    rows = load_yaml(folder / "published" / "files.yaml")["files"]
    return {name: parse(PublishedTokenizer, row, source=f"files.yaml, {name}") for name, row in rows.items()}
