"""Recipes: the complete settings of a training run, and the YAML files under experiments/ that hold them.

The two kinds of run, `tokenizer_config` and `generator_config`, stand on one base, `run_config`: typed dataclasses with
a docstring under each setting. `recipe_files` finds and reads the files by name, `published` what papers printed for
them, and `presets` is the one table of words for a size of work. Nothing here trains: whoever wants to know what a run
will do reads these files. Start with `tokenizer_config.TrainConfig`.
"""
