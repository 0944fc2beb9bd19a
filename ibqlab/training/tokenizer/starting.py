"""A run that starts from a file: its weights put into the run's networks, and an account of what came from where."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.base.files import RunError
from ibqlab.pretrained import Checkpoint, CheckpointError
from ibqlab.pretrained.load_report import AS_GIVEN
from ibqlab.pretrained.start_settings import differing, read_start
from ibqlab.quantizers.upkeep import KMeansStart
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokenizer.discriminator import PatchDiscriminator
from ibqlab.training.tokenizer.growth import Growth, grow, known_hits, require_growable
from ibqlab.training.tokenizer.step import TokenizerStep

UPKEEP = "quantizer.upkeep."
"""Beginning of names of what upkeep counts; a run may have another upkeep than its file."""


class Start(NamedTuple):
    """What a run started with."""

    averages: Mapping[str, Tensor]
    """Averages of the tokenizer in the file, with rows for new codes; empty without any."""
    discriminator_averages: Mapping[str, Tensor]
    """Likewise of the discriminator, where it is the file's."""
    growth: Growth | None
    """What was done to the codebook; None where it is the file's."""
    facts: dict[str, str]
    """For provenance: what came from the file, and what was started as the recipe says."""

    def describe(self) -> str:
        """One line for people."""
        of_file = ("path", "format")
        parts = "; ".join(f"{name}: {text}" for name, text in self.facts.items() if name not in of_file)
        return "starts from {path} ({format}): ".format(**self.facts) + parts


def start_networks(config: TrainConfig, tokenizer: Tokenizer, discriminator: PatchDiscriminator | None) -> Start:
    """Put a file's weights into fresh networks.

    Args:
        config: of the run; start_from names the file.
        tokenizer: filled.
        discriminator: filled where the file's fits; None where the run has none.
    Raises:
        FileNotFoundError, CheckpointError, RunError: the file cannot be read, or has not the weights asked for.
        ValueError: the settings do not fit the file; the message names both and what to type.
    """
    checkpoint = read_start(config.start_from, config.start_family, config.start_num_heads)
    _require_code_dim(config, checkpoint)
    chosen = _chosen_weights(config, checkpoint)
    averages = checkpoint.tokenizer_ema or {}
    weights = checkpoint.tokenizer | (averages if chosen == "ema" else {})
    weights, upkeep = _with_own_upkeep(config, tokenizer, weights)
    growth, old = None, checkpoint.config.quantizer.codebook_size
    if config.tokenizer.quantizer.codebook_size != old:
        require_growable(config, tokenizer.quantizer, old)
        hits = known_hits(checkpoint, old)
        growth = Growth(old, config.tokenizer.quantizer.codebook_size, config.grow_codes, hits is not None)
        weights, averages = grow(config, tokenizer, (weights, averages), hits)
    _fill(tokenizer, weights, "tokenizer", config.start_from)
    discriminator_text, discriminator_averages = _start_discriminator(checkpoint, discriminator)
    facts = {"path": config.start_from, "format": checkpoint.format}
    changed = differing(config.tokenizer, checkpoint.config)
    facts["settings"] = f"the file's but for {', '.join(changed)}" if changed else "the file's"
    facts["weights"] = {"raw": "as trained", "ema": "averaged"}.get(chosen, "the one set that the file has")
    facts["averages"] = "the file's" if averages else "fresh, at the weights: the file has none"
    if not config.ema_decay:
        facts["averages"] = "none, as the recipe says"
    facts["discriminator"] = discriminator_text
    facts["optimizers"] = "fresh"
    if upkeep:
        facts["upkeep"] = upkeep
    if growth:
        facts["codes"] = growth.describe()
    return Start(averages, discriminator_averages, growth, facts)


def load_averages(networks: TokenizerStep, start: Start) -> None:
    """Averages go on where a file's stand; those that it lacks start at the run's weights."""
    averages = [(networks.average, start.averages, networks.tokenizer)]
    if networks.adversary:
        averages.append((networks.adversary.average, start.discriminator_averages, networks.adversary.discriminator))
    for average, stored, module in averages:
        if average:
            own = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
            average.load_state_dict({name: stored.get(name, value) for name, value in own.items()})


