"""Plugins: files and modules of the user's own that register quantizers, families and designs, run before settings.

    plugins: [my_quantizer.py]        # in a recipe; on the command line --plugin my_quantizer.py

What is unusual: a file is known by its content. It is run once per process and content, under a module name made of its
hash, and what it registered comes back whenever the same content is asked for. So two runs with two versions of a file
can be read side by side, and a run is read with the copy of the file that it keeps. Code that came with a folder, and
that this user has never named, is not run: what was named once is kept in the cache by its hash.
"""

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ibqlab.base.cache import cache_folder
from ibqlab.base.files import RunError, UnreadableFile, is_ordinary, read_bytes, write_whole
from ibqlab.config import ConfigError
from ibqlab.quantizers.base import Registration, registrations, replace_registrations
from ibqlab.recipes import registries
from ibqlab.recipes.plugin_imports import require_name, require_one_file, why_it_failed
from ibqlab.tokenizer.designs import find_design

SEARCHED_FIRST = "IBQLAB_PLUGINS"
"""Environment variable that names a folder whose files are taken before others of the same names, and before modules
whose copies they are: a study's processes, jobs of a cluster among them, run the copies in the study's folder."""
COPIES = "plugins"
"""Folder of a run or a study that keeps the plugins."""
SOURCE_BYTES = 4 * 2**20
"""Largest plugin."""
MODULE = "ibqlab_plugin_"
"""Names of modules made of files begin so, and end with the content's hash."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plugin that this process has run."""

    name: str
    """As settings name it: a path that ends in .py, or a module."""
    source: bytes
    """Its code; b"" of a module that has none in Python."""
    module: str
    """Its key in sys.modules."""

    @property
    def sha256(self) -> str:
        """Of its code, hexadecimal."""
        return hashlib.sha256(self.source).hexdigest()

    @property
    def file_name(self) -> str:
        """The name of its copies: `my_quantizer.py`; of a module `package.module.py`."""
        return copy_name(self.name)


_LOADED: dict[str, Plugin] = {}
"""Plugins that this process has run, by module."""
_REGISTERED: dict[str, dict[str, Registration]] = {}
"""What each of them registered."""
_RUNNING: set[str] = set()
"""Modules of files that are being run."""
_SEARCHED: list[Path] = []
"""Folders that `copies_first` has named, the latest first."""


def copy_name(plugin: str) -> str:
    """The file name of a plugin's copy: the file's own, or the module's with .py behind it."""
    name = Path(plugin).name
    return name if name.endswith(".py") else f"{name}.py"


def import_plugins(plugins: Sequence[str]) -> list[Plugin]:
    """Run plugins, unless this process has run the same content, so that what they register is known by name.

    Args:
        plugins: files, whose names end in .py, and modules. A relative path counts from the current folder.
    Returns:
        Each with its content, in the same order.
    Raises:
        ConfigError: there is no such file or module, it raises, two of them have one file name or register one name, a
            name is taken, or the file came with a folder and was never named by this user. Nothing is registered then.
    """
    before, others = registrations(), registries.snapshot()
    try:
        imported = [_import(plugin) for plugin in plugins]
        _require_distinct(imported)
    except BaseException:
        replace_registrations(before)
        registries.restore(others)
        raise
    return imported


def import_named(settings: Mapping[str, Any]) -> None:
    """Run the plugins that settings name which nobody has checked yet; what is no list of names is left to the check.

    Errors are those of `import_plugins`.
    """
    plugins = settings.get("plugins")
    if isinstance(plugins, (list, tuple)) and all(isinstance(plugin, str) for plugin in plugins):
        import_plugins(plugins)


@contextmanager
def copies_first(folder: Path) -> Iterator[None]:
    """Inside the block files and modules are taken from the copies that a study's folder keeps, where it has them."""
    _SEARCHED.insert(0, folder / COPIES)
    try:
        yield
    finally:
        del _SEARCHED[0]


def allow_plugins(plugins: Sequence[str]) -> None:
    """Note that this user has named these files: copies of them in any run's folder may be run from now on."""
    for plugin in plugins:
        if _is_file(plugin):
            source = _read(_find(plugin))
            _keep(source, hashlib.sha256(source).hexdigest())


def plugin_of(quantizer: str) -> Plugin | None:
    """The plugin that registered a quantizer; None for those of this library and of notebooks' cells."""
    registered = registrations().get(quantizer)
    homes = [module for module, names in _REGISTERED.items() if registered and names.get(quantizer) == registered]
    return _LOADED[homes[-1]] if homes else None


def plugin_of_design(design: str) -> Plugin | None:
    """The same of a design of autoencoders."""
    return _LOADED.get(find_design(design).encoder.__module__)


