"""What a token's neighbours tell about it, without a network: the baselines that a generator has to beat.

Every baseline is p(x | context) = (count(context, x) + s·p_lower(x)) / (count(context) + s), where p_lower knows less
of the context. A pair never seen therefore costs finitely, and the strength s is fitted, not set, because a good one
for 1,000 codes is useless for 262,144. Only contexts that occur are stored (sorted keys), never a K × K table.

Three disjoint sets of images: counts come from nine tenths of the training images, strengths and weights from the last
tenth, bits from the validation images. Before the last step the training images are counted again, all of them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from ibqlab.base.checks import require, whole_number
from ibqlab.quantizers.indices import indices_in_memory
from ibqlab.tokens.entropy import HeldOutTokens, Tokens, check_tokens, check_two

BASELINES: dict[str, str] = {
    "uniform": "Every code alike: log2 K.",
    "unigram": "How often a code is used.",
    "position": "How often it is used at this position.",
    "left": "The code to the left (a bigram); the first column knows that it is the first.",
    "upper": "The code above (a bigram); the first row knows that it is the first.",
    "mix": "Left, upper, both together and the position, interpolated with weights of the place.",
    "class": "How often it is used in images of this class.",
    "mix_class": "The mix, with the class and the class at this position.",
}
"""The baselines, by what they know of a token. The last two need labels. Of tokens in one row, as TiTok's, "left" is
the token before, and there is no "upper"."""

Labels = Integer[np.ndarray, "n"] | Integer[Tensor, "n"]
"""Class of each image, −1 for none, which counts as a class."""
BothLabels = tuple[Labels, Integer[np.ndarray, "m"] | Integer[Tensor, "m"]]
"""Classes of the training and of the validation images."""

LARGEST_CODEBOOK = 2**20
"""Codes up to which a token and two neighbours fit into one 64-bit key."""
TUNING_IMAGES = 4096
"""Most training images that strengths and weights are fitted on."""
_STRENGTHS = 2.0 ** np.arange(24, -9, -1)
"""Tried in this order: of equally good ones the first, which trusts the counts least."""
_PRIOR_IMAGES = 16.0
_LOWER = {
    "unigram": "uniform",
    "position": "unigram",
    "left": "unigram",
    "upper": "unigram",
    "both": "left",
    "class": "unigram",
    "class_position": "class",
}
_MIXES = {
    "mix": ("position", "left", "upper", "both"),
    "mix_class": ("position", "left", "upper", "both", "class", "class_position"),
}
_LABELLED = {"class", "class_position"}
"""Models that need labels."""
_ABOVE = {"upper", "both"}
"""Models that need a row above."""
_Contexts = Mapping[str, Int64[np.ndarray, "n T"]]


class _Split(NamedTuple):
    """Tokens of some images and what each baseline may look at."""

    tokens: Int64[np.ndarray, "n T"]
    contexts: _Contexts

    def images(self, rows: np.ndarray) -> "_Split":
        return _Split(self.tokens[rows], {name: context[rows] for name, context in self.contexts.items()})


def measure_ngrams(
    training: Tokens,
    validation: HeldOutTokens,
    codebook_size: int,
    grid: tuple[int, int],
    *,
    labels: BothLabels | None = None,
) -> dict[str, Float[np.ndarray, "T"]]:
    """Cross-entropy of held-out tokens under models that only count.

    −log2 p(x | context), averaged over the validation images at each position. The mean over positions is what the
    baseline costs per token; a generator above "mix" has learnt less than a table of neighbours. With few images or
    many codes even "left" may know no more than "unigram", because hardly a pair comes twice: it then shows how much
    data there is, not how much the tokens have to do with each other.

    Args:
        training: code numbers (n, T) of at least two images.
        validation: code numbers (m, T) of other images, at least one.
        codebook_size: K, 1 to 1,048,576.
        grid: (h, w) with h·w = T; tokens are row by row. (1, T) has nothing above a token: "upper" is left out.
        labels: classes of the training and of the validation images; None leaves "class" and "mix_class" out.
    Returns:
        Baseline (a key of `BASELINES`) → bits at each position.
    Raises:
        ValueError: shapes, numbers or sizes that do not fit each other.
    Cost: O(N log N) for N training tokens and about 100 bytes for each; K costs nothing.
    Source: MacKay and Peto 1995 for the fitted strength; Jelinek and Mercer 1980 for the interpolation, weights by
        expectation maximisation.
    """
    train, held_out = _splits(training, validation, codebook_size, grid, labels)
    images = len(train.tokens)
    # Drawn at random, since stored images may be sorted by class.
    tuning_images = np.random.default_rng(0).permutation(images)[: max(1, min(images // 10, TUNING_IMAGES))]
    tuning = np.isin(np.arange(images), tuning_images)
    fitted, tuned = train.images(~tuning), train.images(tuning)
    strengths: dict[str, float] = {}
    chances = _chances(fitted, tuned, codebook_size, strengths)
    final = _chances(train, held_out, codebook_size, strengths)
    for mix, mixed in _MIXES.items():
        if _LABELLED & {*mixed} <= final.keys():
            known = [name for name in mixed if name in final]
            weights = _fit_weights([chances[name] for name in known])
            final[mix] = (weights * np.stack([final[name] for name in known])).sum(0)
    # p = 1 gives −0.
    return {name: -np.log2(final[name]).mean(0) + 0.0 for name in BASELINES if name in final}


def _splits(
    training: Tokens, validation: HeldOutTokens, codebook_size: int, grid: tuple[int, int], labels: BothLabels | None
) -> tuple[_Split, _Split]:
    """Both splits with their contexts, refused where they do not fit."""
    codebook_size = whole_number("codebook_size", codebook_size, 1, LARGEST_CODEBOOK)
    train = check_tokens(training, codebook_size, "training")
    held_out = check_tokens(validation, codebook_size, "validation")
    require(len(train) >= 2, f"baselines need at least two training images, one to fit on; got {len(train)}")
    grid = check_two("grid", grid, "(h, w)")
    for name, tokens in (("training", train), ("validation", held_out)):
        if grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(
                f"grid (h, w) must have h·w = T tokens; got {grid[0]} × {grid[1]} and {name} of T = "
                f"{tokens.shape[1]}: pass tokenizer.latent_grid(height, width)"
            )
    if labels is not None and (
        not isinstance(labels, tuple | list) or len(labels) != 2 or any(kind is None for kind in labels)
    ):
        raise ValueError("labels must be two, (of the training images, of the validation images), or None")
    kinds = (None, None) if labels is None else labels
    both = (("training", train, kinds[0]), ("validation", held_out, kinds[1]))
    splits = [_Split(tokens, _contexts(tokens, _classes(kind, tokens, name), grid)) for name, tokens, kind in both]
    return splits[0], splits[1]


def _classes(labels: Labels | None, tokens: Int64[np.ndarray, "n T"], name: str) -> Int64[np.ndarray, "n 1"] | None:
    """Labels as a column counted from 0, where 0 is no class."""
    if labels is None:
        return None
    column = indices_in_memory(labels, f"{name} labels").cpu().numpy()
    if column.shape != tokens.shape[:1]:
        raise ValueError(
            f"{name} labels must be whole numbers, one per image, here ({len(tokens)},); got shape {column.shape}"
        )
    if column.min() < -1 or column.max() >= LARGEST_CODEBOOK:
        raise ValueError(f"{name} labels must lie in −1 to {LARGEST_CODEBOOK:,}; got {column.min()} to {column.max()}")
    return column.astype(np.int64)[:, None] + 1


def _contexts(
    tokens: Int64[np.ndarray, "n T"], classes: Int64[np.ndarray, "n 1"] | None, grid: tuple[int, int]
) -> _Contexts:
    """What each model may look at, as one number per token; 0 stands for the edge of the image."""
    rows = tokens.reshape(-1, *grid) + 1  # (n, h, w), so that 0 is free for the edge
    left, upper = np.zeros_like(rows), np.zeros_like(rows)
    left[:, :, 1:], upper[:, 1:] = rows[:, :, :-1], rows[:, :-1]
    left, upper = left.reshape(tokens.shape), upper.reshape(tokens.shape)
    position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    contexts = {
        "unigram": np.zeros_like(tokens),
        "position": position,
        "left": left,
        "upper": upper,
        "both": left * (LARGEST_CODEBOOK + 1) + upper,  # a pair as one key; with the token it still fits 64 bits
    }
    if grid[0] == 1:
        contexts = {name: context for name, context in contexts.items() if name not in _ABOVE}
    if classes is not None:
        contexts["class"] = np.broadcast_to(classes, tokens.shape)
        contexts["class_position"] = classes * tokens.shape[1] + position
    return contexts


def _chances(
    train: _Split, held_out: _Split, codebook_size: int, strengths: dict[str, float]
) -> dict[str, Float[np.ndarray, "n T"]]:
    """What each model gives the tokens held out.

    A model without a strength gets the one that makes these tokens cheapest, which is noted in `strengths`.
    """
    chances = {"uniform": np.full(held_out.tokens.shape, 1 / codebook_size)}
    for name, lower in _LOWER.items():
        if name not in train.contexts:
            continue
        # How often the training images have each token's context with that token, and the context alone.
        before, now = train.contexts[name], held_out.contexts[name]
        pairs = _look_up(before * codebook_size + train.tokens, now * codebook_size + held_out.tokens)
        hits = pairs, _look_up(before, now)
        if name not in strengths:
            costs = [-np.log2(_backed_off(hits, chances[lower], strength)).mean() for strength in _STRENGTHS]
            strengths[name] = float(_STRENGTHS[int(np.argmin(costs))])
        chances[name] = _backed_off(hits, chances[lower], strengths[name])
    return chances


def _backed_off(hits: tuple[np.ndarray, np.ndarray], lower: np.ndarray, strength: float) -> Float[np.ndarray, "n T"]:
    """A model's chance of each token: its counts, and the model below it as if it had counted `strength` tokens."""
    pairs, contexts = hits
    return (pairs + strength * lower) / (contexts + strength)


