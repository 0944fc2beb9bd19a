"""What views are about: a run's folder, or a checkpoint with images; and what it lacks, in words.

subject = open_subject("mine")                          # a run of `ibqlab train`, by name or path
subject = open_subject("published.ckpt", images="IMAGES")
subject.tokenizer, subject.source, subject.steps
"""

import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ibqlab.base.codebook_parts import CONCATENATED
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, is_ordinary, read_bytes
from ibqlab.base.resources import BUILT_IN
from ibqlab.config import content_hash, parse
from ibqlab.data import DataConfig, FileSource, ImageSource, PhotosSource, open_data
from ibqlab.data.shard_index import PICTURE_BYTES
from ibqlab.pretrained import CheckpointError, load_tokenizer
from ibqlab.recipes.plugins import plugin_of
from ibqlab.runs import Run
from ibqlab.runs.finding import find_run, locate, run_name
from ibqlab.runs.folder import step_file
from ibqlab.runs.kinds import is_lab, is_monitored, kind_of
from ibqlab.tokenizer import Tokenizer
from ibqlab.views.snapshot_arrays import PARTS, read_snapshot
from ibqlab.views.store import ViewStore, file_mark, store_of

FORESEEN = (RunError, ValueError, OSError, ImportError)
"""What is raised with a message for readers."""


class ViewError(RunError):
    """A view that a run or checkpoint cannot give; the message says what is missing and how to come by it."""


