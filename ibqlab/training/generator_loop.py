"""The training loop of generators.

    run = train_generator(recipe_config("builtin/digits_generator"), "runs/digits_generator")

The run folder is that of every run. It also holds the tokenizer (`tokenizer.safetensors`), so that whoever has the
folder can draw images.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.base.measures import measure
from ibqlab.base.processes import sum_over_processes
from ibqlab.base.progress import tell
from ibqlab.data import Batch
from ibqlab.generator import AnyGenerator, make_generator
from ibqlab.pretrained import export_tokenizer
from ibqlab.pretrained.generators import FIRST_STAGE_FILE
from ibqlab.recipes.generator_config import GeneratorOptimizerConfig, GeneratorTrainConfig
from ibqlab.runs import Run
from ibqlab.tokens.store import TokenBatch
from ibqlab.training.data_check import reachable
from ibqlab.training.evaluation import require_images
from ibqlab.training.generator_data import Tokens, TokenSource, open_tokens
from ibqlab.training.generator_step import GeneratorStep
from ibqlab.training.launch import preparation
from ibqlab.training.speed import uncompiled
from ibqlab.training.trainer import Session, Trainer, Watch, finished_run, require_room, training_session


def train_generator(
    config: GeneratorTrainConfig,
    path: str | Path,
    *,
    progress: bool = True,
    watch: Watch | None = None,
    accept_changed_data: bool = False,
) -> Run:
    """Train a generator into a run folder, or continue the one that is there.

    A finished run is returned as it is. A run that was interrupted goes on from its last checkpoint, bit for bit; so
    does one that is to have more steps, where its rates do not depend on their number. Ctrl-C and SIGTERM end training
    after the step in progress, which is saved.

    Args:
        config: the run's settings.
        path: the run folder; created, or continued if it holds the same settings.
        progress: show where the run stands, on the first process.
        watch: called on the first process with each row of metrics as it is logged, for live views.
        accept_changed_data: continue a run whose images are no longer those that it began with; provenance keeps both.
    Returns:
        The run.
    Raises:
        RunError: the folder holds another config, or something that is no run; another process trains there; the images
            have changed since; the disk is full.
        TrainingInterrupted: Ctrl-C or SIGTERM came.
        TrainingError: the loss or a weight is not finite, or other than the config's number of processes run.
        ValueError: no tokenizer, or one that does not fit the generator, the stored tokens or the data, or more
            memory needed than there is; nothing has been written then.
    """
    tell(folder=str(Path(path).resolve()))
    config = reachable(config, path)
    finished = finished_run(path, config)
    if finished:
        return finished
    require_room(config)
    with preparation():
        source = open_tokens(config, Path(path))
        torch.manual_seed(config.seed)
        generator = make_generator(config.generator)
        if config.precision == "64-true":
            generator.double()
    with training_session(
        path,
        config,
        source.facts["data"],
        accept_changed_data=accept_changed_data,
        depends_on_steps=_depends_on_steps(config.optimizer),
    ) as session:
        return _GeneratorTrainer(source, generator, session, watch).train(progress)


def _depends_on_steps(config: GeneratorOptimizerConfig) -> str:
    """The setting that stretches over all steps, so that a longer run is another from its first step; "" for none."""
    if config.schedule != "constant":
        return f"the learning rate's schedule {config.schedule!r}"
    if config.warmup_share:
        return "the warm-up of the learning rate"
    return "the weight decay" if config.weight_decay != config.final_weight_decay else ""


class _GeneratorTrainer(Trainer):
    """State of one generator's run on one process."""

    def __init__(self, source: TokenSource, generator: AnyGenerator, session: Session, watch: Watch | None):
        self.source = source
        self.parameters = sum(p.numel() for p in generator.parameters())
        super().__init__(source.config, session, GeneratorStep(source.config, generator, session.fabric), watch)
        self.fabric.to_device(source.tokenizer)

    def start(self) -> None:
        target = self.run.path / FIRST_STAGE_FILE
        if self.fabric.is_global_zero and not target.exists():
            export_tokenizer(self.source.tokenizer, target)

    def describe(self) -> dict[str, Any]:
        return {**self.source.facts, "parameters": self.parameters}

    def kept(self) -> dict[str, Any]:
        return {"tokenizer": self.source.facts["tokenizer"]["fingerprint"]}

    def restore(self, state: dict[str, Any]) -> None:
        given = self.source.facts["tokenizer"]["fingerprint"]
        require(
            state["tokenizer"] == given,
            f"{self.run.path} was begun with another tokenizer (fingerprint {state['tokenizer']}); "
            f"{self.config.tokenizer} now has {given}. Put the tokenizer back, or choose another folder.",
        )

    def batches(self, done: int) -> Iterable[Batch | TokenBatch]:
        return self.source.training_batches(done, self.fabric.global_rank, self.fabric.world_size)

    def learn(self, step: int, batch: Batch | TokenBatch, logging: bool) -> dict[str, Any] | None:
        self.broken.add(getattr(batch, "broken", ()))
        measured = self.networks.learn(step, *self.source.tokens(batch, self.fabric.device))
        return {"weight_decay": self.networks.weight_decay, **self.mean(measured)} if logging else None

    def shown(self, row: dict[str, Any]) -> dict[str, str]:
        bits = f"{row['loss'] / math.log(2):.2f}"
        return {measure("loss").title: f"{row['loss']:.3f}", measure("bits_per_token").title: bits}

    def measure(self, step: int) -> dict[str, Any]:
        with uncompiled(self.config.speed):
            losses = self._validate()
        if self.fabric.is_global_zero:
            self.run.save_snapshot(step, position_loss=losses.given, position_loss_unconditional=losses.unconditional)
        return losses.row(self.config.data.image_size)

    @cached_property
    def _validation_tokens(self) -> list[Tokens]:
        """This process's share of the validation images, on its device."""
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        found = []
        for batch in self.source.validation_batches(rank, world_size):
            self.broken.add(getattr(batch, "broken", ()))
            if len(batch.labels):
                found.append(self.source.tokens(batch, self.fabric.device))
        return found

    def _validate(self) -> "Losses":
        """Mean losses of the validation images by position, with and without their classes."""
        tokens, null = self.config.generator.num_tokens, self.config.generator.num_classes
        device = self.fabric.device
        sums = torch.zeros(2, tokens, dtype=torch.float64, device=device)
        seen = torch.zeros(1, dtype=torch.int64, device=device)
        rounds = self.fabric.all_gather(torch.tensor(len(self._validation_tokens), device=device)).max()
        for number in range(int(rounds)):
            # In shards, a process that has nothing left to look at still lends its pieces to the others.
            spare = number >= len(self._validation_tokens)
            indices, labels = _nothing(tokens, device) if spare else self._validation_tokens[number]
            for row, condition in enumerate((labels, torch.full_like(labels, null))):
                sums[row] += (not spare) * self.networks.evaluate(indices, condition).double().sum(0)
            seen += 0 if spare else len(indices)
        images = int(sum_over_processes(seen))
        require_images(images, self.broken.names)
        given, unconditional = (sum_over_processes(sums) / images).cpu()
        return Losses(given, unconditional, images)


class Losses(NamedTuple):
    """A validation's result."""

    given: Float[Tensor, " T"]
    """Nats per token at each position, the class given."""
    unconditional: Float[Tensor, " T"]
    """Likewise with the null class."""
    images: int
    """How many images were seen."""

    def row(self, image_size: int) -> dict[str, Any]:
        """The numbers as a row of metrics."""
        loss, tokens = float(self.given.mean()), len(self.given)
        bits = loss / math.log(2)
        return {
            "validation_loss": loss,
            "validation_loss_unconditional": float(self.unconditional.mean()),
            "validation_bits_per_token": bits,
            "validation_bits_per_pixel": bits * tokens / image_size**2,
            "validation_tokens": self.images * tokens,
            "validation_images": self.images,
        }


def _nothing(tokens: int, device: torch.device) -> Tokens:
    return Tokens(
        torch.zeros(1, tokens, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    )
