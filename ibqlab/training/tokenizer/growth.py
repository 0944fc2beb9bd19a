"""A codebook grown at the start of a run: the codes of a file keep their indices, and new ones come behind them.

What is unusual: nothing that could be decoded before is decoded otherwise. Old codes stay bit for bit, so stored tokens
and generators over them stay valid. Two rules say where new codes lie:

"split" (the default): beside old codes. Each copy goes to the code that then has the most hits per copy of it, itself
included, so codes in use are shared out and dead ones get none; where the file tells no hits, all count alike. A copy
lies `grow_noise` distances to the nearest neighbour away from its code, in a direction drawn at random.
"tokens": at encoder features of the first training images, drawn without replacement.

"split" is the default because every new code then lies where tokens are known to fall, whatever the quantizer compares
(distances, angles, dot products, scores), because images are rebuilt at the first step nearly as before, and because
it needs no images. Codes that lie at tokens lower the quantization error at once, but each takes its tokens from an old
code whose decoder has learned another place.

Frozen tables under a learned map (SimVQ, VQGAN-LC) are split where they are stored, before the map: a map of copies is
a copy of maps, so new codes lie beside codes in use there, too. Features have no place in such a table, so "tokens" is
refused. Codes that are not stored (LFQ, FSQ, BSQ) cannot be grown at all: their number follows from code_dim.
"""

import heapq
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import require
from ibqlab.base.processes import same_on_all_processes
from ibqlab.data import first_images, to_model_range
from ibqlab.data.source import ImageSource
from ibqlab.diagnostics.geometry import exact_neighbours
from ibqlab.pretrained import Checkpoint
from ibqlab.quantizers import IndexBackpropQuantizer, Quantizer
from ibqlab.quantizers.codebooks import EmaCodebook, FreeCodebook, LinearCodebook, UnitCodebook
from ibqlab.quantizers.methods.vqgan_lc import AnchorCodebook
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs import Run
from ibqlab.tokenizer import Tokenizer

FROZEN = (LinearCodebook, AnchorCodebook)
"""Tables that a learned map makes codes of."""
GROWABLE = (FreeCodebook, UnitCodebook, EmaCodebook, *FROZEN)
"""Codebooks in which a row stands for itself, so that others behind it change nothing; no subclass of them."""
IMAGES_AT_ONCE = 16
"""Images of one pass for the rule "tokens"."""


class Growth(NamedTuple):
    """What was done to a codebook."""

    old: int
    """K of the file; these codes come first."""
    new: int
    """K of the run."""
    rule: str
    """As in the setting grow_codes."""
    known_hits: bool
    """Whether the file told how often each code was used."""

    def describe(self) -> str:
        """For people: "64 of the file, 192 new, split from those used most"."""
        places = {
            "split": "split from those used most" if self.known_hits else "split from all alike, their use unknown",
            "tokens": "at features of the first training images",
        }
        return f"{self.old:,} of the file, {self.new - self.old:,} new, {places[self.rule]}"


def require_growable(config: TrainConfig, quantizer: Quantizer, old: int) -> None:
    """Refuse another number of codes than the file's where no rule gives it.

    Args:
        config: of the run.
        quantizer: of the run.
        old: codes in the file.
    Raises:
        ValueError: fewer codes, codes that are not stored one by one, or a rule that does not fit them.
    """
    size, name = config.tokenizer.quantizer.codebook_size, quantizer.name
    setting = f"start_from {config.start_from}: tokenizer.quantizer.codebook_size={size}"
    require(
        size > old,
        f"{setting} is less than the {old} codes of the file, and a codebook is not shrunk: tokens of the codes left "
        f"out could no longer be decoded. Leave codebook_size out, or give more than {old}",
    )
    require(
        type(quantizer.codes) in GROWABLE,
        f"{setting} is more than the {old} codes of the file, and the codebook of {name!r} is not grown: its codes "
        "are no rows that are stored one by one. Leave codebook_size out, or train without start_from",
    )
    has_rows_besides = any(
        not key.startswith(("codes.", "upkeep.")) and value.shape[:1] == (size,)
        for key, value in quantizer.state_dict().items()
    )
    frozen = isinstance(quantizer.codes, FROZEN)
    require(
        config.grow_codes == "split" or not (frozen or has_rows_besides),
        f"start_from {config.start_from}: grow_codes={config.grow_codes!r} does not apply to {name!r}, whose codes are "
        f"{'a frozen table under a map' if frozen else 'chosen by scores of their own'}, where features have no "
        "place; use grow_codes=split",
    )


