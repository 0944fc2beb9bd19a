"""Opens any checkpoint: a published file, a run folder or an export, of a tokenizer or a generator.

checkpoint = read_checkpoint("imagenet256_16384.ckpt")
print(checkpoint.report)                       # what every key of the file is
checkpoint.tokenizer["encoder.conv_in.weight"] # by our names, whatever the file calls it
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ibqlab.base.checks import require, require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import RunError, UnreadableFile, parse_json
from ibqlab.config import parse
from ibqlab.generator import generator_config
from ibqlab.pretrained import names
from ibqlab.pretrained.checkpoint import Checkpoint
from ibqlab.pretrained.family import available_families
from ibqlab.pretrained.generator_architecture import PARTS, TOKENS
from ibqlab.pretrained.hub import PUBLISHED, PUBLISHED_GENERATORS
from ibqlab.pretrained.load_report import AS_GIVEN, WEIGHTS, WORDS
from ibqlab.pretrained.published_files import check_own_tensors, read_published
from ibqlab.pretrained.tensor_files import (
    SAFETENSORS,
    CheckpointError,
    TensorFile,
    check_tensors,
    existing_path,
    load_pickle,
    open_tensor_file,
)
from ibqlab.quantizers import available_quantizers
from ibqlab.recipes.generator_config import GeneratorTrainConfig
from ibqlab.recipes.plugins import Plugin, import_known, plugin_of, plugin_of_design
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs import Run
from ibqlab.runs.finding import WEIGHT_FILES, locate
from ibqlab.runs.kinds import is_lab, is_monitored
from ibqlab.tokenizer import TokenizerConfig, available_designs
from ibqlab.tokenizer.designs import DEFAULT as DEFAULT_DESIGN

EXPORT = "ibqlab"
"""Key of an export's settings in the header of its file."""
NETWORKS = {"tokenizer": PUBLISHED, "generator": PUBLISHED_GENERATORS}
"""The two networks, and the published checkpoints of each."""
RUN_PARTS = {
    "tokenizer": {
        "model": "tokenizer",
        "ema": "tokenizer_ema",
        "discriminator": "discriminator",
        "discriminator_ema": "discriminator_ema",
    },
    "generator": {"model": "generator"},
}
"""Entries of a run's checkpoint and the parts that they hold."""


def read_checkpoint(
    path: str | Path,
    network: str = "tokenizer",
    *,
    family: str | None = None,
    quantizer: str | None = None,
    num_heads: int | tuple[int, int] | None = None,
    grid_size: int | None = None,
) -> Checkpoint:
    """Everything that a checkpoint holds of a network and of what was trained beside it.

    Args:
        path: a published file of a family that is read here (`available_families`), its bare state dict (.ckpt, .pt,
            .bin, .safetensors), a folder of config.json and weights, a run folder, or a file from `export_tokenizer` or
            `export_generator`; of a generator one of IBQ, Open-MAGVIT2 or LlamaGen.
        network: "tokenizer" or "generator".
        family: of a published tokenizer, where its names do not tell it, such as "vqgan"; None: as the file tells.
        quantizer: of a published tokenizer in IBQ's or VQGAN's autoencoder, where it is another than the family's.
        num_heads: of a published transformer, which does not tell it, of TiTok also two, (encoder, decoder); None: as
            published for its width.
        grid_size: likewise, tokens along one side of an image; None: 16, as published. LlamaGen published grids of 16
            and 24: None is refused for the widths of both.
    Raises:
        FileNotFoundError: nothing there; the message says so of a published name, too, which is not downloaded here.
        CheckpointError: no checkpoint, damaged, of another model, incomplete, or with objects where weights must be.
        RunError: a folder that is no run, or a run without a checkpoint.
        ValueError: an unknown network, family or quantizer, numbers that do not fit, or what a file that stores its own
            was asked to be.
    """
    require_choice("network", network, NETWORKS)
    if quantizer is not None:
        require_choice("quantizer", quantizer, available_quantizers())
    if family is not None:
        require_choice("family", family, available_families())
    user_settings = {"num_heads": num_heads, "grid_size": grid_size}
    if network == "tokenizer":
        user_settings = {"family": family, "quantizer": quantizer, "num_heads": num_heads}
    path = _existing_checkpoint(path, network)
    if path.is_dir():
        checkpoint = _read_run(path, network)
    else:
        file = open_tensor_file(path)
        if EXPORT not in file.metadata:
            return read_published(file, network, **user_settings)
        checkpoint = _read_export(file, network)
    check_own_tensors(checkpoint)
    for name, value in user_settings.items():
        config = checkpoint.config
        actual = config.quantizer.config_name if name == "quantizer" else getattr(config, name, None)
        require(
            value in (None, actual),
            f"{name} is asked of published files, which do not tell it; {path} holds {actual!r}. Leave {name} out",
        )
    return checkpoint


