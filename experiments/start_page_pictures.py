"""The start page's pictures, small cuts of results: `python experiments/start_page_pictures.py`.

A notebook without a line here shows the first figure of its own results, or its name.
"""

from pathlib import Path

from ibqlab.data.pictures import open_picture
from ibqlab.notebooks.start_page import PICTURES, thumbnail

RESULTS = Path(__file__).with_name("results")
CUTS = {
    "ablations": ("ablations_laptop/figures/codebook_size.png", (0, 0, 1296, 520)),
    "browse_runs": ("codebook_map/run_browser.png", (0, 0, 1158, 600)),
    "codebook_atlas": ("codebook_map/atlas.png", (0, 60, 1400, 800)),
    "compare_published": ("notebook_figures/compare_published.png", (0, 0, 1296, 545)),
    "evaluate_tokenizer": ("notebook_figures/evaluate_tokenizer.png", (0, 25, 1296, 345)),
    "explore_collapse": ("explore_collapse_demo/code_maps.png", (378, 552, 1118, 1036)),
    "fair_comparison": ("fair_comparison_laptop/figures/fair_photos.png", (0, 0, 1296, 446)),
    "feature_code_map": ("feature_code_map_laptop/figures/codes_and_usage.png", (0, 60, 1296, 590)),
    "features_lab": ("features_lab_demo/codes_at_the_end.png", (0, 38, 1190, 752)),
    "generation_gallery": ("digits_gallery/gallery.png", (0, 0, 1296, 752)),
    "link_stages": ("link_stages_laptop/token_link_ibq-256.png", (0, 35, 475, 545)),
    "playground": ("playground_demo/codes_through_time.png", (0, 393, 1185, 1092)),
    "scale_codebook": ("scale_codebook_laptop/figures/scaling.png", (0, 80, 640, 540)),
    "train_generator": ("digits_gallery/curves.png", (0, 3, 740, 605)),
    "train_tokenizer": ("notebook_figures/train_tokenizer.png", (648, 55, 1296, 378)),
    "your_case": ("notebook_figures/your_case.png", (0, 0, 1296, 495)),
}
"""Notebook → a result of it, below experiments/results, and left, upper, right and lower edge of the cut in pixels."""

if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, (result, edges) in CUTS.items():
        (PICTURES / f"{name}.webp").write_bytes(thumbnail(open_picture(RESULTS / result).crop(edges)))
