"""One opened checkpoint of a tokenizer or a generator: which tensors a file holds, and what each of them is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ibqlab.base.files import RunError
from ibqlab.generator import AnyGenerator, SequenceConfig, make_generator
from ibqlab.pretrained.load_report import AS_GIVEN, NAMES, LoadReport, warn_of_start
from ibqlab.pretrained.names import TensorRole, is_same_shape
from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.pretrained.tokenizer_architecture import NothingDrawn, empty_tokenizer
from ibqlab.tokenizer import Tokenizer, TokenizerConfig

PORTION = 2**26
"""Bytes copied before the file is mapped again, at most; of a small network a sixteenth of it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights of one network and of what was trained beside it.

    Tensors are mapped from the file, in its own number type: they cost memory when they are used. Clone what you change
    or keep; `load_tokenizer` and `load_generator` do.
    """

    path: Path
    """The file or run folder."""
    network: str
    """"tokenizer" or "generator"."""
    format: str
    """What it is, in words."""
    config: TokenizerConfig | SequenceConfig
    """Architecture: stored with runs and exports, inferred from names and shapes in published files."""
    tensors: Mapping[str, Tensor]
    """By the file's keys."""
    roles: Mapping[str, TensorRole]
    """Key in the file → what the tensor is."""
    reopen: Callable[[], Mapping[str, Tensor]]
    """Maps the tensors again, so that memory of those mapped before can be let go."""
    entries: tuple[str, ...] = ()
    """What the file holds beside these tensors."""
    wrappers: tuple[str, ...] = ()
    """What was taken off the file's keys."""
    stand_ins: tuple[str, ...] = ()
    """Classes of objects in the file that were not made."""
    weights: str | None = None
    """"ema", "raw" or AS_GIVEN: the one set of weights of a tokenizer's export. None: the weights as trained, and
    the averaged ones where the file has them."""
    ema_decay: float | None = None
    """Decay of the averages, where the file tells it."""
    step: int = 0
    """Training step of the weights, 0 where the file does not tell it."""
    family: str = ""
    """Name of the published system that wrote a tokenizer's file, one of `available_families`; "" for our own."""

    @property
    def tokenizer(self) -> dict[str, Tensor]:
        """The tokenizer's state dict as trained, by our names; in an export the one set that it holds."""
        return self.part("tokenizer")

    @property
    def tokenizer_ema(self) -> dict[str, Tensor] | None:
        """Averaged weights of its trainable parameters, by our names; None if the file has none."""
        if self.weights == "ema":
            parameters = {name for name, _ in self.empty_network().named_parameters()}
            return {name: value for name, value in self.tokenizer.items() if name in parameters}
        return self.part("tokenizer_ema") or None

    @property
    def discriminator(self) -> dict[str, Tensor] | None:
        """The discriminator's state dict with buffers, by the names in `PatchDiscriminator`; None if there is none."""
        return self.part("discriminator") or None

    @property
    def discriminator_ema(self) -> dict[str, Tensor] | None:
        """Averaged weights of its parameters; None if there are none."""
        return self.part("discriminator_ema") or None

    @property
    def report(self) -> LoadReport:
        """What every key of the file is."""
        return self.load_report("both", {key: role.name for key, role in self.roles.items() if role.part in NAMES})

    def part(self, part: str) -> dict[str, Tensor]:
        """Tensors of one part by their names in it; those of the network in the shapes that they have there."""
        named = {role.name: self.tensors[key] for key, role in self.roles.items() if role.part == part}
        if not part.startswith(self.network):
            return named
        wanted = {name: self.shapes.get(name, value.shape) for name, value in named.items()}
        return {
            name: value.view(wanted[name]) if is_same_shape(value.shape, wanted[name]) else value
            for name, value in named.items()
        }

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor of the network; a file may hold a 1 × 1 convolution as a linear layer's matrix."""
        return {name: value.shape for name, value in self.empty_network().state_dict().items()}

    def choose(self, weights: str) -> dict[str, str]:
        """The network's tensors by name → the key to fill each from.

        Raises:
            CheckpointError, RunError: the file has not those weights; the message says what to type.
        """
        if self.weights not in (None, AS_GIVEN, weights):
            raise CheckpointError(f'{self.path} holds only one set of weights; type weights="{self.weights}"')
        keys = {role.name: key for key, role in self.roles.items() if role.part == self.network}
        if weights == "raw" or self.weights:
            return keys
        averages = {role.name: key for key, role in self.roles.items() if role.part == f"{self.network}_ema"}
        if not averages:
            kind = RunError if self.path.is_dir() else CheckpointError
            raise kind(f'{self.path} holds no averaged weights; type weights="raw" for those it has')
        return keys | averages

    def load_report(self, weights: str, used: Mapping[str, str]) -> LoadReport:
        """The account of all keys, given those that were used and what each filled."""
        left: dict[str, list[str]] = {}
        for key, role in self.roles.items():
            if key not in used:
                group = NAMES.get(role.part, role.part)
                left.setdefault(group, []).append(key)
        return LoadReport(
            path=str(self.path),
            format=self.format,
            weights=AS_GIVEN if self.weights == AS_GIVEN else weights,
            keys=len(self.tensors),
            used=dict(used),
            left={group: tuple(keys) for group, keys in left.items()},
            entries=self.entries,
            wrappers=self.wrappers,
            stand_ins=self.stand_ins,
            warning=warn_of_start(self.ema_decay, self.step) if weights == "ema" else "",
            step=self.step,
        )

    def empty_network(self) -> Tokenizer | AnyGenerator:
        """The network of these settings; its parameters have names and shapes but no memory."""
        if self.network == "tokenizer":
            return empty_tokenizer(self.config)
        with torch.device("meta"), NothingDrawn():
            return make_generator(self.config)

    def copy_tensors(self, keys: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Every chosen tensor by its name, in memory of its own.

        Tensors come the largest first, large ones row by row, and the file is mapped again for each portion. So at most
        the copies and one portion are in memory, whatever else is in the file.

        Args:
            keys: names → keys of the file, from `choose`.
        """
        sizes = {name: self.tensors[key].nbytes for name, key in keys.items()}
        portion = min(PORTION, sum(sizes.values()) // 16)
        tensors, copied = self.reopen(), 0
        for name in sorted(keys, key=sizes.__getitem__, reverse=True):
            stored = self.tensors[keys[name]]
            rows = len(stored) if stored.ndim else 1
            step = max(1, rows * portion // max(1, sizes[name]))
            copy = torch.empty_like(stored)
            for start in range(0, max(1, rows), step):
                if copied > portion:
                    del tensors  # before the next mapping: the pages of both would count as memory
                    tensors, copied = self.reopen(), 0
                part = slice(start, start + step) if stored.ndim else ...
                copy[part] = tensors[keys[name]][part]
                copied += copy[part].nbytes
            yield name, copy.view(self.shapes[name])
