"""The generator over a tokenizer's tokens, so far its loss.

    from ibqlab.generator import linear_cross_entropy
    loss = linear_cross_entropy(hidden, head.weight, targets)    # instead of cross_entropy(head(hidden), targets)

What is unusual: the vocabulary is the codebook, up to 262,144 tokens, so the logits of one batch would be the largest
tensor of a training step. They are never written out.
"""

from ibqlab.generator.cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
