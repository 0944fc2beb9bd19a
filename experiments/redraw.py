"""Draw a result folder's figures again from the CSV beside each.

    python experiments/redraw.py experiments/results/ablations_laptop

What a CSV does not hold (reconstructed images, maps of before their axes were written down) is named and left alone.
"""

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from benchmarks.figure import plot_against_codebook_size
from matplotlib.figure import Figure

from ibqlab.base.files import write_whole
from ibqlab.base.intervals import name_student_interval
from ibqlab.base.measures import measure
from ibqlab.data.pictures import open_picture
from ibqlab.diagnostics.usage import Usage
from ibqlab.plots import (
    plot_code_maps,
    plot_collapse_curves,
    plot_generator_curves,
    plot_norm_curves,
    plot_scaling,
    plot_token_link,
    plot_token_scaling,
    plot_usage_histogram,
)
from ibqlab.plots.ablation_dots import DOTS_KEY, plot_ablation
from ibqlab.plots.fair_dots import plot_fair_comparison
from ibqlab.plots.feature_code_map import plot_gap_curves, plot_maps_and_usage
from ibqlab.plots.lab import plot_lab_curves, plot_lab_plane
from ibqlab.plots.power_laws import plot_power_laws
from ibqlab.plots.printing import print_style
from ibqlab.plots.style import extend_caption, mark_too_short, method_label
from ibqlab.runs.caveats import why_too_short
from ibqlab.studies.ablation_tables import COLUMNS, STANDS_IN
from ibqlab.studies.ablations import paper_panel
from ibqlab.studies.feature_code_map import PAPER_2, PAPER_3, PAPER_6, one_seed_text
from ibqlab.studies.scaling import FITTED
from ibqlab.studies.table_files import read_table, table_names
from ibqlab.tokens.entropy import TokenEntropy
from ibqlab.tokens.report import TokenReport

BY_NAME: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "collapse": plot_collapse_curves,
    "usage_histogram": plot_usage_histogram,
    "code_maps": plot_code_maps,
    "curves": lambda table: plot_generator_curves(table.assign(unit="bits")),
    "scaling": plot_scaling,
    "token_scaling": plot_token_scaling,
    "codes_": plot_lab_plane,
    "lab_curves": plot_lab_curves,
    "fair_": plot_fair_comparison,
    "distribution_gap": lambda table: plot_gap_curves(table, PAPER_3),
}
"""How a figure's name begins → what draws it from its CSV."""


PAIRED = {f"paper_{paper}": ours for ours, paper in STANDS_IN.items()}
"""The paper's panel → ours that it stands behind."""
OF_ONE_SEED = ("usage_histogram", "code_maps")
"""How the names of figures begin that show the first seed alone."""


def redraw(folder: Path) -> tuple[list[str], list[str]]:
    """Draw every figure below a folder again whose CSV suffices.

    Returns:
        Names of the figures drawn, and of the others with the reason.
    """
    drawn, left = [], []
    for picture in sorted(folder.rglob("*.png")):
        csv = picture.with_suffix(".csv")
        try:
            table = pd.read_csv(csv)
            figure = _draw(picture, table)
            _note_runs(picture, figure)
            write_whole(picture, _png(figure))
            drawn.append(picture.stem)
        except (OSError, ValueError) as error:
            left.append(f"{picture.stem}: {error}")
    return drawn, left


def _provenance(picture: Path) -> dict[str, Any]:
    """What provenance.json says, which lies beside stored figures and in a study's own folder one level above them."""
    files = [folder / "provenance.json" for folder in (picture.parent, picture.parent.parent)]
    return next((json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()), {})


def _note_runs(picture: Path, figure: Figure) -> None:
    """Write on a figure what its CSV does not hold and provenance.json does: the seed shown, and runs too short."""
    facts = _provenance(picture)
    seeds, preset = facts.get("seeds") or [], re.search(r"preset=(\w+)", str(facts.get("command")))
    if len(seeds) > 1 and picture.stem.startswith(OF_ONE_SEED):
        extend_caption(figure, f"seed {seeds[0]}, the first of {len(seeds)}")
    reason = why_too_short(None, preset[1] if preset else "")
    if reason:
        mark_too_short(figure, reason)


def _draw(picture: Path, table: pd.DataFrame) -> Figure:
    name = picture.stem
    if name.removesuffix("_norms") in table_names() and name.endswith("_norms"):
        return plot_norm_curves(table)
    if name in table_names():
        return _ablation(picture, table)
    if "floor_s" in table:
        return plot_against_codebook_size(table)
    fits = [begins for begins in {**BY_NAME, **WITH_FILE_BESIDE} if name.startswith(begins)]
    if not fits:
        raise ValueError("its CSV does not suffice; open the study or the run that it is of")
    longest = max(fits, key=len)
    return WITH_FILE_BESIDE[longest](picture, table) if longest in WITH_FILE_BESIDE else BY_NAME[longest](table)


