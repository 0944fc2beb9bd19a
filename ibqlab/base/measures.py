"""Measures: every number that is recorded, compared or shown, with its title, unit, bounds and meaning, listed once.

    MEASURES["usage"].title              # "usage"
    measure("validation_psnr")           # PSNR, and says that it is of validation images
    measure("usage").text(0.125)         # "12.5 %"
    measure("psnr").axis                 # "PSNR (dB)"

Whoever computes a number names it by a key of this list; tables, plots, the command line and widgets read the rest
here. A new measure is two files: where it is computed, and this one.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

VALIDATION = "validation_"
"""In front of a key: the same, of validation images."""
SHARE = "share"
"""Unit of what lies in 0 to 1 and is shown in %."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What a number is."""

    key: str
    """Column of metrics.jsonl, of rows and of tables."""
    title: str
    """For headings, unit left out."""
    definition: str
    """What it is, in a sentence."""
    unit: str = ""
    """"share", "codes", "dB", "bits", "nats", "tokens", …; "" for a plain number."""
    better: Literal["higher", "lower", ""] = ""
    """Which way is better; "" where neither is."""
    least: float = 0.0
    """What no value can be below."""
    most: float = math.inf
    """What no value can be above."""
    digits: int = 3
    """Significant digits, of shares in %."""
    of_validation: bool = False
    """Measured on validation images."""

    @property
    def bounds(self) -> tuple[float, float]:
        """What no value of it, and no interval, can leave."""
        return self.least, self.most

    @property
    def scale(self) -> float:
        """Factor from the value to what is shown: 100 for shares."""
        return 100.0 if self.unit == SHARE else 1.0

    @property
    def axis(self) -> str:
        """For axes and columns: "usage (%)", "PSNR (dB)"."""
        unit = "%" if self.unit == SHARE else self.unit
        return f"{self.title} ({unit})" if unit else self.title

    @property
    def heading(self) -> str:
        """For columns of tables, whose cells write shares in %: "usage", "PSNR (dB)", "bits per token"."""
        named = not self.unit or self.unit == SHARE or self.unit in self.title
        return self.title if named else f"{self.title} ({self.unit})"

    def text(self, value: float | None) -> str:
        """A value for reading, with its unit; "–" where there is none."""
        if value is None or not math.isfinite(value):
            return "–"
        number = f"{value * self.scale:,.{self.digits}g}" if abs(value * self.scale) < 1000 else f"{value:,.0f}"
        unit = "%" if self.unit == SHARE else self.unit
        return f"{number} {unit}".rstrip()


_SHARE_OF_CODES = {"unit": SHARE, "most": 1.0}
_TIME = {"unit": "s", "better": "lower"}

