"""Names for a size of work, the same at every door, and what each stands for."""

PRESETS = {
    "smoke": "builtin/smoke",
    "laptop": "builtin/photos",
    "digits": "builtin/digits",
    "h200": "h200/photos",
    "paper": "imagenet/ibq_16384",
}
"""Presets of notebooks that train one run, and the recipes they stand for."""