def _paper_map(picture: Path, table: pd.DataFrame) -> Figure:
    """The paper's figures 2 and 6; the usage beside figure 2's maps has a file of its own."""
    if picture.stem.startswith("codes_and_usage"):
        usage = pd.read_csv(picture.with_name(f"{picture.stem}_curves.csv"))
        figure = plot_maps_and_usage(table, usage, PAPER_2)
    else:
        figure = plot_code_maps(table)
        extend_caption(figure, PAPER_6)
    seeds = next(iter(_provenance(picture).get("seeds") or []), 0), len(_provenance(picture).get("seeds") or [0])
    extend_caption(figure, one_seed_text(*seeds))
    return figure


def _tokenizer(name: str) -> str:
    """The tokenizer that a figure's name ends with: "token_link_ibq-1024" → "IBQ, K = 1,024"; "" where it has none."""
    method, _, size = name.removeprefix("token_link").removeprefix("_").rpartition("-")
    return f"{method_label(method)}, K = {int(size):,}" if method else ""


def _token_report(picture: Path, table: pd.DataFrame) -> TokenReport:
    """What a figure's CSV and the table beside it hold of a report. Images are taken to be square."""
    costs = pd.read_csv(picture.with_name(f"{picture.stem}_table.csv"))
    facts = costs.iloc[0]
    size, images = int(facts["codebook_size"]), int(facts["training_images"])
    if size > images:
        raise ValueError("its CSV does not say whether the entropies are lower bounds; open the runs that it is of")
    by_position = table[table["position"].notna()].sort_values("position")
    positions = {name: part["bits"].to_numpy() for name, part in by_position.groupby("name", sort=False)}
    grid = tuple(int(by_position[name].max()) + 1 for name in ("row", "column"))
    side = round((facts["bits_per_image"] / facts["bits_per_pixel"]) ** 0.5)
    entropy = TokenEntropy(
        position=positions["entropy"],
        position_plug_in=positions["entropy"],
        marginal=float(costs.set_index("name")["bits_per_token"]["unigram"]),
        images=images,
        codebook_size=size,
        unseen=0.0,
    )
    tokens = int(facts["usage_tokens"])
    usage = Usage(value=float(facts["usage"]), tokens=tokens, codebook_size=size, definition="any_hit")
    return TokenReport(
        table=costs, positions=positions, entropy=entropy, usage=usage, grid=grid, image_size=(side, side)
    )


def _ablation(picture: Path, table: pd.DataFrame) -> Figure:
    """A table of the paper; what was run stands in the table beside it."""
    shown = pd.read_csv(picture.with_name(f"{picture.stem}_table.csv"))
    distance = next((column for column in shown if column.startswith("Fréchet")), "gFID")
    other = table["measure"].str.startswith("frechet_distance")  # earlier tables call it gfid whatever the network
    table = table.assign(measure=table["measure"].where(~other, "gfid"))
    panels = []
    for key in sorted(table["measure"].unique(), key=lambda key: COLUMNS.index(PAIRED.get(key, key))):
        if key in COLUMNS:
            quantity = measure(key)
            panels.append(replace(quantity, title=distance) if key == "gfid" else quantity)
        else:
            panels.append(paper_panel(key.removeprefix("paper_")))
    file = read_table(picture.stem)
    seeds = int(table["seeds"].max())
    caption = f"{name_student_interval(seeds)}; {DOTS_KEY}"
    here = table["row"].map(shown.set_index("row")["here"])
    return plot_ablation(table.assign(here=here), panels[:4], f"{file.title} ({file.table})", caption)


def _png(figure: Figure) -> bytes:
    """A figure as PNG of 256 colours, which a drawing does not exceed visibly and a repository carries more easily."""
    drawn, picture = io.BytesIO(), io.BytesIO()
    with print_style():
        figure.savefig(drawn, format="png", dpi=180)
    open_picture(drawn).convert("RGB").quantize(256).save(picture, format="png", optimize=True)
    return picture.getvalue()


WITH_FILE_BESIDE: dict[str, Callable[[Path, pd.DataFrame], Figure]] = {
    "power_laws": lambda picture, table: plot_power_laws(
        table, pd.read_csv(picture.with_name("power_laws_fits.csv")), FITTED
    ),
    "token_link": lambda picture, table: plot_token_link(_token_report(picture, table), _tokenizer(picture.stem)),
    "codes_and_usage": _paper_map,
    "soft_vq_codes": _paper_map,
}
"""The same, where a second file beside the CSV is needed."""


if __name__ == "__main__":
    for given in sys.argv[1:]:
        redrawn, others = redraw(Path(given))
        print(f"{given}: drawn {', '.join(redrawn) or 'nothing'}")
        for reason in others:
            print(f"  left alone: {reason}")
