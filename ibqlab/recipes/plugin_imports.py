"""What a plugin's module imports: a run keeps one file of it, which must do without the others of its package."""

import ast
from pathlib import Path
from types import ModuleType

from ibqlab.base.files import is_ordinary
from ibqlab.config import ConfigError


def require_one_file(plugin: str, source: bytes, module: ModuleType) -> None:
    """Refuse a module that imports from its own package or from files beside it, which a run's one copy would lack.

    Args:
        plugin: the module's name.
        source: its code.
        module: it, imported.
    Raises:
        ConfigError: the first such line, and the remedy.
    """
    package, folder = plugin.partition(".")[0], Path(getattr(module, "__file__", None) or "").parent
    in_package = "." in plugin or hasattr(module, "__path__")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            root = name.partition(".")[0]
            if root in ("", package) if in_package else is_ordinary(folder / f"{root}.py"):
                raise ConfigError(
                    f"plugin {plugin}: line {node.lineno} imports {name} of the same package or folder. A run "
                    "keeps one file of a plugin, and could not be opened elsewhere; put what it needs into it, or "
                    "into a package of another name that is installed wherever the run is opened"
                )
