"""What a generator's recipe costs, before anything is paid for; see `planning` for tokenizers and for time and price.

Counted on tensors that have shapes but no contents: the run's own generator and its loss are called on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ibqlab.base.names import BUILT_IN
from ibqlab.base.recomputing import recompute
from ibqlab.config import load_yaml, parse
from ibqlab.costs.meter import (
    Kept,
    count_parameters,
    counting,
    cuda_precision,
    default_dtype,
    fit_line,
    storages_of,
)
from ibqlab.costs.step_cost import weight_dtype
from ibqlab.costs.tokenizer_cost import IMAGENET_IMAGES, Plan, RunPlan, gibi, giga, plan_tokenizer
from ibqlab.generator import Generator, make_generator
from ibqlab.generator.layers import Block
from ibqlab.losses.next_token_loss import NextTokenLoss
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.recipes.recipe_files import EXPERIMENTS, find_recipe, published_row, recipe_config, recipe_name
from ibqlab.runs.checkpoints import CHECKPOINTS_KEPT

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class PublishedGeneration:
    """What a paper printed for the generator of a recipe, on ImageNet's classes at 256 pixels."""

    table: str
    """Where it stands."""
    gfid: float
    """Fréchet Inception distance of 50,000 samples from ADM's reference."""
    inception_score: float
    """Of the same samples."""
    precision: float | None = None
    """Share of samples near a reference image, 0 to 1. None: not printed."""
    recall: float | None = None
    """Share of reference images near a sample, 0 to 1. None: not printed."""
    source: str
    """The paper."""
    remarks: str = ""
    """What is odd about the row."""

    def describe(self) -> str:
        """The numbers in one line."""
        shares = "" if self.precision is None else f", precision {self.precision:.2f}, recall {self.recall:.2f}"
        return f"gFID {self.gfid:.2f}, IS {self.inception_score:.2f}{shares} ({self.source}, {self.table})"


def published_generations(folder: Path = EXPERIMENTS) -> dict[str, PublishedGeneration]:
    """The published numbers of generators by recipe name, from experiments/published/generators.yaml.

    Raises:
        ConfigError: an entry that is no `PublishedGeneration`; the message names it.
    """
    file = folder / "published" / "generators.yaml"
    return {
        name: parse(PublishedGeneration, row, source=f"{file.name}, {name}") for name, row in load_yaml(file).items()
    }


def published_generation(recipe: str) -> PublishedGeneration | None:
    """What was published for a recipe, given as a path or a name under experiments/; None for recipes of our own.

    Raises:
        ConfigError: no such recipe.
    """
    return published_generations().get(recipe_name(find_recipe(recipe)))