MEASURES: dict[str, Quantity] = {
    one.key: one
    for one in (
        # The codebook
        Quantity(
            key="usage",
            title="usage",
            better="higher",
            definition="share of codes hit at least once in the tokens named beside it",
            **_SHARE_OF_CODES,
        ),
        Quantity(
            key="training_usage",
            title="training usage (window)",
            better="higher",
            definition="share of codes hit at least once in a window of past training tokens",
            **_SHARE_OF_CODES,
        ),
        Quantity(
            key="step_usage",
            title="usage in one step",
            better="higher",
            definition="share of codes hit at least once in one step's tokens",
            **_SHARE_OF_CODES,
        ),
        Quantity(
            key="perplexity",
            title="perplexity",
            unit="codes",
            better="higher",
            least=1,
            definition="exp of the entropy of the code frequencies: as many codes, evenly used, have the same entropy",
        ),
        Quantity(
            key="dead_codes",
            title="dead codes",
            unit="codes",
            better="lower",
            definition="codes without a hit in the window of past steps",
        ),
        Quantity(
            key="gradient_reach",
            title="gradient reach",
            better="higher",
            definition="share of codes whose gradient in a step exceeds 10⁻³ of the largest",
            **_SHARE_OF_CODES,
        ),
        Quantity(
            key="softmax_perplexity",
            title="codes in softmax(z·C)",
            unit="codes",
            least=1,
            definition="exp of the entropy of a token's softmax over z·C, mean over tokens: how many codes it teaches",
        ),
        Quantity(key="feature_norm", title="norm of features", definition="mean length of the encoder's features"),
        Quantity(key="code_norm", title="norm of codes", definition="mean length of the codes"),
        # Reconstructions
        Quantity(
            key="psnr",
            title="PSNR",
            unit="dB",
            better="higher",
            least=-math.inf,
            digits=4,
            definition="peak signal-to-noise ratio of reconstructions, mean over images",
        ),
        Quantity(key="ssim", title="SSIM", better="higher", least=-1, most=1, definition="structural similarity"),
        Quantity(key="l1", title="L1", better="lower", definition="mean absolute difference of pixels in [−1, 1]"),
        Quantity(
            key="rfid",
            title="rFID",
            better="lower",
            definition="Fréchet distance of Inception features between images and their reconstructions",
        ),
        Quantity(
            key="lpips",
            title="LPIPS",
            better="lower",
            definition="perceptual distance as papers print it, which do not say with which network",
        ),
        Quantity(key="lpips_vgg", title="LPIPS (VGG)", better="lower", definition="perceptual distance, VGG network"),
        Quantity(key="lpips_alex", title="LPIPS (AlexNet)", better="lower", definition="perceptual distance, AlexNet"),
        # Generators and samples
        Quantity(key="loss", title="loss", better="lower", least=-math.inf, definition="what the training minimises"),
        Quantity(
            key="bits_per_token",
            title="bits per token",
            unit="bits",
            better="lower",
            definition="mean −log₂ of the probability that the generator gives to the next token, the class known",
        ),
        Quantity(
            key="bits_per_pixel",
            title="bits per pixel",
            unit="bits",
            better="lower",
            definition="bits of all tokens of an image, divided by its pixels",
        ),
        Quantity(
            key="gfid",
            title="gFID",
            better="lower",
            definition="Fréchet distance of Inception features between samples and real images",
        ),
        Quantity(
            key="is",
            title="Inception Score",
            better="higher",
            least=1,
            definition="exp of the mean divergence of Inception's class probabilities from their average",
        ),
        Quantity(key="kid", title="KID", better="lower", least=-math.inf, definition="kernel distance of features"),
        Quantity(
            key="precision",
            title="precision",
            better="higher",
            most=1.0,
            definition="share of samples that lie within the real images' neighbourhoods in feature space",
        ),
        Quantity(
            key="recall",
            title="recall",
            better="higher",
            most=1.0,
            definition="share of real images that lie within the samples' neighbourhoods in feature space",
        ),
        Quantity(
            key="recognised",
            title="digits recognised",
            unit=SHARE,
            better="higher",
            most=1.0,
            definition="share of sampled digits that a classifier of real ones takes for the class asked for",
        ),
        # Costs
        Quantity(key="seconds", title="time", definition="seconds of training", **_TIME),
        Quantity(
            key="images_per_second", title="speed", unit="images/s", better="higher", definition="images per second"
        ),
        Quantity(
            key="quantizer_ms",
            title="quantizer",
            unit="ms",
            better="lower",
            definition="one pass of the quantizer forward and backward over a step's tokens",
        ),
        Quantity(
            key="quantizer_mib",
            title="quantizer's memory",
            unit="MiB",
            better="lower",
            definition="what autograd keeps for that pass",
        ),
        Quantity(key="tokens", title="tokens", unit="tokens", definition="tokens that usage was counted in"),
        Quantity(key="steps", title="steps", definition="training steps"),
    )
}


def measure(key: str) -> Quantity:
    """A measure by its key; with `validation_` in front, the same of validation images.

    Raises:
        KeyError: it is not listed; the message says where to list it.
    """
    if key in MEASURES:
        return MEASURES[key]
    plain = key.removeprefix(VALIDATION)
    if plain == key or plain not in MEASURES:
        raise KeyError(f"there is no measure {key!r}; list it in ibqlab/base/measures.py")
    listed = MEASURES[plain]
    return replace(listed, key=key, title=f"validation {listed.title}", of_validation=True)
