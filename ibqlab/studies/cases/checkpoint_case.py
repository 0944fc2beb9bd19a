"""The fifth case: VQ training that goes on from weights alone, without the discriminator that was trained beside them."""

from pathlib import Path

import pandas as pd

from ibqlab.pretrained import export_tokenizer
from ibqlab.runs import Run
from ibqlab.studies.cases.case import REMEDY, REPORTED, Arm, Case, CaseMeasure, Claim
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
    rows["fresh_discriminator"] = float(run.provenance["start"]["discriminator"] == "fresh")
    return rows[["x", "validation_psnr", "validation_usage", "discriminator_margin", "fresh_discriminator"]]


def _losses(curve: pd.DataFrame) -> dict[str, float]:
    """What the first steps lose, what the end has gained, and what the discriminator tells apart at first."""
    psnr = curve["validation_psnr"].dropna()
    early = curve[(curve["x"] >= 1) & (curve["x"] <= EARLY_STEPS)]
    return {
        "psnr_lost": float(psnr.iloc[0] - psnr.min()),
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
    symptom="Fine-tuning from published weights: the file holds the tokenizer and neither discriminator nor optimiser, and "
    "reconstructions get worse at first (LlamaGen #15, chameleon #65).",
    setting="VQ with the adversarial loss on digits of 16 × 16 pixels. It is trained, exported as weights alone, and trained "
    "on from both.",
    arms=(
        _arm("run_folder", "run folder, with its discriminator", "compared", weights_only=False),
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
        CaseMeasure(key="validation_usage", title="usage", unit=" %", scale=100),
        CaseMeasure(key="discriminator_margin", title="discriminator: logits of images − reconstructions", decimals=2),
        CaseMeasure(key="psnr_lost", title="most PSNR lost since the start", unit=" dB", decimals=2, drawn=False),
        CaseMeasure(key="psnr_gained", title="PSNR gained at the end", unit=" dB", decimals=2, drawn=False),
        CaseMeasure(key="early_margin", title="margin in the first steps", decimals=2, drawn=False),
    ),
    claims=(
        Claim(
            kind="symptom",
            measure="psnr_lost",
            arm="weights",
            says="training on from weights alone first loses PSNR",
        ),
        Claim(
            kind="cause",
            measure="psnr_lost",
            arm="weights",
            against="run_folder",
            says="more PSNR is lost from weights alone than with the checkpoint's own discriminator",
        ),
        Claim(
            kind="cause",
            measure="psnr_lost",
            arm="run_folder",
            says="the checkpoint's own discriminator does not prevent the loss: both optimisers start fresh either way",
        ),
        Claim(
            kind="cause",
            measure="early_margin",
            arm="weights",
            against="run_folder",
            lower=True,
            says=f"in the first {EARLY_STEPS} steps a fresh discriminator tells images from reconstructions less well",
        ),
        Claim(
            kind="remedy",
            measure="psnr_lost",
            arm="weights_rate",
            against="weights",
            lower=True,
            says="a tenth of the rate loses less PSNR",
        ),
        Claim(
            kind="remedy",
            measure="psnr_lost",
            arm="weights_later",
            against="weights",
            lower=True,
            says="a discriminator that joins later leaves less PSNR lost",
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
    ends=_losses,
    steps=40,
)
