"""Three cases in the lab without images: a run takes seconds, and one thing changes at a time.

In all of them a small encoder or a drift moves the features, because a codebook among features that stand still shows
none of these troubles.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from ibqlab.diagnostics.lab import LabResult, World, run_lab
from ibqlab.studies.cases.case import COMPARED, REMEDY, REPORTED, SHARE, Arm, Case, CaseMeasure, Claim

USAGE = CaseMeasure(key="validation_usage", title="usage", unit=" %", scale=100, bounds=SHARE)
FLOAT16_MOST = 65_504
"""The largest number of float16."""
ENTROPY_TEMPERATURE = 0.01
"""τ of the published entropy, which divides z·C."""
EPOCHS = 6
"""Of a run of the second case; the lab has no epochs of its own, so a sixth of the steps stands for one."""


def play(arm: Arm, seed: int, steps: int, folder: Path) -> LabResult:
    """One lab run of an arm, in a run folder of its name.

    Args:
        arm: its settings are `world` and `quantizer`, and fields of `LabSettings` under `lab`.
        seed: of points, networks and codes.
        steps: of the run.
        folder: of the case and seed.
    """
    world, settings = World(seed=seed, **arm.settings["world"]), {"codebook_size": 256, "snapshots": 16}
    settings |= arm.settings.get("lab", {}) | {"steps": steps, "seed": seed}
    return run_lab(world, {arm.key: arm.settings["quantizer"]}, folder=folder, progress=False, **settings)


def play_rows(arm: Arm, seed: int, steps: int, folder: Path) -> pd.DataFrame:
    """All rows of a run; usage stands in validated ones, the recorder's numbers in logged ones."""
    (run,) = play(arm, seed, steps, folder).runs.values()
    return pd.DataFrame(list(run.rows)).rename(columns={"step": "x"})


# --- dimension 256 dies and 32 lives ---------------------------------------------------------------------------------


def _dimension_arm(key: str, label: str, dim: int, *, role: str, rate: float, start: str, typed: str = "") -> Arm:
    # Features fill the space, and the encoder learns: standard normal points, through a network that starts near them.
    world = {"dim": dim, "clusters": 64, "width": 1.0, "encoder": "learning"}
    settings = {
        "world": world,
        "quantizer": {"name": "ibq", "codebook_init": start},
        "lab": {"batch_size": 256, "learning_rate": rate},
    }
    return Arm(key=key, label=label, role=role, settings=settings, typed=typed)


DIMENSION = Case(
    name="dimension",
    title="Dimension 256 dies and 32 lives",
    symptom="IBQ's usage falls towards 0 % at code dimension 256; at 32 everything else equal it stays high "
    "(SEED-Voken #59).",
    setting="IBQ over an encoder that learns, K = 256, codes from N(0, 1) and learning rate 0.01 where the name "
    "does not say otherwise.",
    arms=(
        _dimension_arm("dim32", "D = 32", 32, role=COMPARED, rate=0.01, start="normal"),
        _dimension_arm("dim256", "D = 256", 256, role=REPORTED, rate=0.01, start="normal"),
        _dimension_arm(
            "dim256_rate",
            "D = 256, rate/10",
            256,
            role=REMEDY,
            rate=0.001,
            start="normal",
            typed="optimizer.learning_rate=1e-5",
        ),
        _dimension_arm(
            "dim256_unit",
            "D = 256, N(0, 1/D)",
            256,
            role=REMEDY,
            rate=0.01,
            start="unit",
            typed="tokenizer.quantizer.codebook_init=unit",
        ),
        _dimension_arm(
            "dim256_both",
            "D = 256, N(0, 1/D), rate/10",
            256,
            role=REMEDY,
            rate=0.001,
            start="unit",
            typed="tokenizer.quantizer.codebook_init=unit optimizer.learning_rate=1e-5",
        ),
    ),
    measures=(
        USAGE,
        CaseMeasure(key="softmax_perplexity", title="codes per token in softmax(z·C)", log=True),
        CaseMeasure.listed("gradient_reach"),
        CaseMeasure.listed("feature_norm_mean", drawn=False),
    ),
    claims=(
        Claim(
            kind="symptom",
            measure="validation_usage",
            arm="dim256",
            against="dim32",
            lower=True,
            says="at D = 256 usage ends lower than at D = 32",
        ),
        Claim(
            kind="cause",
            measure="softmax_perplexity",
            arm="dim256",
            against="dim32",
            lower=True,
            says="at D = 256 the softmax over z·C holds fewer codes per token",
        ),
        Claim(
            kind="cause",
            measure="gradient_reach",
            arm="dim256",
            against="dim32",
            lower=True,
            says="at D = 256 a step's gradient reaches fewer codes",
        ),
        Claim(
            kind="cause",
            measure="softmax_perplexity",
            arm="dim256_both",
            against="dim256",
            says="shorter codes and a lower rate leave the softmax at D = 256 more codes per token",
        ),
        Claim(
            kind="remedy",
            measure="validation_usage",
            arm="dim256_rate",
            against="dim256",
            says="a tenth of the rate alone raises usage",
        ),
        Claim(
            kind="remedy",
            measure="validation_usage",
            arm="dim256_unit",
            against="dim256",
            says="codes of norm 1 alone raise usage",
        ),
        Claim(
            kind="remedy",
            measure="validation_usage",
            arm="dim256_both",
            against="dim256",
            says="both together raise usage",
        ),
    ),
    runner=play_rows,
    steps=150,
    caveat="The report says usage of 0 % on images; how low it ends here stands in the table.",
)


