"""The lab: several quantizers over the same features, without images, recorded exactly like training.

    result = run_lab(World(clusters=12), {"VQ": {"name": "vq"}, "IBQ": {"name": "ibq"}}, codebook_size=64)
    result.table()

What one step does is what a training step does: the quantizer's forward pass, its loss and a reconstruction loss, one
Adam step, the same recorder. Where the encoder does not learn, the decoder is the identity: the reconstruction loss is
the squared distance of features and codes, with whatever gradient the method lets through to its codes.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError
from ibqlab.base.measures import TERM
from ibqlab.base.progress import ProgressLine
from ibqlab.config import parse, to_dict
from ibqlab.diagnostics.lab.feature_files import FeatureFile
from ibqlab.diagnostics.lab.methods import lab_methods
from ibqlab.diagnostics.lab.result import SNAPSHOT_ARRAYS, LabFailure, LabResult, LabRun
from ibqlab.diagnostics.lab.run_config import LabRunConfig, LabSettings, plugin_copy, plugin_fact
from ibqlab.diagnostics.lab.worlds import World
from ibqlab.diagnostics.recorder import EARLY_STEPS, Recorder
from ibqlab.diagnostics.usage import TOKENS_PER_CODE, count_indices, perplexity
from ibqlab.quantizers import QuantizerConfig, make_quantizer
from ibqlab.quantizers.composite import codebook_arrays
from ibqlab.runs import Run
from ibqlab.runs.metrics import read_rows

PROBE_TOKENS, PROBE_SCORES = 256, 2**20
"""Tokens on which the recorder measures distances and softmax perplexity, at most; fewer of a grid of many codes, so
that there are no more scores than this."""
MOST_VALIDATED = 65_536
"""Features of a validation, at most: a grid of 2^16 codes would else be validated on more than it is trained on."""
LEAST_SNAPSHOT_FEATURES, MOST_SNAPSHOT_FEATURES = 512, 2048


def run_lab(
    features: World | FeatureFile,
    methods: Mapping[str, Any] | Sequence[str] | str,
    *,
    folder: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> LabResult:
    """Quantize features with several methods, and record what becomes of each codebook.

    Args:
        features: a world, or a file of yours.
        methods: label → quantizer, as `{"VQ": {"name": "vq", "codebook_init": "normal"}}` or as a config; or registered
            names, one or a list, as `"vq"` or `["vq", "vq codebook_init=normal"]`. Code dimension, and codebook size
            where it is not given, are filled in.
        folder: where each method becomes a run folder, which every reader of runs opens. A run that is finished there
            with the same settings is read, not made again.
        progress: show where the work stands.
        **settings: fields of `LabSettings`: codebook_size, codebook_init, steps, batch_size, learning_rate, snapshots,
            log_every, seed.
    Returns:
        Rows and snapshots of all methods. One that diverges or raises an error ends alone: it stands in `failures`, and
        its folder keeps what it logged, with status "failed" and the reason.
    Raises:
        ValueError: settings that cannot be, and nothing has been computed then; or not one method finished.
        RunError: a folder holds a run with other settings, or cannot be written.
    Cost: about steps × batch_size × K × D × 6 operations per method, and a validation of 10·K features per snapshot.
    """
    require(
        isinstance(features, World | FeatureFile),
        f"features must be a World or a FeatureFile; got {type(features).__name__}. An array, a tensor or a file of "
        "features becomes one by FeatureFile(features)",
    )
    lab = _settings(settings)
    configs = lab_methods(features, methods, lab)
    if folder is not None:
        check_folder(features, configs, lab, folder)
    folders, runs, failures = method_folders(configs, folder), {}, {}
    with ProgressLine(progress) as line:
        for number, (label, config) in enumerate(configs.items(), start=1):
            line.show(f"lab: {label}, {number} of {len(configs)} methods")
            settings = _run_config(features, label, config, lab)
            try:
                runs[label] = _run_or_read(features, config, lab, folders[label], settings)
            except RunError:  # no room on the disk: the next method would have none either
                raise
            except Exception as error:
                failures[label] = LabFailure(config=config, reason=_in_words(error))
                if len(failures) == len(configs):
                    _raise_all(error, failures)
    return LabResult(
        runs=runs,
        failures=failures,
        features=features.describe(),
        steps=lab.steps,
        seed=lab.seed,
        folder=None if folder is None else Path(folder),
    )


def _raise_all(error: Exception, failures: Mapping[str, LabFailure]) -> NoReturn:
    """Not one method finished: the error itself where there was one method, else what became of each."""
    if len(failures) == 1:
        raise error
    reasons = "\n".join(f"{label}: {failure.reason}" for label, failure in failures.items())
    raise ValueError(f"not one of {len(failures)} methods finished\n{reasons}") from error


def _in_words(error: Exception) -> str:
    """Why a method failed, in one line; an error that is not of this library is named by its kind, too."""
    words = for_terminal(" ".join(str(error).split()), 300)
    return words if type(error) is ValueError and words else f"{type(error).__name__}: {words}".rstrip(": ")


def check_folder(
    features: World | FeatureFile, configs: Mapping[str, QuantizerConfig], lab: LabSettings, folder: str | Path
) -> None:
    """Refuse a folder with runs of other settings, before anything is computed or written.

    Raises:
        RunError: the first of them; the message names the settings that differ.
    """
    for label, path in method_folders(configs, folder).items():
        Run.check(path, _run_config(features, label, configs[label], lab))


def _settings(settings: Mapping[str, Any]) -> LabSettings:
    return parse(LabSettings, settings, source="settings of the lab")


def method_folders(configs: Mapping[str, QuantizerConfig], folder: str | Path | None) -> dict[str, Path | None]:
    """A run folder per method, named by its label as far as a file system takes it."""
    if folder is None:
        return dict.fromkeys(configs)
    names = {
        label: "".join(c if c.isalnum() or c in "-_." else "_" for c in label).strip("._")[:80] for label in configs
    }
    names = {label: name or "method" for label, name in names.items()}
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {
        label: Path(folder) / (f"{name}-{number}" if name in twice else name)
        for number, (label, name) in enumerate(names.items(), start=1)
    }


def _run_config(features: World | FeatureFile, label: str, config: QuantizerConfig, lab: LabSettings) -> dict[str, Any]:
    """What a lab run's config.yaml holds, with names where readers of runs look for them."""
    shared = {name: value for name, value in vars(lab).items() if not name.startswith("codebook_")}
    source = {"label": label, **features.settings(), **plugin_fact(config)}
    return {"lab": source, **shared, "tokenizer": {"quantizer": to_dict(config)}}


