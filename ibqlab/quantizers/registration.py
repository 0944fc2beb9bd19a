"""What may be registered as a quantizer: a name that can be typed, a class of quantizers, settings with defaults."""

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

from ibqlab.base.checks import require

LETTERS = 40
"""Longest name; names of runs and figures contain it."""
WORDS = ("all", "none", "null", "true", "false", "yes", "no", "on", "off", "default")
"""Names that settings read as something else."""


def check_name(name: Any) -> None:
    """Raise ValueError unless a quantizer can be called so: names are typed, stand in lists and in folders' names."""
    rule = "a quantizer's name is text such as 'ibq': letters a–z, digits, _ and -, a letter first"
    write = f"; write @register_quantizer('my_vq') above class {name.__name__}" if isinstance(name, type) else ""
    require(isinstance(name, str) and name.strip() != "", f"{rule}; got {name!r}{write}")
    typed = re.sub("[^A-Za-z0-9-]+", "_", name).strip("-_0123456789")
    hint = f"{typed[: LETTERS - 3]}_vq" if typed.lower() in (*WORDS, "") else typed[:LETTERS]
    fits = re.fullmatch("[A-Za-z][A-Za-z0-9_-]*", name) is not None and len(name) <= LETTERS
    require(fits, f"{rule}, {LETTERS} at most; got {name!r:.80}. Write {hint.lstrip('_')!r}")
    require(name.lower() not in WORDS, f"{rule}; {name!r} means something else in settings. Write {hint!r}")


def check_class(name: str, quantizer: Any, base: type) -> None:
    """Raise ValueError unless what is registered is a class of quantizers."""
    if isinstance(quantizer, type) and issubclass(quantizer, base):
        return
    if isinstance(quantizer, type):
        bases = f"class {quantizer.__name__}(Quantizer)"
        raise ValueError(f"{name!r}: register_quantizer takes a class derived from Quantizer; write {bases}:")
    remedy = "write @quantizer_from above a function" if callable(quantizer) else "write it above a class"
    raise ValueError(
        f"{name!r}: register_quantizer takes a class derived from Quantizer; got {quantizer!r:.80}; {remedy}"
    )


def check_config(name: str, config: Any, base: type) -> None:
    """Raise ValueError unless a config is a class of settings, each of them a field."""
    is_config = isinstance(config, type) and issubclass(config, base)
    require(is_config, f"{name!r}: config must be derived from {base.__name__}; got {config!r:.80}")
    fields = {field.name for field in dataclasses.fields(config)}
    for cls in config.__mro__:
        annotations = {} if cls is object else inspect.get_annotations(cls)
        lost = [key for key, kind in annotations.items() if key not in fields and "ClassVar" not in str(kind)]
        require(
            not lost,
            f"{name!r}: {cls.__name__} does not know its setting {lost and lost[0]!r}; write "
            f"@dataclass(frozen=True, kw_only=True) above class {cls.__name__}",
        )


def check_defaults(name: str, config: type) -> None:
    """Raise ValueError unless a config can be made of its defaults alone, as by `build_quantizer(name)`."""
    open_settings = [
        field.name
        for field in dataclasses.fields(config)
        if field.init and field.default is field.default_factory is dataclasses.MISSING
    ]
    require(not open_settings, f"{name!r}: every setting needs a default; {', '.join(open_settings)} has none")
    try:
        config()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name!r}: its defaults are no possible settings: {error}") from error
    except NameError:
        return  # its check reads what stands further down in its file


def as_default(value: Any) -> Any:
    """A default for a field of a dataclass; of a list or dictionary each config gets a copy."""
    if isinstance(value, (list, dict, set)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(value))
    return value


def check_function(function: Any) -> None:
    """Raise ValueError unless a function can choose codes: it is called with features and codebook."""
    rule = "quantizer_from takes a function of features and codebook"
    require(callable(function), f"{rule}; got {function!r:.80}")
    called = getattr(function, "__name__", repr(function))
    require(not isinstance(function, type), f"{rule}; got the class {called}; write @register_quantizer(NAME) above it")
    require(not _returns_later(function), f"{rule} that returns; {called} yields or is async; write return")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # of compiled code, which does not tell
    try:
        signature.bind(None, None)
    except TypeError:
        raise ValueError(
            f"{rule}, by position; got {called}{signature}. Write def {called}(features, codebook), and give further "
            "arguments defaults"
        ) from None


def _returns_later(function: Callable) -> bool:
    kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return any(kind(function) for kind in kinds)
