"""`ibqlab atlas`: a codebook as pages."""

from collections.abc import Sequence

import click

from ibqlab.cli.terminal import PLUGIN_RUN, WHERE, say, say_loading


@click.command()
@click.argument("source", metavar="RUN|CHECKPOINT")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--output", default="", help=f"Folder to write; by default NAME_atlas, or STUDY-NAME_atlas. {WHERE}")
@PLUGIN_RUN
def atlas(source: str, settings: Sequence[str], *, output: str) -> None:
    """Write a whole codebook as a folder of pages: map, table, and a card per code, to be opened from disk.

    The images are a run's own for validation, or those that KEY=VALUE says: images=FOLDER count=500. Others are
    method=umap, decode=false, weights=ema, family=vqgan, num_heads=8, image_size=256, and parquet=true for a table that
    embedding-atlas reads. Photographs and digits that come with ibqlab: images=photos, images=digits.
    """
    say_loading(f"atlas {source}")
    from ibqlab.config import apply_overrides, parse
    from ibqlab.views.atlas import AtlasSettings, write_atlas
    from ibqlab.views.atlas.table import TABLE, table_command

    typed = parse(AtlasSettings, apply_overrides({}, settings, AtlasSettings), source="atlas")
    page = write_atlas(source, output, typed)
    say(f"open it in a browser: {page}")
    if typed.parquet:
        say(f"the codes as a table: {table_command(page.with_name(TABLE))}")
