"""Any checkpoint of an image tokenizer as one kind of object: published files, runs, exports.

checkpoint = read_checkpoint("imagenet256_16384.ckpt")
print(checkpoint.report)                       # what every key of the file is
checkpoint.tokenizer["encoder.conv_in.weight"] # by our names, whatever the file calls it
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ibqlab.base.checks import require, require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, parse_json
from ibqlab.config import parse
from ibqlab.pretrained.architecture import empty_tokenizer, infer_config
from ibqlab.pretrained.families import check_quantizer_is_told, refuse_other_families
from ibqlab.pretrained.hub import PUBLISHED
from ibqlab.pretrained.names import DECAY, Place, check_filled, place_published
from ibqlab.pretrained.report import NAMES, WORDS, LoadReport, warn_of_start
from ibqlab.pretrained.stored import (
    SAFETENSORS,
    CheckpointError,
    Stored,
    check_tensors,
    existing_path,
    load_pickle,
    open_stored,
)
from ibqlab.quantizers import available_quantizers
from ibqlab.runs import Run, RunError
from ibqlab.runs.root import locate
from ibqlab.tokenizer import TokenizerConfig

EXPORT = "ibqlab"
"""Key of an export's settings in the header of its file."""
AS_GIVEN = "as given"
"""An export's word for weights of which nobody said whether they are averaged."""
OTHERS = {"ema": "raw", "raw": "ema"}
"""The one set of weights of an export, and the set that it does not hold."""
RUN_PARTS = {"model": "tokenizer", "ema": "tokenizer_ema"} | {p: p for p in ("discriminator", "discriminator_ema")}
"""Entries of a run's checkpoint and the parts that they hold."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights of a tokenizer and of what was trained beside it.

    Tensors are mapped from the file, in its own number type: they cost memory when they are used. Clone what you change
    or keep; `load_tokenizer` does.
    """

    config: TokenizerConfig
    """Architecture: stored with runs and exports, inferred from names and shapes in published files."""
    tokenizer: dict[str, Tensor]
    """The tokenizer's state dict as trained, by our names; in an export the one set that it holds."""
    tokenizer_ema: dict[str, Tensor] | None
    """Averaged weights of its trainable parameters, by our names; None if the file has none."""
    discriminator: dict[str, Tensor] | None
    """The discriminator's state dict, buffers included, by the names in `PatchDiscriminator`; None if there is none."""
    discriminator_ema: dict[str, Tensor] | None
    """Averaged weights of its parameters; None if there are none."""
    ema_decay: float | None
    """Decay of the averages, where the file tells it."""
    step: int
    """Training step of the weights, 0 where the file does not tell it."""
    report: LoadReport
    """What every key of the file is."""


def read_checkpoint(path: str | Path, *, quantizer: str | None = None) -> Checkpoint:
    """Everything that a checkpoint holds of a tokenizer and its discriminator.

    Args:
        path: a published Lightning checkpoint of IBQ or Open-MAGVIT2, its bare state dict (.ckpt, .pt, .safetensors),
            a run folder, or a file from `export_tokenizer`.
        quantizer: of a published file that does not tell it: "ibq", or "vq" for a VQGAN of taming-transformers or
            latent-diffusion, whose tensors have the same names. None: as the file tells, "lfq" for Open-MAGVIT2.
    Raises:
        FileNotFoundError: nothing there; the message says so of a published name, too, which is not downloaded here.
        CheckpointError: no checkpoint, damaged, of another model, incomplete, or one that would have to run code.
        RunError: a folder that is no run, or a run without a checkpoint.
        ValueError: an unknown quantizer, or one given for a file that stores its own.
    """
    contents = open_contents(path, quantizer)
    used = {key: place.name for key, place in contents.places.items() if place.part in NAMES}
    return Checkpoint(
        config=contents.config,
        tokenizer=contents.part("tokenizer"),
        tokenizer_ema=contents.part("tokenizer_ema") or None,
        discriminator=contents.part("discriminator") or None,
        discriminator_ema=contents.part("discriminator_ema") or None,
        ema_decay=contents.ema_decay,
        step=contents.step,
        report=contents.report("both", used),
    )