class GeneratorParameters(NamedTuple):
    """Learned numbers, part by part."""

    embeddings: int
    """Of tokens and classes."""
    blocks: int
    head: int
    """With its norm."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class GeneratorPlan(RunPlan):
    """The cost of a generator's recipe in everything but time. Operations count a multiply-add as two.

    Forward is to the loss: about what an image costs to sample without guidance. The tokenizer's operations and memory
    come on top, unless its tokens are stored. Activations include the gradients that the loss makes ahead.
    """

    published: PublishedGeneration | None
    """The numbers that a paper printed for it; None for recipes of our own."""
    parameters: GeneratorParameters
    """Learned numbers, part by part."""
    cache_bytes: int
    """Keys and values of one image while it is sampled, float32; guidance needs twice that."""

    def describe(self) -> str:
        """The plan as lines for people."""
        counted = "\n".join(f"  {name:<23}{value:>14,}" for name, value in self.parameters._asdict().items())
        epochs = "" if self.epochs is None else f" = {self.epochs:,.1f} × ImageNet's {IMAGENET_IMAGES:,}"
        published = f"published: {self.published.describe()}" if self.published else "published: nothing"
        remarks = f"\n  {self.published.remarks}" if self.published and self.published.remarks else ""
        return (
            f"{self.name}\n{published}{remarks}\n"
            f"parameters\n{counted}\n  {'generator, all':<23}{self.parameters.total:>14,}\n"
            f"tokens per image: {self.tokens_per_image:,}\n"
            "operations per image (multiply-add = 2; matrix products and attention; the tokenizer's come on top)\n"
            f"  loss                   {giga(self.forward_operations):>16}\n"
            f"  training step          {giga(self.training_operations):>16}\n"
            "memory of one process (the tokenizer and kernels' work space come on top)\n"
            f"  weights, gradients, Adam{gibi(self.state_bytes):>22}\n"
            f"  for the backward pass{gibi(self.activations.of(self.images_at_once)):>25}, {self.images_at_once} "
            f"images at {gibi(self.activations.per_image)} each and {gibi(self.activations.fixed)} whatever their "
            "number\n"
            f"  together{gibi(self.memory_bytes):>38}\n"
            f"sampling: {gibi(self.cache_bytes)} of keys and values per image, twice that with guidance\n"
            f"training: {self.steps:,} steps, {self.images:,} images{epochs}; processes: {self.processes}\n"
            f"disk: {gibi(self.checkpoint_bytes)} per checkpoint, of which a run keeps {CHECKPOINTS_KEPT}; the "
            "tokenizer, snapshots and metrics come on top"
        )


AnyPlan = Plan | GeneratorPlan


def plan_recipe(name: str, assignments: Sequence[str] = ()) -> AnyPlan:
    """The plan of a recipe of either kind.

    Args:
        name: path, or name under experiments/.
        assignments: keys to replace, as typed on a command line.
    Raises:
        ConfigError: no such recipe, or settings that do not fit it.
        ValueError: an image size that the networks cannot take.
    """
    config, named = recipe_config(name, assignments=assignments), recipe_name(Path(name))
    if isinstance(config, GeneratorTrainConfig):
        return plan_generator(config, named, published_generation(name))
    return plan_tokenizer(config, named, published_row(name))


def plan_generator(
    config: GeneratorTrainConfig, name: str = "", published: PublishedGeneration | None = None
) -> GeneratorPlan:
    """Count what a generator's recipe costs; neither tokenizer nor data need to be there.

    Memory of the state is, per learned number, a weight, a gradient and Adam's two averages, divided by the processes
    where the weights are sharded, else with several processes also the gradient's copy in the buckets that they
    exchange. Attention is counted over the whole sequence, as kernels without knowledge of the mask do it.

    Args:
        config: of the run.
        name: of the recipe, for tables.
        published: what a paper printed for it.
    Cost: seconds; the numbers of the networks take no memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415 - a second, needed only here

    item = weight_dtype(config).itemsize
    at_once = config.batch_size // (config.processes * config.accumulate)
    with FakeTensorMode(), default_dtype(weight_dtype(config)):
        step = _Step(config)
        parameters = step.parameters()
        # A single image's tokens are a view that no fused attention takes, so two are counted.
        forward, training = step.forward_operations(2) // 2, step.training_operations(2) // 2
        activations = fit_line(step.activation_bytes)
    copies = 4 if config.speed.sharded or config.processes == 1 else 5
    shards = config.processes if config.speed.sharded else 1
    images = config.steps * config.batch_size
    return GeneratorPlan(
        name=name,
        published=published,
        parameters=parameters,
        tokens_per_image=config.generator.num_tokens,
        forward_operations=forward,
        training_operations=training,
        state_bytes=parameters.total * item * copies // shards,
        activations=activations,
        cache_bytes=2 * 4 * step.spatial_blocks * config.generator.num_tokens * config.generator.width,
        images_at_once=at_once,
        steps=config.steps,
        images=images,
        epochs=None if config.data.source in BUILT_IN else images / IMAGENET_IMAGES,
        processes=config.processes,
        accelerator=config.accelerator,
        checkpoint_bytes=parameters.total * item * 3,
    )


