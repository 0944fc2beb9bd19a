"""What a generator learns from: a tokenizer's tokens with their classes, made at every step or stored beforehand."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.data import Batch, ImageSource, training_batches, training_requests, validation_batches, validation_requests
from ibqlab.generator import SequenceConfig
from ibqlab.pretrained import load_tokenizer
from ibqlab.pretrained.loading import FIRST_STAGE_FILE
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.runs.finding import locate
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokens.entropy import index_permutation
from ibqlab.tokens.manifest import TOKENIZER
from ibqlab.tokens.store import TokenBatch, TokenSplit, TokenStore
from ibqlab.training.data_check import facts_of, open_images


class Tokens(NamedTuple):
    """Tokens of some images and their classes, on one device."""

    indices: Int[Tensor, "B T"]
    labels: Int[Tensor, " B"]


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """Tokens of both splits.

    Made by `open_tokens`, which checks that everything fits together.
    """

    config: GeneratorTrainConfig
    """Of the run."""
    tokenizer: Tokenizer
    """In eval mode, its weights frozen."""
    training_data: ImageSource | TokenSplit
    """Images, or their tokens."""
    validation_data: ImageSource | TokenSplit
    """Likewise."""
    permutation: Int[Tensor, " K"] | None
    """New number of every code; None where they keep their own."""
    facts: dict[str, Any]
    """Identity of tokenizer and data, for provenance."""

    def training_batches(self, done: int, rank: int, world_size: int) -> Iterable[Batch | TokenBatch]:
        """A process's batches of the steps after `done`; `tokens` makes tokens of them."""
        config = self.config
        shared = {
            "batch_size": config.batch_size,
            "seed": config.seed,
            "start_step": done,
            "steps": config.steps - done,
            "rank": rank,
            "world_size": world_size,
        }
        if isinstance(self.training_data, TokenSplit):
            return self.training_data.batches(training_requests(len(self.training_data), **shared))
        return training_batches(self.training_data, **shared, workers=config.data.workers)

    def tokens(self, batch: Batch | TokenBatch, device: torch.device) -> Tokens:
        """A batch as the generator takes it; images without a class have the null class."""
        labels = batch.labels.to(device, non_blocking=True)
        labels = torch.where(labels < 0, self.config.generator.num_classes, labels)
        if isinstance(batch, TokenBatch):
            indices = batch.indices.to(device, non_blocking=True)
        else:
            indices = self.tokenizer.encode_indices(batch.images.to(device, non_blocking=True)).flatten(1)
        return Tokens(indices if self.permutation is None else self.permutation.to(device)[indices], labels)

    def validation_batches(self, rank: int, world_size: int) -> Iterator[Batch | TokenBatch]:
        """A process's share of the first validation images, as many as the config says or as there are."""
        config, data = self.config, self.validation_data
        endless = not isinstance(data, TokenSplit) and data.endless
        count = config.record.validation_images if endless else min(config.record.validation_images, len(data))
        shared = {
            "images": count,
            "batch_size": max(1, config.batch_size // config.accumulate),
            "rank": rank,
            "world_size": world_size,
        }
        if isinstance(data, TokenSplit):
            return data.batches(validation_requests(len(data), **shared))
        return iter(validation_batches(data, **shared))


def open_tokens(config: GeneratorTrainConfig, run_folder: Path) -> TokenSource:
    """Tokenizer and data of a run: all that can be wrong with them shows before anything is written.

    Args:
        config: of the run.
        run_folder: whose copy of the tokenizer is taken where the original is gone.
    Raises:
        ValueError: no tokenizer, one whose codes, grid or classes do not fit the generator, tokens that another
            tokenizer made.
        TokenStoreError: no store of tokens, or a damaged one.
    """
    store = TokenStore(locate(config.tokens)) if config.tokens else None
    tokenizer = _load_tokenizer(config, run_folder, store)
    check_fit(tokenizer, config.generator, config.data.image_size)
    about_tokenizer = {
        "path": config.tokenizer or f"{config.tokens}/{TOKENIZER}",
        "fingerprint": tokenizer.fingerprint(),
        "codebook_size": tokenizer.quantizer.config.codebook_size,
    }
    if store:
        store.check_tokenizer(tokenizer)
        store.check_data(config.data)
        training, validation = store.split("train"), store.split("validation")
        classes = store.manifest.classes
        about_data = {"tokens": config.tokens, **_facts_of_store(store)}
    else:
        images = open_images(config.data)
        training, validation = images["train"], images["validation"]
        classes, about_data = training.classes, {split: facts_of(source) for split, source in images.items()}
    count, num_classes = len(classes), config.generator.num_classes
    require(
        count <= num_classes,
        f"generator.num_classes must be at least the number of classes in the data, {count}; got {num_classes}. "
        f"Use generator.num_classes={count}.",
    )
    order = config.index_permutation
    return TokenSource(
        config=config,
        tokenizer=tokenizer,
        training_data=training,
        validation_data=validation,
        permutation=None if order < 0 else index_permutation(config.generator.vocabulary_size, order),
        facts={"tokenizer": about_tokenizer, "data": about_data},
    )


def _facts_of_store(store: TokenStore) -> dict[str, Any]:
    """Identity of stored tokens by split, as `facts_of` gives that of images."""
    splits = {"train": store.manifest.train, "validation": store.manifest.validation}
    return {
        name: {
            "fingerprint": split.tokens_sha256 or split.fingerprint,
            "images": split.images,
            "classes": list(store.manifest.classes),
        }
        for name, split in splits.items()
    }


def check_fit(tokenizer: Tokenizer, generator: SequenceConfig, image_size: int | None = None) -> None:
    """Raise ValueError unless a generator's vocabulary and grid are the tokenizer's, which must have a grid.

    Args:
        tokenizer: whose codes the generator draws.
        generator: its settings.
        image_size: of the images in pixels; None: not known.
    """
    require(
        tokenizer.config.has_grid,
        "generators draw tokens row by row of a square grid; got a tokenizer whose tokens lie on no grid (design "
        f'"{tokenizer.config.autoencoder.design}"). Use a tokenizer with a grid, such as one of the design "vqgan".',
    )
    codes, words = tokenizer.quantizer.config.codebook_size, generator.vocabulary_size
    require(
        codes == words,
        f"the generator's vocabulary must be the tokenizer's codebook; got {words:,} tokens for {codes:,} codes. "
        f"Use generator.vocabulary_size={codes} (generator.bits for Open-MAGVIT2's), or another tokenizer.",
    )
    if image_size is None:
        return
    grid = tokenizer.latent_grid(image_size, image_size)[0]
    require(
        grid == generator.grid_size,
        f"the generator's grid must be the tokenizer's; got {generator.grid_size} × {generator.grid_size} tokens for "
        f"{grid} × {grid} at {image_size} pixels. Use generator.grid_size={grid}.",
    )


def _load_tokenizer(config: GeneratorTrainConfig, run_folder: Path, store: TokenStore | None) -> Tokenizer:
    """The tokenizer that the recipe names; where that is not there, the one of the stored tokens, or the run's."""
    named = str(locate(config.tokenizer)) if config.tokenizer else ""
    copy = run_folder / FIRST_STAGE_FILE
    files = [Path(named)] if named and Path(named).exists() else []
    files += [file for file in (store and store.tokenizer_file, copy) if file and file.is_file()]
    require(
        bool(named or files),
        (f"{config.tokens} is of an earlier version and holds no tokenizer: tokenizer" if store else "tokenizer")
        + " must name a trained one (a run, an export or a published file); got none. Train one and give its folder: "
        "ibqlab train builtin/digits --output runs/digits, then tokenizer=runs/digits; or give tokens=…, which bring "
        "theirs.",
    )
    tokenizer = load_tokenizer(files[0] if files else named, config.tokenizer_weights)
    return tokenizer.float().eval().requires_grad_(False)
