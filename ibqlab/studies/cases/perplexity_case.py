"""The fourth case: one codebook, counted in batches of many sizes."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ibqlab.diagnostics.lab import World
from ibqlab.diagnostics.usage import TOKENS_PER_CODE, count_indices, perplexity
from ibqlab.quantizers import nearest_code
from ibqlab.studies.cases.case import REMEDY, REPORTED, SHARE, Arm, Case, CaseMeasure, Claim
from ibqlab.studies.cases.lab_cases import play

BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Tokens of a batch."""
SIZE = 256
"""K."""
_WORLD = {"dim": 8, "clusters": 64, "width": 0.3, "encoder": "fixed"}


def _play_counting(arm: Arm, seed: int, steps: int, folder: Path) -> pd.DataFrame:
    """Perplexity and usage of one trained codebook as a training loop would report them, by the size of its batch."""
    # Both arms count the same run, which is made once.
    trained = Arm(key="trained", label="", settings=arm.settings)
    result = play(trained, seed, steps, folder)
    codebook = torch.from_numpy(result.snapshot("trained")["codebook"])
    tokens = World(seed=seed, **_WORLD).points(8 * max(BATCHES), 1, validation=True)
    indices = nearest_code(tokens, codebook)
    least = TOKENS_PER_CODE * SIZE if arm.settings["window"] else 0
    rows = []
    for batch in BATCHES:
        # Without a window each batch is counted by itself; with one, as many batches as hold 10·K tokens.
        parts = indices.split(max(batch, -(-least // batch) * batch))
        counts = [count_indices(part, SIZE) for part in parts if len(part) == len(parts[0])]
        means = {
            "counted_perplexity": float(np.mean([perplexity(c) for c in counts])),
            "counted_usage": float(np.mean([float((c > 0).float().mean()) for c in counts])),
        }
        rows.append({"x": batch, **means})
    return pd.DataFrame(rows)


def _spread(curve: pd.DataFrame) -> dict[str, float]:
    """What the smallest batch reads, and how far the largest reads above it."""
    values = curve["counted_perplexity"]
    return {
        "perplexity_spread": float(values.iloc[-1] - values.iloc[0]),
        "smallest_perplexity": float(values.iloc[0]),
    }


def _arm(key: str, label: str, role: str, window: bool, typed: str = "") -> Arm:
    settings = {
        "world": _WORLD,
        "quantizer": {"name": "vq", "codebook_init": "kmeans"},
        "lab": {"codebook_size": SIZE, "batch_size": 256},
        "window": window,
    }
    return Arm(key=key, label=label, role=role, settings=settings, typed=typed)


BATCH_PERPLEXITY = Case(
    name="batch_perplexity",
    title="Perplexity that depends on the batch",
    symptom="Two trainings of the same codebook report different perplexity and usage, and the one with the larger "
    "batch looks healthier (SimVQ #3 asks how usage is measured).",
    setting=f"One VQ codebook, K = {SIZE}, trained once per seed; the same tokens in batches of {BATCHES[0]} to "
    f"{BATCHES[-1]:,}.",
    arms=(
        _arm("each_batch", "each batch by itself", REPORTED, window=False),
        _arm(
            "window",
            f"window of {TOKENS_PER_CODE}·K tokens",
            REMEDY,
            window=True,
            typed="measure_usage(indices, codebook_size=K) of at least 10·K indices",
        ),
    ),
    measures=(
        CaseMeasure(key="counted_perplexity", title="perplexity", unit=" codes", limit=SIZE, limit_text="K"),
        CaseMeasure(key="counted_usage", title="usage", unit=" %", scale=100, bounds=SHARE),
        CaseMeasure(
            key="perplexity_spread",
            title="perplexity at the largest batch minus the smallest",
            unit=" codes",
            is_change=True,
            drawn=False,
        ),
        CaseMeasure(
            key="smallest_perplexity",
            title=f"perplexity in batches of {BATCHES[0]}",
            unit=" codes",
            drawn=False,
        ),
    ),
    claims=(
        Claim(
            kind="symptom",
            measure="perplexity_spread",
            arm="each_batch",
            says=f"the same codebook reads a higher perplexity in {BATCHES[-1]:,} tokens than in {BATCHES[0]}",
        ),
        Claim(
            kind="cause",
            measure="perplexity_spread",
            arm="window",
            against="each_batch",
            lower=True,
            says="the same codebook and tokens, counted in equally many tokens each time, differ less",
        ),
        Claim(
            kind="remedy",
            measure="smallest_perplexity",
            arm="window",
            against="each_batch",
            says=f"a window of {TOKENS_PER_CODE}·K tokens reads more codes, though filled by batches of {BATCHES[0]}",
        ),
    ),
    runner=_play_counting,
    ends=_spread,
    steps=150,
    x_title="tokens in a batch",
    x_log=True,
    caveat=f"A batch of n tokens cannot read a perplexity above n: {BATCHES[0]} at most for the smallest.",
)