# --- usage falls after epoch one -------------------------------------------------------------------------------------


def _epoch_arm(
    key: str, label: str, role: str, *, encoder: str, quantizer: Mapping[str, object], typed: str = ""
) -> Arm:
    world = {"dim": 8, "clusters": 64, "width": 0.3, "encoder": encoder}
    settings = {"world": world, "quantizer": quantizer, "lab": {"batch_size": 256}}
    return Arm(key=key, label=label, role=role, settings=settings, typed=typed)


def _usage_change(curve: pd.DataFrame) -> dict[str, float]:
    """Usage at the end minus usage after epoch one."""
    usage = curve.set_index("x")["validation_usage"].dropna()
    after_one = usage[usage.index <= max(1, usage.index.max() / EPOCHS)]
    return {"usage_change": float(usage.iloc[-1] - after_one.iloc[-1])}


AFTER_EPOCH_ONE = Case(
    name="after_epoch_one",
    title="Usage falls after epoch one",
    symptom="Usage is high after the first epoch and then falls from epoch to epoch, though k-means gave every code a "
    "place among the features.",
    setting="VQ from k-means, K = 256, D = 8, features that drift as an encoder's do; a sixth of the run stands for an "
    "epoch.",
    arms=(
        _epoch_arm(
            "fixed",
            "encoder held fixed",
            COMPARED,
            encoder="fixed",
            quantizer={"name": "vq", "codebook_init": "kmeans"},
        ),
        _epoch_arm(
            "drifting",
            "encoder drifts",
            REPORTED,
            encoder="drifting",
            quantizer={"name": "vq", "codebook_init": "kmeans"},
        ),
        _epoch_arm(
            "revived",
            "drifts, dead codes revived",
            REMEDY,
            encoder="drifting",
            quantizer={"name": "vq", "codebook_init": "kmeans", "revive_after": 20},
            typed="revive_after=20 under tokenizer.quantizer",
        ),
        _epoch_arm(
            "simvq",
            "drifts, one map for all codes",
            REMEDY,
            encoder="drifting",
            quantizer={"name": "simvq"},
            typed="tokenizer.quantizer.name=simvq",
        ),
    ),
    measures=(
        USAGE,
        CaseMeasure(key="code_to_feature_distance", title="distance of codes to features", decimals=2),
        CaseMeasure(
            key="usage_change", title="usage since epoch one", unit=" points", scale=100, is_change=True, drawn=False
        ),
    ),
    claims=(
        Claim(
            kind="symptom",
            measure="usage_change",
            arm="drifting",
            lower=True,
            says="usage falls after epoch one",
        ),
        Claim(
            kind="cause",
            measure="usage_change",
            arm="drifting",
            against="fixed",
            lower=True,
            says="usage falls more where the encoder drifts than where it is held fixed",
        ),
        Claim(
            kind="cause",
            measure="code_to_feature_distance",
            arm="drifting",
            against="fixed",
            says="codes end further from the features where the encoder drifts",
        ),
        Claim(
            kind="remedy",
            measure="validation_usage",
            arm="revived",
            against="drifting",
            says="revival of codes that were not chosen for 20 steps keeps usage up",
        ),
        Claim(
            kind="remedy",
            measure="validation_usage",
            arm="simvq",
            against="drifting",
            says="one learned map that moves all codes at once (SimVQ) ends with more usage",
        ),
    ),
    runner=play_rows,
    ends=_usage_change,
    epochs=EPOCHS,
    steps=300,
)