def train_in_lab(config: LabRunConfig, path: str | Path, *, progress: bool = True) -> Run:
    """One method's run in a world, in a folder of its own: made, or read where it is finished.

    Raises:
        ValueError: the loss is no finite number at some step.
        RunError: the folder holds a run with other settings, or cannot be written.
    """
    quantizer, lab = config.tokenizer.quantizer, config.settings()
    with ProgressLine(progress) as line:
        line.show(f"lab: {config.lab.label}")
        _run_or_read(config.lab.world, quantizer, lab, Path(path), to_dict(config))
    return Run(path)


def _run_or_read(
    features: World | FeatureFile,
    config: QuantizerConfig,
    lab: LabSettings,
    path: Path | None,
    settings: Mapping[str, Any],
) -> LabRun:
    """A method's run: made, or read where its folder holds it finished with the same settings."""
    if path is None:
        return _Bench(features, config, lab).run()
    run = Run.start(path, settings, claim=True, copies=plugin_copy(config))
    try:
        if run.status == "finished" and run.snapshot_steps == lab.snapshot_steps:
            return _read(run, config)
        if not run.is_new:
            # Made again from its first step: a lab run takes seconds.
            run.truncate_metrics(-1)
            run.drop_snapshots_after(-1)
        bench = _Bench(features, config, lab)
        try:
            made = bench.run()
        except Exception as error:
            with suppress(RunError):  # the disk may be full: what went wrong first is what must be told
                for row in bench.rows:
                    run.log(row)
                run.finish("failed", reason=_in_words(error), seed=lab.seed, features=features.describe())
            raise
        for step, arrays in made.snapshots.items():
            run.save_snapshot(step, **arrays)
        for row in made.rows:
            run.log(row)
        run.finish("finished", duration_s=round(made.seconds, 3), seed=lab.seed, features=features.describe())
        return made
    finally:
        run.release()


def _read(run: Run, config: QuantizerConfig) -> LabRun:
    """A finished run out of its folder."""
    snapshots = {step: run.snapshot(step) for step in run.snapshot_steps}
    return LabRun(config=config, rows=tuple(read_rows(run.path)), snapshots=snapshots, seconds=run.duration)


