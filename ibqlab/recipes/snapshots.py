"""Which validations of a tokenizer's run leave a snapshot, and what all snapshots take on disk."""

from dataclasses import dataclass

from ibqlab.quantizers.composite import stored_codebook_numbers
from ibqlab.recipes.tokenizer_config import TrainConfig

SNAPSHOTS_BYTES = 8 * 2**30
"""Most that the regular snapshots of a run take. Only codebooks of some ten thousand wide codes in long runs come near:
262,144 × 256 at each of 331 validations would be 88 GiB."""


@dataclass(frozen=True, kw_only=True)
class SnapshotSchedule:
    """The steps of a run that have a snapshot. Settings alone decide it, so that a resumed run has the same."""

    bytes_each: int
    """One snapshot on disk."""
    steps: int
    """Of the run; the last one has a snapshot, and so has step 0."""
    validate_every: int
    """Steps between validations."""
    every: int
    """Steps between snapshots, a multiple of `validate_every`."""
    early: frozenset[int]
    """Further steps, which the settings name."""

    def includes(self, step: int) -> bool:
        """Whether a step has a snapshot."""
        return step % self.every == 0 or step == self.steps or step in self.early

    @property
    def count(self) -> int:
        """Snapshots of the whole run."""
        return self._count(self.every)

    @property
    def total_bytes(self) -> int:
        """All snapshots on disk."""
        return self.count * self.bytes_each

    def _count(self, every: int) -> int:
        early = sum(0 < step < self.steps and step % every != 0 for step in self.early)
        return 1 + self.steps // every + (self.steps % every != 0) + early

    def describe(self) -> str:
        """How many, and why fewer than there are validations."""
        number = f"{self.count:,} snapshots"
        if self.every == self.validate_every:
            return number
        unthinned = self._count(self.validate_every)
        return f"{number}, thinned to one every {self.every:,} steps (one at each validation would be {unthinned:,})"


def snapshot_schedule(config: TrainConfig) -> SnapshotSchedule:
    """The snapshots of a run: at every validation, or at every n-th where all would exceed `SNAPSHOTS_BYTES`.

    Step 0, the last step and the steps of `record.early_snapshots` always have one.

    Args:
        config: of the run.
    """
    record, quantizer, side = config.record, config.tokenizer.quantizer, config.data.image_size
    codes, width = quantizer.codebook_size, quantizer.code_dim
    # float32 codebook, two int64 counters; features with their codes; pictures and reconstructions in 8 bits.
    bytes_each = 4 * stored_codebook_numbers(quantizer) + 16 * codes + record.snapshot_features * (4 * width + 8)
    bytes_each += record.snapshot_images * side**2 * 6
    early = frozenset(record.early_snapshots)
    most = max(1, SNAPSHOTS_BYTES // bytes_each - len(early) - 2)  # beside step 0 and the last
    skipping = max(1, -(-(config.steps // record.validate_every) // most))
    return SnapshotSchedule(
        bytes_each=bytes_each,
        steps=config.steps,
        validate_every=record.validate_every,
        every=skipping * record.validate_every,
        early=early,
    )
