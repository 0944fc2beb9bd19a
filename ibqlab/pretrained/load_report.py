"""What became of every key of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

from ibqlab.base.escaping import for_terminal

WEIGHTS = ("ema", "raw")
AS_GIVEN = "as given"
"""An export's word for weights of which nobody said whether they are averaged."""
WORDS = {
    "ema": "averaged weights",
    "raw": "weights as trained",
    "both": "all weights",
    AS_GIVEN: "weights as they were given",
}
NAMES = {
    "tokenizer": "tokenizer, as trained",
    "tokenizer_ema": "tokenizer, averaged",
    "generator": "generator",
    "discriminator": "discriminator",
    "discriminator_ema": "discriminator, averaged",
}
"""Parts of a file as the report names them; the others are named as they are."""
SHOWN = 2
SHOWN_CLASSES = 8
MOST_OF_START = 0.05
"""Share of the start in averaged weights above which loading them warns; at decay 0.999 that is below 2,995 steps."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Account of a loaded checkpoint, key by key; `print` it.

    Keys count tensors. What a Lightning checkpoint or a run holds beside its weights (optimiser states, callbacks,
    counters) is listed in `entries` and not counted.
    """

    path: str
    """The file or run folder."""
    format: str
    """What it is, in words."""
    weights: str
    """"ema" or "raw": the weights that were taken, or AS_GIVEN where the file does not tell which it holds; "both"
    where the whole checkpoint was read."""
    keys: int
    """Tensors in the file."""
    used: Mapping[str, str]
    """Key in the file, without the wrappers → name of the tensor that it filled."""
    left: Mapping[str, tuple[str, ...]]
    """Group → keys that were recognised and not used: perceptual loss, discriminator, other weights, bookkeeping."""
    entries: tuple[str, ...]
    """Names of what the file holds beside the weights."""
    wrappers: tuple[str, ...] = ()
    """What was taken off the file's keys, in words: prefixes of DataParallel and torch.compile, an outer entry."""
    stand_ins: tuple[str, ...] = ()
    """Classes and functions that the file names beside the weights: none was imported, called or made."""
    warning: str = ""
    """Why the weights that were taken may be of little use, and what to type for the others; empty: nothing known."""
    step: int = 0
    """Training step of the weights, 0 where the file does not tell it."""

    @property
    def renamed(self) -> dict[str, str]:
        """Those of `used` whose name in the file is another."""
        return {key: name for key, name in self.used.items() if key != name}

    @property
    def accounted(self) -> int:
        """Keys used, or left in a known group."""
        return len(self.used) + sum(map(len, self.left.values()))

    def __str__(self) -> str:
        rows = [("used", tuple(self.used)), *((f"left: {group}", keys) for group, keys in self.left.items())]
        width = max(len(label) for label, _ in rows)
        lines = [f"{for_terminal(self.path)}: {self.format}, {WORDS[self.weights]}"]
        for label, keys in rows:
            some = ", ".join(map(for_terminal, keys[:SHOWN])) + (", …" if len(keys) > SHOWN else "")
            lines.append(f"  {label:<{width}}  {len(keys):>5,}  {some}")
        lines.append(f"  {len(self.renamed):,} of the used keys have another name in the file than here")
        if self.entries:
            lines.append(f"  beside the weights, not read: {', '.join(map(for_terminal, self.entries))}")
        if self.wrappers:
            lines.append(f"  taken off: {', '.join(map(for_terminal, self.wrappers))}")
        if self.stand_ins:
            names = ", ".join(for_terminal(name, 80) for name in self.stand_ins[:SHOWN_CLASSES])
            more = f" and {len(self.stand_ins) - SHOWN_CLASSES:,} more" if len(self.stand_ins) > SHOWN_CLASSES else ""
            lines.append(f"  beside the weights, stood in for and not made: {names}{more}")
        lines.append(f"{self.accounted:,} of {self.keys:,} keys accounted for")
        if self.warning:
            lines.append(f"Warning: {self.warning}")
        return "\n".join(lines)


def warn_of_start(decay: float | None, step: int) -> str:
    """A warning where averaged weights are mostly what training began with; "" where they are not, or nobody knows.

    Args:
        decay: d of the averages, which after n steps hold dⁿ of their start.
        step: n; 0 where it is not known.
    """
    share = decay**step if decay and step else 0.0
    if share <= MOST_OF_START:
        return ""
    return (
        f"averaged weights still hold {100 * share:.0f} % of what training began with (decay {decay:g}, {step:,} "
        'steps); for the weights as trained type weights="raw" in Python, --weights raw in a command, weights=raw in a '
        "notebook, tokenizer_weights=raw in a generator's recipe; elsewhere give an export made with --weights raw"
    )
