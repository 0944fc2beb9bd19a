"""What a tokenizer's training step costs in operations and memory, counted on tensors that have shapes but no contents.

Nothing is computed, and no formula of ours stands in for the program: the run's own networks and losses are called on
meta tensors while a counter looks at every convolution and matrix product, and a hook at every tensor that autograd
keeps. What autocast does to a GPU's tensors `meter` does to these, because torch's own does not know the meta device.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.base.recomputing import recompute
from ibqlab.costs import meter
from ibqlab.costs.meter import StepCost
from ibqlab.costs.shapes import ShapeMeter
from ibqlab.losses.gan_losses import DISCRIMINATOR_LOSS_FUNCTIONS, generator_loss
from ibqlab.losses.lpips_layer import layer_distance
from ibqlab.losses.tokenizer_loss import tokenizer_loss
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokenizer import Tokenizer, TokenizerOutput
from ibqlab.tokenizer.autoencoder import find_blocks
from ibqlab.tokenizer.discriminator import PatchDiscriminator

LPIPS_TAPS = {"vgg": ("vgg16", (3, 8, 15, 22, 29)), "alex": ("alexnet", (1, 4, 7, 9, 11))}
"""torchvision's name of the network, and the layers after which LPIPS compares."""


def count_tokenizer_step(config: TrainConfig) -> StepCost:
    """Parameters, operations and activations of a training step of a recipe.

    Operations are those of torch.utils.flop_counter: convolutions, matrix products and attention, forward and backward,
    a multiply-add counted as two; norms, activations and losses are left out. Counted are the tokenizer with its
    quantizer, the discriminator's three calls, LPIPS on both images, and, where the batch comes in parts, the extra
    reconstructions for the discriminator. Not counted: optimisers, averages, diagnostics, validation.
    Activations are what autograd keeps, each storage once, in the types of the recipe's precision; attention is taken
    as fused where the layout of its inputs allows that, and with speed.channels_last group normalisation as the kernel
    that a GPU has for it. With speed.activation_checkpointing the blocks' second pass
    counts among the operations, and what the largest block keeps meanwhile among the activations; what a compiler saves
    is not counted. Work space of kernels and of the quantizer's blocks comes on top. Both are counted with two and with
    three images; the rest follows, because they are linear in images.

    Memory of the state is, per learned number, a weight, a gradient, Adam's two averages and (where ema_decay is above
    0) an averaged weight, with several processes also the gradient's copy in the buckets that they exchange; frozen
    weights and buffers once.

    Args:
        config: of the run; its data and weight files are not looked at.
    Raises:
        ValueError: images that the tokenizer or the discriminator cannot take.
    Cost: seconds, no memory for the numbers.
    """
    with meter.tensors_without_contents(config.precision) as shapes:
        step, itemsize = _Step(config, shapes), torch.get_default_dtype().itemsize
        counts = (step.forward_operations, step.training_operations, step.activation_bytes)
        forward, training, activations = map(meter.fit_line, counts)
        parameters, frozen = step.parameters(), step.frozen_bytes()
    averages = 1 if config.ema_decay else 0
    buckets = 1 if config.processes > 1 else 0
    number = parameters.trained * itemsize
    return StepCost(
        parameters=parameters,
        forward=forward,
        training=training,
        activations=activations,
        state_bytes=number * (4 + averages + buckets) + frozen,
        checkpoint_bytes=number * (3 + averages),
    )


