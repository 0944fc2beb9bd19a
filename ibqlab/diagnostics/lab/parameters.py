"""What the notebooks of the lab may set, and the lab that this describes."""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from ibqlab.base.checks import BATCH, CODES, SEED, STEPS, require, require_between, require_choice
from ibqlab.base.progress import tell
from ibqlab.diagnostics.lab.feature_files import FeatureFile
from ibqlab.diagnostics.lab.laboratory import check_folder, method_folders, run_lab
from ibqlab.diagnostics.lab.methods import lab_methods, read_methods
from ibqlab.diagnostics.lab.result import LabResult
from ibqlab.diagnostics.lab.run_config import LabSettings
from ibqlab.diagnostics.lab.worlds import ENCODERS, World
from ibqlab.quantizers import QuantizerConfig
from ibqlab.recipes.plugins import import_plugins
from ibqlab.recipes.presets import LabPreset, find_preset
from ibqlab.runs.caveats import why_too_short
from ibqlab.runs.finding import output_folder
from ibqlab.runs.provenance_record import COMMAND, portable

BOUNDS = {"codebook_size": CODES, "steps": STEPS, "batch_size": BATCH, "seed": SEED}


@dataclass(frozen=True, kw_only=True)
class _LabParameters:
    """What the `parameters` cell of either notebook may set. Empty or 0 means: as the preset says."""

    use: ClassVar[str] = ""
    """The field of a preset that holds its sizes."""

    preset: str = "demo"
    """One of `preset_names("lab")`."""
    methods: tuple[str, ...] = ()
    """Quantizers by their registered names, each with settings of its own behind it where it has some:
    "vq codebook_init=normal revive_after=20", "residual inner={name: ibq}",
    "vqp cls=ResidualVQ arguments={num_quantizers: 2}"; ["all"]: every registered one."""
    plugins: tuple[str, ...] = ()
    """Files and modules of your own that register quantizers: ["my_quantizer.py"]."""
    codebook_size: int = 0
    """K, codes, of methods that do not say theirs."""
    codebook_init: str = ""
    """One start of the codebook for all methods: "uniform", "normal", "unit" or "kmeans"; empty: each method's own."""
    steps: int = 0
    """Steps of every method."""
    batch_size: int = 0
    """Features of a step."""
    learning_rate: float = 0.0
    """Adam's, ≥ 0."""
    seed: int = 0
    """Of codebooks and features."""
    output: str = ""
    """Folder: a name below the folder of all runs, or a path that starts with / ./ or ~; empty: <notebook>-<preset>."""

    def __post_init__(self):
        find_preset(self.preset, "lab")
        for name, most in BOUNDS.items():
            require_between(name, getattr(self, name), 0, most)
        require(self.learning_rate >= 0, f"learning_rate must be ≥ 0, got {self.learning_rate}")
        self.settings()
        import_plugins(self.plugins)  # last, because it runs somebody's code: numbers are refused at once

    def settings(self) -> LabSettings:
        """Of the lab, with the preset's values where the parameters say nothing."""
        preset: LabPreset = find_preset(self.preset, "lab")
        return LabSettings(
            codebook_size=self.codebook_size or preset.codebook_size,
            codebook_init=self.codebook_init,
            steps=self.steps or preset.steps,
            batch_size=self.batch_size or preset.batch_size,
            learning_rate=self.learning_rate or preset.learning_rate,
            snapshots=preset.snapshots,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PlaygroundParameters(_LabParameters):
    """What the `parameters` cell of the notebook `playground` may set. Empty or 0 means: as the preset says."""

    use: ClassVar[str] = "playground"
    encoder: str = "drifting"
    """"fixed", "drifting" or "learning"."""
    clusters: int = 12
    """Of points, at least 1."""
    drift: float = 1.0
    """How far a drifting encoder goes over the whole run; 1: half a turn."""

    def __post_init__(self):
        require_choice("encoder", self.encoder, ENCODERS)
        super().__post_init__()
        self.features()

    def features(self) -> World:
        """Points in the plane."""
        return World(dim=2, clusters=self.clusters, encoder=self.encoder, drift=self.drift, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class FeaturesLabParameters(_LabParameters):
    """What the `parameters` cell of the notebook `features_lab` may set. Empty or 0 means: as the preset says."""

    use: ClassVar[str] = "features_lab"
    source: str = ""
    """File of features: .npy, .npz, .safetensors or .parquet; empty: the pixels of scikit-learn's digits."""
    column: str = ""
    """Array, tensor or column of the file, where it holds several."""
    standardise: bool = True
    """Bring the features to mean 0 and a mean variance of 1, where codes that start at N(0, 1) lie."""

    def features(self) -> FeatureFile:
        """The file's rows; digits where no file is named."""
        if self.source:
            return FeatureFile(self.source, self.column, standardise=self.standardise, seed=self.seed)
        require(not self.column, "column names a part of a file; give source=FILE, too")
        from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second, and only digits need it

        digits = load_digits().data.astype("float32") / 16
        return FeatureFile(digits, standardise=self.standardise, seed=self.seed, name="digits")


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A lab that is ready: nothing is computed or written before `run`."""

    features: World | FeatureFile
    """What is quantized."""
    methods: Mapping[str, QuantizerConfig]
    """Label → quantizer."""
    settings: LabSettings
    """Common to all methods."""
    folder: Path
    """Where the methods' run folders and all figures go."""
    preset: str
    """Word for its size."""
    command: str = ""
    """What is typed to make it again."""

    def run(self, progress: bool = True) -> LabResult:
        """Every method that is not finished in the folder; the others are read there.

        Args:
            progress: show where the work stands.
        """
        os.environ[COMMAND] = self.command
        try:
            result = run_lab(self.features, self.methods, folder=self.folder, progress=progress, **vars(self.settings))
        finally:
            os.environ.pop(COMMAND, None)
        tell(folder=str(self.folder.resolve()), result=self._in_a_sentence(result))
        return result

    @property
    def method_folders(self) -> list[Path]:
        """Run folders of the methods, in their order; they need not exist."""
        return [folder for folder in method_folders(self.methods, self.folder).values() if folder]

    def _in_a_sentence(self, result: LabResult) -> str:
        """What came of it, for whoever runs the notebook from a terminal."""
        table = result.table().set_index("method").loc[list(result.runs)]
        usage, error = table["usage"], table["error_share"]
        reason = f" ({self.too_short}: too short to mean anything)" if self.too_short else ""
        return (
            f"{len(table)} methods; usage from {usage.min():.1%} ({usage.idxmin()}) to {usage.max():.1%} "
            f"({usage.idxmax()}); least error: {error.idxmin()}, {error.min():.1%} of the features' variance{reason}"
            f"{f'. {result.failed}' if result.failed else ''}"
        )

    @property
    def too_short(self) -> str:
        """Why its runs are too short to mean anything: its preset, or their steps; empty where they are not."""
        return why_too_short(self.settings.steps, self.preset)

    def __str__(self) -> str:
        sizes = f"{self.settings.steps} steps, K = {self.settings.codebook_size:,}, D = {self.features.dim}"
        return f"{len(self.methods)} methods, {sizes}, {self.features.describe()} → {self.folder.name}"


def prepare_lab(parameters: PlaygroundParameters | FeaturesLabParameters) -> Lab:
    """The lab that a notebook's parameters describe; nothing is written.

    Raises:
        ValueError: an unknown method or setting, or features that cannot be read.
        RunError: the folder holds runs with other settings.
    """
    preset: LabPreset = find_preset(parameters.preset, "lab")
    # Features are opened last: a large file is looked through, and that takes seconds.
    typed, settings = read_methods(parameters.methods or getattr(preset, parameters.use)), parameters.settings()
    folder = output_folder(parameters.output, default=f"{parameters.use}-{parameters.preset}")
    features = parameters.features()
    methods = lab_methods(features, typed, settings)
    check_folder(features, methods, settings, folder)
    return Lab(
        features=features,
        methods=methods,
        settings=settings,
        folder=folder,
        preset=parameters.preset,
        command=_command(parameters),
    )


def _command(parameters: PlaygroundParameters | FeaturesLabParameters) -> str:
    """What is typed for these parameters."""
    plain, words = type(parameters)(), [f"preset={parameters.preset}"]
    for field in fields(plain):
        value = getattr(parameters, field.name)
        if field.name != "preset" and value != getattr(plain, field.name):
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else str(value)
            words.append(shlex.quote(portable(f"{field.name}={text}")))
    return " ".join(["ibqlab run", parameters.use, *words])