def held_weights(path: str | Path) -> str:
    """Which weights a tokenizer's file holds, and how to get the others. Errors are those of `read_checkpoint`."""
    checkpoint = read_checkpoint(path)
    weights = checkpoint.weights
    if weights in WEIGHTS:
        alternative = "raw" if weights == "ema" else "ema"
        return f"{WORDS[weights]}; for the {WORDS[alternative]}: --weights {alternative}"
    if weights:
        return WORDS[weights]
    return "weights as trained" + (" and averaged weights" if checkpoint.tokenizer_ema else " alone")


def is_generator(path: str | Path) -> bool:
    """Whether a checkpoint, a run or an export is a generator's; False where nothing is there."""
    try:
        path = existing_path(path)
    except FileNotFoundError:
        return False
    if path.is_dir():
        return (path / "config.yaml").is_file() and "generator" in Run(path).config
    file = open_tensor_file(path)
    if EXPORT in file.metadata:
        return '"generator"' in file.metadata[EXPORT]
    published = any(key.removeprefix(names.TRANSFORMER) in (TOKENS, PARTS[0]) for key in file.tensors)
    return published or names.is_llamagen(file.tensors)


def _existing_checkpoint(path: str | Path, network: str) -> Path:
    name, path, published = str(path), locate(path), NETWORKS[network]
    if name in published and not path.exists():
        raise FileNotFoundError(
            f"{name} is a published {network} and no file here; fetch it first (ibqlab download {name}), and give the "
            "path that comes back: "
            f'load_{network}(download_published("{name}"))'
        )
    path = existing_path(path, f". `ibqlab download` lists published {network}s")
    if path.is_dir() and (path / "config.json").is_file() and not (path / "config.yaml").exists():
        files = ", ".join(for_terminal(file.name, 60) for file in sorted(path.iterdir())[:6])
        raise CheckpointError(
            f"{path}: a published folder holds config.json and one file of weights ({', '.join(WEIGHT_FILES)}); this "
            f"one holds {files}. Where weights lie in pieces, save them as one: model.save_pretrained(FOLDER, "
            'max_shard_size="1TB")'
        )
    return path


def _read_export(file: TensorFile, network: str) -> Checkpoint:
    other_network = "generator" if network == "tokenizer" else "tokenizer"
    try:
        header = parse_json(file.metadata[EXPORT], "header")
        if other_network in header:
            raise CheckpointError(
                f"{file.path} is a {other_network}'s export, not a {network}'s; use load_{other_network}"
            )
        settings, weights = header[network], header.get("weights")
        require(weights in ((*WEIGHTS, AS_GIVEN) if network == "tokenizer" else (None,)), f"weights {weights!r:.60}")
    except CheckpointError:
        raise
    except (UnreadableFile, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file.path}: its header is damaged ({error}); export it again") from None
    if network == "tokenizer":
        _require_plugins(file.path, header.get("plugins"), settings)
        config = parse(TokenizerConfig, settings, source=f"{file.path}, header")
    else:
        config = generator_config(settings)
    return Checkpoint(
        path=file.path,
        network=network,
        format=f"{SAFETENSORS} exported by ibqlab",
        config=config,
        tensors=file.tensors,
        roles={key: names.TensorRole(network, key) for key in file.tensors},
        reopen=lambda: open_tensor_file(file.path).tensors,
        weights=weights,
    )


def _require_plugins(path: Path, plugins: Any, settings: Any) -> None:
    """Run the plugins that an export needs, where this user has run the same content before; warn of other ones.

    Raises:
        CheckpointError: its quantizer or design is not known here; the message names the plugin.
    """
    if not isinstance(plugins, dict) or not isinstance(settings, dict):
        return
    names_of = {"quantizer": available_quantizers, "autoencoder": available_designs}
    for name, digest in ((str(name), str(digest)) for name, digest in plugins.items()):
        file, short = for_terminal(Path(name).name, 80), for_terminal(digest[:12])
        for part, word in (("quantizer", "name"), ("autoencoder", "design")):
            section = settings.get(part)
            asked = section.get(word) if isinstance(section, dict) else None
            if asked is None or asked in names_of[part]() or import_known(Path(name).name, digest):
                continue
            raise CheckpointError(
                f"{path}: its {part} {for_terminal(asked, 80)!r} is registered by the plugin {file} (sha256 {short}), "
                f"which was not run here; give --plugin {file}, in Python "
                f'ibqlab.training.import_plugins(["{file}"])'
            )
        present = next((one for one in _plugins_of(settings) if one.file_name == Path(name).name), None)
        if present and present.sha256 != digest:
            warnings.warn(
                f"{path} was made with the plugin {file} of sha256 {short}; the one run here has {present.sha256[:12]}",
                stacklevel=2,
            )


