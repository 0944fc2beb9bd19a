"""What there is to know of a code, or of some codes together: the card.

card = read_card(subject, [51])
card.html()             # one page, pictures included
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from ibqlab.base.files import RunError
from ibqlab.views.decoding import Decoded, decode_code
from ibqlab.views.patches import IMAGES, PatchIndex, index_patches
from ibqlab.views.subject import Subject, ViewError, lacking

PATCHES = 12
"""Patches of each kind on a card."""
NEIGHBOURS = 6
"""Codes of each kind of nearness on a card."""
MOST_CODES = 100_000
"""Codes of a set, at most."""


class Neighbour(NamedTuple):
    """A code near another."""

    code: int
    value: float
    """Distance in code space, or how many times as often as by chance it stands beside the code."""


class Life(NamedTuple):
    """Use of a code, or of a set, through training."""

    steps: Int[np.ndarray, "F"]
    hits: Int[np.ndarray, "F"]
    """In each snapshot's validation tokens, over the set."""
    tokens: Int[np.ndarray, "F"]
    """Those tokens."""
    last_hit: int
    """Step of the last hit in training, the latest of a set; −1: never."""

    @property
    def events(self) -> list[tuple[int, str]]:
        """Snapshots at which it came into use ("born") and fell out of it ("died")."""
        alive = np.concatenate([[False], self.hits > 0])
        changes = np.flatnonzero(alive[1:] != alive[:-1])
        return [(int(self.steps[i]), "born" if alive[i + 1] else "died") for i in changes]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A code or a set, from one run and its images."""

    name: str
    """Of the run or checkpoint."""
    codes: tuple[int, ...]
    """One, or a set."""
    codebook_size: int
    index: PatchIndex | None
    """The images' tokens; None where there are none."""
    typical: Int[np.ndarray, "n"]
    """Tokens that lie nearest to their code."""
    margin: Int[np.ndarray, "n"]
    """Tokens that nearly went to another code."""
    near: list[Neighbour]
    """In code space."""
    beside: list[Neighbour]
    """In the images."""
    norm: float | None
    """Of the code vector, in the features' units; of a set the mean."""
    life: Life | None
    """Through training; None for a checkpoint."""
    decoded: Decoded | None
    """Of one code."""
    lacks: list[str] = field(default_factory=list)
    """What is not there, a sentence each."""

    @property
    def is_set(self) -> bool:
        """Whether it is of several codes."""
        return len(self.codes) != 1

    @cached_property
    def hits(self) -> int:
        """Tokens of the images that the codes took."""
        return int(self.index.counts[list(self.codes)].sum()) if self.index else 0

    @property
    def title(self) -> str:
        """For headings."""
        if not self.codes:
            return "No code is selected"
        if self.is_set:
            return f"{len(self.codes):,} codes of {self.codebook_size:,}"
        return f"Code {self.codes[0]:,} of {self.codebook_size:,}"

    @property
    def classes(self) -> list[tuple[str, int, float]]:
        """Class, tokens of it among the codes' own, and how many times its share among all tokens; most tokens first.

        Empty where images have no classes.
        """
        if self.index is None or len(self.index.classes) < 2 or not self.hits:
            return []
        here = self.index.class_counts(list(self.codes))
        squares = self.index.codes.shape[1] * self.index.codes.shape[2]
        everywhere = np.bincount(self.index.labels[self.index.labels >= 0], minlength=len(here)) * squares
        expected = here.sum() * everywhere / max(1, everywhere.sum())
        order = np.argsort(-here, kind="stable")
        return [(self.index.classes[i], int(here[i]), float(here[i] / expected[i])) for i in order if here[i]]

    def mean_patch(self, context: int = 1) -> np.ndarray | None:
        """The mean of the nearest patches with their surroundings: what they share. None for fewer than two."""
        if self.index is None:
            return None
        cuts = [self.index.cut(int(t), context)[0] for t in self.typical if self.index.is_inside(int(t), context)]
        return np.mean(cuts, axis=0).round().astype(np.uint8) if len(cuts) > 1 else None


