"""Settings of a training run: what a recipe under experiments/ holds."""

from dataclasses import dataclass, field

from ibqlab.data import DataConfig
from ibqlab.quantizers.base import require, require_choice
from ibqlab.tokenizer import TokenizerConfig

PRECISIONS = ("32-true", "bf16-mixed")
ACCELERATORS = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses beside the quantizer's own, which stand in the quantizer's settings."""

    reconstruction_weight: float = 1.0
    """Weight of mean|x − x̂|, ≥ 0. Published: 1."""

    def __post_init__(self):
        require(self.reconstruction_weight >= 0, f"reconstruction_weight must be ≥ 0, got {self.reconstruction_weight}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, as published, without weight decay."""

    learning_rate: float = 1e-4
    """Step size, > 0. Published: 1e-4 at 256 images per step."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Decay of Adam's two averages, each in [0, 1). Published: 0.5 and 0.9."""

    def __post_init__(self):
        require(self.learning_rate > 0, f"learning_rate must be > 0, got {self.learning_rate}")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must lie in [0, 1), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What a run writes down about its codebook, and how often (in training steps)."""

    log_every: int = 10
    """Steps between rows of metrics.jsonl, ≥ 1."""
    validate_every: int = 100
    """Steps between validations, each with a snapshot, ≥ 1. Step 0 and the last step are always validated."""
    early_snapshots: tuple[int, ...] = ()
    """Further steps to validate at: collapse is decided in the first ones."""
    checkpoint_every: int = 100
    """Steps between checkpoints, ≥ 1; the last step is always kept."""
    tokens_per_code: int = 10
    """Usage is counted on at least this many tokens per code, in the training window and in validation, ≥ 1. Fewer
    than 10 make it meaningless."""
    probe_tokens: int = 256
    """Tokens on which distances and softmax perplexity are measured at a logged step, ≥ 1."""
    snapshot_features: int = 1024
    """Encoder features kept in a snapshot, from the first validation images, ≥ 1."""
    snapshot_images: int = 8
    """Validation images kept with their reconstructions in a snapshot, ≥ 1."""

    def __post_init__(self):
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        for name, value in counts.items():
            require(value >= 1, f"{name} must be at least 1, got {value}")
        require(all(step >= 0 for step in self.early_snapshots), f"early_snapshots must be ≥ 0: {self.early_snapshots}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Encoder, quantizer, decoder."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses beside the quantizer's."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam."""
    record: RecordConfig = field(default_factory=RecordConfig)
    """What is written down."""
    steps: int = 300
    """Optimiser steps, ≥ 1."""
    batch_size: int = 16
    """Images per optimiser step over all processes and accumulated parts, ≥ 1. Published: 256."""
    accumulate: int = 1
    """Parts into which each process's share of a batch is cut to save memory, ≥ 1. The entropy penalty and moving
    averages see one part at a time."""
    processes: int = 1
    """Processes that train together, started by torchrun; fewer is an error. Published: 64."""
    accelerator: str = "auto"
    """"cpu", "cuda", or "auto": CUDA where there is one."""
    precision: str = "32-true"
    """"32-true" or "bf16-mixed". Quantizer and losses stay in float32 either way."""
    ema_decay: float = 0.999
    """Decay per step of the averaged weights that evaluation may use, in [0, 1); 0 keeps none. Published: 0.999."""
    seed: int = 0
    """Seed of weights, crops and order, 0 to 2³¹ − 1. All randomness of a step comes from it and the step's number."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "processes"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        parts = self.processes * self.accumulate
        require(
            self.batch_size % parts == 0,
            f"batch_size {self.batch_size} must be a multiple of processes × accumulate = {parts}",
        )
        require_choice("accelerator", self.accelerator, ACCELERATORS)
        require_choice("precision", self.precision, PRECISIONS)
        require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        require(0 <= self.seed < 2**31, f"seed must lie in 0 … 2147483647, got {self.seed}")