class _Bench:
    """One method at work.

    Args:
        source: of the points.
        config: of the quantizer.
        lab: what all methods have in common.
    """

    def __init__(self, source: World | FeatureFile, config: QuantizerConfig, lab: LabSettings):
        self.source, self.config, self.lab = source, config, lab
        # As many for all methods, whose usage and error can then be compared.
        self.tokens = min(MOST_VALIDATED, TOKENS_PER_CODE * max(config.codebook_size, lab.codebook_size))
        """Features of a validation; of a small file there are fewer."""
        self.rows: list[dict[str, Any]] = []
        """As in metrics.jsonl, also of a run that fails."""

    def run(self) -> LabRun:
        """All steps, from the lab's seed; torch's own random numbers are as they were afterwards."""
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.lab.seed)
            self.quantizer = make_quantizer(self.config)  # first, so that equal codebooks start at equal codes
            self.encoder, self.decoder = self.source.networks(self.config.code_dim) or (None, None)
            self._start()
            snapshots = self._steps()
        seconds = time.perf_counter() - began
        return LabRun(config=self.config, rows=tuple(self.rows), snapshots=snapshots, seconds=seconds)

    def _start(self) -> None:
        lab = self.lab
        networks = [network for network in (self.quantizer, self.encoder, self.decoder) if network is not None]
        parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=lab.learning_rate) if parameters else None
        window = -(-self.tokens // lab.batch_size) * lab.batch_size  # whole steps
        probe = max(16, min(PROBE_TOKENS, PROBE_SCORES // self.config.codebook_size))
        self.recorder = Recorder(self.quantizer, window, probe)
        self.validation_points = self.source.points(self.tokens, 0, validation=True)
        shown = min(MOST_SNAPSHOT_FEATURES, max(LEAST_SNAPSHOT_FEATURES, self.tokens))
        self.snapshot_points = self.source.points(shown, 0, validation=True)

    def _steps(self) -> dict[int, dict[str, np.ndarray]]:
        """Every step, its row where it has one; the snapshots by step."""
        lab, due, snapshots = self.lab, set(self.lab.snapshot_steps), {}
        for step in range(lab.steps + 1):
            row = self._learn(step) if step else {}
            if step in due or step in EARLY_STEPS:
                counts, measured = self._validate(step)
                row = (row or {}) | measured
                if step in due:
                    snapshots[step] = self._snapshot(step, counts)
            if row:
                self.rows.append({"step": step, **row})
        return snapshots

    def _learn(self, step: int) -> dict[str, Any] | None:
        """One step; its row where it is logged."""
        logging = self.lab.logs(step)
        if logging:
            self.recorder.before_step()
        self.quantizer.progress = (step - 1) / self.lab.steps
        points = self.source.points(self.lab.batch_size, step)
        features = self._encode(points, self.quantizer.progress)
        out = self.quantizer(features)
        quantized = out.quantized.flatten(1)
        # Without a decoder what is to be rebuilt are the features themselves.
        target, rebuilt = (
            (features.detach().flatten(1), quantized) if self.decoder is None else (points, self.decoder(quantized))
        )
        loss = nn.functional.mse_loss(rebuilt, target) + out.loss
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {step}; lower learning_rate, or "
                + (
                    "the world's spread, width and drift"
                    if isinstance(self.source, World)
                    else "bring the features to the codes' scale with standardise=True"
                )
            )
        error = self._error(features, out.indices) if logging else None
        if loss.requires_grad:
            loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.recorder.observe(out.indices, step)
        row = None
        if logging:
            terms = {f"{TERM}{name}": term.item() for name, term in out.terms.items()}
            row = {"loss": loss.item(), "quantizer_loss": out.loss.item(), **terms, "quantization_error": error}
            row |= self.recorder.report(features, step)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        return row

    def _encode(self, points: Float[Tensor, "N D"], progress: float) -> Float[Tensor, "N D 1 1"]:
        """Features of points, one token per image."""
        features = self.source.features(points, progress) if self.encoder is None else self.encoder(points)
        return features[:, :, None, None]

    @torch.no_grad()
    def _error(self, features: Tensor, indices: Tensor) -> float:
        """Mean squared difference of features and their codes."""
        codes = self.quantizer.look_up(indices).flatten(0, 2)
        return float((features.detach().flatten(1) - codes).square().mean())

    @torch.no_grad()
    def _validate(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Hits per code among features that training does not see, and the numbers of a row."""
        size = self.config.codebook_size
        self.quantizer.eval()
        points = self.validation_points
        features = self._encode(points, step / self.lab.steps)
        indices = self.quantizer.encode(features)
        self.quantizer.train()
        counts = count_indices(indices, size)
        row = {
            "validation_usage": int((counts > 0).sum()) / size,
            "validation_perplexity": perplexity(counts),
            "validation_tokens": int(counts.sum()),
            "validation_quantization_error": self._error(features, indices),
        }
        if self.decoder is not None:
            rebuilt = self.decoder(self.quantizer.look_up(indices).flatten(0, 2))
            left = (points - rebuilt).square().mean() / points.var(0, correction=0).mean().clamp_min(1e-12)
            row["validation_reconstruction_error"] = float(left)
        return counts, row

    @torch.no_grad()
    def _snapshot(self, step: int, counts: Tensor) -> dict[str, np.ndarray]:
        """Codes and features as they stand, arrays as in a training run's snapshot."""
        self.quantizer.eval()
        features = self._encode(self.snapshot_points, step / self.lab.steps)
        indices = self.quantizer.encode(features)
        self.quantizer.train()
        arrays = (features.flatten(1), indices.flatten(), counts, self.recorder.last_hits())
        copies = {name: array.numpy().copy() for name, array in zip(SNAPSHOT_ARRAYS[1:], arrays, strict=True)}
        return codebook_arrays(self.quantizer) | copies
