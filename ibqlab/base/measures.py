"""Measures: every number that is recorded, compared or shown, with its title, unit, bounds and meaning, listed once.

    measure("usage").axis                # "codes hit (%)"
    measure("validation_psnr").title     # "validation PSNR": a prefix says of what it was measured
    measure("perplexity").least          # 1: no value and no interval lies below

Whoever computes a number names it by a key of this list. Tables, plots, the command line and widgets read the rest
here. A new measure is two files: where it is computed, and this one.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ibqlab.base.checks import is_finite_number

SHARE = "share"
"""Unit of what lies in 0 to 1 and is shown in %; precision and recall are not, since papers print 0.62."""


@dataclass(frozen=True)
class Quantity:
    """What a number is."""

    key: str
    """Column of metrics.jsonl, of rows and of tables."""
    title: str
    """What it is called, without the unit."""
    unit: str
    """"share", "codes", "dB", "bits", "nats per token", "ms", …; "" for a plain number."""
    definition: str
    """What it is, in a sentence."""
    better: str = ""
    """"higher" or "lower"; "" where neither is better."""
    least: float = 0.0
    """What no value can be below."""
    most: float = math.inf
    """What no value can be above."""
    label: str = ""
    """What an axis says in place of the title: "codes hit" for usage."""
    whole: str = ""
    """Of what it is a share: "codes"."""
    tokens: str = ""
    """Column that says in how many tokens it was counted."""

    @property
    def bounds(self) -> tuple[float, float]:
        """What no value of it, and no interval, can leave."""
        return self.least, self.most

    @property
    def scale(self) -> float:
        """Factor from the value to what is shown: 100 for shares in %."""
        return 100.0 if self.unit == SHARE else 1.0

    @property
    def sign(self) -> str:
        """What stands behind a number that was multiplied by `scale`: "%", "dB", or nothing."""
        return "%" if self.unit == SHARE else self.unit

    @property
    def heading(self) -> str:
        """For columns of tables, whose cells write shares in %: "usage", "PSNR (dB)", "bits per token"."""
        return self.title if self.unit == SHARE else self._with_unit(self.title)

    @property
    def panel_title(self) -> str:
        """For the head of a panel: "Usage", "PSNR"."""
        return self.title[:1].upper() + self.title[1:]

    @property
    def axis(self) -> str:
        """For axes: "codes hit (%)", "PSNR (dB)", "bits per token"."""
        return self._with_unit(self.label or self.title)

    def _with_unit(self, name: str) -> str:
        """A name with its unit, unless it says it: "dead codes", "bits per token"."""
        is_said = self.sign.partition(" ")[0] in ("", *name.split())
        return name if is_said else f"{name} ({self.sign})"

    def text(self, value: float, row: Mapping[str, Any]) -> str:
        """A value for reading: "25.00 % of codes in 640 tokens", "20.5 dB".

        Args:
            value: finite.
            row: the numbers beside it, which say in how many tokens it was counted.
        """
        if self.sign == "%":
            number = f"{self.scale * value:.2f} %" + (f" of {self.whole}" if self.whole else "")
        else:
            number = f"{whole_or_short(value)} {self.sign}".rstrip()
        if not self.tokens:
            return number
        tokens = row.get(self.tokens)
        return f"{number} in {f'{tokens:,.0f}' if is_finite_number(tokens) else 'an unknown number of'} tokens"


def whole_or_short(value: float) -> str:
    """A finite number in five digits, a whole one in full."""
    return f"{value:,.5g}" if isinstance(value, float) and not value.is_integer() else f"{value:,.0f}"


def _share(key: str, title: str, definition: str, **settings: Any) -> Quantity:
    """A share, of which more is better."""
    return Quantity(key, title, SHARE, definition, "higher", most=1.0, **settings)


def _loss(key: str, title: str, definition: str, unit: str = "", tokens: str = "") -> Quantity:
    """A loss or a part of one, which a negative entropy can bring below zero."""
    return Quantity(key, title, unit, definition, "lower", least=-math.inf, tokens=tokens)


_HITS = {"whole": "codes", "label": "codes hit", "tokens": "usage_tokens"}
_TRAINING = {**_HITS, "tokens": "training_usage_tokens"}
_REACH = {"whole": "codes", "label": "codes reached"}
_NATS = ("nats per token", "validation_tokens")
_FID = "of Inception's features; biased upward by few images"
_OTHER = "of another network's features"

_LISTED = (
    # The codebook.
    _share("usage", "usage", "share of codes hit at least once in so many tokens", **_HITS),
    _share("usage_old", "usage of old codes", "of a grown codebook, share of the codes before that were hit", **_HITS),
    _share("usage_new", "usage of new codes", "likewise of the codes that were added", **_HITS),
    _share("training_usage", "training usage (window)", "usage of the window of latest training tokens", **_TRAINING),
    _share("step_usage_even", "even usage", "usage that even use of all codes would show in a step", whole="codes"),
    _share("gradient_reach", "gradient reach", "codes whose gradient exceeds 10⁻³ of the step's largest", **_REACH),
    Quantity("perplexity", "perplexity", "codes", "exp of the codes' entropy", "higher", 1.0, tokens="usage_tokens"),
    Quantity("dead_codes", "dead codes", "codes", "codes without a hit", "lower", tokens="usage_tokens"),
    Quantity("steps_since_hit", "steps since a hit", "steps (median over codes)", "steps since a code was last chosen"),
    Quantity(
        "softmax_perplexity",
        "codes in softmax(z·C)",
        "codes per token",
        "how many codes a token teaches: exp of its entropy over z·C, mean over tokens",
        least=1.0,
        label="perplexity",
    ),
    Quantity("feature_norm", "norm of features", "", "length of the encoder's features", label="mean norm"),
    Quantity("code_norm", "norm of codes", "", "length of the codes", label="mean norm"),
    Quantity("feature_to_code_distance", "features to codes", "", "distance of a feature to its nearest code, mean"),
    Quantity("code_to_feature_distance", "codes to features", "", "distance of a code to its nearest feature, mean"),
    Quantity(
        "winner_margin", "lead of the nearest", SHARE, "1 − distance to the nearest over the second code", most=1.0
    ),
    Quantity("logit_margin", "lead in z·C", "nats", "gap of a token's two largest dot products, mean"),
    Quantity(
        "quantization_error", "quantization error", "", "mean squared difference of a feature and its code", "lower"
    ),
    Quantity(
        "relative_quantization_error",
        "quantization error over variance",
        "",
        "mean squared distance of a feature to its code over that to the features' mean",
        "lower",
    ),
    Quantity(
        "variance_lost",
        "variance lost",
        SHARE,
        "share of the features' variance that no linear layer behind their codes has back",
        "lower",
        most=1.0,
    ),
    Quantity("code_drift", "drift of codes", "per step", "distance that a step moves a code, mean"),
    Quantity("feature_drift", "drift of features", "per step", "distance between two states of the encoder's output"),
    Quantity(
        "distribution_gap",
        "gap of codes and features",
        "",
        "energy distance of codes and features over its largest value",
        most=1.0,
        label="gap (0: none)",
    ),
    Quantity(
        "in_use_distance", "codes in use to features", "", "distance to the nearest feature over the features' spread"
    ),
    Quantity("unused_distance", "codes not hit to features", "", "likewise of codes without a hit"),
    Quantity("code_similarity", "cosine of two codes", "", "mean over all pairs of codes", least=-1.0, most=1.0),
    Quantity("births", "codes born", "codes", "codes that the window has gained since the row before"),
    Quantity("deaths", "codes died", "codes", "codes that the window has lost since the row before", "lower"),
    # Losses of training. Those of a quantizer begin with `term_`; it names them.
    _loss("loss", "loss", "what training lowers: the sum of a tokenizer's weighted terms"),
    _loss("quantizer_loss", "quantizer's loss", "the quantizer's weighted terms"),
    _loss("perceptual", "LPIPS loss", "LPIPS of the batch, unweighted"),
    _loss("adversarial", "GAN loss", "the discriminator's loss on reconstructions, unweighted"),
    _loss("discriminator", "discriminator's loss", "of telling images from reconstructions"),
    _loss("lecam", "LeCam penalty", "the discriminator's distance from its own averages"),
    Quantity("adversarial_weight", "GAN weight", "", "weight of the GAN loss in the step"),
    Quantity("logits_real", "logits of images", "", "the discriminator's mean logit of images", least=-math.inf),
    Quantity("logits_fake", "logits of reconstructions", "", "likewise of reconstructions", least=-math.inf),
    Quantity("gradient_norm", "gradient before clipping", "", "length of the gradient of all weights", label="length"),
    Quantity("learning_rate", "learning rate", "", "the optimizer's rate in the step", label="rate"),
    # Reconstructions.
    Quantity(
        "reconstruction_error",
        "reconstruction error",
        "",
        "mean squared difference of the lab's points and what is rebuilt of them, over the points' variance",
        "lower",
    ),
    Quantity("l1", "L1", "", "mean absolute difference of pixels in [−1, 1]", "lower", most=2.0),
    Quantity("psnr", "PSNR", "dB", "peak signal-to-noise ratio, mean over images", "higher", -math.inf),
    Quantity("soft_psnr", "PSNR of averages", "dB", "PSNR from averages of all codes", "higher", -math.inf),
    Quantity("ssim", "SSIM", "", "structural similarity, mean over images", "higher", -1.0, 1.0),
    Quantity("lpips", "LPIPS", "", "perceptual distance as papers print it, its network not named", "lower"),
    Quantity("lpips_vgg", "LPIPS (VGG)", "", "perceptual distance by VGG16, mean over images", "lower"),
    Quantity("lpips_alex", "LPIPS (AlexNet)", "", "perceptual distance by AlexNet, mean over images", "lower"),
    Quantity("rfid", "rFID", "", f"Fréchet distance of images and their reconstructions {_FID}", "lower"),
    Quantity("reconstruction_frechet_distance", "Fréchet distance", "", f"like rFID, {_OTHER}", "lower"),
    # Generators and samples.
    _loss("validation_loss", "validation loss", "of next tokens, the class given", *_NATS),
    _loss("validation_loss_unconditional", "loss, class unknown", "likewise, the class unknown", *_NATS),
    Quantity("bits_per_token", "bits per token", "bits", "mean −log₂ probability of the next token", "lower"),
    Quantity("bits_per_pixel", "bits per pixel", "bits", "bits of an image's tokens over its pixels", "lower"),
    Quantity("fid", "FID", "", f"Fréchet distance of samples and real images {_FID}", "lower"),
    Quantity("gfid", "gFID", "", "FID of a generator's samples, so called beside the tokenizer's rFID", "lower"),
    Quantity("frechet_distance", "Fréchet distance", "", f"like FID, {_OTHER}", "lower"),
    Quantity("is", "Inception Score", "", "sharp and varied classes score high", "higher", 1.0, 1008.0),
    Quantity("class_score", "class score", "", "like the Inception Score, of another network's classes", "higher", 1.0),
    Quantity("kid", "KID", "", "kernel distance of Inception's features, without bias", "lower", -math.inf),
    Quantity("kernel_distance", "kernel distance", "", f"like KID, {_OTHER}", "lower", -math.inf),
    Quantity("precision", "precision", "", "samples within the manifold of real images", "higher", most=1.0),
    Quantity("recall", "recall", "", "real images within the manifold of samples", "higher", most=1.0),
    _share("recognised", "digits recognised", "samples that a classifier takes for the class asked for"),
    _share("recognised_real", "real digits recognised", "likewise, of real images: the most to expect"),
    # Costs.
    Quantity("seconds", "time", "s", "of training, validations left out", "lower"),
    Quantity("images_per_second", "speed", "images/s", "images per second since the last row", "higher"),
    Quantity("quantizer_ms", "quantizer", "ms", "a pass forward and backward over a step's tokens", "lower"),
    Quantity("quantizer_mib", "quantizer", "MiB", "what autograd keeps for that pass", "lower"),
)
MEASURES: dict[str, Quantity] = {quantity.key: quantity for quantity in _LISTED}
"""The measures by key. `measure` knows besides those whose prefix or suffix says of what they were measured."""

_PREFIXES = {
    "validation_": ("validation {}", "validation images", "validation_tokens"),
    "step_": ("{} (each step's tokens)", "one step's own tokens", "step_tokens"),
}
"""Prefix of a key → title, of what it was measured, the column that counts its tokens."""
_SUFFIXES = {"_mean": ("{}", "mean"), "_std": ("{}, spread", "standard deviation")}
"""Suffix of a key → title, which statistic it is."""
TERM = "term_"
"""Prefix of a quantizer's loss terms, which the quantizer names."""
OTHER_NETWORK = {
    "rfid": "reconstruction_frechet_distance",
    "fid": "frechet_distance",
    "gfid": "frechet_distance",
    "is": "class_score",
    "kid": "kernel_distance",
}
"""Measure of Inception's features → the same of another network's, which must not bear its name."""


