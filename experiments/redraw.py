"""Draw a result folder's figures again from the CSV beside each.

    python experiments/redraw.py experiments/results/ablations_laptop

What a CSV does not hold (reconstructed images, maps of before their axes were written down) is named and left alone.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ibqlab.plots import (
    plot_code_maps,
    plot_collapse_curves,
    plot_generator_curves,
    plot_norm_curves,
    plot_scaling,
    plot_token_scaling,
    plot_usage_histogram,
    save_figure,
)
from ibqlab.plots.power_laws import plot_power_laws
from ibqlab.studies.scaling import FITTED

BY_NAME: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "collapse": plot_collapse_curves,
    "usage_histogram": plot_usage_histogram,
    "code_maps": plot_code_maps,
    "curves": lambda table: plot_generator_curves(table.assign(unit="bits")),
    "scaling": plot_scaling,
    "token_scaling": plot_token_scaling,
}
"""How a figure's name begins → what draws it from its CSV."""


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
            save_figure(_draw(picture, table), picture, table)
            drawn.append(picture.stem)
        except (OSError, ValueError) as error:
            left.append(f"{picture.stem}: {error}")
    return drawn, left


def _draw(picture: Path, table: pd.DataFrame) -> Figure:
    name = picture.stem
    if name.endswith("_norms"):
        return plot_norm_curves(table)
    if name == "power_laws":
        return plot_power_laws(table, pd.read_csv(picture.with_name("power_laws_fits.csv")), FITTED)
    fits = [begins for begins in BY_NAME if name.startswith(begins)]
    if not fits:
        raise ValueError("its CSV does not suffice; open the study or the run that it is of")
    return BY_NAME[max(fits, key=len)](table)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        redrawn, others = redraw(Path(given))
        print(f"{given}: drawn {', '.join(redrawn) or 'nothing'}")
        for reason in others:
            print(f"  left alone: {reason}")
