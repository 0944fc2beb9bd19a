"""What the fields of a settings class may hold, from their annotations."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any


def field_types(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses that an annotation names."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for inner in typing.get_args(hint) for cls in dataclasses_in(inner)]


def derived_classes(cls: type) -> list[type]:
    """The dataclasses derived from one, such as the settings of each quantizer."""
    return [sub for child in cls.__subclasses__() for sub in (child, *derived_classes(child))]


def alternatives(hint: Any) -> list[Any]:
    """The types that an annotation allows: `int | None` is two."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [inner for choice in typing.get_args(hint) for inner in alternatives(choice)]
    return alternatives(typing.get_args(hint)[0]) if typing.get_origin(hint) is typing.Annotated else [hint]


def takes_text(hint: Any) -> bool:
    """Whether text is a value of this type."""
    if typing.get_origin(hint) is typing.Literal:
        return any(isinstance(choice, str) for choice in typing.get_args(hint))
    return hint is Any or (isinstance(hint, type) and issubclass(hint, (str, Path, Enum)))


def takes_list(hint: Any) -> bool:
    """Whether a list is a value of this type."""
    return (typing.get_origin(hint) or hint) in (tuple, list, Sequence)
