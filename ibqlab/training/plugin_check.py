"""A run's plugins: whether they are still those that it began with, and whether other processes can find them."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import is_ordinary, read_bytes
from ibqlab.config import ConfigError
from ibqlab.quantizers.assignments import PACKAGE
from ibqlab.quantizers.base import registrations
from ibqlab.quantizers.findings import in_lines, quick_findings
from ibqlab.recipes.plugins import SOURCE_BYTES, Plugin, copy_name, plugin_of
from ibqlab.recipes.tokenizer_config import TrainConfig
from ibqlab.runs import Run, RunError

if TYPE_CHECKING:
    from ibqlab.diagnostics.lab import LabRunConfig


def require_same_plugins(run: Run, plugins: Sequence[Plugin]) -> None:
    """Refuse to continue a run with other code than it began with.

    Args:
        run: before anything of it is changed.
        plugins: as its settings name them now.
    Raises:
        RunError: one has changed, or its copy has; the message gives both hashes and what to type.
    """
    noted = run.provenance.get("plugins")
    noted = noted if isinstance(noted, dict) else {}
    for plugin in plugins:
        copy = run.copy_of(plugin.name)
        if not is_ordinary(copy):
            continue  # other settings, which are refused by name, or a copy that was deleted
        kept = hashlib.sha256(read_bytes(copy, SOURCE_BYTES)).hexdigest()
        began = next((str(digest) for name, digest in noted.items() if run.copy_of(name) == copy), kept)
        if kept != began:
            raise RunError(
                f"{copy} was edited after the run began (sha256 {kept[:12]}, began with {for_terminal(began[:12])}); "
                "nothing was changed. Undo the edit, or choose another folder (--output FOLDER)"
            )
        if plugin.sha256 != kept:
            raise RunError(
                f"{run.path}: the plugin {plugin.name} has changed since the run began (sha256 {kept[:12]}, now "
                f"{plugin.sha256[:12]}); nothing was changed. Restore it (the run keeps it as {copy}), or train a new "
                "run with it: --output FOLDER"
            )


def require_reachable(configs: "Sequence[TrainConfig | LabRunConfig]") -> None:
    """Refuse quantizers that exist in this process alone, before other processes are to train them.

    Args:
        configs: of runs that are to be trained in processes of their own.
    Raises:
        ConfigError: one is registered by a notebook's cell or by a module that no run imports; the message says how to
            carry it.
    """
    for config in configs:
        name = config.tokenizer.quantizer.config_name
        module, plugin = registrations()[name].module, plugin_of(name)
        if module.startswith(PACKAGE) or (plugin and plugin.file_name in map(copy_name, config.plugins)):
            continue
        if module == "__main__":
            home = "this notebook or script alone"
            remedy = "put its class into a file of its own (in a notebook: %%writefile my_quantizer.py above the cell)"
        else:
            home, remedy = f"the module {module}, which they do not import", "name it"
        raise ConfigError(
            f"the runs train in processes of their own, and the quantizer {name!r} is known to {home}: {remedy} and "
            f"give plugins=[{'my_quantizer.py' if module == '__main__' else module}]. In this process alone it trains "
            "with ibqlab.training.train"
        )


_TRIED: set[tuple[str, str]] = set()
"""Quantizers whose rules this process has tried, and the code that registered them."""


def warn_of_broken_rules(configs: "Sequence[Any]") -> None:
    """Say which rules of `quantizers.contract` the users' own quantizers of some runs break, and why that matters.

    Once per process and content of a plugin; training goes on all the same. Runs without a quantizer are passed over.
    Cost: a second on a CPU; five at most.
    """
    for config in configs:
        quantizer = getattr(getattr(config, "tokenizer", None), "quantizer", None)
        name = getattr(quantizer, "config_name", "")
        registration, plugin = registrations().get(name), plugin_of(name)
        code = plugin.sha256 if plugin else str(id(registration))
        if registration is None or registration.module.startswith(PACKAGE) or (name, code) in _TRIED:
            continue
        _TRIED.add((name, code))
        try:
            findings = quick_findings(name)
        except ValueError as error:  # its settings or exemptions are wrong
            warnings.warn(f"the rules of the quantizer {name!r} could not be tried: {error}", stacklevel=2)
            continue
        if findings:
            where = f" --plugin {plugin.name}" if plugin else ""
            warnings.warn(
                f"the quantizer {name!r} breaks rules that every quantizer keeps, and is trained all the same: "
                f"{' '.join(in_lines(findings))}. Look at all of them with: ibqlab check {name}{where}",
                stacklevel=2,
            )