def known_hits(checkpoint: Checkpoint, old: int) -> Int[Tensor, " K"] | Float[Tensor, " K"] | None:
    """How often each code of a checkpoint was used, where it tells; None where it does not.

    A run tells it in its last snapshot (of validation images), moving averages in their own counts, LlamaGen's files in
    the window of indices chosen last.

    Args:
        checkpoint: of a tokenizer.
        old: its codes.
    """
    hits = checkpoint.tokenizer.get("quantizer.codes.hits")
    if hits is None and (checkpoint.path / "config.yaml").is_file() and Run(checkpoint.path).snapshot_steps:
        hits = torch.as_tensor(Run(checkpoint.path).snapshot()["counts"])
    windows = [checkpoint.tensors[key] for key, role in checkpoint.roles.items() if role.part == "indices chosen last"]
    # A window of zeros is one that was never filled.
    if hits is None and windows and windows[0].any():
        hits = torch.bincount(windows[0].flatten().long(), minlength=old)
    return hits if hits is not None and len(hits) == old and bool(hits.any()) else None


def choose_parents(hits: Tensor | None, old: int, count: int) -> Int[Tensor, " R"]:
    """The old code that each new one is split from: the one with the most hits per copy of it, one after the other.

    Args:
        hits: of each old code; None: all count alike.
        old: K, codes.
        count: R, new codes.
    Returns:
        (R,) 0 to K − 1; of two codes alike the lower index comes first.
    """
    loads = [1.0] * old if hits is None else hits.double().tolist()
    queue = [(-load / 2, index, 2) for index, load in enumerate(loads)]  # hits per copy, once there is one more
    heapq.heapify(queue)
    parents = []
    for _ in range(count):
        _, index, copies = queue[0]
        parents.append(index)
        heapq.heapreplace(queue, (-loads[index] / (copies + 1), index, copies + 1))
    return torch.tensor(parents, dtype=torch.int64)


@torch.no_grad()
def grow(
    config: TrainConfig, tokenizer: Tokenizer, sets: tuple[dict[str, Tensor], ...], hits: Tensor | None
) -> tuple[dict[str, Tensor], ...]:
    """A file's tensors with rows for the new codes.

    Per code there may be more than its vector: scores, counts of moving averages and of upkeep. With "split" a copy has
    those of its code, scores displaced likewise; counts of moving averages begin at one hit, as a revived code's do.

    Args:
        config: of the run.
        tokenizer: of the run, with fresh weights, which new rows have that no rule gives.
        sets: tensors by name: the weights, and, where there are any, their averages. Both get the same displacements.
        hits: as `choose_parents` takes them.
    Returns:
        The same, every tensor as large as the tokenizer's.
    Cost: "split" compares all old codes with each other, O(K²·D).
    """
    fresh, size = tokenizer.state_dict(), config.tokenizer.quantizer.codebook_size
    unit = isinstance(tokenizer.quantizer.codes, UnitCodebook)
    generator = torch.Generator().manual_seed(config.seed)
    first, table = (
        sets[0],
        f"quantizer.codes.{'anchors' if isinstance(tokenizer.quantizer.codes, FROZEN) else 'weight'}",
    )
    if table not in first:
        return sets  # the file's codes are of another kind, which is told where the weights are put in
    displaced, old = {table, "quantizer.scores.weight"}, len(first[table])
    parents = choose_parents(hits, old, size - old) if config.grow_codes == "split" else None
    grown = tuple(dict(tensors) for tensors in sets)
    for name, value in first.items():
        if not name.startswith("quantizer.") or not _has_row_per_code(value, fresh.get(name), old, size):
            continue
        shift = None
        if parents is not None and name in displaced:
            shift = config.grow_noise * displacements(_table(value, unit), parents, generator)
        for tensors in grown:
            if name in tensors:
                old_rows = tensors[name].to(fresh[name].dtype)
                rows = fresh[name][old:]
                if shift is not None:
                    rows = _table(_table(old_rows, unit)[parents] + shift, unit)
                elif parents is not None:
                    rows = old_rows[parents]
                tensors[name] = torch.cat([old_rows, rows])
    _restart_averages(grown[0], old)
    return grown


