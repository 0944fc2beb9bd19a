"""Settings: typed dataclasses, read once and strictly from YAML, command lines and notebook parameters.

Whatever comes in becomes plain dictionaries first and is then checked against a dataclass (`parse`): an unknown key, a
wrong type or an impossible value is an error that says what to write instead. Start with `checking`, whose
`read_parameters` is the third cell of every notebook; `assignments` reads `key=value`, `plain_values` reads recipes.
"""

from ibqlab.config.assignments import apply_overrides, field_types, read_assigned, split_assignment
from ibqlab.config.checking import check_parameters, completed, parse, read_parameters
from ibqlab.config.plain_values import content_hash, dump_yaml, load_yaml, to_dict
from ibqlab.config.problems import ConfigError, nearest

__all__ = [
    "ConfigError",
    "apply_overrides",
    "check_parameters",
    "completed",
    "content_hash",
    "dump_yaml",
    "field_types",
    "load_yaml",
    "nearest",
    "parse",
    "read_assigned",
    "read_parameters",
    "split_assignment",
    "to_dict",
]
