"""Settings as YAML files: read strictly, written so that every value reads back equal."""

from pathlib import Path
from typing import Any

from ibqlab.base.files import UnreadableFile, read_text
from ibqlab.config.plain_values import to_dict
from ibqlab.config.problems import ConfigError, describe


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: the file.
    Returns:
        Plain dictionaries, lists, numbers, text; 1e-3 is a number.
    Raises:
        ConfigError: no such file, no ordinary file, empty, not YAML, not a mapping, a key given twice, nested too deep,
            or aliases that multiply; the message names the file.
    """
    from ibqlab.config.yaml_rules import read_yaml  # noqa: PLC0415 - heavy

    path = Path(path)
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give the path of a YAML file") from None
    except UnreadableFile as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); give the path of a YAML file") from None
    try:
        content = read_yaml(text)
    except UnreadableFile as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        raise ConfigError(f"{path}: the file is empty; write settings as `key: value`")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold settings as `key: value`; got {describe(content)}")
    return content


def dump_yaml(config: Any) -> str:
    """A config as YAML, keys in the order of its fields; every value reads back equal."""
    from ibqlab.config.yaml_rules import write_yaml  # noqa: PLC0415 - heavy

    return write_yaml(to_dict(config))
