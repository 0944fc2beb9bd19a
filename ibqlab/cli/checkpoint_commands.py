"""`ibqlab inspect`, `download` and `export`: checkpoints, published ones and our own."""

import warnings
from pathlib import Path

import click

from ibqlab.cli.terminal import PLUGIN_RUN, say, section

FAMILY = click.option("--family", help="Whose published file it is, where names do not tell: ibq, vqgan or ldm.")
HEADS = click.option("--num-heads", type=int, help="Of a published generator or TiTok; by default as published.")
GRID = click.option("--grid-size", type=int, help="Its tokens along a side of an image; by default as published.")


@click.command()
@click.argument("checkpoint")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", help="Which set to account for as used.")
@FAMILY
@click.option("--quantizer", help="Of a published file in IBQ's or VQGAN's autoencoder: another than the family's.")
@HEADS
@GRID
@PLUGIN_RUN
def inspect(
    checkpoint: str,
    weights: str,
    num_heads: int | None,
    grid_size: int | None,
    **told: str | None,
) -> None:
    """What CHECKPOINT holds, key by key, and the architecture that its names and shapes tell.

    CHECKPOINT is a published file, a file from `ibqlab export`, or a run folder, of a tokenizer or a generator. Nothing
    in it is executed. A plugin that it names is run if you have used the same file before, or give it.
    """
    from ibqlab.config import dump_yaml
    from ibqlab.pretrained import is_generator, load_generator, load_tokenizer

    if is_generator(checkpoint):
        model = load_generator(checkpoint, num_heads=num_heads, grid_size=grid_size)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*averaged weights still hold")  # the report says the same
            model = load_tokenizer(checkpoint, weights, num_heads=num_heads, **told)
    say(model.load_report)
    section("settings", dump_yaml(model.config))


@click.command()
@click.argument("name", required=False)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to; by default the hub's own cache.")
def download(name: str | None, folder: Path | None) -> None:
    """Fetch the published checkpoint NAME, check its checksum and print where it lies; without a name, list them all.

    Tokenizers are listed with K, their number of codes, and D, numbers per code; generators with the tokenizer whose
    tokens they draw. They are grouped by system, with the licences of its code and of its weights.
    """
    from ibqlab.pretrained import download_published, list_published

    if name is None:
        say(list_published())
        return
    say(download_published(name, folder))


@click.command()
@click.argument("checkpoint")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--weights", type=click.Choice(["ema", "raw"]), help="For .safetensors: which set; by default ema.")
@FAMILY
@HEADS
@GRID
@PLUGIN_RUN
def export(
    checkpoint: str,
    target: Path,
    *,
    weights: str | None,
    family: str | None,
    num_heads: int | None,
    grid_size: int | None,
) -> None:
    """Write CHECKPOINT to TARGET: .safetensors with one set of weights and its settings, .ckpt with published names."""
    from ibqlab.config import ConfigError
    from ibqlab.pretrained import export_published, export_tokenizer, held_weights, is_generator

    generator = is_generator(checkpoint)
    if generator and weights:
        raise ConfigError("--weights is for tokenizers; a generator has one set of weights. Leave it out")
    if generator and target.suffix in (".safetensors", ".ckpt"):
        say(_export_generator(checkpoint, target, num_heads=num_heads, grid_size=grid_size))
        return
    if target.suffix == ".safetensors":
        path = export_tokenizer(checkpoint, target, weights, family=family, num_heads=num_heads)
        say(f"{path}\nholds {held_weights(path)}")
        return
    if target.suffix != ".ckpt":
        raise ConfigError(
            f"TARGET must end in .safetensors (one set of weights) or .ckpt (published names); got {target}"
        )
    if weights:
        raise ConfigError("--weights is for .safetensors; a .ckpt holds the weights as trained and the averaged ones")
    say(f"{export_published(checkpoint, target, family=family)}\nholds {held_weights(target)}")


def _export_generator(checkpoint: str, target: Path, **sizes: int | None) -> Path:
    """A generator's export of the kind that the target's ending names."""
    from ibqlab.generator import LlamaGenConfig
    from ibqlab.pretrained import export_generator, export_published_generator, load_first_stage, load_generator
    from ibqlab.pretrained.export import check_free

    check_free(target)
    generator = load_generator(checkpoint, **sizes)
    if target.suffix == ".safetensors":
        return export_generator(generator, target)
    alone = isinstance(generator.config, LlamaGenConfig)
    return export_published_generator(generator, target, None if alone else load_first_stage(checkpoint))
