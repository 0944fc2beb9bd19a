"""A whole codebook as a folder of HTML that opens from disk: map, table of codes, a card per code.

write.py           what an atlas looks at, and the order in which its folder is written; start reading here
gather.py          its data: facts, columns, the map's places, a card per code
pictures.py        images, and what codes decode to
moment.py          the map of a checkpoint, which has no snapshots
table.py           the codes as a Parquet table for embedding-atlas
building.py        the folder: refused where it holds something else, there whole or not at all
example_cards.py   what the notebook `codebook_atlas` shows below the link
index.html, atlas.css, atlas.js, table.js, map.js   the page, written beside the data as they are
"""

from ibqlab.views.atlas.example_cards import AtlasParameters, example_cards, find_or_train
from ibqlab.views.atlas.write import AtlasSettings, write_atlas

__all__ = ["AtlasParameters", "AtlasSettings", "example_cards", "find_or_train", "write_atlas"]
