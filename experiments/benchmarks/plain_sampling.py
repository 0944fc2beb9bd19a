"""Sampling as it is written when nothing is done for speed: what `sampling.py` measures against.

A cache of full length with a mask over all positions, two passes per token for the class and for none, and the class's
gates, scales and shifts computed again in every block of every pass. Draws the tokens that `Generator.sample` draws.
"""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.generator import Generator, SamplingConfig
from ibqlab.generator.attention import rotate
from ibqlab.generator.sequence import position_table
from ibqlab.generator.token_choice import choose_tokens, guide, uniform_numbers


class PlainPass:
    """One pass after another through all blocks, for one set of labels."""

    def __init__(self, generator: Generator, labels: Int[Tensor, " B"]) -> None:
        self.generator, self.labels, config = generator, labels, generator.config
        weight = generator.head.weight
        shape = (config.depth, 2, len(labels), config.num_heads, config.num_tokens, config.head_dim)
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.table = position_table(config, weight, config.num_tokens)

    def logits(self, place: int, tokens: Int[Tensor, " B"] | None) -> Tensor:
        """Scores (B, V) of the token at a place, given the one before it."""
        model = self.generator
        condition = model.class_emb(self.labels)
        x = condition if tokens is None else model.tok_emb(tokens)[:, None]
        mask = torch.arange(len(self.table), device=x.device)[None, None, None] <= place
        for number, block in enumerate(model.blocks):
            gate1, gate2, scale1, scale2, shift1, shift2 = block.ada_lin(condition).chunk(6, dim=-1)
            mixed = self._attend(block.attention, block.attention_norm(x) * (1 + scale1) + shift1, number, place, mask)
            x = x + gate1 * mixed
            x = x + gate2 * block.feed_forward(block.ffn_norm(x) * (1 + scale2) + shift2)
        return model.head(model.head_nm(x, condition))[:, 0]

    def _attend(self, attention: torch.nn.Module, x: Tensor, number: int, place: int, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (attention.num_heads, -1)) for part in attention.wqkv(x).chunk(3, dim=-1))
        row = self.table[place : place + 1]
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, row), rotate(k, row), v))
        keys, values = self.cache[number]
        keys[:, :, place : place + 1] = k
        values[:, :, place : place + 1] = v
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return attention.wo(mixed.transpose(1, 2).flatten(-2))


@torch.no_grad()
def sample_plainly(
    generator: Generator, labels: Int[Tensor, " B"], config: SamplingConfig, positions: int, seed: int = 0
) -> Int[Tensor, "B n"]:
    """The first tokens of images.

    Args:
        generator: in eval mode.
        labels: classes, on its device.
        config: how to draw.
        positions: n, how many tokens.
        seed: image i is drawn by seed + i.
    """
    most = generator.config.num_tokens
    numbers = uniform_numbers(len(labels), most, seed).to(labels.device)
    given = PlainPass(generator, labels)
    null = PlainPass(generator, torch.full_like(labels, generator.config.num_classes))
    tokens: list[Tensor] = []
    for place in range(positions):
        before = tokens[-1] if tokens else None
        logits = guide(given.logits(place, before), null.logits(place, before), config.scale_at(place, most))
        tokens.append(choose_tokens(logits, numbers[:, place], config))
    return torch.stack(tokens, dim=1)
