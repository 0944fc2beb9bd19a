"""The fifth case: VQ training that goes on from weights alone, without the discriminator trained beside them."""

from pathlib import Path

import pandas as pd

from ibqlab.pretrained import export_tokenizer
from ibqlab.runs import Run
from ibqlab.studies.cases.case import COMPARED, REMEDY, REPORTED, SHARE, Arm, Case, CaseMeasure, Claim
from ibqlab.training import recipe_config, train

_RECIPE = (
    "data.source=digits",
    "tokenizer.quantizer={name: vq, codebook_size: 64, codebook_init: kmeans}",
    "loss.adversarial_weight=0.1",
    "loss.lecam_weight=0.05",
    "loss.discriminator={base_channels: 16, num_layers: 2}",
    "record.log_every=1",
    "record.snapshot_features=16",
    "record.alarm=off",
    "record.checkpoint_every=1000",
    "ema_decay=0",
    "batch_size=8",
)
"""Changes to the recipe builtin/smoke: a VQ with the adversarial loss on."""
VALIDATED = (1, 2, 5, 10, 20)
"""Steps after which the continued run is validated: what is lost is lost in the first ones."""
PARENT_STEPS = 3
"""The checkpoint is so many times as old as the continued run is long."""
LOST_AT = 2
"""Validation after the start, in the order of `VALIDATED`, at which PSNR is compared with that of the checkpoint."""
EARLY_STEPS = 10
"""Over which the discriminator's margin is averaged."""


def _train(folder: Path, steps: int, seed: int, *settings: str) -> Run:
    typed = [*_RECIPE, f"record.validate_every={steps}", f"steps={steps}", f"seed={seed}", *settings]
    return train(recipe_config("builtin/smoke", assignments=typed), folder, progress=False)


def _play_continued(arm: Arm, seed: int, steps: int, folder: Path) -> pd.DataFrame:
    """Train once per seed, then go on from the run folder or from its exported weights."""
    parent = _train(folder / "checkpoint", PARENT_STEPS * steps, seed)
    start = parent.path
    if arm.settings["weights_only"]:
        start = folder / "weights.safetensors"
        if not start.exists():
            export_tokenizer(parent.path, start, weights="raw")
    early = [step for step in VALIDATED if step < steps]
    run = _train(
        folder / arm.key,
        steps,
        seed + 100,
        f"start_from={start}",
        f"record.early_snapshots={early}",
        *arm.settings["typed"],
    )
    rows = run.metrics.rename(columns={"step": "x"})
    rows["discriminator_margin"] = rows.get("logits_real", pd.NA) - rows.get("logits_fake", pd.NA)
    rows["discriminator_margin"] = pd.to_numeric(rows["discriminator_margin"])
    return rows[["x", "validation_psnr", "validation_usage", "discriminator_margin"]]


def _changes(curve: pd.DataFrame) -> dict[str, float]:
    """What the first two steps change, what the end has gained, and what the discriminator tells apart at first."""
    psnr = curve["validation_psnr"].dropna()
    early = curve[(curve["x"] >= 1) & (curve["x"] <= EARLY_STEPS)]
    return {
        "psnr_change": float(psnr.iloc[: 1 + LOST_AT].iloc[-1] - psnr.iloc[0]),
        "psnr_gained": float(psnr.iloc[-1] - psnr.iloc[0]),
        "early_margin": float(early["discriminator_margin"].mean()),
    }


def _arm(key: str, label: str, role: str, *, weights_only: bool, typed: tuple[str, ...] = (), remedy: str = "") -> Arm:
    return Arm(
        key=key,
        label=label,
        role=role,
        settings={"weights_only": weights_only, "typed": typed},
        typed=remedy or " ".join(typed),
    )


NO_DISCRIMINATOR = Case(
    name="no_discriminator",
    title="VQ from a checkpoint without discriminator",
    symptom="Fine-tuning from published weights: the file holds the tokenizer and neither discriminator nor optimiser. "
    "What is lost (LlamaGen #15, chameleon #65)?",
    setting="VQ with the adversarial loss on digits of 16 × 16 pixels. It is trained, exported as weights alone, and "
    "trained on from both.",
    arms=(
        _arm("run_folder", "run folder, with its discriminator", COMPARED, weights_only=False),
        _arm("weights", "weights alone", REPORTED, weights_only=True),
        _arm(
            "weights_rate",
            "weights alone, rate/10",
            REMEDY,
            weights_only=True,
            typed=("optimizer.learning_rate=1e-4",),
            remedy="optimizer.learning_rate=1e-5 (a tenth of the rate before)",
        ),
        _arm(
            "weights_later",
            "weights alone, GAN later",
            REMEDY,
            weights_only=True,
            typed=("loss.discriminator_start=20",),
            remedy="loss.discriminator_start=20 (later in longer runs)",
        ),
    ),
    measures=(
        CaseMeasure(key="validation_psnr", title="PSNR", unit=" dB", decimals=2),
        CaseMeasure(key="validation_usage", title="usage", unit=" %", scale=100, bounds=SHARE),
        CaseMeasure(
            key="discriminator_margin",
            title="discriminator's margin",
            axis="logits, images − rebuilt",
            decimals=2,
            is_change=True,
        ),
        CaseMeasure(
            key="psnr_change",
            title="change of PSNR in the first two steps",
            unit=" dB",
            decimals=2,
            is_change=True,
            drawn=False,
        ),
        CaseMeasure(
            key="psnr_gained", title="PSNR gained at the end", unit=" dB", decimals=2, is_change=True, drawn=False
        ),
        CaseMeasure(key="early_margin", title="margin in the first steps", decimals=2, is_change=True, drawn=False),
    ),
    claims=(
        Claim(
            kind="symptom",
            measure="early_margin",
            arm="weights",
            against="run_folder",
            lower=True,
            says=f"in the first {EARLY_STEPS} steps a fresh discriminator tells images from reconstructions less well",
        ),
        Claim(
            kind="symptom",
            measure="psnr_change",
            arm="weights",
            against="run_folder",
            lower=True,
            says="in the first two steps weights alone lose more PSNR than the run folder",
        ),
        Claim(
            kind="symptom",
            measure="validation_usage",
            arm="weights",
            against="run_folder",
            lower=True,
            says="usage ends lower from weights alone",
        ),
        Claim(
            kind="cause",
            measure="psnr_change",
            arm="run_folder",
            lower=True,
            says="PSNR falls in the first two steps with the checkpoint's own discriminator, too",
        ),
        Claim(
            kind="remedy",
            measure="psnr_change",
            arm="weights_rate",
            against="weights",
            says="a tenth of the rate loses less PSNR",
        ),
        Claim(
            kind="remedy",
            measure="psnr_change",
            arm="weights_later",
            against="weights",
            says="a discriminator that joins later loses less PSNR in the first two steps",
        ),
        Claim(
            kind="remedy",
            measure="psnr_gained",
            arm="weights_rate",
            against="weights",
            says="at the end a tenth of the rate has gained more PSNR",
        ),
    ),
    runner=_play_continued,
    ends=_changes,
    steps=40,
)
