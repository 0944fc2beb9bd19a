"""The start page's pictures, small cuts of results: `python experiments/start_page_pictures.py`.

A notebook without a line here shows the first figure of its own results, or its name.
"""

from pathlib import Path

from ibqlab.data.pictures import open_picture
from ibqlab.notebooks.start_page import PICTURES, thumbnail

RESULTS = Path(__file__).with_name("results")
CUTS = {
    "ablations": ("ablations_laptop/figures/codebook_size.png", (20, 0, 1296, 480)),
    "explore_collapse": ("explore_collapse_demo/code_maps.png", (430, 575, 1110, 980)),
    "fair_comparison": ("fair_comparison_laptop/figures/fair_photos.png", (0, 900, 870, 1400)),
    "features_lab": ("features_lab_demo/codes_at_the_end.png", (300, 110, 1190, 610)),
    "generation_gallery": ("digits_gallery/gallery.png", (0, 20, 1296, 770)),
    "link_stages": ("link_stages_laptop/token_link_ibq-256.png", (0, 80, 700, 520)),
    "playground": ("playground_demo/codes_through_time.png", (0, 330, 1070, 930)),
    "scale_codebook": ("scale_codebook_laptop/figures/scaling.png", (0, 80, 640, 540)),
    "train_generator": ("digits_gallery/curves.png", (0, 20, 830, 560)),
}
"""Notebook → a result of it, below experiments/results, and left, upper, right and lower edge of the cut in pixels."""

if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, (result, edges) in CUTS.items():
        (PICTURES / f"{name}.webp").write_bytes(thumbnail(open_picture(RESULTS / result).crop(edges)))
