"""The generators over a tokenizer's tokens: one token after another, given a class.

A generator learns what images look like as sequences of codes; a new image is drawn code by code and then decoded by
the tokenizer. Three published transformers are here, those of IBQ and LlamaGen (`transformer`) and that of Open-MAGVIT2
(`factorized`). Start with `transformer`, then `layers` and `attention`. `sampling` draws images: on a CPU by its plain
loop, with `decoding` as the loop's memory, and on a GPU by `sampler`, one recorded call per token.

    from ibqlab.generator import Generator, GeneratorConfig
    generator = Generator(GeneratorConfig.preset("B"))
    loss = generator.loss(indices, labels)       # indices (B, T) of a tokenizer, labels (B,)

What is unusual: the vocabulary is the codebook, up to 262,144 tokens, so the logits of one batch would be the largest
tensor of a training step. `loss` does without them (`linear_cross_entropy`); Open-MAGVIT2's generator, beside IBQ's
here, has two small vocabularies instead.
"""

from ibqlab.generator.cross_entropy import linear_cross_entropy
from ibqlab.generator.factorized import FactorizedGenerator, FactorizedGeneratorConfig, FactorizedLogits
from ibqlab.generator.sampling_config import SamplingConfig
from ibqlab.generator.sequence import SequenceConfig, generator_config
from ibqlab.generator.transformer import Generator, GeneratorConfig, LlamaGenConfig

AnyGenerator = Generator | FactorizedGenerator


def make_generator(config: SequenceConfig) -> AnyGenerator:
    """The generator that a config describes, its weights drawn from torch's global random state."""
    return Generator(config) if isinstance(config, GeneratorConfig | LlamaGenConfig) else FactorizedGenerator(config)


__all__ = [
    "AnyGenerator",
    "FactorizedGenerator",
    "FactorizedGeneratorConfig",
    "FactorizedLogits",
    "Generator",
    "GeneratorConfig",
    "LlamaGenConfig",
    "SamplingConfig",
    "SequenceConfig",
    "generator_config",
    "linear_cross_entropy",
    "make_generator",
]
