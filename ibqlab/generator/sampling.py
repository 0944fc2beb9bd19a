"""What the generators share: the loss of given tokens, and images drawn token by token.

Images are drawn in one of two ways. The plain loop here computes one position after another as PyTorch runs it, with
caches that grow; it is what a CPU does. `sampler` does all of a position in one recorded call; it is what a GPU does,
and both give the same tokens. Shape letters: B images · T sequence · V vocabulary.
"""

from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import require, require_choice
from ibqlab.base.progress import track_items
from ibqlab.generator.cross_entropy import linear_cross_entropy
from ibqlab.generator.decoding import TokenDecoding
from ibqlab.generator.kept_samplers import draw_with_sampler, forget_sampler
from ibqlab.generator.sampler import Request
from ibqlab.generator.sampler_network import SamplerNetwork
from ibqlab.generator.sampling_config import SamplingConfig, setting_pair
from ibqlab.generator.sampling_dtype import sampling_dtype
from ibqlab.generator.sequence import check_inputs, check_labels
from ibqlab.generator.token_choice import Seed, choose_tokens, guide, refuse_broken, uniform_numbers
from ibqlab.quantizers.indices import indices_in_memory, to_indices

Prediction = tuple[Float[Tensor, "B T C"], nn.Linear, Int[Tensor, "B T"]]
"""Hidden states, the head that multiplies them, and the tokens, or parts of tokens, that it predicts."""


