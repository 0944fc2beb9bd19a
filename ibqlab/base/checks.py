"""Bounds that no honest use reaches, stated once: what sizes an allocation or a loop is checked before it is used.

Two kinds. Fixed bounds keep a typing mistake (10¹² codes, 100,000 residual blocks) from becoming hours or a killed
process. `require_memory` compares what is about to be allocated with the memory of this machine.
"""

import dataclasses
import difflib
import math
import numbers
import operator
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ibqlab.base.escaping import for_terminal

CODES = 2**24
"""Codes of a codebook. The largest published one has 2^18."""
CODE_DIM = 2**16
"""Dimension of a code; published: 8 to 768."""
CHANNELS = 2**16
"""Channels of a convolution or width of a transformer; published: up to 2,560."""
BLOCKS = 1024
"""Residual or transformer blocks in a row; published: up to 48."""
IMAGE_SIDE = 2**14
"""Pixels along the side that a model sees; published: 128 to 512."""
BATCH = 2**20
"""Images of a step over all processes; published: up to 2,048."""
STEPS = 10**9
"""Steps of a run; published: 1,651,650."""
WORKERS = 256
"""Loader processes of a training process."""
PROCESSES = 2**14
"""Processes of a run."""
IMAGES = 10**9
"""Images of a data set, a sample or a snapshot."""
CLASSES = 2**20
"""Classes of a data set; ImageNet-21k has 21,841."""
FILES = 10**6
"""Shards or files that a pattern may stand for."""
FOLDER_DEPTH = 64
"""Folders inside folders in a data set."""
PIXELS = 2**28
"""Pixels of one picture, as its header says, before it is decoded: 16,384 × 16,384."""
PICTURE_SIDE = 2**17
"""Pixels along one side of a picture on disk."""
ASPECT = 100
"""How many times as long as wide a picture may be that is resized by its short side; ImageNet has none above 20."""
SEED = 2**31 - 1
"""Seed of a run."""
SAMPLE_SEED = 2**62
"""Seed of the first image of samples."""
STUDY_RUNS = 10_000
"""Runs of one study; the largest here has 75."""
GALLERY_IMAGES = 10_000
"""Images of one figure of a gallery; published: 64."""
NAME = 200
"""Letters of a name that becomes a file or folder."""
WHOLE = 2**63 - 1
"""Whole numbers of any kind: what arrays and files can hold."""
FLOAT32 = 3.4e38
"""Numbers that models compute with."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_choice(setting: str, value: str, choices: Any) -> None:
    """Raise ValueError naming the valid choices, the nearest first, unless value is one of them."""
    if value in list(choices):  # not in a dictionary: a list or mapping that arrives from YAML has no hash
        return
    near = difflib.get_close_matches(str(value), list(choices), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{setting} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}")


def require_at_most(name: str, value: int, bound: int, reason: str = "") -> None:
    """Refuse a number above its bound.

    Args:
        name: the setting.
        value: what arrived.
        bound: the largest value.
        reason: why there is such a bound; a few words.
    Raises:
        ValueError: it is larger; the message names setting, bound and value.
    """
    if value > bound:
        text = f"{value:,}" if value < 10**30 else _short_text(value)
        raise ValueError(f"{name} must be at most {bound:,}{f' ({reason})' if reason else ''}; got {text}")


def require_between(name: str, value: int, least: int, most: int) -> None:
    """Refuse a number below the least or above the most.

    Args:
        name: the setting.
        value: what arrived.
        least: the smallest value.
        most: the largest.
    Raises:
        ValueError: it is smaller or larger; the message names setting, bound and value.
    """
    if value < least:
        raise ValueError(f"{name} must be at least {least:,}; got {value:,}")
    require_at_most(name, value, most)


def whole_number(name: str, value: Any, least: int, most: int = WHOLE, hint: str = "") -> int:
    """A whole number within its bounds, of whatever type has one: int, NumPy, a tensor of one element.

    Args:
        name: the setting.
        value: what arrived; True and 3.0 are no whole numbers here.
        least, most: smallest and largest value.
        hint: the end of the message: what to type instead.
    Raises:
        ValueError: no whole number, or out of bounds.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # torch's, of tensors without numbers
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number; got {_short_text(value)}{hint}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {_short_text(number)}{hint}")
    require_at_most(name, number, most)
    return number


def finite_number(name: str, value: Any) -> float:
    """A finite number, of whatever type has one.

    Args:
        name: the setting.
        value: what arrived; neither True nor text.
    Raises:
        ValueError: no number, or NaN or infinity.
    """
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number; got {_short_text(value)}")
    return number


def check_numbers(settings: Any) -> None:
    """The numbers of a frozen dataclass are numbers, whoever makes it: whole where it says int, finite where float.

    NumPy's numbers become plain ones, so that equal settings are equal.

    Raises:
        ValueError: the first that is none; the message names the field.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.type is int:
            number = whole_number(field.name, value, -WHOLE)
        elif field.type is float:
            number = finite_number(field.name, value)
            if abs(number) > FLOAT32:
                raise ValueError(f"{field.name} must be a number that float32 holds, to {FLOAT32:.1e}; got {number:g}")
        else:
            continue
        if type(value) not in (int, float):
            object.__setattr__(settings, field.name, number)


def is_finite_number(value: Any) -> bool:
    """Whether a value out of somebody's file is a number that a float can hold; True and text are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < sys.float_info.max


def _short_text(value: Any) -> str:
    """A value for a message, short whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"a number of {value.bit_length():,} bits"
    return for_terminal(repr(value), 60)


def memory_bytes() -> int | None:
    """Memory that this process may come to use: the machine's, or the container's limit where that is less."""
    sizes = []
    with suppress(AttributeError, OSError, ValueError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text.isdecimal():
            sizes.append(int(text))
    return min(sizes) if sizes else None


def require_memory(needed: int, purpose: str, remedy: str) -> None:
    """Refuse work that cannot fit into this machine's memory, before any of it is allocated.

    Args:
        needed: bytes.
        purpose: what they are for; starts the message.
        remedy: what to type instead.
    Raises:
        ValueError: it needs more than the machine has; the message gives both in GiB.
    """
    memory = memory_bytes()
    if memory is not None and needed > memory:
        raise ValueError(f"{purpose} needs {gib(needed)} of memory, this machine has {gib(memory)}; {remedy}")


def gib(count: Any) -> str:
    """Bytes in GiB for a message."""
    size = float(count) / 2**30
    return f"{size:,.1f} GiB" if size < 10_000 else f"{size:.1e} GiB"
