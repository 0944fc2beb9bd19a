"""From a recipe to a generator: tokenizer → stored tokens → generator, each step done once and kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from ibqlab.base.checks import require
from ibqlab.config import content_hash, to_dict
from ibqlab.generating.pairs import run_config
from ibqlab.generating.token_statistics import describe_tokenizer, save_token_figure
from ibqlab.pretrained import load_tokenizer
from ibqlab.recipes.plugins import import_plugins
from ibqlab.recipes.presets import find_preset
from ibqlab.runs import Run
from ibqlab.runs.finding import locate, output_folder, run_name
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokens.report import TokenReport
from ibqlab.tokens.store import TokenStore
from ibqlab.tokens.writing import write_tokens
from ibqlab.training import GeneratorTrainConfig, TrainConfig, recipe_config, train, train_generator
from ibqlab.training.generator.token_source import check_fit


@dataclass(frozen=True, kw_only=True)
class GeneratorRunParameters:
    """What the `parameters` cell of a notebook that trains a generator may set."""

    preset: str = "digits"
    """One of `preset_names("generator")`."""
    tokenizer: str = ""
    """A trained tokenizer: a run, an export or a published file; empty: the preset's is trained first."""
    tokenizer_settings: tuple[str, ...] = ()
    """Keys of the tokenizer's recipe to replace, as typed on a command line: ["steps=500"]."""
    settings: tuple[str, ...] = ()
    """Keys of the generator's recipe to replace: ["steps=500", "generator.depth=6"]."""
    store_tokens: bool = True
    """Write the tokens once and train from them; False: tokenize every batch anew, as published."""
    output: str = ""
    """Folder for tokenizer, tokens and generator: a name below the folder of all runs, or a path that starts with / ./
    or ~; empty: named by preset and settings."""
    plugins: tuple[str, ...] = ()
    """Files (my_quantizer.py) and modules of your own that register quantizers, for the tokenizer to have."""
    wait: bool = True
    """Whether training cells wait for the end; else training goes on in the background and the kernel is free."""

    def __post_init__(self):
        find_preset(self.preset, "generator")
        import_plugins(self.plugins)
        require(
            not (self.tokenizer and self.tokenizer_settings),
            "tokenizer_settings are for the preset's tokenizer; got them with a trained one. Use [].",
        )


class Pipeline(NamedTuple):
    """Runs that have not started, and where they will lie."""

    folder: Path
    """Holds `tokenizer` (where it is trained here), `tokens` (where they are stored) and `generator`."""
    tokenizer: TrainConfig | None
    """None: a trained one is given."""
    generator: GeneratorTrainConfig
    """Names the tokenizer and the tokens."""

    @property
    def tokenizer_path(self) -> Path:
        """The run folder of a tokenizer that is trained here."""
        return self.folder / "tokenizer"

    @property
    def generator_path(self) -> Path:
        """The generator's run folder."""
        return self.folder / "generator"

    def train_tokenizer(self) -> Tokenizer:
        """The tokenizer, trained if it is not there yet."""
        if self.tokenizer:
            train(self.tokenizer, self.tokenizer_path)
        return self.load_tokenizer()

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer as it stands now: the one that is given, or the last checkpoint of the one trained here."""
        return load_tokenizer(locate(self.generator.tokenizer), self.generator.tokenizer_weights)

    def write_tokens(self, tokenizer: Tokenizer) -> TokenStore | None:
        """The data's tokens, written if they are not there yet; None where every batch is tokenized anew.

        Raises:
            ValueError: the generator cannot draw this tokenizer's tokens; nothing is written then.
        """
        if not self.generator.tokens:
            return None
        check_fit(tokenizer, self.generator.generator, self.generator.data.image_size)
        return write_tokens(tokenizer, self.generator.data, self.folder / "tokens")

    def train_generator(self) -> Run:
        """The generator's run, trained to its end; needs the tokens where they are stored."""
        return train_generator(self.generator, self.generator_path)


def prepare_pipeline(parameters: GeneratorRunParameters) -> Pipeline:
    """Settings and folders of all that a notebook's parameters describe.

    Raises:
        ConfigError: no such recipe, or settings that do not fit it.
        RunError: the folder holds runs with other settings.
    """
    first, second = find_preset(parameters.preset, "generator")
    settings, plugins = parameters.tokenizer_settings, parameters.plugins
    tokenizer = None if parameters.tokenizer else recipe_config(first, assignments=settings, plugins=plugins)
    plain = recipe_config(second, assignments=parameters.settings, plugins=plugins)
    trained_with = to_dict(tokenizer) if tokenizer else parameters.tokenizer
    settings_hash = content_hash({"tokenizer": trained_with, "generator": to_dict(plain)})
    folder = output_folder(parameters.output, default=f"train_generator-{parameters.preset}-{settings_hash}")
    name = run_name(folder)
    # Names below the folder of all runs, so that settings hold no path of this machine.
    inputs = {"tokenizer": parameters.tokenizer or f"{name}/tokenizer"}
    if parameters.store_tokens:
        inputs["tokens"] = f"{name}/tokens"
    generator = recipe_config(second, inputs, parameters.settings, plugins)
    pipeline = Pipeline(folder=folder, tokenizer=tokenizer, generator=generator)
    Run.check(pipeline.generator_path, generator)
    if tokenizer:
        Run.check(pipeline.tokenizer_path, tokenizer)
    return pipeline


def describe_run(run: Run, tokenizer: Tokenizer, *, images: int = 4096) -> tuple[TokenReport, Figure]:
    """What the tokens cost by counting, and to this generator; the figure is saved into its run as `token_link`.

    Args:
        run: a finished generator's.
        tokenizer: that it was trained over.
        images: training images to count.
    """
    config = run_config(run)
    report = describe_tokenizer(
        tokenizer,
        config.data,
        images=images,
        validation_images=config.record.validation_images,
        generators={"generator": run},
    )
    return report, save_token_figure(report, run.figure_path("token_link"))