class CardReader:
    """Cards of one run or checkpoint, read one after another.

    Args:
        subject: of which parts may be missing; cards then say so.
        images: how many are looked at, at most.
        progress: show a line while they are encoded for the first time.
    """

    def __init__(self, subject: Subject, images: int = IMAGES, *, progress: bool = True):
        self.subject, self.lacks = subject, []
        self.index: PatchIndex | None = None
        try:
            self.index = index_patches(subject, images, progress=progress)
        except (RunError, ValueError, OSError) as error:
            self.lacks.append(lacking(error))
        try:
            self.codebook_size = self._size()
        except RunError as error:
            raise ViewError(f"no cards of {subject.name}: {lacking(error)}") from None

    def _size(self) -> int:
        if self.index is not None:
            return self.index.codebook_size
        return len(self.subject.snapshot()["counts"])

    @cached_property
    def codebook(self) -> Float[np.ndarray, "K D"] | None:
        """All code vectors, where they can be listed."""
        if self.subject.run is not None and self.subject.steps:
            return self.subject.snapshot().get("codebook")
        try:
            return self.subject.tokenizer.quantizer.codebook.detach().float().numpy()
        except (RunError, ValueError, MemoryError):
            return None

    @cached_property
    def history(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Steps, hits (F, K) and the last hits (K,) of all snapshots with this codebook size."""
        if self.subject.run is None or not self.subject.steps:
            return None
        steps, hits, last = [], [], np.full(self.codebook_size, -1)
        for step in self.subject.steps:
            shot = self.subject.snapshot(step)
            if len(shot["counts"]) == self.codebook_size:
                steps.append(step)
                hits.append(shot["counts"])
                last = shot.get("last_hit", last)
        return (np.array(steps), np.stack(hits), last) if steps else None

    def use_history(
        self, steps: Int[np.ndarray, "F"], ids: Int[np.ndarray, "C"], hits: np.ndarray, idle: np.ndarray
    ) -> None:
        """Take the history from a map that has read it already, in place of reading every snapshot again.

        Args:
            steps: of the snapshots.
            ids: codes that the map shows; all others have no hit.
            hits: (F, C) in each snapshot's validation tokens.
            idle: (F, C) steps since the last hit; −1 never. Of codes that are not shown it is not known.
        """
        if len(ids) == self.codebook_size:
            last = np.where(idle[-1] < 0, -1, steps[-1] - idle[-1])
            self.__dict__["history"] = steps, hits, last  # in place of what the cached property would read

    def read(self, codes: Sequence[int], *, decode: bool = True) -> Card:
        """The card of a code or a set.

        Args:
            codes: numbers below K; none gives an empty card.
            decode: also decode a single code.
        Raises:
            ValueError: a number that is no code, or more than `MOST_CODES`.
        """
        chosen = tuple(dict.fromkeys(int(code) for code in codes))
        if len(chosen) > MOST_CODES:
            raise ValueError(f"a card is of at most {MOST_CODES:,} codes; got {len(chosen):,}")
        wrong = [code for code in chosen if not 0 <= code < self.codebook_size]
        if wrong:
            raise ValueError(f"codes are 0 to {self.codebook_size - 1:,}; got {wrong[0]:,}")
        one, lacks, decoded = len(chosen) == 1, list(self.lacks), None
        if one and decode and self.index is not None:
            decoded = decode_code(self.subject.tokenizer, self.index, chosen[0])
        rows = self.codebook[list(chosen)] if self.codebook is not None and chosen else None
        nothing = np.zeros(0, np.int64)
        return Card(
            name=self.subject.name,
            codes=chosen,
            codebook_size=self.codebook_size,
            index=self.index,
            typical=self.index.typical(list(chosen), PATCHES) if self.index else nothing,
            margin=self.index.at_margin(list(chosen), PATCHES) if self.index else nothing,
            near=self._near(chosen[0]) if one else [],
            beside=self._beside(chosen[0]) if one else [],
            norm=float(np.linalg.norm(rows, axis=1).mean()) if rows is not None else None,
            life=self._life(chosen),
            decoded=decoded,
            lacks=lacks,
        )

    def _near(self, code: int) -> list[Neighbour]:
        if self.codebook is None:
            return []
        book = torch.from_numpy(np.ascontiguousarray(self.codebook))
        distances = (book - book[code]).square().sum(1).sqrt()
        distances[code] = torch.inf
        values, codes = distances.topk(min(NEIGHBOURS, len(book) - 1), largest=False)
        return [Neighbour(int(other), float(value)) for other, value in zip(codes, values, strict=True)]

    def _beside(self, code: int) -> list[Neighbour]:
        if self.index is None:
            return []
        codes, lift = self.index.beside(code)
        pairs = zip(codes[:NEIGHBOURS], lift[:NEIGHBOURS], strict=True)
        return [Neighbour(int(other), float(value)) for other, value in pairs]

    def _life(self, codes: tuple[int, ...]) -> Life | None:
        if self.history is None or not codes:
            return None
        steps, hits, last = self.history
        rows = list(codes)
        return Life(steps, hits[:, rows].sum(1), hits.sum(1), int(last[rows].max()))
