"""What plugins may register beside quantizers: families of checkpoints, designs of autoencoders.

Those registries stand in packages that are built upon this one. Each tells here how it is read and replaced, so that a
plugin that fails leaves nothing behind, and one that is edited takes the place of what it was.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ibqlab.tokenizer.designs import all_designs, replace_designs


class Registry(NamedTuple):
    """One registry."""

    entries: Callable[[], dict[str, Any]]
    """What is registered, by name; a copy."""
    replace: Callable[[Mapping[str, Any]], None]
    """Puts others in place of all that are registered."""
    module_of: Callable[[Any], str]
    """The module that defines an entry."""


_REGISTRIES = [Registry(all_designs, replace_designs, lambda design: design.encoder.__module__)]
_KEPT: dict[str, list[dict[str, Any]]] = {}
"""What each plugin's module registered, one mapping per registry."""


def follow_registry(registry: Registry) -> None:
    """Have a registry's entries come and go with the plugins that made them."""
    _REGISTRIES.append(registry)


def snapshot() -> list[tuple[Registry, dict[str, Any]]]:
    """All entries as they are, for `restore`."""
    return [(registry, registry.entries()) for registry in _REGISTRIES]


def restore(taken: list[tuple[Registry, dict[str, Any]]]) -> None:
    """Put entries back; a registry that came later loses those of plugins."""
    before = {id(registry): entries for registry, entries in taken}
    for registry in _REGISTRIES:
        built_in = {name: one for name, one in registry.entries().items() if _is_built_in(registry, one)}
        registry.replace(before.get(id(registry), built_in))


def keep(module: str) -> None:
    """Remember what a plugin's module has registered."""
    _KEPT[module] = [
        {name: one for name, one in registry.entries().items() if registry.module_of(one).split(".")[0] == module}
        for registry in _REGISTRIES
    ]


def bring_back(module: str) -> None:
    """Register again what a plugin's module had registered."""
    for registry, entries in zip(_REGISTRIES, _KEPT.get(module, ()), strict=False):
        registry.replace(registry.entries() | entries)


def forget(modules: list[str]) -> None:
    """Take back what modules have registered."""
    for registry in _REGISTRIES:
        kept = {name: one for name, one in registry.entries().items() if registry.module_of(one) not in modules}
        registry.replace(kept)


def _is_built_in(registry: Registry, entry: Any) -> bool:
    return registry.module_of(entry).startswith("ibqlab.")