class _Step:
    """A recipe's generator as fake tensors, and the calls that one step makes on it."""

    def __init__(self, config: GeneratorTrainConfig):
        self.config = config
        self.generator = make_generator(config.generator)
        self.blocks = [block for block in self.generator.modules() if isinstance(block, Block)]
        for block in self.blocks if config.speed.activation_checkpointing else ():
            recompute(block)
        plain = isinstance(self.generator, Generator)
        self.spatial_blocks = len(self.generator.blocks if plain else self.generator.spatial_blocks)
        self.model = NextTokenLoss(self.generator)

    def parameters(self) -> GeneratorParameters:
        """Learned numbers, part by part."""
        model, count = self.generator, count_parameters
        embeddings = (model.tok_emb,) if isinstance(model, Generator) else (model.pre_emb, model.post_emb)
        embedded = sum(map(count, (*embeddings, model.class_emb)))
        blocks = sum(map(count, self.blocks))
        return GeneratorParameters(embedded, blocks, count(model) - embedded - blocks)

    def forward_operations(self, images: int) -> int:
        """Operations for the loss, without gradients."""
        with counting() as counter, torch.no_grad():
            self.model(*self._tokens(images))
        return counter.get_total_flops()

    def training_operations(self, images: int) -> int:
        """Operations of a training step, forward and backward."""
        with counting() as counter:
            self.model(*self._tokens(images)).backward()
        return counter.get_total_flops()

    def activation_bytes(self, images: int) -> int:
        """What autograd keeps, the gradients that the loss makes ahead, and a block that is computed again."""
        known = storages_of([self.generator])
        kept = Kept(known)
        with kept.watching(), cuda_precision(self.config.precision == "bf16-mixed"):
            self.model(*self._tokens(images))
        config, item = self.config.generator, torch.get_default_dtype().itemsize
        words = (
            config.vocabulary_size if isinstance(self.generator, Generator) else sum(2**bits for bits in config.bits)
        )
        parts = 1 if isinstance(self.generator, Generator) else 2
        ahead = (parts * images * config.num_tokens + words) * config.width * item
        return kept.bytes + ahead + (self._largest_block(images) if self.config.speed.activation_checkpointing else 0)

    def _largest_block(self, images: int) -> int:
        """Bytes that one block keeps for its backward pass: the largest of them."""
        model = make_generator(self.config.generator)
        kept, before, sizes = Kept(storages_of([model])), [], []
        for block in model.modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(lambda *_: before.append(kept.bytes))
                block.register_forward_hook(lambda *_: sizes.append(kept.bytes - before[-1]))
        with kept.watching(), cuda_precision(self.config.precision == "bf16-mixed"):
            model.loss(*self._tokens(images))
        return max(sizes)

    def _tokens(self, images: int) -> tuple[Tensor, Tensor]:
        indices = torch.zeros(images, self.config.generator.num_tokens, dtype=torch.int64)
        return indices, torch.zeros(images, dtype=torch.int64)


def generator_plan_table(plans: Sequence[GeneratorPlan]) -> "pd.DataFrame":
    """Plans as one row each.

    Returns:
        Columns: recipe; gfid, inception_score (published); parameters_m (millions); tokens; forward_gflop and
        training_gflop (10⁹ operations per image); image_gib (activations per image, GiB); memory_gib (one process,
        GiB); steps; epochs (of ImageNet); storage_gib (kept checkpoints).
    """
    import pandas as pd  # noqa: PLC0415 - keeps `import ibqlab.training` quick

    return pd.DataFrame([_table_row(plan) for plan in plans])


def _table_row(plan: GeneratorPlan) -> dict[str, str | float | int | None]:
    printed = plan.published
    return {
        "recipe": plan.name,
        "gfid": printed.gfid if printed else None,
        "inception_score": printed.inception_score if printed else None,
        "parameters_m": plan.parameters.total / 1e6,
        "tokens": plan.tokens_per_image,
        "forward_gflop": plan.forward_operations / 1e9,
        "training_gflop": plan.training_operations / 1e9,
        "image_gib": plan.activations.per_image / 2**30,
        "memory_gib": plan.memory_bytes / 2**30,
        "steps": plan.steps,
        "epochs": plan.epochs,
        "storage_gib": plan.storage_bytes / 2**30,
    }