def held_weights(path: str | Path) -> str:
    """Which weights a tokenizer's file holds, in words that say how the others are had; errors of `read_checkpoint`."""
    contents = open_contents(path)
    if contents.only in OTHERS:
        return f"{WORDS[contents.only]}; for the {WORDS[OTHERS[contents.only]]}: --weights {OTHERS[contents.only]}"
    if contents.only:
        return "weights as they were given"
    return "weights as trained" + (" and averaged weights" if contents.part("tokenizer_ema") else " alone")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint as it lies in its file, every key with its place."""

    path: Path
    format: str
    config: TokenizerConfig
    tensors: Mapping[str, Tensor]
    places: Mapping[str, Place]
    reopen: Callable[[], Mapping[str, Tensor]]
    """Maps the tensors anew, so that memory of those mapped before can be let go."""
    entries: tuple[str, ...] = ()
    wrappers: tuple[str, ...] = ()
    """What was taken off the file's keys."""
    only: str | None = None
    """The one set of weights of an export: "ema", "raw" or AS_GIVEN."""
    ema_decay: float | None = None
    step: int = 0

    def part(self, part: str) -> dict[str, Tensor]:
        """Tensors of one part by their names in it; an export of averaged weights gives those as averages, too."""
        if part == "tokenizer_ema" and self.only == "ema":
            parameters = {name for name, _ in empty_tokenizer(self.config).named_parameters()}
            return {name: value for name, value in self.part("tokenizer").items() if name in parameters}
        return {place.name: self.tensors[key] for key, place in self.places.items() if place.part == part}

    def choose(self, weights: str) -> dict[str, str]:
        """The tokenizer's tensors by name → the key to fill each from.

        Raises:
            CheckpointError, RunError: the file has not those weights; the message says what to type.
        """
        if self.only not in (None, AS_GIVEN, weights):
            raise CheckpointError(f'{self.path} holds only one set of weights; type weights="{self.only}"')
        keys = {place.name: key for key, place in self.places.items() if place.part == "tokenizer"}
        if weights == "raw" or self.only:
            return keys
        averages = {place.name: key for key, place in self.places.items() if place.part == "tokenizer_ema"}
        if not averages:
            kind = RunError if self.path.is_dir() else CheckpointError
            raise kind(f'{self.path} holds no averaged weights; type weights="raw" for those it has')
        return keys | averages

    def report(self, weights: str, used: Mapping[str, str]) -> LoadReport:
        """The account of all keys, given those that were used."""
        left: dict[str, tuple[str, ...]] = {}
        for key, place in self.places.items():
            if key not in used:
                group = NAMES.get(place.part, place.part)
                left[group] = (*left.get(group, ()), key)
        return LoadReport(
            path=str(self.path),
            format=self.format,
            weights=weights,
            keys=len(self.tensors),
            used=dict(used),
            left=left,
            entries=self.entries,
            wrappers=self.wrappers,
            warning=warn_of_start(self.ema_decay, self.step) if weights == "ema" else "",
        )


def open_contents(path: str | Path, quantizer: str | None = None) -> Contents:
    """Open a checkpoint and find every key's place; arguments and errors are those of `read_checkpoint`."""
    if quantizer is not None:
        require_choice("quantizer", quantizer, available_quantizers())
    name, path = str(path), locate(path)
    if name in PUBLISHED and not path.exists():
        raise FileNotFoundError(
            f"{name} is a published tokenizer and no file here; fetch it first (ibqlab download {name}), and give the "
            "path that comes back: "
            f'load_tokenizer(download_published("{name}"))'
        )
    path = existing_path(path, f". Published tokenizers that `ibqlab download` fetches: {', '.join(PUBLISHED)}")
    if path.is_dir():
        contents = _open_run(path)
    else:
        stored = open_stored(path)
        if EXPORT not in stored.metadata:
            return _open_published(stored, quantizer)
        contents = _open_export(stored)
    own = contents.config.quantizer.config_name
    require(
        quantizer in (None, own),
        f"quantizer is asked of published files, which do not tell it; {path} holds {own!r}. Leave quantizer out",
    )
    return contents


def _open_published(stored: Stored, quantizer: str | None) -> Contents:
    try:
        refuse_other_families(stored.tensors)
        quantizer = check_quantizer_is_told(stored, stored.tensors, quantizer)
        config = infer_config({key: tuple(value.shape) for key, value in stored.tensors.items()}, quantizer)
        places = place_published(stored.tensors, empty_tokenizer(config))
    except CheckpointError as error:
        raise CheckpointError(f"{stored.path}: {error}") from None
    decay = stored.tensors.get(DECAY)
    return Contents(
        path=stored.path,
        format=f"{stored.format} with published names",
        config=config,
        tensors=stored.tensors,
        places=places,
        reopen=lambda: open_stored(stored.path).tensors,
        entries=stored.entries,
        wrappers=stored.wrappers,
        ema_decay=None if decay is None else float(decay),
    )