def _look_up(training: Int64[np.ndarray, "n T"], held_out: Int64[np.ndarray, "m T"]) -> Int64[np.ndarray, "m T"]:
    """How often the training images have each held-out key."""
    # Sorted keys that occur, not a K × K table: the memory is that of the tokens, whatever K is.
    keys, counts = np.unique(training, return_counts=True)
    nearest = np.minimum(np.searchsorted(keys, held_out), len(keys) - 1)
    return np.where(keys[nearest] == held_out, counts[nearest], 0)


def _fit_weights(chances: list[Float[np.ndarray, "n T"]]) -> Float[np.ndarray, "models 1 T"]:
    """Weights of an interpolation at each position that make the tuning images cheapest.

    Those of all positions together first, then of each one, drawn towards the common ones as by 16 images more: the
    first row has nothing above it, and a position that always holds the same needs no neighbours.
    """
    table = np.stack(chances)
    common = _maximise(table.reshape(len(table), -1, 1), np.full((len(table), 1), 1 / len(table)), 0.0)
    return _maximise(table, common, _PRIOR_IMAGES)[:, None]


def _maximise(
    table: Float[np.ndarray, "models n T"], prior: Float[np.ndarray, "models #T"], strength: float
) -> Float[np.ndarray, "models T"]:
    """Expectation maximisation of weights per position under `strength` images that followed the prior."""
    weights = prior
    for _ in range(200):
        shares = weights[:, None] * table  # (models, n, T)
        images = (shares / shares.sum(0)).sum(1)  # how many images each model explains at each position
        new = (images + strength * prior) / (table.shape[1] + strength)
        if np.abs(new - weights).max() < 1e-4:
            return new
        weights = new
    return weights
