"""Generating: from a trained tokenizer to images that nobody has photographed.

A generator learns which token follows which, draws new tokens for a class, and the tokenizer decodes them. The main
idea: an image is drawn by a seed of its own, so it is the same one whatever the batch, the shard or the process.
`pipeline` trains both networks one after the other, `pairs` opens them again, `drawing` makes images, `gallery`
compares settings beside each other, `sampling_runs` writes thousands of samples and resumes after a kill, and
`token_statistics` says what the tokens cost. Start with `drawing.draw_images`.

    from ibqlab.generating import GalleryParameters, open_gallery
    open_gallery(GalleryParameters(generator="runs/digits_generator")).figure_seeds([0, 1, 2])
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "GalleryParameters": "gallery",
    "GeneratorRunParameters": "pipeline",
    "SampleRequest": "sampling_runs",
    "choose_classes": "gallery",
    "describe_run": "pipeline",
    "describe_tokenizer": "token_statistics",
    "draw_gallery": "drawing",
    "draw_images": "drawing",
    "generators_over": "token_statistics",
    "open_gallery": "gallery",
    "open_pair": "pairs",
    "prepare_pipeline": "pipeline",
    "sample_images": "sampling_runs",
    "save_token_figure": "token_statistics",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # The process of one run of a grid needs `sampling_runs` alone, and should not wait for matplotlib.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
