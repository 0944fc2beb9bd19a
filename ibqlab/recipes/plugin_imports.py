"""What may be a plugin: its name, what it imports, and why one could not be run.

A run keeps one file of a plugin, which must do without its neighbours: it is run elsewhere, by a job of a cluster or by
whoever reads the run.
"""

import ast
import re
import sys
import traceback
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from ibqlab.base.files import is_ordinary
from ibqlab.config import ConfigError


def require_name(plugin: str, is_file: bool) -> None:
    """Refuse what is neither a file nor the name of a module.

    Args:
        plugin: as it was typed.
        is_file: whether it reads as a file.
    Raises:
        ConfigError: the rule, what was got, and what to type.
    """
    rule = "plugins: a plugin is a file that ends in .py, or a module"
    if not plugin.strip():
        raise ConfigError(f"{rule}; got an empty name")
    folder = Path(plugin).expanduser()
    is_plain = not any(is_ordinary(file) for file in (f"{plugin}.py", folder / "__init__.py"))  # no module or package
    if folder.is_dir() and (is_file or plugin.strip(".") == "" or (is_plain and not _is_installed(plugin))):
        files = sorted(file.name for file in folder.glob("*.py"))
        raise ConfigError(
            f"{rule}; got the folder {plugin!r}. Give a file in it, such as {folder / (files or ['my.py'])[0]}"
        )
    if not is_file and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", plugin):
        hint = f"the file {plugin}.py" if is_ordinary(f"{plugin}.py") else "my_quantizer.py or package.module"
        raise ConfigError(f"{rule}; got {plugin!r}, which names neither. Give {hint}")
    if not is_file and plugin.partition(".")[0] == "ibqlab":
        raise ConfigError(
            f"{rule} of your own; got {plugin!r}, which is this library: its quantizers are known. Leave it out"
        )


def require_one_file(plugin: str, source: bytes, folder: Path, package: str | None = None) -> None:
    """Refuse code that imports from its own package, or from files that lie beside it or in the current folder and are
    not installed: a run's one copy would lack them.

    Args:
        plugin: its name.
        source: its code; what cannot be parsed is left to whoever runs it.
        folder: that it lies in.
        package: that it is a part of; None: none.
    Raises:
        ConfigError: the first such line, and the remedy.
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            root = name.partition(".")[0]
            beside = _lies_in(root, folder) or _lies_in(root, Path.cwd())
            if root in ("", package) or (beside and not _is_installed(root)):
                raise ConfigError(
                    f"plugin {plugin}: line {node.lineno} imports {name} of the same package or folder. A run "
                    "keeps one file of a plugin, and could not be opened elsewhere; put what it needs into it, or "
                    "into a package of another name that is installed wherever the run is opened"
                )


def _lies_in(root: str, folder: Path) -> bool:
    """Whether a folder has a module or package of this name."""
    if is_ordinary(folder / f"{root}.py"):
        return True
    return is_ordinary(folder / root / "__init__.py") or any((folder / root).glob("*.py"))


def _is_installed(root: str) -> bool:
    """Whether a module is found from any folder: of Python, of a package, or on the path that Python starts with."""
    if root in sys.stdlib_module_names or root == "ibqlab":
        return True
    spec = PathFinder.find_spec(root, [path for path in sys.path if "site-packages" in path or "dist-packages" in path])
    return spec is not None or root in metadata.packages_distributions()


def why_it_failed(error: BaseException, file: str | None) -> str:
    """Why a plugin could not be run: the line in it, and the remedy.

    Args:
        error: what it raised.
        file: of the plugin; None: unknown.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if file and frame.filename == file]
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    place = f" at line {line}" if line else ""
    said = error.msg if isinstance(error, SyntaxError) else error
    text = f"it cannot be run: {type(error).__name__}{place}: {said}".rstrip(": ")
    if isinstance(error, SystemExit):
        text += ". A plugin is imported, and must not end the program; put what a script does under "
        text += 'if __name__ == "__main__":'
    elif isinstance(error, ModuleNotFoundError):
        text += ". A plugin is one file, which a run copies; put what it needs into it, or install that as a package"
    return text