def _open_export(stored: Stored) -> Contents:
    try:
        settings = parse_json(stored.metadata[EXPORT], "header")
        if "generator" in settings:
            raise CheckpointError(f"{stored.path} is a generator's export, not a tokenizer's; use load_generator")
        only, mapping = settings["weights"], settings["tokenizer"]
        require(only in ("ema", "raw", AS_GIVEN), f"weights {only!r:.60}")
    except CheckpointError:
        raise
    except (UnreadableFile, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{stored.path}: its header is damaged ({error}); export it again") from None
    config = parse(TokenizerConfig, mapping, source=f"{stored.path}, header")
    places = {key: Place("tokenizer", key) for key in stored.tensors}
    _check_own(stored.path, config, stored.tensors, places)
    return Contents(
        path=stored.path,
        format=f"{SAFETENSORS} exported by ibqlab",
        config=config,
        tensors=stored.tensors,
        places=places,
        reopen=lambda: open_stored(stored.path).tensors,
        only=only,
    )


def _open_run(path: Path) -> Contents:
    from ibqlab.recipes.tokenizer_config import TrainConfig  # noqa: PLC0415 - training itself starts from checkpoints

    run = Run(path)
    if "generator" in run.config:
        raise CheckpointError(f"{path} is a generator's run; its tokenizer is load_first_stage({str(path)!r})")
    file, step, state = newest_state(run)
    config = parse(TrainConfig, run.config, source=f"run {run.name}")
    tensors, places = _flatten(state)
    _check_own(path, config.tokenizer, tensors, places)
    return Contents(
        path=path,
        format=f"run at step {step}",
        config=config.tokenizer,
        tensors=tensors,
        places=places,
        reopen=(lambda: _flatten(load_pickle(file)["state"])[0]) if file else (lambda: tensors),
        entries=tuple(entry for entry in state if entry not in RUN_PARTS),
        ema_decay=config.ema_decay or None,
        step=step,
    )


def newest_state(run: Run) -> tuple[Path | None, int, dict[str, Any]]:
    """File, step and state of a run's last checkpoint; without a file where it is read whole.

    Raises:
        RunError: there is none, or none that can be read.
        CheckpointError: it holds no networks.
    """
    file = run.last_checkpoint
    if file is None and run.status == "finished":
        raise RunError(
            f"the run {run.name} is finished and its checkpoints are gone ({run.path / 'checkpoints'}); put them back "
            "from a copy, or train the run anew in another folder"
        )
    if file is None:
        raise RunError(f"the run {run.name} has no checkpoint yet; let it train to its first one")
    try:
        content = load_pickle(file)
        step, state = int(content["step"]), content["state"]
        if not isinstance(state, dict):
            raise ValueError("no state")
    except (CheckpointError, OSError, LookupError, TypeError, ValueError):
        file = None
        step, state = run.load_checkpoint()  # goes back to the one before with a warning, or says that none is good
    _check_networks(file or run.path, state)
    return file, step, state


def _check_networks(path: Path, state: Mapping[str, Any]) -> None:
    """A run's checkpoint holds its networks, each as plain tensors by name."""
    for entry in RUN_PARTS:
        held = state.get(entry) or {}
        named = isinstance(held, dict) and all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()
        )
        if not named or (entry == "model" and not held):
            there = ", ".join(for_terminal(key, 40) for key in [*state][:6]) or "nothing"
            raise CheckpointError(
                f"{path}: a run's checkpoint must hold tensors by name under {entry!r}; its entries are: {there}. Put "
                "it back from a copy, or delete it to use the one before"
            )
        check_tensors(path, held)


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Place]]:
    """Tensors of a run's networks by entry and name, and where each belongs."""
    tensors, places = {}, {}
    for entry, part in RUN_PARTS.items():
        for name, value in (state.get(entry) or {}).items():
            tensors[f"{entry}.{name}"], places[f"{entry}.{name}"] = value, Place(part, name)
    return tensors, places


def _check_own(path: Path, config: TokenizerConfig, tensors: Mapping[str, Tensor], places: Mapping[str, Place]) -> None:
    """A file of ours must have the tensors that its own settings ask for."""
    like = empty_tokenizer(config).state_dict()
    parts = ("tokenizer", "tokenizer_ema")
    found, averages = (
        {place.name: tensors[key] for key, place in places.items() if place.part == part} for part in parts
    )
    averaged = {name: value for name, value in like.items() if name in averages}
    try:
        check_filled(found, {name: Place("tokenizer", name) for name in like}, like)
        check_filled(averages, {name: Place("tokenizer_ema", name) for name in averaged}, averaged)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
