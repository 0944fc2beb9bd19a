"""Families: whose system wrote a tokenizer's file, how its names translate, and what its settings are.

A family is a small class: names → ours, what differs, nothing else. Ours stand in `ibqlab.pretrained.families`, one
file each; a user's is one more file, a plugin:

    @register_family("mine")
    class Mine(Family):
        title = "a tokenizer of mine"
        marks = ("enc.stem.",)
        names = ((r"^enc\\.stem\\.", "encoder.conv_in."), …)

        def infer(self, shapes, facts):
            return TokenizerConfig(autoencoder=…, quantizer=…)

What is unusual: nothing is known of a family but names, shapes and what the file says of itself, so a file of 10⁹
weights is recognised without reading one of them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ibqlab.base.checks import require, require_choice
from ibqlab.pretrained.names import AVERAGE, DECAY, UPDATES, TensorRole
from ibqlab.pretrained.tensor_files import CheckpointError
from ibqlab.pretrained.tokenizer_architecture import Shapes
from ibqlab.recipes.registries import Registry, follow_registry
from ibqlab.tokenizer import TokenizerConfig

Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]
"""Regular expressions of names in the file and what stands in their place, applied one after the other."""
BESIDE = {
    "loss.discriminator.": "discriminator",
    "loss.perceptual_loss.": "perceptual loss",
}
"""Beginnings of names that are not the tokenizer's and the part that they belong to, the first that fits."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What beside names and shapes may tell a tokenizer's settings."""

    quantizer: str | None = None
    """A quantizer's registered name, from the user or from an export under published names; None: the family's own."""
    num_heads: Any = None
    """Attention heads, which no shape tells, from the user; None: by the family's own rule."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The config.json that lies in the folder with the weights; empty without one."""


class Family:
    """One published system's tokenizers. Subclass it, say what differs, and register it."""

    name: ClassVar[str] = ""
    """As in `load_tokenizer(path, family=…)`; set by `register_family`."""
    title: ClassVar[str] = ""
    """In sentences: "a tokenizer of LlamaGen"."""
    marks: ClassVar[tuple[str, ...]] = ()
    """Beginnings of names, as regular expressions; a file is of this family if each is found and no other family's."""
    averaged: ClassVar[bool] = False
    """Whether the published evaluation takes averaged weights, so that a file without them is refused for those."""
    protocol: ClassVar[str] = ""
    """Name in `ibqlab.metrics.PROTOCOLS` of the published evaluation; "": nobody told how its numbers were made."""
    names: ClassVar[Rules] = ()
    """From names in the file to ours (`Tokenizer.state_dict()`); what no rule touches stands as it is."""
    beside: ClassVar[Mapping[str, str]] = BESIDE
    """See `BESIDE`."""

    def rename(self, key: str, keys: Mapping[str, Any]) -> str:
        """Our name of a tensor of the tokenizer.

        Args:
            key: its name in the file.
            keys: all of them, for names that depend on how many levels there are.
        """
        for pattern, ours in self.names:
            key = re.sub(pattern, ours, key)
        return key

    def infer(self, shapes: Shapes, facts: Facts) -> TokenizerConfig:
        """The settings of a tokenizer.

        Args:
            shapes: of every tensor of the tokenizer by our name, as they stand in the file.
            facts: what else is known.
        Raises:
            CheckpointError: no tokenizer of this family has such shapes; ValueError: what the user said does not fit.
        """
        raise TypeError(f"{type(self).__name__} must define infer(shapes, facts) -> TokenizerConfig")

    def remark(self, config: TokenizerConfig, settings: Mapping[str, Any]) -> str:
        """What of the settings a rule tells and not the file, for the report; "" where there is nothing such.

        Args:
            config: what `infer` gave.
            settings: as in `Facts`.
        """
        return ""

    def check(self, tensors: Mapping[str, Tensor], config: TokenizerConfig) -> None:
        """Look at values where names and shapes leave a question. Does nothing unless overridden.

        Args:
            tensors: of the file by its keys, mapped: each costs memory where it is looked at.
            config: what `infer` gave.
        Raises:
            CheckpointError: the values are another system's.
        """

    def role(self, key: str, keys: Mapping[str, Any]) -> TensorRole:
        """What a tensor is; averages under `model_ema.` are told apart by the loader."""
        if key in (DECAY, UPDATES):
            return TensorRole("bookkeeping", key.removeprefix(AVERAGE))
        for start, part in self.beside.items():
            if key.startswith(start):
                return TensorRole(part, key.removeprefix(start) or key)
        return TensorRole("tokenizer", self.rename(key, keys))

    def missing_marks(self, keys: Mapping[str, Any]) -> list[str]:
        """The marks that no name begins with."""
        plain = [key for key in keys if "\n" not in key]  # ahead of which $ would match
        return [mark for mark in self.marks if not any(re.match(mark, key) for key in plain)]