def _require_code_dim(config: TrainConfig, checkpoint: Checkpoint) -> None:
    run, file = config.tokenizer.quantizer.code_dim, checkpoint.config.quantizer.code_dim
    require(
        run == file,
        f"start_from {config.start_from}: tokenizer.quantizer.code_dim={run}, and codes of the file have {file} "
        "numbers. With another code_dim all codes and the layers on both sides of them would start fresh, and "
        f"the file's tokens would mean nothing. Leave code_dim out ({file}), or train without start_from",
    )


def _chosen_weights(config: TrainConfig, checkpoint: Checkpoint) -> str:
    """The set of weights that a run starts at: "ema", "raw", or AS_GIVEN where the file has one set only.

    Where the setting says nothing, a run of ours goes on at its weights as trained, whose averages it has beside them;
    a published file starts at what its family evaluates with.
    """
    if checkpoint.weights == AS_GIVEN:
        return AS_GIVEN
    has_averages = checkpoint.tokenizer_ema is not None and not checkpoint.path.is_dir()
    chosen = config.start_weights or checkpoint.weights or ("ema" if has_averages else "raw")
    try:
        checkpoint.choose(chosen)
    except (CheckpointError, RunError) as error:
        raise type(error)(str(error).replace('type weights="', 'type start_weights="')) from None
    return chosen


def _with_own_upkeep(
    config: TrainConfig, tokenizer: Tokenizer, weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """A file's weights with the upkeep that the run has, fresh where the file has none; and a few words about it.

    Raises:
        ValueError: a k-means start, which would overwrite the file's codes.
    """
    own = {name: value for name, value in tokenizer.state_dict().items() if name.startswith(UPKEEP)}
    missing = sorted(own.keys() - weights.keys())
    left = sorted(name for name in weights.keys() - own.keys() if name.startswith(UPKEEP))
    starts = [name for name, module in tokenizer.named_modules() if isinstance(module, KMeansStart)]
    overwriting = [name for name in starts if not bool(weights.get(f"{name}.started", False))]
    require(
        not overwriting,
        f"start_from {config.start_from}: tokenizer.quantizer.codebook_init=kmeans would overwrite the file's codes at "
        "the first step. Leave codebook_init out",
    )
    kept = {name: value for name, value in weights.items() if name not in left}
    words = "fresh, as the settings say" if missing else "left out, as the settings say" if left else ""
    return kept | {name: own[name] for name in missing}, words


def _start_discriminator(
    checkpoint: Checkpoint, discriminator: PatchDiscriminator | None
) -> tuple[str, Mapping[str, Tensor]]:
    """Fill a discriminator where the file has one of its shapes; in words whose it is, and its averages."""
    stored = checkpoint.discriminator
    if discriminator is None:
        return "none, as the recipe says", {}
    if stored is None:
        has_one = any("disc" in entry for entry in checkpoint.entries)  # LlamaGen keeps it beside the tokenizer
        why = "the file's is not read" if has_one else "the file has none"
        return f"fresh, as the recipe says: {why}", {}
    fresh = discriminator.state_dict()
    differ = [name for name in sorted(fresh.keys() | stored.keys()) if _shape(fresh, name) != _shape(stored, name)]
    if differ:
        name = differ[0]
        there, here = _shape(stored, name) or "none", _shape(fresh, name) or "none"
        return f"fresh, as the recipe says: the file's is another ({name}: {there} there, {here} here)", {}
    discriminator.load_state_dict(stored)
    return "its own", checkpoint.discriminator_ema or {}


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _fill(module: nn.Module, weights: dict[str, Tensor], setting: str, path: str) -> None:
    expected = module.state_dict()
    names = sorted(expected.keys() | weights.keys())
    differ = [name for name in names if _shape(expected, name) != _shape(weights, name)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"start_from {path}: {len(differ)} tensors do not fit the settings under {setting}, first {name!r}: "
            f"{_shape(weights, name) or 'none'} in the checkpoint, {_shape(expected, name) or 'none'} by the settings. "
            f"Leave the settings under {setting} to the file, or change them to the checkpoint's, which `ibqlab "
            "inspect` prints"
        )
    module.load_state_dict(weights)