def registered_by(plugin: Plugin) -> list[str]:
    """Names of the quantizers that a plugin registered, sorted."""
    return sorted(_REGISTERED[plugin.module])


def beside_recipe(plugins: Any, recipe: Path) -> Any:
    """A recipe's plugins as the current folder reaches them.

    A file may lie beside the recipe. A run's config.yaml is a recipe, too: where the file is gone, its copy is taken.

    Args:
        plugins: as the recipe has them; what is no list stays as it is.
        recipe: the recipe's file.
    """
    if not isinstance(plugins, list):
        return plugins

    def reached(plugin: Any) -> Any:
        if not isinstance(plugin, str) or not _is_file(plugin) or os.path.isabs(os.path.expanduser(plugin)):
            return plugin
        beside, copy = recipe.parent / plugin, recipe.parent / COPIES / copy_name(plugin)
        if is_ordinary(plugin) and not is_ordinary(beside):
            return plugin
        return next((str(file) for file in (beside, copy) if is_ordinary(file)), plugin)

    return [reached(plugin) for plugin in plugins]


def plugin_copies(plugins: Sequence[Plugin]) -> dict[str, bytes]:
    """What a run's folder keeps of its plugins: path in the folder → content."""
    return {f"{COPIES}/{plugin.file_name}": plugin.source for plugin in plugins if plugin.source}


def plugin_facts(plugins: Sequence[Plugin]) -> dict[str, str]:
    """What provenance says of plugins: name → sha256."""
    return {plugin.name: plugin.sha256 for plugin in plugins}


# --- one plugin -------------------------------------------------------------------------------------------------------


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py") or os.sep in plugin


def _import(plugin: str) -> Plugin:
    require_name(plugin, _is_file(plugin))
    file = _find(plugin) if _is_file(plugin) else _copy_of(plugin)
    if file is None:
        return _import_module(plugin)
    source = _read(file)
    digest = hashlib.sha256(source).hexdigest()
    module = f"{MODULE}{digest[:32]}"
    if module not in _LOADED:
        _require_allowed(file, source, digest)
        if not _came_along(file):
            require_one_file(plugin, source, file.parent)
        _run(Plugin(name=plugin, source=source, module=module), file)
    else:
        _register_again(module)
    return Plugin(name=plugin, source=source, module=module)


def _copy_of(plugin: str) -> Path | None:
    """A study's copy of a file or module, which goes before what its name leads to; None where no study has one.

    A job of a cluster may start in another folder or late, where the module is missing or has changed since.
    """
    for folder in (*_SEARCHED, os.environ.get(SEARCHED_FIRST)):
        if folder and is_ordinary(Path(folder) / copy_name(plugin)):
            return (Path(folder) / copy_name(plugin)).absolute()
    return None


def _find(plugin: str) -> Path:
    """The file of a plugin."""
    file, copy = Path(plugin).expanduser(), _copy_of(plugin)
    if copy or is_ordinary(file):
        return copy or file.resolve()
    raise ConfigError(
        f"plugins: there is no file {plugin} (from {Path.cwd()}); give its path, or the name of a module without .py"
    )


def _read(file: Path) -> bytes:
    try:
        return read_bytes(file, SOURCE_BYTES)
    except (UnreadableFile, FileNotFoundError) as error:
        raise ConfigError(f"plugin {file}: cannot be read ({error})") from None


def _run(plugin: Plugin, file: Path) -> None:
    """Run a file as a module, and remember what it registers."""
    if plugin.module in _RUNNING:
        raise ConfigError(f"plugin {plugin.name}: it names itself as a plugin while it is run; leave that out")
    spec = importlib.util.spec_from_file_location(plugin.module, file)
    module = importlib.util.module_from_spec(spec)
    _forget_other_versions(plugin)
    before = registrations()
    sys.modules[plugin.module] = module  # dataclasses and pickles look for it there
    _RUNNING.add(plugin.module)
    try:
        exec(compile(plugin.source, str(file), "exec"), module.__dict__)
    except BaseException as error:
        sys.modules.pop(plugin.module, None)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(f"plugin {plugin.name}: {why_it_failed(error, str(file))}") from error
    finally:
        _RUNNING.discard(plugin.module)
    _remember(plugin, before)