def _has_row_per_code(value: Tensor, fresh: Tensor | None, old: int, size: int) -> bool:
    """Whether a tensor has a row for each code, in the file and in the run."""
    return fresh is not None and (old, *value.shape[1:]) == value.shape and (size, *value.shape[1:]) == fresh.shape


def _restart_averages(weights: dict[str, Tensor], old: int) -> None:
    """Moving averages of new codes begin as if hit once."""
    if len(weights.get("quantizer.codes.hits", ())) > old:
        weights["quantizer.codes.hits"][old:] = 1
        weights["quantizer.codes.sums"][old:] = weights["quantizer.codes.weight"][old:]


def _table(rows: Tensor, unit: bool) -> Tensor:
    """Rows as they are compared: of length 1 where codes are used so."""
    return F.normalize(rows, dim=1) if unit else rows


def displacements(
    codes: Float[Tensor, "K D"], parents: Int[Tensor, " R"], generator: torch.Generator
) -> Float[Tensor, "R D"]:
    """Vectors as long as the distance of each parent to its nearest neighbour, in directions drawn at random.

    Args:
        codes: old codes.
        parents: of each new code.
        generator: draws the directions.
    Returns:
        Codes that lie on each other count with the median distance, because copies at one place would never part.
    """
    nearest = torch.from_numpy(exact_neighbours(codes.float(), 2)[1][:, 1]).to(codes.dtype)  # (K,)
    apart = nearest[nearest > 0]
    nearest = torch.where(nearest > 0, nearest, apart.median() if len(apart) else torch.ones(()).to(codes.dtype))
    directions = F.normalize(torch.randn(len(parents), codes.shape[1], generator=generator), dim=1)  # (R, D)
    return nearest[parents, None] * directions.to(codes.dtype)


@torch.no_grad()
def move_to_tokens(
    tokenizer: Tokenizer, averages: Mapping[str, Tensor], images: ImageSource, growth: Growth, seed: int
) -> None:
    """The rule "tokens": new codes go to encoder features of the first training images, without replacement.

    Where codes are chosen by dot product (IBQ), features are brought to the mean length of old codes: longer codes
    would win tokens by their length alone.

    Args:
        tokenizer: on its device.
        averages: averaged weights by name, whose new codes go there, too.
        images: for training.
        growth: of its codebook.
        seed: of the draw.
    Raises:
        ValueError: fewer tokens than new codes; the message says how many images are needed.
    """
    codes, device = tokenizer.quantizer.codes, tokenizer.decoder.last_layer.device
    rows, columns = tokenizer.latent_grid(*first_images(images, 1).images.shape[2:])
    new = growth.new - growth.old
    needed = -(-new // (rows * columns))
    require(
        images.endless or needed <= len(images),
        f"grow_codes=tokens needs {needed:,} training images of {rows * columns} tokens for {new:,} new "
        f"codes; {images.description} has {len(images):,}. Use grow_codes=split",
    )
    was_training = tokenizer.training
    tokenizer.eval()
    features = []
    for batch in first_images(images, needed).images.split(IMAGES_AT_ONCE):
        pictures = to_model_range(batch.to(device)).to(tokenizer.decoder.last_layer.dtype)
        maps = tokenizer.quant_conv(tokenizer.encoder(pictures))  # (B, D, h, w)
        features.append(maps.permute(0, 2, 3, 1).flatten(0, 2).float())
    tokenizer.train(was_training)
    tokens = torch.cat(features)  # (N, D)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:new]
    chosen = same_on_all_processes(tokens[order.to(device)])
    if isinstance(tokenizer.quantizer, IndexBackpropQuantizer):
        chosen = F.normalize(chosen, dim=1) * torch.linalg.vector_norm(codes.weight[: growth.old], dim=1).mean()
    codes.replace(torch.arange(growth.old, growth.new, device=device), chosen)
    average = averages.get("quantizer.codes.weight")
    if average is not None:
        average[growth.old :] = codes.weight[growth.old :].to(average.dtype)
