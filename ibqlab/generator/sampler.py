"""Images drawn by one recorded step per position: from the last token to the next one, all work in one call.

What is unusual: the number of images is fixed. The same seed gives the same token whatever the batch, and a matrix
product of another number of rows may add in another order; in bfloat16 that changes a token here and there. So every
product here has the same rows, larger batches come in portions and smaller ones leave lanes idle. That costs next to
nothing, because a step waits for weights, which it reads once for all rows. And it gives caches, weights and recordings
one shape, so that they are made once and kept. Letters as in `sampler_operations`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.kernels import kernels_run_on
from ibqlab.base.progress import track_items
from ibqlab.generator import sampler_operations
from ibqlab.generator.recording import Step, record
from ibqlab.generator.sampler_network import RowMemory, SamplerNetwork
from ibqlab.generator.sampler_operations import Drawing, DrawingForm
from ibqlab.generator.sampling_config import SamplingConfig
from ibqlab.generator.token_choice import LARGEST_NUMBER, refuse_broken
from ibqlab.quantizers.blocks import full_precision

LANES = 64
"""L on a GPU, images drawn at once: 128 rows under guidance, as many as a tile of a GPU's matrix product has."""
CPU_HALF_LANES = 4
"""L of half types on a CPU, where a product's time grows with its rows."""
MOST_RECORDINGS = 8
"""Kept of one sampler, which needs one or two for a set of filters; the oldest is dropped first."""
Recorder = Callable[[Step, torch.device, Step], Step]
"""`record`, or what stands in for it."""


class Request(NamedTuple):
    """Images to draw, checked: labels and prompt on the generator's device, numbers on any.

    There are numbers for n positions, those of the prompt among them: T, or fewer for the first rows of images alone.
    """

    config: SamplingConfig
    labels: Int[Tensor, " B"]
    prompt: Int[Tensor, "B P"] | None
    numbers: Float[Tensor, "B n parts"]
    num_tokens: int
    """T."""

    @property
    def prompt_length(self) -> int:
        """P, 0 without a prompt."""
        return 0 if self.prompt is None else self.prompt.shape[1]

    def scales(self) -> list[list[float]]:
        """Guidance of all T positions and their parts."""
        parts, scale_at = range(self.numbers.shape[2]), partial(self.config.scale_at, positions=self.num_tokens)
        return [[scale_at(position, part=part) for part in parts] for position in range(self.num_tokens)]

    def guided_positions(self) -> int:
        """Positions from the first one on in which the null class has to be computed.

        Its keys and values are needed from the beginning to the last guided position, and not at all where that lies
        in the prompt.
        """
        guided = [position for position, scales in enumerate(self.scales()) if any(scale != 1 for scale in scales)]
        last = max(guided, default=-1)
        return last + 1 if last >= self.prompt_length else 0

    def drawing_form(self) -> DrawingForm:
        """What of the draw is built into a recording."""
        config, parts = self.config, self.numbers.shape[2]
        greedy = tuple(config.temperature_of(part) == 0 for part in range(parts))
        return DrawingForm(greedy, config.top_k, config.top_p < 1, config.min_p > 0)


def lanes_for(dtype: torch.dtype, device: torch.device, images: int) -> int:
    """L for this many images.

    On a CPU wider types take the batch's own size: a product's time grows with its rows there, and its rounding in
    float32 hardly ever changes a token.
    """
    if device.type == "cuda":
        return LANES
    return CPU_HALF_LANES if dtype.itemsize == 2 else min(images, LANES)


