"""A trained generator with the tokenizer that decodes it, the images it learned from, and the names of its classes."""

from contextlib import suppress
from pathlib import Path

from ibqlab.config import parse
from ibqlab.data import DataConfig, open_data
from ibqlab.generator import AnyGenerator
from ibqlab.pretrained import load_first_stage, load_generator, load_tokenizer
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.runs import Run
from ibqlab.runs.finding import locate
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokens.store import TokenStore, TokenStoreError


def open_pair(generator: str | Path, tokenizer: str | Path = "") -> tuple[AnyGenerator, Tokenizer]:
    """A trained generator, and the tokenizer that decodes what it draws.

    Args:
        generator: a run folder, an export or a published file.
        tokenizer: a run, an export or a published file; empty: the one that the generator's run or file holds.
    Raises:
        CheckpointError: no generator, or none that holds a tokenizer where none is given; and whatever
            `load_generator`, `load_first_stage` and `load_tokenizer` raise.
    """
    path = locate(generator)
    first = load_tokenizer(locate(tokenizer)) if tokenizer else load_first_stage(path)
    return load_generator(path), first


def data_of(generator: str | Path) -> DataConfig | None:
    """The images that a generator's run was trained on; None for files, and where the images are not here.

    Args:
        generator: a run folder, or a file.
    """
    path = locate(generator)
    if not path.is_dir():
        return None
    data = run_config(Run(path)).data
    try:
        open_data(data, "validation")
    except (ValueError, FileNotFoundError):
        return None
    return data


def class_names(generator: str | Path) -> list[str]:
    """Names of a generator's classes by label: as its run has noted them, else those of its stored tokens or images.

    Args:
        generator: a run folder, or a file.
    Returns:
        The names; none for a file, and for an earlier run whose tokens and images are not here.
    """
    path = locate(generator)
    if not path.is_dir():
        return []
    run = Run(path)
    # Facts of a run are read as they stand: an earlier version, or another hand, may have written them.
    facts = run.provenance.get("data")
    training = facts.get("train") if isinstance(facts, dict) else None
    names = training.get("classes") if isinstance(training, dict) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    tokens = run_config(run).tokens
    with suppress(FileNotFoundError, TokenStoreError):
        if tokens:
            return list(TokenStore(locate(tokens)).manifest.classes)
    data = data_of(generator)
    return [] if data is None else list(open_data(data, "train").classes)


def run_config(run: Run) -> GeneratorTrainConfig:
    """The settings of a generator's run, with the folders that its names mean here."""
    return parse(GeneratorTrainConfig, run.located_config, source=f"run {run.name}")