_FAMILIES: dict[str, Family] = {}


def register_family(name: str) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: make a family known to `load_tokenizer`, to commands and to notebooks.

    Args:
        name: what `family=` takes.
    Raises:
        ValueError: the name is another family's or cannot be typed, or the class is no family, or says nothing of
            itself.
    """
    require(
        isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_-]{0,39}", name) is not None,
        f"a family's name is text such as 'vqgan': letters a–z, digits, _ and -, a letter first, 40 at most; got "
        f"{name!r:.80}",
    )

    def decorate(family: type[Family]) -> type[Family]:
        is_family = isinstance(family, type) and issubclass(family, Family)
        require(is_family, f"{name!r}: register_family takes a class derived from Family; got {family!r:.80}")
        require(bool(family.title), f'{name!r}: write title = "a tokenizer of …" into class {family.__name__}')
        known = type(_FAMILIES[name]) if name in _FAMILIES else family
        same = known.__qualname__ == family.__qualname__ and not known.__module__.startswith("ibqlab.")
        require(
            same or known is family, f"a family named {name!r} exists already: {known.__module__}; choose another name"
        )
        family.name = name
        _FAMILIES[name] = family()
        return family

    return decorate


def available_families() -> list[str]:
    """Names that `family=` takes, sorted."""
    return sorted(_FAMILIES)


def find_family(name: str) -> Family:
    """A family by its name. ValueError for an unknown one; the message names the nearest."""
    require_choice("family", name, _FAMILIES)
    return _FAMILIES[name]


def all_families() -> list[Family]:
    """All of them, in the order of their registration."""
    return list(_FAMILIES.values())


def _replace_families(families: Mapping[str, Family]) -> None:
    _FAMILIES.clear()
    _FAMILIES.update(families)


follow_registry(Registry(lambda: dict(_FAMILIES), _replace_families, lambda family: type(family).__module__))


def reversed_levels(pattern: str, ours: str) -> Callable[[str, Mapping[str, Any]], str]:
    """A renaming of numbered levels that a file counts from the other end.

    Args:
        pattern: of the level's names with its number as the one group, such as r"decoder\\.conv_blocks\\.([0-9]+)\\.".
        ours: what stands in its place, with {} for our number.
    """
    compiled = re.compile(pattern)
    newest: tuple[Any, int] = ({}, 0)  # a file's names and its last level: looked for once a file, not once a name

    def rename(key: str, keys: Mapping[str, Any]) -> str:
        nonlocal newest
        match = compiled.match(key)
        if match is None:
            return key
        if newest[0] is not keys:
            newest = (keys, max(int(found[1]) for other in keys if (found := compiled.match(other))))
        return ours.format(newest[1] - int(match[1])) + key[match.end() :]

    return rename


def refuse_shapes(title: str, why: str) -> CheckpointError:
    """The error of shapes that no tokenizer of a family has."""
    return CheckpointError(f"the names are those of {title}, the shapes are not: {why}")
