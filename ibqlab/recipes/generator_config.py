"""Settings of a generator's training run: what its recipe under experiments/ holds."""

from dataclasses import dataclass, field

from ibqlab.base import checks as bounds
from ibqlab.base.checks import require, require_at_most, require_choice
from ibqlab.generator import GeneratorConfig, SequenceConfig
from ibqlab.recipes.run_config import RunConfig, ordered_keys

SCHEDULES = ("plateau", "constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class GeneratorOptimizerConfig:
    """AdamW with a schedule, as published. Shares are of the steps of the whole run."""

    learning_rate: float = 3e-4
    """Highest step size, > 0. Published: 1e-4 per 256 images, 3e-4 at 768 (Open-MAGVIT2-XL: 2.4e-4)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's two averages, each in [0, 1). Published: 0.9 and 0.95."""
    schedule: str = "plateau"
    """After the warm-up: "plateau" stays for 5 % of the steps that remain and then falls in a straight
    line to final_share (published); "cosine" falls along half a cosine; "constant" stays."""
    warmup_share: float = 0.02
    """Share of the steps in which the rate rises in a straight line, 0 to below 1. Published: 6 of 300 epochs (B) to 9
    of 450 (XXL), which is 0.02 for all."""
    warmup_start: float = 0.005
    """Share of the highest rate at the first step, 0 to 1. Published: 0.005."""
    final_share: float = 0.1
    """Share of the highest rate at the last step, 0 to 1. Published: 0.1 (B, L), 0.01 (XL, XXL)."""
    weight_decay: float = 0.05
    """Decoupled weight decay at the first step, ≥ 0. Published: 0.05."""
    final_weight_decay: float = 0.05
    """Weight decay at the last step, ≥ 0, reached along half a cosine. Published: 0.05 (B, L, XL), 0.08 (XXL)."""
    decay_norms: bool = True
    """Decay norms and biases, too. The paper's way is False; the published code means to leave them out and then
    overwrites both groups' decay at every step, which is True."""
    clip_norm: float = 1.0
    """Longest gradient over all weights together; a longer one is scaled down to it, ≥ 0, 0 for any length.
    Published: 1."""

    def __post_init__(self):
        require(self.learning_rate > 0, f"learning_rate must be > 0, got {self.learning_rate}")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must lie in [0, 1), got {self.betas}")
        require_choice("schedule", self.schedule, SCHEDULES)
        require(0 <= self.warmup_share < 1, f"warmup_share must lie in [0, 1), got {self.warmup_share}")
        for name in ("warmup_start", "final_share"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie in 0 to 1, got {getattr(self, name)}")
        for name in ("weight_decay", "final_weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, f"{name} must be ≥ 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class GeneratorRecordConfig:
    """What a run writes down, and how often (in training steps)."""

    log_every: int = 10
    """Steps between rows of metrics.jsonl, ≥ 1."""
    validate_every: int = 100
    """Steps between validations, each with a snapshot, ≥ 1. Step 0 and the last step are always validated."""
    validation_images: int = 256
    """Images of a validation, the first ones of the validation split, ≥ 1; fewer where there are fewer."""
    checkpoint_every: int = 100
    """Steps between checkpoints, ≥ 1; the last step is always kept."""

    def __post_init__(self):
        for name, value in vars(self).items():
            require(value >= 1, f"{name} must be at least 1, got {value}")
            require_at_most(name, value, bounds.IMAGES if name == "validation_images" else bounds.STEPS)


@dataclass(frozen=True, kw_only=True)
class GeneratorSpeedConfig:
    """Ways to compute the same step. Results differ by rounding, so a run goes on with the settings it began with."""

    compile: bool = False
    """Let torch.compile fuse each block in training; validation and the loss stay as they are. Blocks share what was
    compiled. Costs a C++ compiler and time before the first step. Published: False."""
    activation_checkpointing: bool = False
    """Keep only the blocks' inputs, and compute each block again for its backward pass. Published: False."""
    sharded: bool = False
    """Cut weights, gradients and Adam's averages into one piece per process (fully sharded data parallel); each block's
    weights are gathered where they are needed. For XXL. Published: False."""


@ordered_keys(
    *("tokenizer", "tokenizer_weights", "data", "tokens", "index_permutation", "generator"),
    *("optimizer", "record", "speed", "steps", "batch_size", "accumulate", "processes"),
    *("accelerator", "precision", "seed", "plugins"),
)
@dataclass(frozen=True, kw_only=True)
class GeneratorTrainConfig(RunConfig):
    """One training run of a generator over a trained tokenizer's tokens."""

    tokenizer: str = ""
    """The trained tokenizer: a published file, an export, or a run's folder or name in the folder of all runs. It is
    kept in the run folder. Paper: IBQ with 16,384 codes."""
    tokenizer_weights: str = "ema"
    """"ema" (published for IBQ) or "raw" (published for Open-MAGVIT2)."""
    tokens: str = ""
    """A folder that `ibqlab tokenize` wrote, or its name in the folder of all runs, which saves the tokenizer's work at
    every step; empty: tokenize on the fly, as published."""
    index_permutation: int = -1
    """Seed of a permutation of the code numbers, ≥ 0, to measure what the numbering is worth; −1 keeps the tokenizer's.
    Published: −1."""
    generator: SequenceConfig = field(default_factory=GeneratorConfig)
    """The transformer: `name: ibq`, `name: llamagen` or `name: magvit2`, with a published `preset` or its own
    settings."""
    optimizer: GeneratorOptimizerConfig = field(default_factory=GeneratorOptimizerConfig)
    """AdamW and its schedule."""
    record: GeneratorRecordConfig = field(default_factory=GeneratorRecordConfig)
    """What is written down."""
    speed: GeneratorSpeedConfig = field(default_factory=GeneratorSpeedConfig)
    """How a step is computed; changes no result beyond rounding."""

    def __post_init__(self):
        super().__post_init__()
        # Bounds that no honest use reaches; the designs have different sizes.
        limits = {
            "width": bounds.CHANNELS,
            "num_heads": bounds.CHANNELS,
            "hidden_multiple": bounds.CHANNELS,
            "grid_size": bounds.BLOCKS,
            "num_classes": bounds.CLASSES,
            "vocabulary_size": bounds.CODES,
            **dict.fromkeys(("depth", "spatial_depth", "factorized_depth"), bounds.BLOCKS),
        }
        for name, limit in limits.items():
            require_at_most(f"generator.{name}", getattr(self.generator, name, 0), limit)
        require(
            self.processes > 1 or not self.speed.sharded,
            "speed.sharded cuts weights into one piece per process and needs at least 2; got processes=1. "
            "Use speed.sharded=false.",
        )
        require_choice("tokenizer_weights", self.tokenizer_weights, ("ema", "raw"))
        require(-1 <= self.index_permutation < 2**31, f"index_permutation must be ≥ −1, got {self.index_permutation}")
