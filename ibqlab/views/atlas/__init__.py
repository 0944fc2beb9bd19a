"""A whole codebook as a folder of HTML that opens from disk: map, table of codes, a card per code.

write.py     gathers what the pages show and writes it
page.html, atlas.css, atlas.js   the page, written beside the data as they are
"""

from ibqlab.views.atlas.write import AtlasSettings, write_atlas

__all__ = ["AtlasSettings", "write_atlas"]