def _import_module(name: str) -> Plugin:
    if name in _LOADED:
        _register_again(name)
        return _LOADED[name]
    before = registrations()
    sys.path.insert(0, os.getcwd())  # as for a script that lies here
    try:
        module = importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "") in (name, name.partition(".")[0]):
            hint = f"; did you mean the file {name}.py?" if is_ordinary(f"{name}.py") else ""
            raise ConfigError(
                f"plugins: there is no module {name!r}; install it, or give a file: my.py{hint}"
            ) from None
        spec = importlib.util.find_spec(name) if "." not in name else None
        raise ConfigError(f"plugin {name}: {why_it_failed(error, spec.origin if spec else None)}") from error
    finally:
        sys.path.remove(os.getcwd())
    plugin = Plugin(name=name, source=_source_of(module), module=name)
    try:
        own = name.partition(".")[0] if "." in name or hasattr(module, "__path__") else None
        require_one_file(name, plugin.source, Path(getattr(module, "__file__", None) or "").parent, own)
    except ConfigError:
        replace_registrations(before)
        sys.modules.pop(name, None)  # it is run again once it has been mended
        raise
    _keep(plugin.source, plugin.sha256)  # whoever named the module may run the copies that runs have of it
    _remember(plugin, before)
    return plugin


def _source_of(module: ModuleType) -> bytes:
    file = getattr(module, "__file__", None) or ""
    return _read(Path(file)) if file.endswith(".py") else b""


def _remember(plugin: Plugin, before: Mapping[str, Registration]) -> None:
    registered = {
        name: one
        for name, one in registrations().items()
        if before.get(name) is not one or one.module == plugin.module or one.module.startswith(f"{plugin.module}.")
    }
    _LOADED[plugin.module], _REGISTERED[plugin.module] = plugin, registered
    registries.keep(plugin.module)


def _register_again(module: str) -> None:
    _forget_other_versions(_LOADED[module])
    taken = [name for name, one in registrations().items() if name in _REGISTERED[module] and not _is_plugins(one)]
    if taken:
        raise ConfigError(
            f"plugin {_LOADED[module].name}: a quantizer named {taken[0]!r} exists already; choose another name"
        )
    replace_registrations(registrations() | _REGISTERED[module])
    registries.bring_back(module)


def _is_plugins(registration: Registration) -> bool:
    return any(registration in names.values() for names in _REGISTERED.values())


def _forget_other_versions(plugin: Plugin) -> None:
    """Take back what files of the same name have registered: an edited file replaces what it was, a copy its module."""
    others = [module for module, one in _LOADED.items() if one.file_name == plugin.file_name]
    old = [one for module in others if module != plugin.module for one in _REGISTERED[module].values()]
    replace_registrations({name: one for name, one in registrations().items() if one not in old})
    registries.forget([module for module in others if module != plugin.module])


def _require_distinct(plugins: Sequence[Plugin]) -> None:
    files: dict[str, Plugin] = {}
    names: dict[str, Plugin] = {}
    for plugin in plugins:
        other = files.setdefault(plugin.file_name, plugin)
        if other.module != plugin.module:
            raise ConfigError(
                f"plugins: {other.name} and {plugin.name} have one file name, and a run keeps both; rename one"
            )
        for name in _REGISTERED[plugin.module]:
            first = names.setdefault(name, plugin)
            if first.module != plugin.module:
                raise ConfigError(
                    f"plugins: {first.name} and {plugin.name} both register the quantizer {name!r}; rename one"
                )


# --- code that came with a folder -------------------------------------------------------------------------------------


def import_known(plugin: str, sha256: str) -> bool:
    """Run a plugin that an export names, if this user has run the same content before; whether it was.

    Args:
        plugin: its file name.
        sha256: of its content, hexadecimal.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return False
    try:
        source = read_bytes(_known(sha256), SOURCE_BYTES)
    except (UnreadableFile, FileNotFoundError):
        return False
    if hashlib.sha256(source).hexdigest() != sha256:
        return False
    module = f"{MODULE}{sha256[:32]}"
    if module in _LOADED:
        _register_again(module)
    else:
        _run(Plugin(name=plugin, source=source, module=module), _known(sha256))
    return True


def _require_allowed(file: Path, source: bytes, digest: str) -> None:
    """Refuse to run a file out of a run's or study's folder that this user has never named, and keep the others."""
    first = os.environ.get(SEARCHED_FIRST)
    if not _came_along(file) or (first and file.parent == Path(first)):
        _keep(source, digest)
    elif not is_ordinary(_known(digest)):
        raise ConfigError(
            f"plugin {file}: it lies in the folder of a run or study, and was never used here (sha256 {digest[:12]}); "
            f"code that comes with a folder is not run unasked. Read it, then allow it: ibqlab check --plugin {file}"
        )


def _came_along(file: Path) -> bool:
    """Whether a file lies in the folder of a run or study."""
    return file.parent in [folder.absolute() for folder in _SEARCHED] or any(
        is_ordinary(folder / name) for folder in file.parents[:2] for name in ("provenance.json", "study.json")
    )


def _known(digest: str) -> Path:
    """Where this user's own plugins are kept, by content: what stands here may be run."""
    return cache_folder() / "plugins" / f"{digest}.py"


def _keep(source: bytes, digest: str) -> None:
    file = _known(digest)
    if not file.exists():
        with suppress(OSError, RunError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, source)