class TokenGenerator(nn.Module):
    """What the generators share: the loss of given tokens, and images drawn one token after another.

    A subclass has its settings in `config`, in `class_emb` and `dropout` what its `decoding` starts from, and in
    `hidden_states` and `predictions` what its loss is made of.
    """

    decoding: ClassVar[type[TokenDecoding]]
    """How the plain loop goes from one position to the next."""
    network: ClassVar[type[SamplerNetwork]]
    """How a recorded step does."""

    def train(self, mode: bool = True) -> "TokenGenerator":
        """Training mode, or eval mode; training frees the memory that sampling keeps between calls."""
        if mode:
            forget_sampler(self)
        return super().train(mode)

    def loss(
        self, indices: Int[Tensor, "B T"], labels: Int[Tensor, " B"], *, reduction: Literal["mean", "none"] = "mean"
    ) -> Float[Tensor, ""] | Float[Tensor, "B T"]:
        """Cross-entropy of all tokens, without the logits: their mean, or one per token.

        In nats per token: ln V for no idea at all, where training starts. No label smoothing, as published. A token of
        two parts costs the sum of both, which is comparable with that of another generator over the same V tokens.

        Args:
            indices, labels: as in `forward`.
            reduction: "mean" or "none".
        Raises:
            ValueError: as in `forward`.
        Cost: that of `hidden_states`, and of `linear_cross_entropy`.
        """
        indices = to_indices(indices, device=next(self.parameters()).device)
        hidden = self.hidden_states(indices, labels)
        losses = [
            linear_cross_entropy(states, head.weight, tokens, reduction=reduction)
            for states, head, tokens in self.predictions(hidden, indices)
        ]
        return sum(losses[1:], losses[0])

    def sample(
        self,
        labels: Int[Tensor, " B"],
        *,
        seed: Seed = 0,
        prompt: Int[Tensor, "B P"] | None = None,
        compiled: bool | None = None,
        dtype: torch.dtype | str | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Int[Tensor, "B T"]:
        """New images' tokens, drawn one position after another; dropouts are off meanwhile.

            tokens = generator.sample(labels, cfg_scale=2.25, temperature=1.1, top_k=0, top_p=1.0, seed=0)

        Args:
            labels: classes, 0 to num_classes − 1, or num_classes for none in particular.
            seed: the same seed, labels, settings and dtype give the same tokens, whatever the batch, but for rounding
                on another device and between float32 batches of the plain loop: image i is drawn by the seed `seed` +
                i, or by its own where one per image is given.
            prompt: tokens of the first positions, such as the first rows of an image.
            compiled: record the step of one position and play it: a CUDA graph on a GPU, where it is the default and
                the first call takes seconds; torch.compile on a CPU, where it pays off from some images on and the
                first call takes a minute.
            dtype: to draw in: "float32", "bfloat16", "float16", "float64", or torch's own. None or "auto": bfloat16 for
                float32 weights on a GPU, and the weights' type elsewhere.
            progress: show a bar over the tokens.
            **settings: fields of `SamplingConfig`: cfg_scale, cfg_schedule, cfg_power, cfg_interval, temperature,
                top_k, top_p, min_p. Guidance needs label_dropout in training and costs twice the time. Open-MAGVIT2's
                generator draws a token in two parts, and cfg_scale and temperature may be pairs for them.
        Returns:
            int64, T = grid_size²; `.view(B, grid_size, grid_size)` is what a tokenizer decodes.
        Raises:
            ValueError: labels, tokens or settings that do not fit; the message says what to type.
            SamplerMemoryError: the GPU has too little memory; the message names what to change.
        Cost: T passes of one position; 2·T·C numbers of memory per block and image, twice that with guidance. On a GPU
            memory for 64 images and a copy of the weights is kept until the generator trains or is gone.
        Source: published IBQ sampling code, which draws from torch's global random state instead.
        """
        setting_names = [field.name for field in fields(SamplingConfig)]
        for name in settings:
            require_choice("a setting of sample(…)", name, setting_names)
        config, sizes, device = SamplingConfig(**settings), self.config, next(self.parameters()).device
        labels = check_labels(indices_in_memory(labels, "labels"), sizes).to(device)
        if prompt is not None:
            prompt, most = to_indices(prompt, "prompt"), sizes.num_tokens - 1
            require(
                prompt.ndim == 2 and 1 <= prompt.shape[1] <= most,
                f"prompt must be (B, given) with 1 to {most} tokens given; got {tuple(prompt.shape)}. Use "
                "indices.flatten(1)[:, :rows * grid_size] for the first rows of images.",
            )
            prompt = check_inputs(prompt.to(device), labels, sizes, device)[0]
        for name in ("cfg_scale", "temperature"):
            pair = setting_pair(name, getattr(config, name))
            require(
                self.decoding.parts == 2 or pair[0] == pair[1],
                f"{name} must be one number for this generator, whose tokens have one part; got {pair}, which are for "
                "the two parts of Open-MAGVIT2's tokens.",
            )
        weights = next(self.parameters()).dtype
        dtype = sampling_dtype(dtype, weights, device)
        if compiled is None:
            compiled = device.type == "cuda"
        shape = len(labels), sizes.num_tokens, self.decoding.parts
        numbers = uniform_numbers(shape[0], shape[1] * shape[2], seed).view(shape)
        request = Request(config, labels, prompt, numbers, sizes.num_tokens)
        was_training = self.training
        self.eval()
        try:
            # Half types round so coarsely that every product must have the same rows in every batch.
            if compiled or dtype != weights or dtype.itemsize == 2:
                return draw_with_sampler(self, request, dtype, compiled=compiled, progress=progress)
            return self.sample_plainly(request, progress=progress)
        finally:
            self.train(was_training)

    @torch.no_grad()
    def sample_plainly(self, request: Request, *, progress: bool = False) -> Int[Tensor, "B n"]:
        """What `sample` does on a CPU: one position after another, in the weights' type and in eval mode.

        With guidance the classes and the null class go through the blocks as one batch; after the last guided position
        the null class is dropped, and without guidance it is never there.
        """
        config, labels, prompt = request.config, request.labels, request.prompt
        numbers = request.numbers.to(labels.device)
        images, positions, parts = numbers.shape
        tokens = [] if prompt is None else list(prompt.T)  # one (B,) per position
        first, scales, guided_positions = len(tokens), request.scales(), request.guided_positions()
        copies = 2 if guided_positions else 1
        null = torch.full_like(labels, self.config.num_classes)
        state = self.decoding(self, torch.cat([labels, null])[: copies * images])  # (2B,) when guided, else (B,)
        broken = torch.zeros_like(labels, dtype=torch.bool)  # looked at once at the end: each look waits for the GPU
        for position in track_items(range(first, positions), "sampling", "tokens", shown=progress):
            if copies == 2 and position == guided_positions:
                state.truncate(images)  # the null class is the second half of the batch
                copies = 1
            if position == first and tokens:
                state.prefill(torch.stack(tokens, dim=1).repeat(copies, 1))
            else:
                state.advance(tokens[-1].repeat(copies) if tokens else None)
            token_parts: list[Tensor] = []  # the parts of this token, (B,) each
            for part in range(parts):
                earlier_parts = [indices.repeat(copies) for indices in token_parts]
                logits = state.logits(earlier_parts)  # (B, V), or (2B, V) when guided
                if copies == 2:
                    logits = guide(*logits.chunk(2), scales[position][part])
                broken |= ~logits.amax(-1).isfinite()
                token_parts.append(choose_tokens(logits, numbers[:, position, part], config, part))
            tokens.append(state.join(token_parts))
        refuse_broken(broken)
        return torch.stack(tokens, dim=1)
