"""What became of every key of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

from ibqlab.escaping import for_terminal

WEIGHTS = ("ema", "raw")
WORDS = {"ema": "averaged weights", "raw": "weights as trained", "both": "all weights"}
NAMES = {
    "tokenizer": "tokenizer, as trained",
    "tokenizer_ema": "tokenizer, averaged",
    "discriminator": "discriminator",
    "discriminator_ema": "discriminator, averaged",
}
"""Parts of a file as the report names them; the others are named as they are."""
SHOWN = 2


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
    """"ema" or "raw": the weights that were taken; "both" where the whole checkpoint was read."""
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
        lines.append(f"{self.accounted:,} of {self.keys:,} keys accounted for")
        return "\n".join(lines)
