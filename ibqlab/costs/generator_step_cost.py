"""What a generator's training step costs, counted as in `tokenizer_step_cost`: on shapes, by the run's own program."""

import torch
from torch import Tensor

from ibqlab.base.recomputing import recompute
from ibqlab.costs import meter
from ibqlab.costs.meter import StepCost
from ibqlab.costs.shapes import ShapeMeter
from ibqlab.generator import Generator, make_generator
from ibqlab.generator.layers import Block
from ibqlab.losses.next_token_loss import NextTokenLoss
from ibqlab.recipes.generator_config import GeneratorTrainConfig


def count_generator_step(config: GeneratorTrainConfig) -> StepCost:
    """Parameters, operations and activations of a training step; neither tokenizer nor data need to be there.

    Forward is to the loss: about what an image costs to sample without guidance. The tokenizer's operations and memory
    come on top, unless its tokens are stored. Activations include the gradients that the loss makes ahead. Memory of
    the state is, per learned number, a weight, a gradient and Adam's two averages, divided by the processes where the
    weights are sharded, else with several processes also the gradient's copy in the buckets that they exchange.
    Attention is counted over the whole sequence, as kernels without knowledge of the mask do it.

    Args:
        config: of the run.
    Cost: seconds; the numbers of the networks take no memory.
    """
    with meter.tensors_without_contents(config.precision) as shapes:
        step, itemsize = _Step(config, shapes), torch.get_default_dtype().itemsize
        parameters = step.parameters()
        # A single image's tokens are a view that no fused attention takes, so two are counted.
        forward, training = step.forward_operations(2) // 2, step.training_operations(2) // 2
        activations = meter.fit_line(step.activation_bytes)
    copies = 4 if config.speed.sharded or config.processes == 1 else 5
    shards = config.processes if config.speed.sharded else 1
    return StepCost(
        parameters=parameters,
        forward=meter.LinearCost(0, forward),
        training=meter.LinearCost(0, training),
        activations=activations,
        state_bytes=parameters.total * itemsize * copies // shards,
        checkpoint_bytes=parameters.total * itemsize * 3,
        cache_bytes=2 * 4 * step.spatial_blocks * config.generator.num_tokens * config.generator.width,
    )


class _Step:
    """A recipe's generator as meta tensors, and the calls that one step makes on it."""

    def __init__(self, config: GeneratorTrainConfig, shapes: ShapeMeter):
        self.config, self.shapes = config, shapes
        self.generator = make_generator(config.generator)
        self.blocks = [block for block in self.generator.modules() if isinstance(block, Block)]
        for block in self.blocks if config.speed.activation_checkpointing else ():
            recompute(block)
        plain = isinstance(self.generator, Generator)
        self.spatial_blocks = len(self.generator.blocks if plain else self.generator.spatial_blocks)
        self.model = NextTokenLoss(self.generator)

    def parameters(self) -> meter.Parameters:
        """Learned numbers, part by part."""
        model, count = self.generator, meter.count_parameters
        embeddings = (model.tok_emb,) if isinstance(model, Generator) else (model.pre_emb, model.post_emb)
        embedded = sum(map(count, (*embeddings, model.class_emb)))
        blocks = sum(map(count, self.blocks))
        return meter.Parameters(embeddings=embedded, blocks=blocks, head=count(model) - embedded - blocks)

    def forward_operations(self, images: int) -> int:
        """Operations for the loss, without gradients."""
        before = self.shapes.operations
        with torch.no_grad():
            self.model(*self._tokens(images))
        return self.shapes.operations - before

    def training_operations(self, images: int) -> int:
        """Operations of a training step, forward and backward."""
        before = self.shapes.operations
        self.model(*self._tokens(images)).backward()
        return self.shapes.operations - before

    def activation_bytes(self, images: int) -> int:
        """What autograd keeps, the gradients that the loss makes ahead, and a block that is computed again."""
        saved = meter.SavedTensors(meter.storages_of([self.generator]))
        with saved.watching(), meter.cuda_precision(self.config.precision == "bf16-mixed"):
            self.model(*self._tokens(images))
        config, item = self.config.generator, torch.get_default_dtype().itemsize
        words = (
            config.vocabulary_size if isinstance(self.generator, Generator) else sum(2**bits for bits in config.bits)
        )
        parts = 1 if isinstance(self.generator, Generator) else 2
        ahead = (parts * images * config.num_tokens + words) * config.width * item
        again = self._largest_block(images) if self.config.speed.activation_checkpointing else 0
        return saved.bytes + ahead + again

    def _largest_block(self, images: int) -> int:
        model = make_generator(self.config.generator)
        blocks = [block for block in model.modules() if isinstance(block, Block)]
        mixed = self.config.precision == "bf16-mixed"
        return meter.largest_block_bytes(model, blocks, lambda: model.loss(*self._tokens(images)), mixed)

    def _tokens(self, images: int) -> tuple[Tensor, Tensor]:
        indices = torch.zeros(images, self.config.generator.num_tokens, dtype=torch.int64)
        return indices, torch.zeros(images, dtype=torch.int64)