class Subject:
    """A run, or a checkpoint with images, as views see it. Made by `open_subject`.

    Args:
        path: of the run's folder or the checkpoint's file.
        run: the run; None for a checkpoint.
        images: a folder of images or shards, or a run, to look at in place of the run's own validation images.
        weights: "raw" or "ema"; "": of a run as trained, of a file its averages or what it holds.
        image_size: pixels along one side of the images looked at; 0: as the tokenizer was trained.
        told: what a published file does not tell, as of `load_tokenizer`.
    """

    def __init__(
        self, path: Path, run: Run | None, images: str, weights: str, *, image_size: int, told: Mapping[str, Any]
    ):
        self.path, self.run, self.images, self._told = path, run, images, dict(told)
        self._image_size = image_size
        self.weights, self._any_weights = weights or ("raw" if run else "ema"), not weights

    @property
    def name(self) -> str:
        """For headings."""
        return self.path.name

    @property
    def full_name(self) -> str:
        """As commands name it below the folder of all runs, a study's run with its study; elsewhere its own name alone.

        What is sent to others names it so: it never holds a path of this machine.
        """
        name = run_name(self.path)
        return Path(os.path.abspath(self.path)).name if os.path.isabs(name) or name == "." else name

    @property
    def place_mark(self) -> str:
        """Where it lies, as a mark that names no place: below the folder of all runs, else on this disk."""
        name = run_name(self.path)
        place = os.path.realpath(self.path) if os.path.isabs(name) else name
        return hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @cached_property
    def store(self) -> ViewStore:
        """Of what views compute."""
        return store_of(self.path)

    # --- through training ---

    @property
    def steps(self) -> list[int]:
        """Steps that have a snapshot; none of a checkpoint."""
        return self.run.snapshot_steps if self.run else []

    def snapshot(self, step: int = -1) -> dict[str, np.ndarray]:
        """The arrays of a step, −1 for the last one, checked as `read_snapshot` does.

        Raises:
            RunError: there is no such snapshot, or it is damaged.
        """
        self.require_run()
        steps = self.steps
        if not steps or step not in (-1, *steps):
            return self.run.snapshot(step)  # which says what there is
        return read_snapshot(self._snapshot_file(steps[-1] if step == -1 else step))

    def last_codebook(self, most: int) -> np.ndarray | None:
        """The code vectors of the last snapshot; None where it holds none, or more than `most` numbers.

        Raises:
            RunError: the snapshot is damaged.
        """
        if not self.steps:
            return None
        file = self._snapshot_file(self.steps[-1])
        parts = read_snapshot(file, PARTS, join=False)
        for name, values in parts.items():
            number, size, dim = values.shape
            if size**number * dim * (number if name == CONCATENATED else 1) > most:
                return None
        return read_snapshot(file, ("codebook", "counts", *PARTS)).get("codebook")

    def facts_of(self, step: int) -> dict[str, np.ndarray]:
        """The small arrays of a step: counts and last hits, without reading codebook and features.

        Raises:
            RunError: there is no such snapshot, its file is damaged, or it holds no counts.
        """
        self.require_run()
        file = self._snapshot_file(step)
        arrays = read_snapshot(file, ("counts", "last_hit"))
        if "counts" not in arrays:
            raise ViewError(f"{file} holds no counts of hits, so that nothing is known of the use of codes")
        return arrays

    def snapshot_marks(self) -> list[str]:
        """Step and content of all snapshots, for the store.

        Raises:
            FileNotFoundError: one is gone by now.
            RunError: one is no file.
        """
        marks = []
        for step in self.steps:
            file = self._snapshot_file(step)
            try:
                marks.append(f"{step} {file_mark(file)}")
            except UnreadableFile as error:
                raise ViewError(f"{error}; delete {file.name} or train again") from error
        return marks

    def _snapshot_file(self, step: int) -> Path:
        return step_file(self.path, "snapshots", step, ".npz")

    @property
    def counted(self) -> str:
        """What a snapshot's hits are counted in, in words: a monitor sees no validation."""
        is_training = self.run is not None and is_monitored(self.run.config)
        return "tokens of training" if is_training else "validation tokens"

    def require_run(self) -> None:
        """Refuse a checkpoint where training is looked at."""
        if self.run is None:
            raise ViewError(
                f"{self.name} is a checkpoint, which holds one moment; give a run's folder to look through its training"
            )

    # --- with its network ---

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The network, in evaluation mode, on the CPU.

        Raises:
            ViewError: the run keeps none.
        """
        if self.run is not None:
            kind = "monitored" if is_monitored(self.run.config) else "lab" if is_lab(self.run.config) else ""
            if kind:
                why = (
                    "a monitor stores codes and features, not the model" if kind == "monitored" else "it has no images"
                )
                raise ViewError(f"{self.name} has no network that encodes and decodes images: {why}")
            if self.run.last_checkpoint is None:
                raise ViewError(f"{self.name} has no checkpoint yet, so nothing can be encoded or decoded; train on")
        try:
            return load_tokenizer(self.path, self.weights, **self._told).float()
        except CheckpointError as error:
            # An export holds one set, averaged or as trained; which one, its reader need not know.
            if self.run is not None or "one set of weights" not in str(error) or not self._any_weights:
                raise
            return load_tokenizer(self.path, "raw", **self._told).float()

    @property
    def network_step(self) -> int | None:
        """Training step of the network; None of a file, which does not tell it."""
        return self.tokenizer.load_report.step if self.run is not None else None

    @cached_property
    def side(self) -> int:
        """Pixels along one side of the images that are looked at.

        Raises:
            ViewError: the tokenizer takes none of that size.
        """
        autoencoder = self.tokenizer.config.autoencoder
        side = self._image_size or autoencoder.resolution
        try:
            autoencoder.latent_grid(side, side)
        except ValueError as error:
            raise ViewError(f"image_size: {error}") from None
        return side

    @cached_property
    def source(self) -> ImageSource:
        """The images to look at: those given, else the run's own for validation.

        Raises:
            ViewError: none are known.
        """
        side = self.side
        if self.images in BUILT_IN:
            return open_data(DataConfig(source=self.images, image_size=side), "validation")
        if self.images and is_ordinary(locate(self.images) / "config.yaml"):
            return _validation_images(Run(locate(self.images)), side)
        if self.images:
            config = DataConfig(source=self.images, validation_source=self.images, image_size=side, resize=self.resize)
            try:
                return open_data(config, "validation")
            except ValueError as error:
                words = re.sub(r"\b(validation_)?source\b(?=( must|=))", "images", str(error))
                raise ViewError(words) from None
        if self.run is None:
            raise ViewError(f"{self.name} is a checkpoint and brings no images; name some: images=FOLDER")
        return _validation_images(self.run, side)

    @property
    def resize(self) -> str:
        """How pictures come to the tokenizer's size: as in the run's training."""
        data = self.run.config.get("data") if self.run is not None else None
        return str((data if isinstance(data, dict) else {}).get("resize", DataConfig().resize))

    def images_mark(self, count: int) -> str:
        """The content of the first images, for the store.

        Cost: reads their files.
        """
        source = self.source
        digest = hashlib.sha256(f"{source.fingerprint} {source.classes}".encode("utf-8", "replace"))
        if isinstance(source, PhotosSource):
            digest.update(str(source.image_size).encode())  # other places are cut out for another size
        if isinstance(source, FileSource):
            for position in source.positions[:count].tolist():
                try:
                    file = source.files.file(position)
                    content = file if isinstance(file, bytes) else read_bytes(file, PICTURE_BYTES)
                except (OSError, ValueError) as error:
                    content = str(error).encode("utf-8", "replace")
                digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    @cached_property
    def weights_mark(self) -> str:
        """All that makes the network what it is, for the store: weights, settings and the code of a plugin.

        Settings are part of it because one file may be read as several methods, by `quantizer`.
        """
        config = self.tokenizer.config
        file = self.path
        if self.run is not None:  # a training that goes on may have written another meanwhile, and deleted this one
            file = step_file(self.path, "checkpoints", self.network_step, ".pt")
        try:
            content = file_mark(file)
        except FileNotFoundError:
            content = f"gone {time.time_ns()}"
        plugin = plugin_of(config.quantizer.config_name)
        code = plugin.sha256 if plugin is not None else ""
        return f"{self.weights} {content} {content_hash(config)} {code}"


def open_subject(
    what: str | Path | Run | Subject,
    images: str | Path = "",
    *,
    weights: str = "",
    image_size: int = 0,
    family: str | None = None,
    quantizer: str | None = None,
    num_heads: Any = None,
) -> Subject:
    """A run or a checkpoint to look at.

    Args:
        what: a run, its name or its folder; or a checkpoint's file; or what this function gave, which comes back.
        images: a folder of images, shards, "photos" or "digits", or a run, whose validation images are looked at. "": a
            run's own.
        weights: "raw" or "ema"; "": a run as it was trained, which its snapshots show, and of a file its averages, or
            the one set that it holds.
        image_size: pixels along one side of the images looked at; 0: as the tokenizer was trained, so far as it tells.
        family, quantizer, num_heads: of a published file that does not tell its own, as of `load_tokenizer`.
    Raises:
        FileNotFoundError: there is nothing there.
        RunError: a folder that is no run, a run of a generator, or a quantizer named for a run, which tells its own.
    """
    if isinstance(what, Subject):
        return what
    path = what.path if isinstance(what, Run) else find_run(what, "run or checkpoint")
    run = what if isinstance(what, Run) else Run(path) if path.is_dir() else None
    if run is not None and kind_of(run.config) == "generator":
        raise ViewError(
            f"{for_terminal(run.name)} is a run of a generator; its codebook is its tokenizer's: give "
            f"{for_terminal(run.config.get('tokenizer') or 'that run')}"
        )
    told = {"family": family, "quantizer": quantizer, "num_heads": num_heads}
    for word, value in told.items():
        if run is not None and value is not None:
            raise ViewError(
                f"{word} is asked of published files, which do not tell it; {for_terminal(run.name)} is a run, whose "
                f"config.yaml does: leave {word} out"
            )
    return Subject(path, run, str(images or ""), weights, image_size=image_size, told=told)


def _validation_images(run: Run, side: int) -> ImageSource:
    """A run's own, in the size that a tokenizer takes."""
    data = run.located_config.get("data")
    if not isinstance(data, dict):
        raise ViewError(f"{run.name} was trained on no images; name some: images=FOLDER")
    return open_data(replace(parse(DataConfig, data, source=str(run.path)), image_size=side), "validation")


def lacking(error: Exception) -> str:
    """Why a view is not there, as one sentence for readers; of an error that nobody foresaw, with its kind."""
    text = " ".join(str(error).split())
    if not isinstance(error, FORESEEN):
        text = f"this cannot be shown ({type(error).__name__}: {text}); please report it with the run's folder"
    return text if text.endswith((".", "?", "!")) else f"{text}."