def _plugins_of(settings: Mapping[str, Any]) -> list[Plugin]:
    """The plugins that have registered what a tokenizer's settings name."""
    quantizer, design = (settings.get(part, {}) for part in ("quantizer", "autoencoder"))
    found = (plugin_of(quantizer.get("name", "")), plugin_of_design(design.get("design", DEFAULT_DESIGN)))
    return [plugin for plugin in found if plugin]


def _read_run(path: Path, network: str) -> Checkpoint:
    run = Run(path)
    if is_monitored(run.config):
        raise CheckpointError(
            f"{path} is what a monitor wrote of somebody's own model, and holds no weights; load them with the code "
            "that trained it"
        )
    if is_lab(run.config):
        raise CheckpointError(
            f"{path} is a run of the lab, a quantizer alone on features, and keeps no weights; train a tokenizer: "
            "ibqlab train builtin/photos tokenizer.quantizer.name=NAME"
        )
    if network == "tokenizer" and "generator" in run.config:
        raise CheckpointError(f"{path} is a generator's run; its tokenizer is load_first_stage({str(path)!r})")
    if network == "generator" and "generator" not in run.config:
        raise CheckpointError(f"{path} is a tokenizer's run, not a generator's; use load_tokenizer")
    parts = RUN_PARTS[network]
    file, step, state = _last_state(run, parts)
    run_config = TrainConfig if network == "tokenizer" else GeneratorTrainConfig
    config = parse(run_config, run.located_config, source=f"run {run.name}")
    keys = {  # where there is one network, keys are its names
        f"{entry}.{name}" if len(parts) > 1 else name: (entry, name)
        for entry in parts
        for name in state.get(entry) or {}
    }

    def by_key(state: Mapping[str, Any]) -> dict[str, Tensor]:
        return {key: state[entry][name] for key, (entry, name) in keys.items()}

    tensors = by_key(state)
    return Checkpoint(
        path=path,
        network=network,
        format=f"run at step {step}",
        config=getattr(config, network),
        tensors=tensors,
        roles={key: names.TensorRole(parts[entry], name) for key, (entry, name) in keys.items()},
        reopen=(lambda: by_key(load_pickle(file)["state"])) if file else (lambda: tensors),
        entries=tuple(entry for entry in state if entry not in parts),
        ema_decay=(config.ema_decay or None) if network == "tokenizer" else None,
        step=step,
    )


def _last_state(run: Run, parts: Mapping[str, str]) -> tuple[Path | None, int, dict[str, Any]]:
    """File, step and state of a run's last checkpoint; without a file where it is read whole.

    Raises:
        RunError: there is none, or none that can be read.
        CheckpointError: it holds no networks.
    """
    file = run.last_checkpoint
    if file is None and run.status == "finished":
        raise RunError(
            f"the run {run.name} is finished and its checkpoints are gone ({run.path / 'checkpoints'}); put them back "
            "from a copy, or train the run anew in another folder"
        )
    if file is None:
        raise RunError(f"the run {run.name} has no checkpoint yet; let it train to its first one")
    try:
        content = load_pickle(file)
        step, state = int(content["step"]), content["state"]
        if not isinstance(state, dict):
            raise ValueError("no state")
    except (CheckpointError, OSError, LookupError, TypeError, ValueError):
        file = None
        step, state = run.load_checkpoint()  # goes back to the one before with a warning, or says that none is good
    for entry in parts:
        _check_network(file or run.path, state, entry)
    return file, step, state


def _check_network(path: Path, state: Mapping[str, Any], entry: str) -> None:
    """A run's checkpoint holds a network as plain tensors by name; the trained one must be there."""
    network = state.get(entry) or {}
    by_name = isinstance(network, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in network.items()
    )
    if not by_name or (entry == "model" and not network):
        entries = ", ".join(for_terminal(key, 40) for key in [*state][:6]) or "nothing"
        raise CheckpointError(
            f"{path}: a run's checkpoint must hold tensors by name under {entry!r}; its entries are: {entries}. Put "
            "it back from a copy, or delete it to use the one before"
        )
    check_tensors(path, network)