# --- NaN when the batch was reduced and the rate kept ----------------------------------------------------------------


def _batch_arm(
    key: str, label: str, role: str, *, batch: int, rate: float, precision: str = "float16", typed: str = ""
) -> Arm:
    settings = {
        "world": {"dim": 256, "clusters": 64, "width": 1.0, "encoder": "learning"},
        "quantizer": {"name": "ibq"},
        "lab": {"batch_size": batch, "learning_rate": rate},
        "precision": precision,
    }
    return Arm(key=key, label=label, role=role, settings=settings, typed=typed)


def _play_entropy(arm: Arm, seed: int, steps: int, folder: Path) -> pd.DataFrame:
    """The published entropy of each snapshot's tokens, with z·C / τ in the arm's number type."""
    result, rows = play(arm, seed, steps, folder), []
    kind = getattr(torch, arm.settings["precision"])
    for step in result.snapshot_steps:
        snapshot = result.snapshot(arm.key, step)
        features, codebook = (torch.from_numpy(snapshot[name]) for name in ("features", "codebook"))
        largest = float((features @ codebook.T).max()) / ENTROPY_TEMPERATURE  # in float32, whatever the arm's type
        # As autocast computes it: product and division in the short type, the softmax in float32.
        logits = ((features.to(kind) @ codebook.to(kind).T) / ENTROPY_TEMPERATURE).float()  # (M, K)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
        rows.append(
            {"x": step, "largest_logit": largest, "nan_tokens": float((~torch.isfinite(entropy)).float().mean())}
        )
    return pd.DataFrame(rows)


def _nan_at_any_step(curve: pd.DataFrame) -> dict[str, float]:
    """One step with a NaN ends a run, so the worst counts."""
    return {"nan_steps": float((curve["nan_tokens"] > 0).mean()), "largest_logit": float(curve["largest_logit"].max())}


SMALL_BATCH = Case(
    name="small_batch",
    title="NaN when the batch was reduced and the rate kept",
    symptom="IBQ's training ends in NaN after hours; only the batch is smaller than published, the learning rate is "
    "not (SEED-Voken #53).",
    setting="IBQ over an encoder that learns, K = 256, D = 256, trained in float32. On each snapshot's features and "
    "codes the published entropy is computed once more with z·C / 0.01 in float16, as 16-mixed does.",
    arms=(
        _batch_arm("batch256", "batch 256", COMPARED, batch=256, rate=0.01),
        _batch_arm("batch16", "batch 16, rate kept", REPORTED, batch=16, rate=0.01),
        _batch_arm(
            "batch16_rate",
            "batch 16, rate/16",
            REMEDY,
            batch=16,
            rate=0.01 / 16,
            typed="optimizer.learning_rate=6.25e-6",
        ),
        _batch_arm(
            "batch16_float32",
            "batch 16, rate kept, float32",
            REMEDY,
            batch=16,
            rate=0.01,
            precision="float32",
            typed="precision=32-true",
        ),
    ),
    measures=(
        CaseMeasure(
            key="largest_logit",
            title="largest z·C / 0.01",
            decimals=0,
            log=True,
            limit=FLOAT16_MOST,
            limit_text="float16 ends here",
        ),
        CaseMeasure(key="nan_tokens", title="tokens whose entropy is NaN", unit=" %", scale=100, bounds=SHARE),
        CaseMeasure(key="nan_steps", title="snapshots with a NaN", unit=" %", scale=100, bounds=SHARE, drawn=False),
    ),
    claims=(
        Claim(
            kind="symptom",
            measure="nan_steps",
            arm="batch16",
            against="batch256",
            says="with the small batch more snapshots hold a NaN",
        ),
        Claim(
            kind="cause",
            measure="largest_logit",
            arm="batch16",
            against="batch256",
            says="at the same rate the small batch drives z·C higher",
        ),
        Claim(
            kind="remedy",
            measure="nan_steps",
            arm="batch16_rate",
            against="batch16",
            lower=True,
            says="a rate lowered with the batch leaves fewer snapshots with a NaN",
        ),
        Claim(
            kind="remedy",
            measure="nan_steps",
            arm="batch16_float32",
            against="batch16",
            lower=True,
            says="the same features and codes give fewer snapshots with a NaN where z·C is computed in float32",
        ),
    ),
    runner=_play_entropy,
    ends=_nan_at_any_step,
    steps=150,
    caveat="Training itself does not end in NaN here: this library computes z·C in float32 whatever the precision. "
    "What is reproduced is the overflow that the published float16 step would meet.",
)
