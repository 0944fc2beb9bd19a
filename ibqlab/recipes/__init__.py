"""Recipes: the complete settings of a training run, and the YAML files under experiments/ that hold them.

`tokenizer_config` and `generator_config` are the two kinds of run, as typed dataclasses with a docstring under each
setting. `recipe_files` finds and reads the files by name, and `presets` holds the names for a size of work. Nothing
here trains: whoever wants to know what a run will do reads these files. Start with `tokenizer_config.TrainConfig`.
"""
