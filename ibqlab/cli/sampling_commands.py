"""`ibqlab tokenize` and `ibqlab sample`: images to tokens, and tokens to images."""

import os
import shlex
from collections.abc import Sequence
from typing import Any

import click

from ibqlab.base.devices import require_device, require_processes
from ibqlab.cli.terminal import PLUGIN_RUN, WHERE, is_first_process, say, say_loading


@click.command()
@click.argument("tokenizer")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default="", help=f"Folder to write; by default <tokenizer>-tokens. {WHERE}")
@click.option("--crops", type=int, default=1, show_default=True, help="Random crops stored of each training image.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True, help="Of TOKENIZER.")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images computed at once.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the crops.")
@click.option("--verify", is_flag=True, help="Compare the files of a store that is there with their checksums.")
@PLUGIN_RUN
def tokenize(tokenizer: str, settings: Sequence[str], output: str, verify: bool, **options: Any) -> None:
    """Write the tokens of a data set once, for generators to be trained on: tokens=FOLDER in their recipe.

    TOKENIZER is a run, an export or a published file. The images are those that the run was trained on, or those that
    KEY=VALUE says: source=FOLDER image_size=256 flip=false. Typed again, an interrupted command resumes. Several
    processes: torchrun --nproc-per-node N -m ibqlab tokenize …
    """
    say_loading(f"tokenize {tokenizer}")
    from ibqlab.config import apply_overrides, parse
    from ibqlab.data import DataConfig
    from ibqlab.pretrained import load_tokenizer
    from ibqlab.runs import Run
    from ibqlab.runs.finding import locate, output_folder
    from ibqlab.tokens.store import TokenStore
    from ibqlab.tokens.writing import TokenSettings, write_tokens

    require_device(options["device"], "--device")
    require_processes()
    path = locate(tokenizer)
    folder = output_folder(output, default=f"{path.stem}-tokens")
    if verify:
        TokenStore(folder).verify()
        say(f"every file of {folder} has its checksum")
        return
    loaded = load_tokenizer(path, options.pop("weights")).float()
    # A tokenizer that is no run has no data settings of its own.
    trained_on = Run(path).located_config.get("data", {}) if path.is_dir() else {}
    data = parse(DataConfig, apply_overrides(trained_on, settings, DataConfig), source="data")
    store = write_tokens(loaded, data, folder, TokenSettings(**options))
    say(f"{store.describe()}\ntrain a generator on them: ibqlab train RECIPE tokens={folder}")


@click.command()
@click.argument("checkpoint")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default="", help=f"Folder; by default <checkpoint>-samples. {WHERE}")
@click.option("--card", help="A published sampling card, such as ibq_b, which KEY=VALUE changes.")
@click.option("--tokenizer", default="", help="That decodes; by default the one that CHECKPOINT holds.")
@click.option("--images-per-class", type=int, default=50, show_default=True)
@click.option("--classes", default="", help="Names, or labels such as 0,7,12 or 0-3; by default all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first image; the next ones follow.")
@click.option("--batch-size", type=int, default=64, show_default=True, help="Images drawn at once.")
@click.option("--shard-size", type=int, default=1000, show_default=True, help="Images per tar file.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="To draw in: float32, bfloat16, … auto: bfloat16 on a GPU, the weights' type on a CPU.",
)
@click.option(
    "--compiled/--no-compiled",
    default=None,
    help="Record the step of one position; by default on a GPU (CUDA graph) and not on a CPU (torch.compile).",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@PLUGIN_RUN
def sample(checkpoint: str, settings: Sequence[str], output: str, card: str | None, **options: Any) -> None:
    """Draw images of every class from a generator: tar shards, and the .npz that published evaluators read.

    CHECKPOINT is a generator's run, export or published file. KEY=VALUE says how tokens are drawn: cfg_scale=2.25
    temperature=1.1 top_p=0.95. Typed again, an interrupted command resumes. Several processes: torchrun
    --nproc-per-node N -m ibqlab sample …
    """
    say_loading(f"sample {checkpoint}")
    from dataclasses import replace

    from ibqlab.base.checks import require_choice
    from ibqlab.config import ConfigError, apply_overrides, parse, to_dict
    from ibqlab.generating.class_labels import read_classes
    from ibqlab.generating.pairs import class_names, open_pair
    from ibqlab.generating.sample_shards import save_sample_picture
    from ibqlab.generating.sampling_runs import SampleRequest, sample_images
    from ibqlab.generator.sampling_config import SAMPLING_CARDS, SamplingConfig
    from ibqlab.pretrained import is_generator
    from ibqlab.runs import RunError
    from ibqlab.runs.finding import locate, output_folder

    require_device(options["device"], "--device")
    require_processes()
    if card:
        require_choice("card", card, SAMPLING_CARDS)
    base = to_dict(SAMPLING_CARDS[card]) if card else {}
    sampling = parse(SamplingConfig, apply_overrides(base, settings, SamplingConfig), source="sampling")
    tokenizer, classes = options.pop("tokenizer"), options.pop("classes")
    request = parse(SampleRequest, options, source="samples")
    path = locate(checkpoint)
    folder = output_folder(output, default=f"{path.stem}-samples")
    if os.path.exists(path) and not is_generator(path):
        raise ConfigError(
            f"{checkpoint} is no generator; images are drawn from one that was trained over a tokenizer's tokens: "
            "ibqlab train builtin/digits_generator tokens=… (ibqlab tokenize writes them)"
        )
    generator, decoder = open_pair(checkpoint, tokenizer)
    names = class_names(checkpoint)
    labels = read_classes(classes, names, generator.config.num_classes)
    archive = sample_images(generator, decoder, folder, sampling, replace(request, classes=labels))
    if not is_first_process():
        return
    try:
        say(f"picture: {save_sample_picture(folder, names)}")
    except RunError as error:  # of samples that are finished, but whose shards were deleted
        say(f"no picture: {error}", err=True)
    say(f"{archive}; compare it with real images: ibqlab.metrics.evaluate_generation({str(archive)!r}, REFERENCE)")
    gallery = ["ibqlab", "run", "generation_gallery", f"generator={checkpoint}"]
    gallery += [f"tokenizer={tokenizer}"] if tokenizer else []
    say(f"other guidance, temperatures and top-p beside each other: {shlex.join(gallery)}")