class Sampler:
    """One generator's memory for drawing in one type: copies of its weights, caches, and recorded steps.

    Args:
        generator: only its shapes are looked at, and no reference to it is kept.
        dtype: to draw in.
        lanes: L.
        is_guided: whether there is room for the null class.
    Cost: the generator's weights once more, and 2·T·C numbers per block and row.
    """

    def __init__(self, generator: nn.Module, dtype: torch.dtype, lanes: int, *, is_guided: bool) -> None:
        self.lanes, self.is_guided, self.dtype = lanes, is_guided, dtype
        self.network: SamplerNetwork = generator.network(generator, dtype, (1 + is_guided) * lanes)
        self.null_class = generator.config.num_classes
        self.device, positions, parts = self.network.device, generator.config.num_tokens, self.network.parts
        zeros = partial(torch.zeros, device=self.device)
        wide = self.network.table.dtype
        self.drawing = Drawing(
            position=zeros(1, dtype=torch.int64),
            prompt_length=zeros(1, dtype=torch.int64),
            active=zeros(1, dtype=torch.int64),
            tokens=zeros(lanes, positions, dtype=torch.int64),
            numbers=zeros(lanes, positions, parts, dtype=torch.float64),
            scales=zeros(positions, parts, dtype=wide),
            temperatures=zeros(parts, dtype=wide),
            top_p=zeros(1, dtype=wide),
            log_min_p=zeros(1, dtype=wide),
            broken=zeros(lanes, dtype=torch.uint8),
        )
        self._recordings: dict[tuple[bool, DrawingForm, Recorder | None], Step] = {}

    def fits(self, generator: nn.Module, lanes: int, *, is_guided: bool) -> bool:
        """Whether it can draw so many images at once where the generator is now."""
        device = next(generator.parameters()).device
        return self.device == device and self.lanes == lanes and self.is_guided >= is_guided

    @torch.no_grad()
    def draw(
        self, generator: nn.Module, request: Request, recorder: Recorder | None = record, *, progress: bool = False
    ) -> Int[Tensor, "B n"]:
        """Tokens of new images.

        Args:
            generator: that it was made for, in eval mode; its weights are taken over as they are now.
            request: what to draw.
            recorder: makes one call of a step; None: the step runs as it stands.
            progress: show a bar over the tokens.
        Raises:
            ValueError: scores that are no numbers.
        """
        images, positions, _ = request.numbers.shape
        guided_positions, form = request.guided_positions(), request.drawing_form()
        starts = range(0, images, self.lanes)
        bar = iter(track_items(range(len(starts) * positions), "sampling", "tokens", shown=progress))
        tokens, broken = [], []
        with self._computing():
            self.network.copy_weights(generator)
            guided = self._recording(form, recorder, is_guided=True) if guided_positions else None
            plain = self._recording(form, recorder, is_guided=False) if guided_positions < positions else None
            for start in starts:
                size = min(self.lanes, images - start)
                self._load(generator, request, slice(start, start + size))
                for position in range(positions):
                    next(bar)
                    (guided if position < guided_positions else plain)()
                tokens.append(self.drawing.tokens[:size, :positions].clone())
                broken.append(self.drawing.broken[:size].bool())
        next(bar, None)
        refuse_broken(torch.cat(broken))
        return torch.cat(tokens)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The sampler's device is the current one, and products are what `dtype` says."""
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(full_precision(self.device))
            yield

    def _recording(self, form: DrawingForm, recorder: Recorder | None, *, is_guided: bool) -> Step:
        key = is_guided, form, recorder
        if key not in self._recordings:
            rows = self.network.rows if is_guided or not self.is_guided else self.network.rows.first(self.lanes)
            step = partial(take_step, self.network, rows, self.drawing, form, operations_for(self.device, self.dtype))
            if len(self._recordings) == MOST_RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
            self._recordings[key] = recorder(step, self.device, self._restart) if recorder else step
        return self._recordings[key]

    def _restart(self) -> None:
        self.drawing.position.zero_()

    def _load(self, generator: nn.Module, request: Request, images: slice) -> None:
        """Put a portion's classes, numbers and settings where the recorded steps find them."""
        drawing, config, size = self.drawing, request.config, images.stop - images.start
        self._restart()
        drawing.active.fill_(size)
        drawing.broken.zero_()
        drawing.prompt_length.fill_(request.prompt_length)
        if request.prompt is not None:
            drawing.tokens[:size, : request.prompt_length] = request.prompt[images]
        drawing.numbers[:size, : request.numbers.shape[1]] = request.numbers[images].clamp_max(LARGEST_NUMBER)
        parts = range(len(drawing.temperatures))
        values = {
            drawing.scales: request.scales(),
            drawing.temperatures: [config.temperature_of(part) for part in parts],
            drawing.top_p: [config.top_p],
            drawing.log_min_p: [math.log(config.min_p) if config.min_p else -math.inf],
        }
        for target, numbers in values.items():
            target.copy_(torch.tensor(numbers, dtype=torch.float64))
        # Idle lanes, and with room for guidance the second half of the rows, have the null class.
        labels = torch.full((len(self.network.rows.x),), self.null_class, device=self.device)
        labels[:size] = request.labels[images]
        self.network.begin(generator, labels)


def take_step(
    network: SamplerNetwork, rows: RowMemory, drawing: Drawing, form: DrawingForm, operations: ModuleType
) -> None:
    """Draw the tokens of the next position and make them what the position after it starts from.

    Args:
        network: whose caches hold the positions before.
        rows: its memory, or that of the first half, without the null class.
        drawing: says where the images are; its position is counted on.
        form: of the draw.
        operations: `sampler_operations` or `sampler_kernels`.
    """
    parts: list[Tensor] = []
    for part in range(network.parts):
        scores = network.scores(rows, parts, drawing, operations)
        parts.append(operations.choose(scores, drawing, form, part))
    tokens = operations.write_tokens(parts, network.worth, drawing)
    rows.x.unflatten(0, (-1, len(tokens))).copy_(network.embed(tokens))  # one token for class and null class
    drawing.position.add_(1)


def operations_for(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """What a step is made of: kernels where they run; they add in float32, which float64 asks more than."""
    if dtype == torch.float64 or not kernels_run_on(device):
        return sampler_operations
    from ibqlab.generator import sampler_kernels  # noqa: PLC0415 - imports Triton

    return sampler_kernels
