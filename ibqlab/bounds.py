"""Bounds that no honest use reaches, stated once: what sizes an allocation or a loop is checked before it is used.

Two kinds. Fixed bounds keep a typing mistake (10¹² codes, 100,000 residual blocks) from becoming hours or a killed
process. `require_memory` compares what is about to be allocated with the memory of this machine.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

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


def require_at_most(name: str, value: int, bound: int, what: str = "") -> None:
    """Refuse a number above its bound.

    Args:
        name: the setting.
        value: what arrived.
        bound: the largest value.
        what: why there is such a bound; a few words.
    Raises:
        ValueError: it is larger; the message names setting, bound and value.
    """
    if value > bound:
        shown = f"{value:,}" if value < 10**30 else f"a number of {len(hex(value)) * 4 - 8:,} bits"
        raise ValueError(f"{name} must be at most {bound:,}{f' ({what})' if what else ''}; got {shown}")


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


def memory_bytes() -> int | None:
    """Memory that this process may come to use: the machine's, or the container's limit where that is less."""
    found = []
    with suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text.isdecimal():
            found.append(int(text))
    return min(found) if found else None


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse work that cannot fit into this machine's memory, before any of it is allocated.

    Args:
        needed: bytes.
        what: what they are for; starts the message.
        remedy: what to type instead.
    Raises:
        ValueError: it needs more than the machine has; the message gives both in GiB.
    """
    there = memory_bytes()
    if there is not None and needed > there:
        raise ValueError(f"{what} needs {gib(needed)} of memory, this machine has {gib(there)}; {remedy}")


def gib(count: Any) -> str:
    """Bytes in GiB for a message."""
    size = float(count) / 2**30
    return f"{size:,.1f} GiB" if size < 10_000 else f"{size:.1e} GiB"
