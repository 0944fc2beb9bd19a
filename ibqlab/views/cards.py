"""What there is to know of a code, or of some codes together: the card.

card = read_card(subject, [51])
card.html()             # one page, pictures included
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.base.files import RunError
from ibqlab.base.progress import notice
from ibqlab.quantizers.composite import Parts
from ibqlab.runs import Run
from ibqlab.views.cautions import cautions_of
from ibqlab.views.decoding import Decoded, Decoder
from ibqlab.views.encoding import LISTED, list_codes
from ibqlab.views.patches import IMAGES, PatchIndex, index_patches
from ibqlab.views.sharing import BesideInside, NearInside, beside_inside, near_inside
from ibqlab.views.snapshot_arrays import NOT_STORED
from ibqlab.views.subject import Subject, ViewError, lacking, open_subject

PATCHES = 12
"""Patches of each kind on a card."""
NEIGHBOURS = 6
"""Codes of each kind of nearness on a card."""
MOST_CODES = 100_000
"""Codes of a set, at most."""
MEAN_OF = 64
"""Patches that a mean patch is made of, at most."""
_MANY = 65_536
"""Codes that take a moment to be read."""


class Neighbour(NamedTuple):
    """A code near another."""

    code: int
    value: float
    """Distance in code space, or how many times as often as by chance it stands beside the code."""


class Life(NamedTuple):
    """Use of a code, or of a set, through training."""

    steps: Int[np.ndarray, "F"]
    hits: Int[np.ndarray, "F"]
    """In each snapshot's tokens, over the set."""
    tokens: Int[np.ndarray, "F"]
    """Those tokens."""
    last_hit: int
    """Step of the last hit in training, the latest of a set; `NEVER` (−1), or `NOT_STORED` (−2)."""
    counted: str = "validation tokens"
    """What the tokens are."""

    @property
    def events(self) -> list[tuple[int, str]]:
        """Snapshots at which it came into use or has no hit any more: step and words, such as "without a hit".

        Without a hit in a snapshot's validation tokens a rare code may still be in use.
        """
        hit = np.concatenate([[False], self.hits > 0])
        changes = np.flatnonzero(hit[1:] != hit[:-1])
        # The first change is into use, then they take turns. The atlas's life() in atlas.js says the same words.
        return [
            (int(self.steps[i]), "without a hit" if turn % 2 else "in use again" if turn else "in use")
            for turn, i in enumerate(changes)
        ]


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
    parts: tuple[int, ...] = ()
    """Indices that a code of several parts stands for."""
    near_inside: NearInside | None = None
    """Of a set: whether its codes are each other's nearest."""
    beside_inside: BesideInside | None = None
    """Of a set: whether its codes stand beside each other."""
    decoded: Decoded | None = None
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

    @cached_property
    def images(self) -> int:
        """Images that hold one of the codes."""
        if self.index is None or not self.codes:
            return 0
        grid = self.index.codes.shape[1] * self.index.codes.shape[2]
        return len(np.unique(self.index.tokens_of_set(self.codes) // grid))

    def mean_patch(self, context: int = 1) -> np.ndarray | None:
        """The mean of typical patches with their surroundings: what they share. None for fewer than two."""
        if self.index is None or not self.codes:
            return None
        tokens = self.index.typical(self.codes, MEAN_OF, inside=context)
        cuts = [self.index.cut(token, context)[0] for token in map(int, tokens)]
        return np.mean(cuts, axis=0).round().astype(np.uint8) if len(cuts) > 1 else None


class CardReader:
    """Cards of one run or checkpoint, read one after another.

    The first card takes longer: it reads the codebook, and counts which codes stand beside each other.

    Args:
        subject: of which parts may be missing; cards then say so.
        images: how many are looked at, at most.
        progress: show a line while they are encoded for the first time.
    Raises:
        ViewError: not even the number of codes is known.
    """

    def __init__(self, subject: Subject, images: int = IMAGES, *, progress: bool = True):
        self.subject, self.progress = subject, progress
        self.lacks: list[str] = []
        """What no card has, a sentence each."""
        self.index: PatchIndex | None = None
        try:
            self.index = index_patches(subject, images, progress=progress)
        # A view says what is wrong, whatever it is: its reader sees no stack trace of a widget.
        except Exception as error:
            self._lack(lacking(error))
        try:
            self.codebook_size = self._size()
        except Exception as error:
            reasons = " ".join(dict.fromkeys([*self.lacks, lacking(error)]))
            raise ViewError(f"no cards of {subject.name}: {reasons}") from None
        if self.index is not None:
            self.lacks += cautions_of(self.index)

    @classmethod
    def open(
        cls, what: "str | Path | Run | Subject | CardReader", images: str | Path = "", count: int = IMAGES
    ) -> "CardReader":
        """The reader of whatever a view may be given.

        Args:
            what: a run, its name or folder, a checkpoint's file, a `Subject`, or a reader, which is returned.
            images: as of `open_subject`.
            count: images that are looked at, at most.
        Raises:
            RunError, FileNotFoundError: there is nothing to look at.
        """
        if isinstance(what, CardReader):
            return what
        return cls(what if isinstance(what, Subject) else open_subject(what, images), count)

    def _lack(self, text: str) -> None:
        """Note what no card has; what two of them need is told once."""
        if text not in self.lacks:
            self.lacks.append(text)

    def _size(self) -> int:
        if self.index is not None:
            return self.index.codebook_size
        damaged: Exception | None = None
        for step in reversed(self.subject.steps):
            try:
                return len(self.subject.facts_of(step)["counts"])
            except RunError as error:
                damaged = damaged or error
        if damaged is not None:
            raise damaged
        return self.subject.tokenizer.quantizer.config.codebook_size

    @cached_property
    def codebook(self) -> Float[np.ndarray, "K D"] | None:
        """All code vectors, where they can be listed and are finite."""
        if self.progress and self.codebook_size > _MANY:
            notice(f"cards of {self.subject.name}: reading {self.codebook_size:,} codes, once")
        try:
            codebook = self._read_codebook()
        except Exception as error:
            self._lack(lacking(error))
            return None
        if codebook is not None and not np.isfinite(codebook).all():
            self._lack("The code vectors hold NaN or infinity: training has diverged, so none is near another.")
            return None
        return codebook

    def _read_codebook(self) -> np.ndarray | None:
        """Of the network, where it has encoded the images: norm and nearest codes are then of the same step as tokens
        and pictures. Without tokens of the last snapshot, which holds weights as trained."""
        if self.index is None and self.subject.weights == "raw":
            stored = self.subject.last_codebook(LISTED)
            if stored is not None and len(stored) == self.codebook_size:
                return stored
            if self.subject.run is not None and self.subject.run.last_checkpoint is None:
                return None
        codes = list_codes(self.subject.tokenizer)
        if codes is None:
            self._lack(
                f"The {self.codebook_size:,} codes are combinations of parts, too many to be listed: none is near."
            )
        return None if codes is None else codes.numpy()

    @cached_property
    def _vectors(self) -> tuple[Float[Tensor, "K D"], Float[Tensor, " K"]] | None:
        """Code vectors and their squared norms."""
        if self.codebook is None:
            return None
        book = torch.from_numpy(np.ascontiguousarray(self.codebook)).float()
        return book, torch.einsum("kd,kd->k", book, book)

    @cached_property
    def history(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Steps, hits (F, K) of all snapshots with this codebook size, and the last hits (K,) of the last of them."""
        steps, hits, last, errors = [], [], np.zeros(0), []
        for step in self.subject.steps:
            try:
                shot = self.subject.facts_of(step)
            except Exception as error:
                errors.append(lacking(error))
                continue
            if len(shot["counts"]) == self.codebook_size:
                steps.append(step)
                hits.append(shot["counts"])
                last = shot.get("last_hit", np.full(self.codebook_size, NOT_STORED))
        if errors:
            self._lack(errors[0])
        if len(errors) > 1:
            also = f"{len(errors) - 1:,} further snapshot{' is' if len(errors) == 2 else 's are'}"
            self._lack(f"{also} left out for reasons of this kind.")
        return (np.array(steps), np.stack(hits), last) if steps else None

    @cached_property
    def _decoder(self) -> Decoder | None:
        return None if self.index is None else Decoder(self.subject.tokenizer, self.index)

    def use_history(
        self, steps: Int[np.ndarray, "F"], ids: Int[np.ndarray, "C"], hits: np.ndarray, idle: np.ndarray
    ) -> None:
        """Take the history from a map that has read it already, in place of reading every snapshot again.

        Args:
            steps: of the snapshots.
            ids: codes that the map shows; all others have no hit.
            hits: (F, C) in each snapshot's tokens.
            idle: (F, C) steps since the last hit, `NEVER` or `NOT_STORED`. Of codes that are not shown it is not known.
        """
        if len(ids) == self.codebook_size:
            last = np.where(idle[-1] < 0, idle[-1], steps[-1] - idle[-1])
            self.__dict__["history"] = steps, hits, last  # in place of what the cached property would read

    @property
    def step_note(self) -> str:
        """Which step is looked at, where training has gone on since the network was stored; "" where it has not."""
        network, last = self.index.step if self.index is not None else None, self.history and int(self.history[0][-1])
        if network is None or last is None or network == last:
            return ""
        return (
            f"Two steps: tokens, patches, norm, nearest codes and decoded pictures are of step {network:,}, the last "
            f"checkpoint; the use through training is of snapshots up to step {last:,}."
        )

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
        one, index, everything = len(chosen) == 1, self.index, self._vectors
        nothing = np.zeros(0, np.int64)
        card = Card(
            name=self.subject.name,
            codes=chosen,
            codebook_size=self.codebook_size,
            index=index,
            typical=index.typical(chosen, PATCHES) if index and chosen else nothing,
            margin=index.at_margin(chosen, PATCHES) if index and chosen else nothing,
            near=self._near(chosen[0]) if one else [],
            beside=self._beside(chosen[0]) if one else [],
            norm=float(everything[1][list(chosen)].sqrt().mean()) if everything and chosen else None,
            life=self._life(chosen),
            parts=self._parts(chosen[0]) if one else (),
            near_inside=near_inside(*everything, chosen) if everything else None,
            beside_inside=beside_inside(index, chosen) if index and len(chosen) > 1 else None,
        )
        card.lacks.extend([*filter(None, [self.step_note]), *self.lacks])
        return self.decode(card) if decode else card

    def decode(self, card: Card) -> Card:
        """A single code's card with what the code decodes to, or why it does not.

        Cost: the decoder's pass over one picture.
        """
        if len(card.codes) != 1 or self._decoder is None:
            return card
        try:
            return replace(card, decoded=self._decoder.decode(card.codes[0]))
        except Exception as error:
            return replace(card, lacks=[*card.lacks, f"Code {card.codes[0]:,} cannot be decoded: {lacking(error)}"])

    def _parts(self, code: int) -> tuple[int, ...]:
        """Of a composite's code, whose number has the parts' indices as digits."""
        codes = self.subject.tokenizer.quantizer.codes if self.index is not None else None
        if not isinstance(codes, Parts):
            return ()
        return tuple(int(digit) for digit in codes.digits(torch.tensor(code)))

    def _near(self, code: int) -> list[Neighbour]:
        if self._vectors is None:
            return []
        book, squares = self._vectors
        rough = squares - 2 * (book @ book[code])  # up to the code's own square; never a second codebook
        rough[code] = torch.inf
        # Differences of large numbers are rough; the few nearest are measured once more.
        codes = rough.topk(min(2 * NEIGHBOURS, len(book) - 1), largest=False).indices
        distances = (book[codes] - book[code]).norm(dim=1)
        order = torch.argsort(distances, stable=True)[:NEIGHBOURS]
        return [Neighbour(int(codes[place]), float(distances[place])) for place in order]

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
        return Life(steps, hits[:, rows].sum(1), hits.sum(1), int(last[rows].max()), self.subject.counted)