class _Step:
    """A recipe's networks as meta tensors, and the calls that one step makes on them."""

    def __init__(self, config: TrainConfig, shapes: ShapeMeter):
        self.config, self.shapes, self.size = config, shapes, config.data.image_size
        self.dtype = torch.get_default_dtype()
        self.tokenizer = self._build_tokenizer()
        self.tokenizer.latent_grid(self.size, self.size)
        for block in find_blocks(self.tokenizer) if config.speed.activation_checkpointing else ():
            recompute(block)
        self.discriminator = self.perceptual = None
        if config.loss.adversarial_weight:
            channels = config.tokenizer.autoencoder.in_channels
            self.discriminator = PatchDiscriminator(config.loss.discriminator, channels)
            self.discriminator.check_size(self.size, self.size)
        if config.loss.perceptual_weight:
            self.perceptual = Lpips(config.loss.perceptual_net)

    def parameters(self) -> meter.Parameters:
        """Learned numbers, part by part."""
        tokenizer, count = self.tokenizer, meter.count_parameters
        return meter.Parameters(
            encoder=count(tokenizer.encoder),
            decoder=count(tokenizer.decoder),
            codebook=count(tokenizer.quantizer),
            convolutions=count(tokenizer.quant_conv) + count(tokenizer.post_quant_conv),
            discriminator=count(self.discriminator),
            perceptual=count(self.perceptual),
        )

    def frozen_bytes(self) -> int:
        """Bytes of buffers and of frozen weights."""
        frozen = [buffer for network in self._networks() for buffer in network.buffers()]
        frozen += [p for network in self._networks() for p in network.parameters() if not p.requires_grad]
        return sum(tensor.nbytes for tensor in frozen)

    def forward_operations(self, images: int) -> int:
        """Operations from images to reconstructions in evaluation."""
        self.tokenizer.eval()
        before = self.shapes.operations
        with torch.no_grad():
            self.tokenizer(self._images(images))
        self.tokenizer.train()
        return self.shapes.operations - before

    def training_operations(self, images: int) -> int:
        """Operations of a training step, forward and backward."""
        pictures, adversary = self._images(images), self.config.loss
        before = self.shapes.operations
        with self.tokenizer.quantizer.without_upkeep():
            out = self.tokenizer(pictures)
            if self.discriminator:
                self._discriminate(pictures, out.reconstruction.detach()).backward()
                if adversary.discriminator_first and self.config.accumulate > 1:
                    with torch.no_grad():
                        self.tokenizer(pictures)
            self._loss(pictures, out).backward()
        return self.shapes.operations - before

    def activation_bytes(self, images: int) -> int:
        """The tokenizer's, and the most of those of the discriminator's step, the losses, or a block computed again."""
        pictures, known = self._images(images), meter.storages_of(self._networks())
        mixed = self.config.precision == "bf16-mixed"
        tokenizer = meter.SavedTensors(known)
        with self.tokenizer.quantizer.without_upkeep(), tokenizer.watching(), meter.cuda_precision(mixed):
            out = self.tokenizer(pictures)
        learning, losses = (meter.SavedTensors(known | tokenizer.storages.keys()) for _ in range(2))
        if self.discriminator:
            with learning.watching(), meter.cuda_precision(mixed):
                self._discriminate(pictures, out.reconstruction.detach())
        with losses.watching():
            self._loss(pictures, out, partial(meter.cuda_precision, mixed))
        again = self._largest_block(pictures) if self.config.speed.activation_checkpointing else 0
        return tokenizer.bytes + max(learning.bytes, losses.bytes, again)

    def _largest_block(self, pictures: Tensor) -> int:
        tokenizer = self._build_tokenizer()
        mixed = self.config.precision == "bf16-mixed"
        with tokenizer.quantizer.without_upkeep():
            return meter.largest_block_bytes(tokenizer, find_blocks(tokenizer), lambda: tokenizer(pictures), mixed)

    def _build_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_config(self.config.tokenizer).to(memory_format=self.config.speed.memory_format)

    def _networks(self) -> list[nn.Module]:
        return [network for network in (self.tokenizer, self.discriminator, self.perceptual) if network]

    def _images(self, count: int) -> Tensor:
        channels = self.config.tokenizer.autoencoder.in_channels
        images = torch.empty(count, channels, self.size, self.size, dtype=self.dtype)
        return images.to(memory_format=self.config.speed.memory_format)

    def _discriminate(self, pictures: Tensor, rebuilt: Tensor) -> Tensor:
        """The discriminator's loss on images and reconstructions."""
        real, fake = self.discriminator(pictures), self.discriminator(rebuilt)
        return DISCRIMINATOR_LOSS_FUNCTIONS[self.config.loss.discriminator_loss](
            real.to(self.dtype), fake.to(self.dtype)
        )

    def _loss(self, pictures: Tensor, out: TokenizerOutput, precision: Callable = nullcontext) -> Tensor:
        """The tokenizer's loss, the networks that judge it in the run's precision."""

        def judge(rebuilt: Tensor) -> Tensor:
            self.discriminator.requires_grad_(False)
            with precision():
                logits = self.discriminator(rebuilt)
            self.discriminator.requires_grad_(True)
            return generator_loss(logits.to(self.dtype))

        def perceive(images: Tensor, rebuilt: Tensor) -> Tensor:
            with precision():
                return self.perceptual(images, rebuilt).to(self.dtype)

        loss, _ = tokenizer_loss(
            self.config.loss,
            pictures,
            out,
            perceptual=perceive if self.perceptual else None,
            judge=judge if self.discriminator else None,
            last_layer=self.tokenizer.decoder.last_layer,
        )
        return loss


class Lpips(nn.Module):
    """LPIPS as its package computes it, frozen, with fresh weights: good for counting and timing alone."""

    def __init__(self, net: str = "vgg"):
        import torchvision  # noqa: PLC0415 - a second, needed only where LPIPS is on

        super().__init__()
        name, self.taps = LPIPS_TAPS[net]
        self.trunk = getattr(torchvision.models, name)(weights=None).features[: self.taps[-1] + 1]
        convolutions = [(number, layer) for number, layer in enumerate(self.trunk) if isinstance(layer, nn.Conv2d)]
        widths = [max((n, c.out_channels) for n, c in convolutions if n < tap)[1] for tap in self.taps]
        self.layers = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.requires_grad_(False)

    def forward(self, images: Float[Tensor, "B 3 H W"], rebuilt: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """One distance per image."""
        pairs = zip(self._features(images), self._features(rebuilt), self.layers, strict=True)
        return sum(layer_distance(left, right, layer.weight) for left, right, layer in pairs).flatten()

    def _features(self, images: Tensor) -> list[Tensor]:
        features = []
        for number, layer in enumerate(self.trunk):
            images = layer(images)
            if number in self.taps:
                features.append(images)
        return features