def measure(key: str) -> Quantity:
    """A measure by its key.

    `validation_` and `step_` in front of a listed key say of what it was measured, `_mean` and `_std`
    behind it which statistic it is. `term_` stands before a quantizer's own loss terms. The name of a feature extractor
    may follow a distance in its features: "frechet_distance_digits".

    Raises:
        KeyError: it is not listed; the message says where to list it.
    """
    if key in MEASURES:
        return MEASURES[key]
    if key.startswith(TERM):
        return _loss(key, key.removeprefix(TERM).replace("_", " "), "a loss term of the quantizer, unweighted")
    for prefix, (title, subject, tokens) in _PREFIXES.items():
        plain = MEASURES.get(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if plain:
            texts = {"title": title.format(plain.title), "definition": f"{plain.definition}; of {subject}"}
            return replace(plain, key=key, tokens=plain.tokens and tokens, **texts)
    for suffix, (title, statistic) in _SUFFIXES.items():
        plain = MEASURES.get(key.removesuffix(suffix)) if key.endswith(suffix) else None
        if plain:
            return replace(
                plain, key=key, title=title.format(plain.title), definition=f"{plain.definition}; {statistic}"
            )
    for base_key in OTHER_NETWORK.values():
        if key.startswith(f"{base_key}_"):
            extractor = key.removeprefix(f"{base_key}_")
            return replace(MEASURES[base_key], key=key, title=f"{MEASURES[base_key].title} ({extractor})")
    near = difflib.get_close_matches(key, MEASURES, n=1)
    meant = f"did you mean {near[0]!r}? A new one is listed" if near else "list it"
    raise KeyError(f"there is no measure {key!r}; {meant} in ibqlab/base/measures.py")


def is_measure(key: str) -> bool:
    """Whether `measure` knows a key; columns that it does not know say where and when, not how well."""
    try:
        measure(key)
    except KeyError:
        return False
    return True
