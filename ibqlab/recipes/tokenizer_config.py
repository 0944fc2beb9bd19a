"""Settings of a tokenizer's training run: what its recipe under experiments/ holds."""

from dataclasses import dataclass, field, replace

import torch

from ibqlab.base import checks as bounds
from ibqlab.base.checks import require, require_at_most, require_choice
from ibqlab.recipes.run_config import RunConfig, ordered_keys
from ibqlab.tokenizer import TokenizerConfig
from ibqlab.tokenizer.discriminator import DiscriminatorConfig

LEVELS = 16
"""Levels of an autoencoder or discriminator, each of which halves the image."""
DISCRIMINATOR_LOSSES = ("hinge", "vanilla", "non_saturating")
PERCEPTUAL_NETS = ("vgg", "alex")
CODEBOOK_AVERAGE_STARTS = ("placeholder", "codes")
START_WEIGHTS = ("", "ema", "raw")
GROWTH_RULES = ("split", "tokens")
ALARMS = ("warn", "stop", "off")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses beside the quantizer's own, which stand in the quantizer's settings.

    loss = reconstruction_weight·L1 + perceptual_weight·LPIPS + adversarial_weight·G + quantizer's loss, while the
    discriminator learns its own loss + lecam_weight·LeCAM. LPIPS and discriminator are off unless a recipe turns them
    on: the first needs a weight file, the second doubles the cost of small runs. Tables name what a run had.
    """

    reconstruction_weight: float = 1.0
    """Weight of mean|x − x̂|, ≥ 0. Published: 1."""
    perceptual_weight: float = 0.0
    """Weight of LPIPS, ≥ 0; 0 leaves it out and needs no weight file. Published: 1."""
    perceptual_net: str = "vgg"
    """Network of LPIPS: "vgg" (published) or "alex"."""
    perceptual_weights: str = ""
    """File of that network's ImageNet weights; empty: torch's own cache of downloads."""
    adversarial_weight: float = 0.0
    """Weight of the generator's adversarial loss, ≥ 0; 0 trains without a discriminator. Published: 0.1."""
    adaptive_weight: bool = False
    """Multiply adversarial_weight by the ratio of gradients at the decoder's last layer, as VQGAN does. Published IBQ:
    False; its configurations hold a disc_weight of 0.4 for this, which nothing reads."""
    discriminator_loss: str = "hinge"
    """What the discriminator learns: "hinge" (published), "vanilla" or "non_saturating". The generator's loss is
    non-saturating with each of them, as published."""
    discriminator_first: bool = True
    """The discriminator learns from a batch before it judges the tokenizer (IBQ, published). False: after it
    (Open-MAGVIT2, published)."""
    discriminator_start: int = 0
    """Steps of training before the discriminator joins, ≥ 0. Published: 0."""
    lecam_weight: float = 0.0
    """Weight of the LeCAM regulariser in the discriminator's loss, ≥ 0. Published: 0.05."""
    lecam_decay: float = 0.999
    """Decay of LeCAM's averages, in [0, 1). Published: 0.999."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The discriminator's width and depth."""

    def __post_init__(self):
        for name in ("reconstruction_weight", "perceptual_weight", "adversarial_weight", "lecam_weight"):
            require(getattr(self, name) >= 0, f"{name} must be ≥ 0, got {getattr(self, name)}")
        require(self.discriminator_start >= 0, f"discriminator_start must be ≥ 0, got {self.discriminator_start}")
        require(0 <= self.lecam_decay < 1, f"lecam_decay must lie in [0, 1), got {self.lecam_decay}")
        require_choice("perceptual_net", self.perceptual_net, PERCEPTUAL_NETS)
        require_choice("discriminator_loss", self.discriminator_loss, DISCRIMINATOR_LOSSES)

    def describe(self) -> str:
        """The losses in a few words, for tables: "L1 + LPIPS (vgg) + hinge GAN"; what is missing is named."""
        perceptual = f" + LPIPS ({self.perceptual_net})" if self.perceptual_weight else ""
        adversarial = f" + {self.discriminator_loss} GAN" if self.adversarial_weight else ""
        missing = [name for name, words in {"LPIPS": perceptual, "GAN": adversarial}.items() if not words]
        return f"L1{perceptual}{adversarial}" + (f", no {', no '.join(missing)}" if missing else "")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, as published; one each for tokenizer and discriminator, with the same settings."""

    learning_rate: float = 1e-4
    """Step size, > 0. Published: 1e-4 at 256 images per step."""
    scale_lr_by_batch: int = 0
    """Images per step that learning_rate belongs to: a run of batch_size images learns at learning_rate · batch_size /
    this. 0: learning_rate as written. VQGAN and latent-diffusion print rates per image: 4.5e-6 and 1."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Decay of Adam's two averages, each in [0, 1). Published: 0.5 and 0.9."""
    drop_steps: tuple[int, ...] = ()
    """Steps after which the learning rate is multiplied by drop_factor, each once. Published: the ends of epochs 250
    and 300."""
    drop_factor: float = 0.1
    """Factor of each drop, above 0 to 1. Published: 0.1."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW), ≥ 0. Published: 0 for tokenizers."""
    decay_norms: bool = True
    """Where weight_decay is above 0, apply it to norms and biases, too. The paper's way is False; the published code
    means to leave them out and then overwrites both groups' decay at every step, which is True."""

    def __post_init__(self):
        require(self.learning_rate > 0, f"learning_rate must be > 0, got {self.learning_rate}")
        require(self.scale_lr_by_batch >= 0, f"scale_lr_by_batch must be ≥ 0 images, got {self.scale_lr_by_batch}")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas must lie in [0, 1), got {self.betas}")
        require(all(step >= 1 for step in self.drop_steps), f"drop_steps must be ≥ 1, got {self.drop_steps}")
        require(0 < self.drop_factor <= 1, f"drop_factor must lie in (0, 1], got {self.drop_factor}")
        require(self.weight_decay >= 0, f"weight_decay must be ≥ 0, got {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What a run writes down about its codebook, and how often (in training steps)."""

    log_every: int = 10
    """Steps between rows of metrics.jsonl, ≥ 1. A tokenizer's run has one for each of its first 50 steps."""
    validate_every: int = 100
    """Steps between validations, each with a snapshot, ≥ 1. Step 0 and the last step are always validated. Where all
    snapshots would take more than 8 GiB, only every n-th of these validations has one."""
    early_snapshots: tuple[int, ...] = ()
    """Further steps to validate at, each with a snapshot. Usage alone is measured on validation images after steps 1,
    2, 3, 5, 10, 15, 20, 30 and 50 of every run: collapse is decided in the first ones."""
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
    alarm: str = "warn"
    """What to do when a rule of `ibqlab.diagnostics.alarm` finds signs of collapse in a row: "warn" (say so, and write
    it into the run folder), "stop" (besides, save the step and end; the same command goes on, but a study's run has
    finished then), or "off"."""

    def __post_init__(self):
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        for name, value in counts.items():
            require(value >= 1, f"{name} must be at least 1, got {value}")
            require_at_most(name, value, bounds.STEPS if name.endswith("_every") else bounds.BATCH)
        require_choice("record.alarm", self.alarm, ALARMS)
        require(all(step >= 0 for step in self.early_snapshots), f"early_snapshots must be ≥ 0: {self.early_snapshots}")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Ways to compute the same step. Results differ by rounding, so a run goes on with the settings it began with."""

    channels_last: bool = False
    """Keep pictures, activations and convolution weights with the channels of a pixel side by side, as tensor cores
    read them. On CUDA, group normalisation with its swish is then one operation that reads and writes them so, in the
    activations' type, and keeps less for the backward pass. Published: False."""
    compile: bool = False
    """Let torch.compile fuse each residual and attention block, the discriminator and the LPIPS network in training;
    validation and quantizer stay as they are. Blocks of one shape share what was compiled; the published tokenizer has
    10 shapes. Costs a C++ compiler and time before the first step. Published: False."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the residual and attention blocks of encoder and decoder, and compute each block again,
    up to its last convolution, for its backward pass. By `ibqlab plan` that takes a fifth of the memory per image, with
    channels_last two fifths, and a seventh more operations for the published tokenizer. Published: False."""

    @property
    def memory_format(self) -> torch.memory_format:
        """How pictures and convolution weights lie in memory."""
        return torch.channels_last if self.channels_last else torch.preserve_format


@ordered_keys(
    *("data", "tokenizer", "loss", "optimizer", "record", "speed"),
    *("steps", "batch_size", "accumulate", "processes", "accelerator", "precision"),
    *("ema_decay", "ema_codebook_start"),
    *("start_from", "start_family", "start_num_heads", "start_weights", "grow_codes", "grow_noise"),
    *("seed", "plugins"),
)
@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """One training run of a tokenizer."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Encoder, quantizer, decoder."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Losses beside the quantizer's."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Adam."""
    record: RecordConfig = field(default_factory=RecordConfig)
    """What is written down."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """How a step is computed; changes no result beyond rounding."""
    ema_decay: float = 0.999
    """Decay per step of the averaged weights that evaluation may use, in [0, 1); 0 keeps none. Published: 0.999."""
    ema_codebook_start: str = "placeholder"
    """Where IBQ's averaged codebook starts. "placeholder": at U(±1/K), as in the published code, which makes its
    averages before the codebook gets its own start; they mean nothing in the first few thousand steps. "codes": at the
    codebook itself, like all other averages."""
    start_from: str = ""
    """A checkpoint to start from: a published file or folder of any family, a run folder, an export. Weights, averages,
    and the discriminator where it has one that fits; the optimisers start fresh. The tokenizer's settings are then the
    file's, but for those that stand in the same recipe or are typed. Empty: fresh weights."""
    start_family: str = ""
    """Whose file start_from is, where its names do not tell: `family` of `load_tokenizer`. Empty: as the file tells."""
    start_num_heads: tuple[int, ...] = ()
    """Attention heads of the encoder and the decoder in start_from, or one number for both, where the file does not
    tell: `num_heads` of `load_tokenizer`. Empty: as the file or its family tells."""
    start_weights: str = ""
    """"ema": start at the file's averaged weights; "raw": at the weights as trained. Empty: at those that a published
    file's family evaluates with, and at a run's as trained. Averages of the file start the averages either way."""
    grow_codes: str = "split"
    """Where the codes beyond a file's lie if tokenizer.quantizer.codebook_size is larger: "split", beside old codes, or
    "tokens", at encoder features of the first training images. See `ibqlab.training.tokenizer.growth`."""
    grow_noise: float = 0.1
    """Distance of a split code from the old one, in distances of that one to its nearest neighbour, above 0 to 1."""

    @property
    def scaled_optimizer(self) -> OptimizerConfig:
        """The optimiser's settings with the learning rate at this run's batch_size, by `scale_lr_by_batch`."""
        written, images = self.optimizer.learning_rate, self.optimizer.scale_lr_by_batch
        rate = written * self.batch_size / images if images else written
        return replace(self.optimizer, learning_rate=rate, scale_lr_by_batch=0)

    def __post_init__(self):
        super().__post_init__()
        self._check_sizes()
        require_choice("ema_codebook_start", self.ema_codebook_start, CODEBOOK_AVERAGE_STARTS)
        require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        require_choice("start_weights", self.start_weights, START_WEIGHTS)
        heads = self.start_num_heads
        require(
            len(heads) <= 2 and all(number >= 1 for number in heads),
            f"start_num_heads must be one number of at least 1, or the encoder's and the decoder's, got {list(heads)}",
        )
        require_choice("grow_codes", self.grow_codes, GROWTH_RULES)
        require(0 < self.grow_noise <= 1, f"grow_noise must lie above 0 to 1, got {self.grow_noise}")

    def _check_sizes(self) -> None:
        """A tokenizer's sizes lie within bounds that no honest use reaches, and its discriminator can judge images."""
        quantizer = self.tokenizer.quantizer  # the autoencoder's settings have bounds of their own
        discriminator, image_size = self.loss.discriminator, self.data.image_size
        require_at_most("tokenizer.quantizer.codebook_size", quantizer.codebook_size, bounds.CODES)
        require_at_most("tokenizer.quantizer.code_dim", quantizer.code_dim, bounds.CODE_DIM)
        require_at_most("loss.discriminator.base_channels", discriminator.base_channels, bounds.CHANNELS)
        require_at_most("loss.discriminator.num_layers", discriminator.num_layers, LEVELS)
        smallest = discriminator.smallest_image if self.loss.adversarial_weight else 1
        require(
            image_size >= smallest,
            f"the discriminator's {discriminator.num_layers} layers need images of at least {smallest} × {smallest} "
            f"pixels, got data.image_size={image_size}; lower loss.discriminator.num_layers",
        )
