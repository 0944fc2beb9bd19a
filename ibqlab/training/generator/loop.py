"""The training loop of generators.

    run = train_generator(recipe_config("builtin/digits_generator"), "runs/digits_generator")

The run folder is that of every run. It also holds the tokenizer (`tokenizer.safetensors`), so that whoever has the
folder can draw images.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.base.measures import measure
from ibqlab.base.processes import sum_over_processes
from ibqlab.data import Batch
from ibqlab.generator import make_generator
from ibqlab.pretrained import export_tokenizer
from ibqlab.pretrained.loading import FIRST_STAGE_FILE
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.runs import Run
from ibqlab.tokens.store import TokenBatch
from ibqlab.training.generator.step import GeneratorStep
from ibqlab.training.generator.token_source import Tokens, open_tokens
from ibqlab.training.session import RunInputs, Session
from ibqlab.training.speed import uncompiled
from ibqlab.training.tokenizer.validation import require_images
from ibqlab.training.trainer import Trainer, Watch, train_run


def train_generator(
    config: GeneratorTrainConfig,
    path: str | Path,
    *,
    progress: bool = True,
    watch: Watch | None = None,
    accept_changed_data: bool = False,
) -> Run:
    """Train a generator into a run folder, or continue the one that is there.

    Arguments, result and errors are those of `ibqlab.training.train`. A run can be made longer where its rates do not
    depend on the number of steps.

    Raises:
        ValueError: also where there is no tokenizer, or one that does not fit the generator, the stored tokens or the
            data; nothing has been written then.
    """
    return train_run(
        _GeneratorTrainer, config, path, progress=progress, watch=watch, accept_changed_data=accept_changed_data
    )


class _GeneratorTrainer(Trainer):
    """State of one generator's run on one process."""

    @staticmethod
    def prepare(config: GeneratorTrainConfig, path: Path) -> RunInputs:
        source = open_tokens(config, path)
        torch.manual_seed(config.seed)
        generator = make_generator(config.generator)
        return RunInputs(
            source, generator.double() if config.precision == "64-true" else generator, source.facts["data"]
        )

    @staticmethod
    def depends_on_steps(config: GeneratorTrainConfig) -> str:
        optimizer = config.optimizer
        if optimizer.schedule != "constant":
            return f"the learning rate's schedule {optimizer.schedule!r}"
        if optimizer.warmup_share:
            return "the warm-up of the learning rate"
        return "the weight decay" if optimizer.weight_decay != optimizer.final_weight_decay else ""

    def __init__(self, config: GeneratorTrainConfig, inputs: RunInputs, session: Session, watch: Watch | None):
        self.source, generator = inputs.source, inputs.networks
        self.parameters = sum(p.numel() for p in generator.parameters())  # before they are cut into shards
        super().__init__(config, session, GeneratorStep(config, generator, session.fabric), watch)
        self.fabric.to_device(self.source.tokenizer)

    def start(self) -> None:
        target = self.run.path / FIRST_STAGE_FILE
        if self.fabric.is_global_zero and not target.exists():
            export_tokenizer(self.source.tokenizer, target)

    def describe(self) -> dict[str, Any]:
        return {**self.source.facts, "parameters": self.parameters}

    def extra_state(self) -> dict[str, Any]:
        return {"tokenizer": self.source.facts["tokenizer"]["fingerprint"]}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        fingerprint = self.source.facts["tokenizer"]["fingerprint"]
        require(
            state["tokenizer"] == fingerprint,
            f"{self.run.path} was begun with another tokenizer (fingerprint {state['tokenizer']}); "
            f"{self.config.tokenizer} now has {fingerprint}. Put the tokenizer back, or choose another folder.",
        )

    def batches(self, done: int) -> Iterable[Batch | TokenBatch]:
        return self.source.training_batches(done, self.fabric.global_rank, self.fabric.world_size)

    def learn(self, step: int, batch: Batch | TokenBatch, logging: bool) -> dict[str, Any] | None:
        self.broken.add(getattr(batch, "broken", ()))
        measured = self.networks.learn(step, *self.source.tokens(batch, self.fabric.device))
        return {"weight_decay": self.networks.weight_decay, **self.mean(measured)} if logging else None

    def line_numbers(self, row: dict[str, Any]) -> dict[str, str]:
        bits = f"{row['loss'] / math.log(2):.2f}"
        return {measure("loss").title: f"{row['loss']:.3f}", measure("bits_per_token").title: bits}

    def measure(self, step: int) -> dict[str, Any]:
        with uncompiled(self.config.speed):
            (conditional, unconditional), images = self._validate()
        if self.fabric.is_global_zero:
            self.run.save_snapshot(step, position_loss=conditional, position_loss_unconditional=unconditional)
        loss, tokens = float(conditional.mean()), len(conditional)
        bits = loss / math.log(2)
        return {
            "validation_loss": loss,
            "validation_loss_unconditional": float(unconditional.mean()),
            "validation_bits_per_token": bits,
            "validation_bits_per_pixel": bits * tokens / self.config.data.image_size**2,
            "validation_tokens": images * tokens,
            "validation_images": images,
        }

    @cached_property
    def _validation_tokens(self) -> list[Tokens]:
        """This process's share of the validation images, on its device."""
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        tokens = []
        for batch in self.source.validation_batches(rank, world_size):
            self.broken.add(getattr(batch, "broken", ()))
            if len(batch.labels):
                tokens.append(self.source.tokens(batch, self.fabric.device))
        return tokens

    def _validate(self) -> tuple[Float[Tensor, "2 T"], int]:
        """Nats per token at each position, with the class and without, and how many validation images were seen."""
        tokens, null = self.config.generator.num_tokens, self.config.generator.num_classes
        device = self.fabric.device
        sums = torch.zeros(2, tokens, dtype=torch.float64, device=device)  # (2, T): with the class, without
        seen = torch.zeros(1, dtype=torch.int64, device=device)
        nothing = torch.zeros(1, tokens, dtype=torch.int64, device=device), torch.zeros_like(seen)
        rounds = self.fabric.all_gather(torch.tensor(len(self._validation_tokens), device=device)).max()
        for number in range(int(rounds)):
            # In shards, a process that has nothing left to look at still lends its pieces to the others.
            spare = number >= len(self._validation_tokens)
            indices, labels = nothing if spare else self._validation_tokens[number]
            for row, condition in enumerate((labels, torch.full_like(labels, null))):
                sums[row] += (not spare) * self.networks.evaluate(indices, condition).double().sum(0)
            seen += 0 if spare else len(indices)
        images = int(sum_over_processes(seen))
        require_images(images, self.broken.names)
        return (sum_over_processes(sums) / images).cpu(), images
