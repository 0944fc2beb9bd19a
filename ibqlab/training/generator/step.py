"""One step of a generator's training: gradients of the loss, clipped, and AdamW on its schedule; whole or in shards.

Sharded (torch's fully sharded data parallel), every process holds one piece of each weight, gradient and average, and
gathers a block's weights when it is the block's turn. The numbers are those of plain data parallel training.

What sharding needs of torch costs a second to import, so it is imported where it is used.
"""

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.generator import AnyGenerator
from ibqlab.losses.errors import NonFinite, anywhere_nonfinite
from ibqlab.losses.next_token_loss import NextTokenLoss
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.training.optimisation import (
    build_generator_optimizer,
    generator_learning_rate_at,
    generator_weight_decay_at,
    named_moments,
)
from ibqlab.training.speed import many_graphs, prepare_generator, shard

LOSS = "the loss or its gradient, here or on another process,"
"""What is not finite where all weights are."""


class GeneratorStep:
    """A generator with its optimiser.

    Args:
        config: of the run.
        generator: as it starts, on the CPU.
        fabric: the run's Fabric.
    """

    def __init__(self, config: GeneratorTrainConfig, generator: AnyGenerator, fabric: Any) -> None:
        self.config, self.fabric, self.sharded = config, fabric, config.speed.sharded
        prepare_generator(config.speed, generator)
        self.generator, module = generator, NextTokenLoss(generator)
        if self.sharded:
            self.model = shard(module.to(fabric.device))
            self.optimizer = build_generator_optimizer(module, config.optimizer)
        else:
            self.model, self.optimizer = fabric.setup(module, build_generator_optimizer(module, config.optimizer))
        self.learning_rate = self.weight_decay = 0.0
        """Of the last step."""

    def learn(self, step: int, indices: Int[Tensor, "B T"], labels: Int[Tensor, " B"]) -> dict[str, Float[Tensor, ""]]:
        """The generator learns from a batch.

        Args:
            step: number of the step, from 1.
            indices: this process's share of the batch, on its device.
            labels: likewise.
        Returns:
            The loss in nats per token, and the length of the gradient before it was clipped.
        Raises:
            NonFinite: one of them is NaN or infinite; nothing has learned from it.
        """
        self._set_rates(step)
        parts = list(zip(indices.chunk(self.config.accumulate), labels.chunk(self.config.accumulate), strict=True))
        with many_graphs(self.config.speed):
            loss = sum(self._backward(*part, last=number == len(parts)) for number, part in enumerate(parts, start=1))
        longest = self.config.optimizer.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.generator.parameters(), longest)  # its length before it is scaled down
        norm = norm.full_tensor() if self.sharded else norm
        if anywhere_nonfinite(loss + norm):
            culprits = (name for name, value in self.tensors().items() if not torch.isfinite(value).all())
            raise NonFinite(next(culprits, LOSS))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss, "gradient_norm": norm}

    def evaluate(self, indices: Int[Tensor, "B T"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B T"]:
        """Losses of all tokens without dropout, nats; under sharding all processes call it at the same time."""
        self.generator.eval()
        try:
            with torch.no_grad(), self.fabric.autocast():
                return self.model(indices, labels, reduction="none")
        finally:
            self.generator.train()

    def tensors(self) -> dict[str, Tensor]:
        """All learned tensors and Adam's averages with names for error messages; this process's pieces of them."""
        state = {f"the weight {name!r}": value for name, value in self.generator.named_parameters()}
        state |= named_moments(self.generator, self.optimizer)
        return {name: value.to_local() if hasattr(value, "to_local") else value for name, value in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; whole weights, also where they are in pieces. Every process calls it."""
        if not self.sharded:
            return {"model": self.generator.state_dict(), "optimizer": self.optimizer.state_dict()}
        import torch.distributed.checkpoint.state_dict as whole_states  # noqa: PLC0415

        whole = whole_states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            "model": whole_states.get_model_state_dict(self.generator, options=whole),
            "optimizer": whole_states.get_optimizer_state_dict(self.model, self.optimizer, options=whole),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if not self.sharded:
            self.generator.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            return
        import torch.distributed.checkpoint.state_dict as whole_states  # noqa: PLC0415

        whole = whole_states.StateDictOptions(full_state_dict=True)
        whole_states.set_model_state_dict(self.generator, state["model"], options=whole)
        whole_states.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=whole)

    def _backward(self, indices: Tensor, labels: Tensor, last: bool) -> Tensor:
        """Gradients of one part of the batch; processes exchange them after the last. Its share of the loss."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        waiting = nullcontext() if self.sharded else self.fabric.no_backward_sync(self.model, enabled=not last)
        with waiting:
            with self.fabric.autocast():
                loss = self.model(indices, labels) / self.config.accumulate
            loss.backward() if self.sharded else self.fabric.backward(loss)
        return loss.detach()

    def _set_rates(self, step: int) -> None:
        config = self.config.optimizer
        self.learning_rate = generator_learning_rate_at(step, self.config.steps, config)
        self.weight_decay = generator_weight_decay_at(step, self.config.steps, config)
        matrices, flat = self.optimizer.param_groups
        matrices |= {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        flat |= {"lr": self.learning_rate, "weight_decay": self.weight_decay if config.decay_norms else 0.0}
